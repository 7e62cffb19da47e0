"""Studies: what is proposed follows from what has ended; what is kept; what is chosen."""

import pytest

from kdsweep.core.errors import InputError
from kdsweep.tuning import space
from kdsweep.tuning.book import Entry
from kdsweep.tuning.pruning import Curve
from kdsweep.tuning.study import Outcome, Study, read_trials

SEARCH = {"train.lr": {"log": [1e-4, 1e-2]}, "kd.weight": {"range": [0.1, 0.9]}, "kd.temperature": [1, 2, 4]}
LISTS = {"train.lr": [1e-4, 1e-3], "kd.temperature": [1, 2]}
DEFAULTS = {"train.lr": 1e-3, "kd.weight": "matched", "kd.temperature": 1}
TPE = {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 4, "seed": 3}
QMC = {"_target_": "optuna.samplers.QMCSampler", "scramble": True}


def study(tmp_path, *, search=SEARCH, name="sweep/L_KLD/split0/0", **about):
    own = space.read(search)
    told = {"round": "4", "sampler": "{}", **about}
    return Study(storage=f"sqlite:///{tmp_path}/optuna.db", name=name, space=own, defaults=DEFAULTS, about=told)


def run(own, sampler, *, rounds, size=4, stop_after=None):
    """Ask and tell; a trial's Dice is near 1 where the learning rate is near 1e-3."""
    for first in range(0, rounds * size, size):
        proposals = own.propose(sampler, first=first, count=size)
        for proposal in proposals[len(own.trials) - first :]:
            if stop_after is not None and len(own.trials) == stop_after:
                return
            value = 1 - abs(proposal.values["train.lr"] - 1e-3)
            own.add(proposal, Outcome(Curve("COMPLETE", (0.1, value)), (1.0, 2.0), value))


def values(own):
    return [trial.params for trial in own.trials]


@pytest.mark.parametrize("sampler", [{}, TPE, QMC], ids=["default", "tpe", "qmc"])
@pytest.mark.parametrize("stop_after", [2, 4, 7])
def test_a_killed_command_proposes_the_same_trials_again(tmp_path, sampler, stop_after):
    whole = study(tmp_path, name="whole")
    run(whole, sampler, rounds=3)
    run(study(tmp_path, name="broken"), sampler, rounds=3, stop_after=stop_after)
    again = study(tmp_path, name="broken")
    assert len(again.trials) == stop_after
    for first in range(stop_after // 4 * 4, 12, 4):  # from the round that was not ended on
        proposals = again.propose(sampler, first=first, count=4)
        for proposal in proposals[len(again.trials) - first :]:
            value = 1 - abs(proposal.values["train.lr"] - 1e-3)
            again.add(proposal, Outcome(Curve("COMPLETE", (0.1, value)), (1.0, 2.0), value))
    assert values(again) == values(whole)


def test_trial_0_has_the_configured_settings(tmp_path):
    (first,) = study(tmp_path).propose({}, first=0, count=1)
    assert first.values == {"train.lr": 1e-3, "kd.temperature": 1}  # kd.weight=matched is no number of the range


def test_proposals_lie_in_the_space_and_differ(tmp_path):
    proposals = study(tmp_path).propose({}, first=0, count=8)[1:]
    own = space.read(SEARCH)
    assert all(space.contains(own[key], value) for one in proposals for key, value in one.values.items())
    assert len({one.values["train.lr"] for one in proposals}) == 7


def test_methods_with_equal_keys_get_equal_first_values(tmp_path):
    """Before a sampler has learned anything, no method is luckier than another."""
    one = study(tmp_path, name="one").propose({}, first=0, count=5)
    other = study(tmp_path, name="other").propose({}, first=0, count=5)
    assert [own.values for own in one] == [own.values for own in other]


def test_tpe_learns_from_what_has_ended(tmp_path):
    own = study(tmp_path)
    run(own, TPE, rounds=6)
    errors = [abs(trial.params["train.lr"] - 1e-3) for trial in own.trials]
    assert sum(errors[12:]) < sum(errors[:12])


def test_qmc_covers_a_range_evenly(tmp_path):
    """Eight points of a Sobol sequence: two in each quarter of a range (Sobol 1967); of seed, not of chance."""
    own = study(tmp_path, search={"kd.weight": {"range": [0.0, 1.0]}})
    drawn = [one.values["kd.weight"] for one in own.propose(QMC, first=0, count=9)[1:]]
    assert [sum(low <= value < low + 0.25 for value in drawn) for low in (0, 0.25, 0.5, 0.75)] == [2, 2, 2, 2]


def test_the_grid_is_covered(tmp_path):
    own = study(tmp_path, search=LISTS)
    grid = {"_target_": "optuna.samplers.GridSampler"}
    drawn = {tuple(sorted(one.values.items())) for one in own.propose(grid, first=0, count=5)}
    assert len(drawn) == 4


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        ({"_target_": "optuna.samplers.GridSampler"}, "train.lr is a range, and GridSampler takes lists of values"),
        ({"_target_": "optuna.samplers.Nothing"}, "Nothing"),
        ({"_target_": "optuna.pruners.NopPruner"}, "is not one of optuna.samplers"),
        ({"_target_": "optuna.samplers.TPESampler", "wrong": 1}, "wrong"),
        ({"_target_": "optuna.samplers.BruteForceSampler"}, "hydra.sweeper.sampler: "),
    ],
)
def test_a_sampler_that_is_none_is_told_in_one_line(tmp_path, sampler, told):
    with pytest.raises(InputError, match=told) as error:
        study(tmp_path).propose(sampler, first=0, count=2)
    assert "\n" not in str(error.value)


