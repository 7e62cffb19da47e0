"""Table 5: counts are computed a second time by hooks and by hand, durations with a clock made here."""

import ast
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from small import unet
from test_tables import ALL, FakeSweep, changed, run_row, score_rows, shown, sweep_of, with_status, without
from torch import nn

from kdsweep.core.device import usable_cores
from kdsweep.evaluation import costs
from kdsweep.results import paper
from kdsweep.results.tables import table4, table5

DASH = "\N{EN DASH}"
QUICK = {
    "image_size": "64",
    "student.encoder": "mobilenetv3_small_trimmed",
    "student.decoder_channels": "[80, 40, 24, 16, 16]",
    "teacher.encoder": "resnet18",
    "teacher.decoder_channels": "[256, 128, 64, 32, 16]",
}


def quick(sweep):
    runs = sweep.runs
    dice = [(0.5 + 0.01 * ALL.index(notation)) for notation in runs["notation"]]  # on validation images
    return changed(sweep, profile="quick", params=[QUICK if params else {} for params in runs["params"]], val_dice=dice)


def made(sweep, store, repeats=3):
    scores = table4.numbers(sweep)
    return table5.numbers(sweep, store=store, scores=scores, repeats=repeats), scores


def row(table, kind):
    return table.set_index("kind").loc[kind]


def macs_by_hooks(network, size):
    """Sum over convolutions of output pixels times output channels times input channels of a group times kernel."""
    total = 0

    def count(layer, _, output):
        nonlocal total
        total += output.numel() * layer.in_channels // layer.groups * math.prod(layer.kernel_size)

    for layer in network.modules():
        assert not isinstance(layer, nn.Linear | nn.ConvTranspose2d)
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    return total


@pytest.fixture(scope="module")
def sweep():
    return quick(sweep_of(splits=(0, 1)))


@pytest.fixture(scope="module")
def store(tmp_path_factory, sweep):
    store = tmp_path_factory.mktemp("store")
    for run in sweep.runs.to_dict("records"):
        parent, name = ("teachers", "teacher") if run["role"] == "teacher" else ("cells", "student")
        folder = store / parent / f"{run['notation']}-split{run['split']}-seed0-{run['fingerprint'][:10]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.safetensors").write_bytes(bytes(5_000 if name == "teacher" else 2_000))
    return store


@pytest.fixture(scope="module")
def table(sweep, store):
    return made(sweep, store)[0]


# ---- what is measured ----------------------------------------------------------------------------------------------


def test_rows_are_teacher_student_best_cell_and_the_published(table):
    assert table["kind"].tolist()[:3] == ["teacher", "student", "best cell"]
    assert set(table["kind"][3:]) == {"published"}
    # Validation Dice rises down the rows.
    assert table["notation"].tolist() == ["Teacher", "Student", ALL[-1], *paper.PUBLISHED]


def test_parameters_are_those_of_torch_and_of_smp(table):
    teacher = smp.Unet("resnet18", encoder_weights=None, decoder_channels=[256, 128, 64, 32, 16], classes=1)
    assert row(table, "teacher")["parameters"] == sum(tensor.numel() for tensor in teacher.parameters())
    assert row(table, "student")["parameters"] == row(table, "best cell")["parameters"] == 820_385


@pytest.mark.parametrize(("kind", "group"), [("teacher", "teacher"), ("student", "student")])
def test_macs_are_those_of_the_convolutions(table, kind, group):
    channels = json.loads(QUICK[f"{group}.decoder_channels"])
    network = unet(encoder=QUICK[f"{group}.encoder"], decoder_channels=channels, weights="none", seed=1)
    assert row(table, kind)["image_size"] == 64
    # beyond the convolutions the counter sees nothing but what squeeze-and-excitation does, also convolutions
    assert row(table, kind)["macs"] == macs_by_hooks(network, 64)


