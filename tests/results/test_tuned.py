"""The table of tuned methods: what its seconds and its choice mean, by hand."""

import pandas as pd
import pytest

from kdsweep.core.errors import InputError
from kdsweep.results import plots, tuned


def trial(notation, number, dice, *, size=2, seconds=1.0, **about):
    state = {"state": "COMPLETE", "is_chosen": False, "value": max(dice), "params": {}, "split": 0, "role": "baseline"}
    own = {"notation": notation, "number": number, "round": number // size, "dice": dice}
    return {**state, **own, "seconds": [seconds] * len(dice), **about}


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
    found = tuned.best_by_seconds(trials)
    own = found[found["notation"] == "A"]
    assert list(own["seconds"]) == [2, 4, 6, 8]  # epochs 1 and 2 of both trials of the first round, then of the second
    assert list(own["best_dice"]) == [0.2, 0.3, 0.5, 0.6]
    other = found[found["notation"] == "B"]
    assert list(other["seconds"]) == [4, 6, 10, 12]  # a pruned trial costs what it has taken
    assert list(other["best_dice"]) == [0.3, 0.4, 0.4, 0.4]


def test_equal_seconds_are_those_of_the_cheapest_method(trials):
    progress = tuned.best_by_seconds(trials)
    assert tuned.equal_seconds(progress) == 8
    other = progress[progress["notation"] == "B"]
    assert tuned._at(other, seconds=8) == {"equal_dice_percent": pytest.approx(40)}
    assert pd.isna(tuned._at(other, seconds=3)["equal_dice_percent"])  # before its first epoch


def test_what_a_row_says_of_its_trials(trials):
    found = tuned._tried(trials[trials["notation"] == "B"])
    assert found["trials"] == 4
    assert found["pruned"] == 0.5
    assert found["failed"] == 0.25
    assert found["seconds"] == 12
    assert found["val_dice_percent"] == pytest.approx(40)
    assert found["chosen"] == "split 0: as configured"
    assert tuned._tried(trials[trials["notation"] == "A"])["chosen"] == "split 0: train.lr=0.00123"


def test_seconds_of_several_splits_are_a_mean(trials):
    second = trials.assign(split=1, seconds=trials["seconds"].map(lambda own: [3 * s for s in own]))
    found = tuned._tried(pd.concat([trials, second])[lambda table: table["notation"] == "A"])
    assert found["seconds"] == (8 + 24) / 2


def test_a_figure_has_a_panel_for_each_method(trials):
    figure = plots.tuning_plot(progress=tuned.best_by_seconds(trials), title="A title")
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.axison] == ["A", "B"]
    with pytest.raises(InputError, match="no trial of this sweep has ended yet"):
        plots.tuning_plot(progress=tuned.best_by_seconds(trials.iloc[:0]), title="A title")