def test_a_storage_with_another_space_or_protocol_is_refused(tmp_path):
    study(tmp_path)
    with pytest.raises(InputError, match=r"has trials with another space .* give another sweep_name"):
        study(tmp_path, search=LISTS)
    with pytest.raises(InputError, match=r"has trials with another round \(4, now 8\)"):
        study(tmp_path, round="8")


def test_a_storage_that_cannot_be_opened_is_told_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"hydra\.sweeper\.storage=sqlite:.* cannot be opened") as error:
        Study(storage=f"sqlite:///{tmp_path}/no/such/folder.db", name="a", space={}, defaults={}, about={})
    assert "\n" not in str(error.value)


def test_the_first_of_the_best_complete_trials_is_chosen(tmp_path):
    own = study(tmp_path)
    states = [("COMPLETE", 0.5), ("PRUNED", None), ("COMPLETE", 0.7), ("COMPLETE", 0.7), ("FAIL", None)]
    for proposal, (state, value) in zip(own.propose({}, first=0, count=5), states, strict=True):
        own.add(proposal, Outcome(Curve(state, (0.9,) if state == "PRUNED" else (0.1, 0.2)), value=value))
    best = own.best()
    assert best is not None
    assert best.number == 2


def test_what_is_kept_of_a_trial_can_be_read_back(tmp_path):
    own = study(tmp_path)
    for proposal in own.propose({}, first=0, count=6):
        state = "PRUNED" if proposal.number == 1 else "COMPLETE"
        own.add(proposal, Outcome(Curve(state, (0.1, 0.4)), (1.5, 2.5), None if state == "PRUNED" else 0.4))
    entry = Entry(own.name, "L_KLD", 0, "distilled", 6)
    absent = Entry("absent", "Student", 0, "baseline", 6)
    found = read_trials(f"sqlite:///{tmp_path}/optuna.db", {own.name: entry, "absent": absent})
    assert list(found["round"]) == [0, 0, 0, 0, 1, 1]
    assert list(found["state"]) == ["COMPLETE", "PRUNED", *["COMPLETE"] * 4]
    assert list(found["is_chosen"]) == [True, *[False] * 5]
    assert found["dice"][0] == [0.1, 0.4]
    assert found["seconds"][0] == [1.5, 2.5]
    assert set(found["notation"]) == {"L_KLD"}
