"""Students of several sizes: fronts by hand, costs of the right network, differences to the Student of that size."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from test_tables import run_row, score_rows, shown, sweep_of

from kdsweep.core.errors import InputError
from kdsweep.evaluation import costs
from kdsweep.results.figures import capacity as drawing
from kdsweep.results.figures import style
from kdsweep.results.table import Options
from kdsweep.results.tables import capacity, table4

STUDENTS = {"large": ("resnet18", 3.0), "small": ("mobilenetv3_small_trimmed", 1.0)}
COST = {"macs": 5, "cpu_1_thread_p95_ms": 9.0}


@pytest.fixture
def sweep():
    runs, scores = [], []
    for number, (student, (encoder, _)) in enumerate(STUDENTS.items()):
        params = {"image_size": "64", "student.encoder": encoder, "student.decoder_channels": "[80, 40, 24, 16, 16]"}
        for name in ("Student", "L_MSE"):
            for split in (0, 1, 2):
                row = run_row(name, split, params=params, variant={"student": student}, teacher="")
                runs.append(row | {"fingerprint": f"{row['fingerprint']}-{student}"})
                table = score_rows(name, split)
                scores.append(table.assign(fingerprint=runs[-1]["fingerprint"], dice=table["dice"] + 0.1 * number))
    return replace(sweep_of(), runs=pd.DataFrame(runs), scores=pd.concat(scores), varied=("student",))


@pytest.fixture
def table(sweep, monkeypatch):
    by_encoder = dict(STUDENTS.values())

    def measure(network, *, repeats, **_):
        cost = by_encoder[network.name]
        return {"parameters": int(1e6 * cost), "cpu_1_thread_median_ms": 10 / cost, **COST}

    monkeypatch.setattr(costs, "measure", measure)
    return capacity.make(sweep, Options(Path())).frame


def test_each_row_has_the_cost_of_its_student_and_the_difference_to_the_plain_one(table):
    assert table["settings"].tolist() == ["student=small", "student=small", "student=large", "student=large"]
    assert table["parameters"].tolist() == [1_000_000] * 2 + [3_000_000] * 2
    cells = table[table["notation"] == "L_MSE"]
    expected = 100 * (pd.concat([score_rows("L_MSE", k) for k in range(3)])["dice"].mean())
    expected -= 100 * (pd.concat([score_rows("Student", k) for k in range(3)])["dice"].mean())
    assert cells["difference_points"].tolist() == pytest.approx([expected] * 2)
    assert table.loc[table["notation"] == "Student", "difference_points"].isna().all()


def test_the_fronts(table):
    """The small one scores higher, so that it is on both fronts until its latency is the higher one."""
    at = table.set_index(["settings", "notation"])
    assert at.loc[("student=small", "L_MSE"), ["on_parameters_front", "on_latency_front"]].tolist() == [True, True]
    assert at.loc[("student=large", "L_MSE"), ["on_parameters_front", "on_latency_front"]].tolist() == [False, True]
    assert not at.loc[("student=small", "Student"), "on_parameters_front"]


def test_a_front_by_hand():
    cost, gain = pd.Series([1, 2, 2, 3, 4, 4]), pd.Series([5, 4, 6, 6, 9, float("nan")])
    assert capacity.on_front(cost, gain).tolist() == [True, False, True, False, True, False]
    assert capacity.on_front(pd.Series([1, 1]), pd.Series([5, 5])).tolist() == [True, True]


def test_the_figure_has_a_line_per_model_and_the_fronts(table):
    figure = drawing.figure(table, title="Size")
    for axes, column in zip(figure.axes, ("parameters", "latency"), strict=True):
        front, student, cell = axes.lines
        there = table[table[f"on_{column}_front"]]
        assert sorted(front.get_ydata()) == sorted(there["mean_dice_percent"])
        assert sorted(student.get_ydata()) == sorted(table.loc[table["notation"] == "Student", "mean_dice_percent"])
        assert sorted(cell.get_ydata()) == sorted(table.loc[table["notation"] == "L_MSE", "mean_dice_percent"])
    assert figure.axes[0].get_xscale() == "log"
    assert style.render(figure, "svg") == style.render(drawing.figure(table, title="Size"), "svg")
    with pytest.raises(InputError, match="no Student of this sweep is finished"):
        drawing.figure(table.assign(mean_dice_percent=float("nan")), title="")


def test_a_sweep_with_one_student_is_refused():
    params = {"image_size": "64", "student.encoder": "resnet18", "student.decoder_channels": "[8, 8, 8, 8, 8]"}
    one = sweep_of(("Student", "L_MSE"))
    one = replace(one, runs=one.runs.assign(params=[params] * len(one.runs)))
    with pytest.raises(InputError, match=r"has one Student: student=NAME,NAME compares several"):
        capacity.numbers(one, scores=table4.numbers(one))
    assert not capacity.applies(one)


def test_the_text(table):
    text = shown(capacity, table)
    assert text["Parameters (M)"].tolist() == ["1.00", "1.00", "3.00", "3.00"]
    assert text["Pareto front"].iloc[1] == "parameters and latency"
