"""The table of tuned methods: what its seconds and its choice mean, by hand."""

from dataclasses import replace

import pandas as pd
import pytest
from test_tables import sweep_of

from kdsweep.core.errors import InputError
from kdsweep.results.figures import tuning
from kdsweep.results.tables import tuned
from kdsweep.store import sweep_file


def trial(notation, number, dice, *, size=2, seconds=1.0, **about):
    state = {"state": "COMPLETE", "is_chosen": False, "value": max(dice), "params": {}, "split": 0, "role": "baseline"}
    row = {"notation": notation, "number": number, "round": number // size, "dice": dice}
    return {**state, **row, "seconds": [seconds] * len(dice), **about}


@pytest.fixture
def trials():
    """Two methods of four trials, two of them side by side; of the second method two are pruned after one epoch."""
    rows = [
        trial("A", 0, [0.1, 0.3]),
        trial("A", 1, [0.2, 0.2], is_chosen=True, params={"train.lr": 0.00123456}),
        trial("A", 2, [0.5, 0.1]),
        trial("A", 3, [0.0, 0.6]),
        trial("B", 0, [0.3, 0.4], seconds=2.0, is_chosen=True),
        trial("B", 1, [0.1], seconds=2.0, state="PRUNED", value=None),
        trial("B", 2, [0.2], seconds=2.0, state="PRUNED", value=None),
        trial("B", 3, [0.0, 0.1], seconds=2.0, state="FAIL", value=None),
    ]
    return pd.DataFrame(rows)


def test_trials_of_a_round_advance_side_by_side_and_their_seconds_add_up(trials):
    curves = tuned.best_by_seconds(trials)
    of_a = curves[curves["notation"] == "A"]
    assert list(of_a["seconds"]) == [2, 4, 6, 8]  # epochs 1 and 2 of both trials of the first round, then of the second
    assert list(of_a["best_dice"]) == [0.2, 0.3, 0.5, 0.6]
    other = curves[curves["notation"] == "B"]
    assert list(other["seconds"]) == [4, 6, 10, 12]  # a pruned trial costs what it has taken
    assert list(other["best_dice"]) == [0.3, 0.4, 0.4, 0.4]


def test_equal_seconds_are_those_of_the_cheapest_method(trials):
    progress = tuned.best_by_seconds(trials)
    assert tuned.equal_seconds(progress) == 8
    other = progress[progress["notation"] == "B"]
    assert tuned._at(other, seconds=8) == {"equal_dice_percent": pytest.approx(40)}
    assert pd.isna(tuned._at(other, seconds=3)["equal_dice_percent"])  # before its first epoch


def test_what_a_row_says_of_its_trials(trials):
    row = tuned._tried(trials[trials["notation"] == "B"])
    assert row["trials"] == 4
    assert row["pruned"] == 0.5
    assert row["failed"] == 0.25
    assert row["seconds"] == 12
    assert row["val_dice_percent"] == pytest.approx(40)
    assert row["chosen"] == "split 0: as configured"
    assert tuned._tried(trials[trials["notation"] == "A"])["chosen"] == "split 0: train.lr=0.00123"


def test_seconds_of_several_splits_are_a_mean(trials):
    second = trials.assign(split=1, seconds=trials["seconds"].map(lambda seconds: [3 * s for s in seconds]))
    row = tuned._tried(pd.concat([trials, second])[lambda table: table["notation"] == "A"])
    assert row["seconds"] == (8 + 24) / 2


def test_a_figure_has_a_panel_for_each_method(trials):
    figure = tuning.figure(tuned.best_by_seconds(trials), title="A title")
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.axison] == ["A", "B"]
    with pytest.raises(InputError, match="no trial of this sweep has ended yet"):
        tuning.figure(tuned.best_by_seconds(trials.iloc[:0]), title="A title")


def test_a_method_that_stays_as_configured_is_not_tested(trials):
    """Its networks are the same: a p of 1 would count in Holm's family, a power of 0 points in the median."""
    before = sweep_of(("Teacher", "Student", "L_MSE"), seeds=(0, 1))
    runs, scores = before.runs.copy(), before.scores.copy()
    ours = scores["fingerprint"].str.startswith("L_MSE")
    noise = pd.Series(range(len(scores))) % 7 / 100
    scores = scores.assign(dice=scores["dice"].where(~ours, scores["dice"] * (0.9 + noise)))
    for table in (runs, scores):
        table["fingerprint"] = table["fingerprint"].str.replace("L_MSE", "L_MSE-of-another-rate")
    tuning = tuned.Tuning(before, replace(before, runs=runs, scores=scores), trials)
    table = tuned.numbers(tuning).set_index("notation")
    assert table.loc["Student", "difference_points"] == 0
    assert table.loc["Student", ["p", "p_holm", "p_methods", "detectable_points"]].isna().all()
    assert table.loc["L_MSE", "p_holm"] == table.loc["L_MSE", "p"]  # a family of one
    assert table.loc["L_MSE", "difference_points"] < 0
    notes = tuned.footnotes(tuning, table.reset_index(), test="ttest")
    assert any(note.startswith("A difference of 0 without p") for note in notes)
    assert not any("differences from 0.0 points" in note for note in notes)
    (line,) = tuned.sentences(table.reset_index())
    assert line.startswith("These methods: L_MSE tuned: ")
    assert "Student" not in line


def test_a_sweep_may_be_named_as_one_with_chosen_settings(tmp_path):
    sweep_file.add(tmp_path, "busi-tuned", cells=[], teachers=[], storage="sqlite://")
    assert sweep_file.as_configured(tmp_path, "busi-tuned") == "busi-tuned"
    assert sweep_file.as_configured(tmp_path, "busi-tuned-tuned") == "busi-tuned"
    sweep = sweep_of(("Teacher", "Student"))
    assert not tuned.applies(replace(sweep, name="busi-tuned"), store=tmp_path)
    assert tuned.applies(replace(sweep, name="busi-tuned-tuned"), store=tmp_path)