def test_dice_and_the_papers_stand_beside(sweep, table):
    scores = table4.numbers(sweep).set_index("notation")
    for kind, notation in {"teacher": "Teacher", "student": "Student", "best cell": ALL[-1]}.items():
        assert row(table, kind)["mean_dice_percent"] == scores.loc[notation, "mean_dice_percent"]
        assert row(table, kind)["published_dice_percent"] == paper.PAPER[notation][0]
    assert table["published_parameters_millions"].tolist() == [96, 0.82, 0.82, 0.82, 20.5, 2.34, 26.63, 7.7, 2.2]
    assert table["published_dice_percent"].tolist()[3:] == [80, 84, 85, 90, 89, 88.40]
    assert table["published_gflops"].dropna().tolist() == [16.59]


def test_files_are_weighed_where_they_lie(sweep, table, tmp_path):
    assert table["file_mb"].tolist()[:3] == [0.005, 0.002, 0.002]
    assert table5.numbers(sweep, store=tmp_path, scores=table4.numbers(sweep), repeats=1)["file_mb"].isna().all()


def test_every_cost_is_a_measured_one(sweep, store, monkeypatch):
    order = {"resnet18": 1, "mobilenetv3_small_trimmed": 2}

    def measure(network, *, repeats, **_):
        assert repeats == 7
        return {name: 100.0 * order[network.name] + i for i, name in enumerate(names)}

    names = ["parameters", "macs", *(f"{name}_{part}_ms" for name in table5.TIMINGS for part in ("median", "p95"))]
    monkeypatch.setattr(costs, "measure", measure)
    table, _ = made(sweep, store, repeats=7)
    for i, name in enumerate(names):
        assert table[name].tolist()[:3] == [100 + i, 200 + i, 200 + i]
        assert table[name][3:].isna().all()


