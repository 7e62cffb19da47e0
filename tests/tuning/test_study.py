"""Studies: what is asked for follows from what has ended; what is kept; what is chosen."""

import optuna
import pytest
from optuna.trial import TrialState

from kdsweep.core.errors import InputError
from kdsweep.tuning import pruning, space
from kdsweep.tuning.study import Study, one_row_each, planned, read_studies, read_trials

SEARCH = {"train.lr": {"log": [1e-4, 1e-2]}, "kd.weight": {"range": [0.1, 0.9]}, "kd.temperature": [1, 2, 4]}
LISTS = {"train.lr": [1e-4, 1e-3], "kd.temperature": [1, 2]}
DEFAULTS = {"train.lr": 1e-3, "kd.weight": "matched", "kd.temperature": 1}
TPE = {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 4, "seed": 3}
QMC = {"_target_": "optuna.samplers.QMCSampler", "scramble": True}
GRID = {"_target_": "optuna.samplers.GridSampler"}
ABOUT = {"sweep": "sweep", "notation": "L_KLD", "split": 0, "role": "distilled", "trials": 6, "epochs": 2}


def study(tmp_path, *, search=SEARCH, name="sweep/L_KLD/split0/0", about=ABOUT, size="4", defaults=DEFAULTS):
    storage = pruning.open_storage(f"sqlite:///{tmp_path}/optuna.db")
    fixed = {"round": size, "sampler": "{}"}
    return Study(
        storage=storage, name=name, space=space.read(search), defaults=defaults, fixed=fixed, about={**ABOUT, **about}
    )


def run(own, sampler, *, rounds, size=4, stop_after=None):
    """Ask and tell; a trial's Dice is near 1 where the learning rate is near 1e-3."""
    for count in range(size, rounds * size + 1, size):
        for trial in own.ask(sampler, count=count):
            if stop_after is not None and own.ended == stop_after:
                return
            own.tell(trial.number, 1 - abs(trial.params["train.lr"] - 1e-3), seconds=[1.0, 2.0])


def values(own):
    return [trial.params for trial in own.trials]


@pytest.mark.parametrize("sampler", [{}, TPE, QMC, GRID], ids=["default", "tpe", "qmc", "grid"])
@pytest.mark.parametrize("stop_after", [2, 4, 7])
def test_a_killed_command_asks_for_the_same_trials(tmp_path, sampler, stop_after):
    search = LISTS if sampler is GRID else SEARCH
    unbroken = study(tmp_path, search=search, name="unbroken")
    run(unbroken, sampler, rounds=3)
    run(study(tmp_path, search=search, name="broken"), sampler, rounds=3, stop_after=stop_after)
    again = study(tmp_path, search=search, name="broken")
    assert again.ended == stop_after
    run(again, sampler, rounds=3)
    assert values(again) == values(unbroken)


@pytest.mark.parametrize("writes", range(14))
def test_a_trial_that_was_half_asked_for_gets_the_same_values(tmp_path, monkeypatch, writes):
    """Killed at each of the first writes to the storage: three values of a trial, one after the other."""
    unbroken = study(tmp_path, name="unbroken")
    unbroken.ask(TPE, count=4)
    broken, count = study(tmp_path, name="broken"), [0]

    def dying(write):
        def written(*args, **options):
            if count[0] == writes:
                raise KeyboardInterrupt
            count[0] += 1
            return write(*args, **options)

        return written

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("create_new_trial", "set_trial_param", "set_trial_state_values"):
            patch.setattr(optuna.storages._CachedStorage, name, dying(getattr(optuna.storages._CachedStorage, name)))
        broken.ask(TPE, count=4)
    again = study(tmp_path, name="broken")
    assert [trial.number for trial in again.ask(TPE, count=4)] == [0, 1, 2, 3]
    assert values(again) == values(unbroken)


def test_trial_0_has_the_configured_settings(tmp_path):
    (first,) = study(tmp_path).ask({}, count=1)
    assert first.params == {"train.lr": 1e-3, "kd.temperature": 1}  # kd.weight=matched is not a number of the range


def test_trial_0_may_be_outside_of_the_space(tmp_path):
    (first,) = study(tmp_path, defaults={"train.lr": 1, "kd.weight": "matched", "kd.temperature": 9}).ask({}, count=1)
    assert first.params == {}


def test_values_are_in_the_space_and_differ(tmp_path):
    trials = study(tmp_path).ask({}, count=8)[1:]
    own = space.read(SEARCH)
    assert all(space.contains(own[key], value) for one in trials for key, value in one.params.items())
    assert len({one.params["train.lr"] for one in trials}) == len({one.params["kd.weight"] for one in trials}) == 7


def test_methods_with_equal_keys_get_equal_first_values(tmp_path):
    """Before a sampler has learned anything, no method is luckier than another."""
    one = study(tmp_path, name="one").ask({}, count=5)
    fewer = {"kd.temperature": SEARCH["kd.temperature"], "train.lr": SEARCH["train.lr"]}
    other = study(tmp_path, name="other", search=fewer).ask({}, count=5)
    assert [own.params["train.lr"] for own in one] == [own.params["train.lr"] for own in other]


def test_tpe_learns_from_what_has_ended(tmp_path):
    own = study(tmp_path)
    run(own, TPE, rounds=6)
    errors = [abs(trial.params["train.lr"] - 1e-3) for trial in own.trials]
    assert sum(errors[12:]) < sum(errors[:12])


def test_qmc_covers_a_range_evenly(tmp_path):
    """Eight points of a Sobol sequence: two in each quarter of a range (Sobol 1967); of seed, not of chance."""
    own = study(tmp_path, search={"kd.weight": {"range": [0.0, 1.0]}}, defaults={"kd.weight": 0.5})
    own.ask(QMC, count=1)
    own.tell(0, 0.5, seconds=[])  # the sequence begins when a trial is complete
    drawn = [one.params["kd.weight"] for one in own.ask(QMC, count=9)]
    assert [sum(low <= value < low + 0.25 for value in drawn) for low in (0, 0.25, 0.5, 0.75)] == [2, 2, 2, 2]


def test_the_grid_is_covered(tmp_path):
    own = study(tmp_path, search=LISTS)
    drawn = {tuple(sorted(one.params.items())) for one in own.ask(GRID, count=5)}
    assert len(drawn) == 4
    for number in range(5):  # Optuna's own would stop a loop that is not there
        own.tell(number, 0.5, seconds=[])


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (GRID, "train.lr is a range, and GridSampler takes lists of values"),
        ({"_target_": "optuna.samplers.Nothing"}, "Nothing"),
        ({"_target_": "optuna.pruners.NopPruner"}, "is not one of optuna.samplers"),
        ({"_target_": "optuna.samplers.TPESampler", "wrong": 1}, "wrong"),
        ({"_target_": "optuna.samplers.BruteForceSampler"}, "hydra.sweeper.sampler: "),
    ],
)
def test_a_sampler_that_cannot_be_used_is_refused_in_one_line(tmp_path, sampler, message):
    with pytest.raises(InputError, match=message) as error:
        study(tmp_path).ask(sampler, count=2)
    assert "\n" not in str(error.value)


def test_a_storage_with_another_space_or_protocol_is_refused(tmp_path):
    study(tmp_path)
    with pytest.raises(InputError, match=r"has trials with another space .* give another sweep_name"):
        study(tmp_path, search=LISTS)
    with pytest.raises(InputError, match=r"has trials with another round \(4, now 8\)"):
        study(tmp_path, size="8")


def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"hydra\.sweeper\.storage=sqlite:.* cannot be used") as error:
        study(tmp_path / "no" / "such" / "folder")
    assert "\n" not in str(error.value)


def test_the_first_of_the_best_complete_trials_is_chosen(tmp_path):
    own = study(tmp_path)
    own.ask({}, count=5)
    study_itself = optuna.load_study(study_name=own.name, storage=own.storage)
    optuna.Trial(study_itself, own.trials[1]._trial_id).report(0.9, 1)
    study_itself.tell(1, state=TrialState.PRUNED)
    outcomes = [0.5, 0.9, 0.7, 0.7, RuntimeError("a loss that is not a number")]
    for number, outcome in enumerate(outcomes):
        own.tell(number, outcome, seconds=[])
    assert [trial.state.name for trial in own.trials] == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE", "FAIL"]
    assert own.trials[4].user_attrs["error"] == "a loss that is not a number"
    best = own.best()
    assert best is not None
    assert best.number == 2


def test_the_trials_of_a_sweep_can_be_read(tmp_path):
    own = study(tmp_path)
    own.ask({}, count=6)
    for number in range(5):  # the last one is in training
        trial = optuna.Trial(optuna.load_study(study_name=own.name, storage=own.storage), own.trials[number]._trial_id)
        for step, dice in ((1, 0.1), (2, 0.4)):
            trial.report(dice, step)
        own.tell(number, 0.4, seconds=[1.5, 2.5])
    study(tmp_path, name="of another sweep", about={"sweep": "other"}).ask({}, count=1)
    studies = read_studies(own.storage, "sweep")
    found = read_trials(studies)
    assert planned(studies) == 6
    assert list(found["round"]) == [0, 0, 0, 0, 1]
    assert set(found["state"]) == {"COMPLETE"}
    assert list(found["is_chosen"]) == [True, *[False] * 4]
    assert found["dice"][0] == [0.1, 0.4]
    assert found["seconds"][0] == [1.5, 2.5]
    assert set(found["notation"]) == {"L_KLD"}
    assert list(one_row_each(found)["val_dice_percent"]) == [40.0] * 5
    assert read_trials([]).empty


def test_of_several_studies_of_a_method_that_used_last_counts(tmp_path):
    first, second = study(tmp_path, name="first"), study(tmp_path, name="second", search=LISTS)
    assert [own.study_name for own in read_studies(first.storage, "sweep")] == ["second"]
    study(tmp_path, name="first")
    half = optuna.create_study(storage=first.storage, study_name="of a command killed while it opened it")
    half.set_user_attr("sweep", "sweep")
    assert [own.study_name for own in read_studies(second.storage, "sweep")] == ["first"]