@pytest.mark.parametrize("module", [costs, table5], ids=lambda module: module.__name__.rpartition(".")[2])
def test_no_cost_is_typed_in(module):
    """Every number beside the published ones is an index, a unit, a percentile or a count of passes."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    exempt = ("PUBLISHED", "PAPER_PARAMETERS_MILLIONS")
    body = [
        node
        for node in ast.parse(source).body
        if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in exempt)
    ]
    numbers = {
        node.value
        for part in body
        for node in ast.walk(part)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool)
    }
    assert numbers <= {0, 1, 2, 3, 10, 50, 95, 100, 1000, 1e6, 1e9}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_timed_where_there_is_one(table):
    assert (table["cuda_median_ms"][:3] > 0).all()
    assert "CUDA (ms)" in shown(table5, table)


# ---- the best cell, gaps -------------------------------------------------------------------------------------------


def test_the_best_is_a_whole_cell_and_the_first_name_of_equals(sweep):
    names = ["Teacher", "Teacher_WAug", "Student", "L_KLD", "H_MSE", "L_MSE", "mine_KLD"]
    dice = [99.0, 98.0, 97.0, 80.0, 80.0, float("nan"), 70.0]
    gap = ["", "", "", "", "", "failed: split 1", ""]
    scores = pd.DataFrame({"notation": names, "mean_val_dice_percent": dice, "gap": gap})
    assert table4.ranked(scores)["notation"].tolist() == ["H_MSE", "L_KLD", "mine_KLD"]
    failed = with_status(sweep, ALL[-1], 1, "FAILED")
    assert table4.ranked(table4.numbers(failed))["notation"].iloc[0] == ALL[-2]


def test_no_student_is_a_gap_with_its_reason(sweep, tmp_path):
    sweep = without(sweep, "Student")
    table, scores = made(sweep, tmp_path)
    student = row(table, "student")
    assert student["gap"] == "not run"
    assert student[["parameters", "macs", "cpu_1_thread_median_ms", "mean_dice_percent"]].isna().all()
    assert shown(table5, table).set_index("Model").loc["Student", "DSC %"] == f"{DASH} (not run)"
    assert "Gaps, never averaged over fewer runs: Student (not run)." in table5.footnotes(sweep, table, scores=scores)


def test_an_unfinished_teacher_has_costs_and_no_dice(sweep, tmp_path):
    teacher = row(made(with_status(sweep, "Teacher", 1, "FAILED"), tmp_path)[0], "teacher")
    assert teacher["gap"] == "failed: split 1"
    assert teacher["parameters"] > 1e6
    assert math.isnan(teacher["mean_dice_percent"])


def test_no_finished_cell_is_a_gap(tmp_path):
    sweep = quick(sweep_of(("Teacher", "Student"), splits=(0,)))
    table, scores = made(sweep, tmp_path)
    assert row(table, "best cell")["gap"] == "no finished cell"
    text = shown(table5, table).set_index("Model")
    assert text.loc["best cell", "DSC %"] == f"{DASH} (no finished cell)"
    assert text.loc["best cell", "Parameters (M)"] == text.loc["best cell", "CPU, 1 thread (ms)"] == DASH
    assert not any("Best cell" in note for note in table5.footnotes(sweep, table, scores=scores))


def test_a_run_that_never_started_tells_of_no_network(tmp_path):
    sweep = quick(with_status(sweep_of(("Teacher", "Student"), splits=(0,)), "Student", 0, "missing"))
    student = row(made(sweep, tmp_path)[0], "student")
    assert student["gap"] == "missing: split 0"
    assert pd.isna(student["parameters"])


def test_with_weak_teachers_alone_the_row_is_theirs(tmp_path):
    runs = pd.DataFrame([run_row(name, 0, params=QUICK) for name in ("Teacher_WAug", "Student", "L_KLD_WAug")])
    scores = pd.concat([score_rows(name, 0) for name in runs["notation"]], ignore_index=True)
    table, _ = made(FakeSweep("study", runs, scores), tmp_path)
    assert table["notation"].tolist()[:3] == ["Teacher_WAug", "Student", "L_KLD_WAug"]
    assert (table["gap"] == "").all()


# ---- text ----------------------------------------------------------------------------------------------------------


def test_text_of_known_numbers(table):
    published = table.assign(
        parameters=[95_755_409, *table["parameters"][1:]],
        macs=[20_474_000_000, *table["macs"][1:]],
        cpu_1_thread_median_ms=[412.34, 9.876, *table["cpu_1_thread_median_ms"][2:]],
        cpu_1_thread_p95_ms=[450.0, 12.0, *table["cpu_1_thread_p95_ms"][2:]],
        cuda_median_ms=float("nan"),
    )
    text = shown(table5, published).set_index("Model")
    assert "CUDA (ms)" not in text
    teacher = text.loc["Teacher"]
    assert teacher[["Parameters (M)", "MACs (G)", "CPU, 1 thread (ms)"]].tolist() == ["95.76", "20.47", "412.3 (450.0)"]
    assert text.loc["Student", "CPU, 1 thread (ms)"] == "9.88 (12.00)"
    assert text.loc[f"{ALL[-1]} (best cell)", "Parameters (M)"] == "0.82"
    other = text.loc["dual-teacher Attention U-Net"]
    assert other.tolist() == [*[DASH] * 6, "2.2", "16.59", "88.4"]
    with_cuda = shown(table5, published.assign(cuda_median_ms=1.5, cuda_p95_ms=2.0))
    assert with_cuda["CUDA (ms)"].tolist() == ["1.50 (2.00)"] * len(table)
    assert all(isinstance(value, str) for value in text.to_numpy().ravel())


def test_notes_tell_machine_conditions_and_sources(sweep, table):
    notes = "\n".join(table5.footnotes(sweep, table, scores=table4.numbers(sweep), repeats=3))
    for part in (
        *(costs.cpu_name(), f"1 thread and {usable_cores()} threads", torch.__version__, "64 x 64"),
        *("batch of 1", "3 forward passes after 5", "profile quick, data busi", "not a result"),
        *(
            "Best cell: chosen of 12 finished ones by its mean DSC on the validation images",
            "10.36922/aih.3509",
            "10.7507/1001-5515.202311054",
        ),
        *("Other networks, hardware", "Titan Xp"),
    ):
        assert part in notes, part


def test_a_run_that_records_a_part_of_its_network_has_no_costs():
    params = {key: QUICK[key] for key in ("student.encoder", "student.decoder_channels")} | {"image_size": "64"}
    for absent in ("student.decoder_channels", "image_size"):
        part = {key: value for key, value in params.items() if key != absent}
        assert table5.network_of(pd.DataFrame({"params": [part]}), group="student") is None
        network = table5.network_of(pd.DataFrame({"params": [part, params]}), group="student")
        assert (network.name, network.image_size) == (QUICK["student.encoder"], 64)
