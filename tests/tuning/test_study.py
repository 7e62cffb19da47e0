"""Studies: the trials that follow from those that have ended; what is kept; what is chosen."""

import functools
import tempfile
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from kdsweep.core.errors import InputError
from kdsweep.store import sweep_file
from kdsweep.tuning import space
from kdsweep.tuning.study import (
    annotate,
    ask,
    best_of,
    default_storage,
    ended,
    one_row_each,
    open_storage,
    read_studies,
    read_trials,
    settle,
    tell,
    trials_of,
)

SEARCH = {"train.lr": {"log": [1e-4, 1e-2]}, "kd.weight": {"range": [0.1, 0.9]}, "kd.temperature": [1, 2, 4]}
LISTS = {"train.lr": [1e-4, 1e-3], "kd.temperature": [1, 2]}
DEFAULTS = {"train.lr": 1e-3, "kd.weight": "matched", "kd.temperature": 1}
TPE = {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 4, "seed": 3}
QMC = {"_target_": "optuna.samplers.QMCSampler", "scramble": True}
GRID = {"_target_": "optuna.samplers.GridSampler"}
ABOUT = {"sweep": "sweep", "notation": "L_KLD", "split": 0, "role": "distilled", "round": "4"}


@functools.cache
def empty_database():
    """Return a database without studies: its tables take longer to make than a trial."""
    with tempfile.TemporaryDirectory() as folder:
        open_storage(default_storage(Path(folder))).engine.dispose()
        return (Path(folder) / "optuna.db").read_bytes()


class Study:
    """A study in the storage of a store, with the values of trial 0."""

    def __init__(self, store, *, search=SEARCH, name="study", defaults=DEFAULTS):
        self.space = space.read(search)
        values = {key: defaults[key] for key in self.space}
        self.configured = {key: value for key, value in values.items() if space.contains(self.space[key], value)}
        file = store / "optuna.db"
        if not file.exists():
            file.write_bytes(empty_database())
        self.study = optuna.create_study(
            storage=open_storage(default_storage(store)), study_name=name, direction="maximize", load_if_exists=True
        )

    def ask(self, count, sampler=None):
        options = {"configured": self.configured, "sampler": sampler or {}, "count": count}
        return [(trial.number, trial.params) for trial in ask(self.study, self.space, **options)]

    def run(self, sampler, *, rounds, stop_after=None):
        """Ask and tell rounds of four; a trial's Dice is near 1 where the learning rate is near 1e-3."""
        for count in range(4, 4 * rounds + 1, 4):
            for number, params in self.ask(count, sampler):
                if stop_after is not None and ended(self.study) == stop_after:
                    return
                tell(self.study, number, 1 - abs(params["train.lr"] - 1e-3), seconds=[1.0, 2.0])

    @property
    def values(self):
        return [trial.params for trial in trials_of(self.study)]

    def open(self, *, opened, **about):
        """Note whose study it is, at this time."""
        for key, value in {**ABOUT, "opened": opened, **about}.items():
            self.study.set_user_attr(key, value)

    def report(self, number, *dice):
        trial = optuna.Trial(self.study, trials_of(self.study)[number]._trial_id)
        for step, value in enumerate(dice, start=1):
            trial.report(value, step)


@pytest.fixture(scope="module", params=[{}, TPE, QMC, GRID], ids=["default", "tpe", "qmc", "grid"])
def drawn(request, tmp_path_factory):
    """A sampler, what it draws from, and the trials of three rounds that nothing happened to."""
    sampler = request.param
    search = LISTS if sampler is GRID else SEARCH
    unbroken = Study(tmp_path_factory.mktemp("drawn"), search=search, name="unbroken")
    unbroken.run(sampler, rounds=3)
    return sampler, search, unbroken.values


@pytest.mark.parametrize("stop_after", [2, 4, 7])
def test_a_killed_command_asks_for_the_same_trials(tmp_path, drawn, stop_after):
    sampler, search, values = drawn
    Study(tmp_path, search=search, name="broken").run(sampler, rounds=3, stop_after=stop_after)
    again = Study(tmp_path, search=search, name="broken")
    assert ended(again.study) == stop_after
    again.run(sampler, rounds=3)
    assert again.values == values


@pytest.fixture(scope="module")
def first_four(tmp_path_factory):
    """The values of four trials that were drawn without a break."""
    unbroken = Study(tmp_path_factory.mktemp("first-four"), name="unbroken")
    unbroken.ask(4, TPE)
    return unbroken.values


@pytest.mark.parametrize("writes", range(0, 13, 2))
def test_a_trial_that_was_half_drawn_gets_the_same_values(tmp_path, monkeypatch, first_four, writes):
    """Killed at each of the first writes to the storage: a trial, then its three values, one after the other."""
    broken, count = Study(tmp_path, name="broken"), [0]

    def dying(write):
        def written(*args, **options):
            if count[0] == writes:
                raise KeyboardInterrupt
            count[0] += 1
            return write(*args, **options)

        return written

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("create_new_trial", "set_trial_param"):
            patch.setattr(optuna.storages._CachedStorage, name, dying(getattr(optuna.storages._CachedStorage, name)))
        broken.ask(4, TPE)
    again = Study(tmp_path, name="broken")
    assert [number for number, _ in again.ask(4, TPE)] == [0, 1, 2, 3]
    assert again.values == first_four


def test_trial_0_has_the_configured_settings_that_are_in_the_space(tmp_path):
    # kd.weight=matched is not a number of the range
    assert Study(tmp_path).ask(1) == [(0, {"train.lr": 1e-3, "kd.temperature": 1})]
    outside = {"train.lr": 1, "kd.weight": "matched", "kd.temperature": 9}
    assert Study(tmp_path, name="outside", defaults=outside).ask(1) == [(0, {})]


def test_values_are_in_the_space_and_differ(tmp_path):
    tuned = Study(tmp_path)
    drawn = [params for _, params in tuned.ask(8)[1:]]
    assert all(space.contains(tuned.space[key], value) for params in drawn for key, value in params.items())
    assert len({params["train.lr"] for params in drawn}) == len({params["kd.weight"] for params in drawn}) == 7


def test_methods_with_equal_keys_get_equal_first_values(tmp_path):
    """Before a sampler has learned anything, no method is luckier than another."""
    fewer = {"kd.temperature": SEARCH["kd.temperature"], "train.lr": SEARCH["train.lr"]}
    one, other = Study(tmp_path, name="one"), Study(tmp_path, name="other", search=fewer)
    assert [params["train.lr"] for _, params in one.ask(5)] == [params["train.lr"] for _, params in other.ask(5)]


def test_tpe_learns_from_what_has_ended(tmp_path):
    tuned = Study(tmp_path)
    tuned.run(TPE, rounds=6)
    errors = [abs(params["train.lr"] - 1e-3) for params in tuned.values]
    assert sum(errors[12:]) < sum(errors[:12])


def test_qmc_covers_a_range_evenly(tmp_path):
    """Eight points of a Sobol sequence: two in each quarter of a range (Sobol 1967); of seed, not of chance."""
    tuned = Study(tmp_path, search={"kd.weight": {"range": [0.0, 1.0]}}, defaults={"kd.weight": 0.5})
    tuned.ask(1, QMC)
    tell(tuned.study, 0, 0.5, seconds=[])  # the sequence begins when a trial is complete
    drawn = [params["kd.weight"] for _, params in tuned.ask(9, QMC)]
    assert [sum(low <= value < low + 0.25 for value in drawn) for low in (0, 0.25, 0.5, 0.75)] == [2, 2, 2, 2]


def test_the_grid_is_covered(tmp_path):
    tuned = Study(tmp_path, search=LISTS)
    assert len({tuple(sorted(params.items())) for _, params in tuned.ask(5, GRID)}) == 4
    for number in range(5):  # Optuna's sampler would stop a loop that is not there
        tell(tuned.study, number, 0.5, seconds=[])


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
        Study(tmp_path).ask(2, sampler)
    assert "\n" not in str(error.value)


def test_trials_made_with_other_settings_are_refused(tmp_path):
    tuned = Study(tmp_path).study
    settle(tuned, {"round": "4"})
    settle(tuned, {"round": "4", "seed": "0"})
    with pytest.raises(InputError, match=r"has trials with another round \(4, now 8\); give another sweep_name"):
        settle(tuned, {"round": "8"})


def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"hydra\.sweeper\.storage=sqlite:.* cannot be used") as error:
        open_storage(default_storage(tmp_path / "no" / "such" / "folder"))
    assert "\n" not in str(error.value)


def test_the_first_of_the_best_complete_trials_is_chosen(tmp_path):
    tuned = Study(tmp_path)
    tuned.ask(5)
    tuned.report(1, 0.9)
    tuned.study.tell(1, state=TrialState.PRUNED)
    for number, outcome in enumerate([0.5, 0.9, 0.7, 0.7, RuntimeError("a loss that is not a number")]):
        tell(tuned.study, number, outcome, seconds=[])
    trials = trials_of(tuned.study)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE", "FAIL"]
    assert trials[4].user_attrs["error"] == "a loss that is not a number"
    best = best_of(tuned.study)
    assert best is not None
    assert best.number == 2


def test_the_trials_of_a_sweep_can_be_read(tmp_path):
    assert read_studies(tmp_path, "sweep") == []
    sweep_file.add(tmp_path, "sweep", cells=[], teachers=[], storage="")
    tuned = Study(tmp_path)
    tuned.open(opened=1)
    tuned.ask(6)
    annotate(tuned.study, 5, folder="of the last one, which is in training")
    for number in range(5):
        tuned.report(number, 0.1, 0.4)
        tell(tuned.study, number, 0.4, seconds=[1.5, 2.5])
    Study(tmp_path, name="of another sweep").open(opened=2, sweep="other")
    trials = read_trials(read_studies(tmp_path, "sweep"))
    assert list(trials["round"]) == [0, 0, 0, 0, 1]
    assert set(trials["state"]) == {"COMPLETE"}
    assert list(trials["is_chosen"]) == [True, *[False] * 4]
    assert trials["dice"][0] == [0.1, 0.4]
    assert trials["seconds"][0] == [1.5, 2.5]
    assert set(trials["notation"]) == {"L_KLD"}
    assert list(one_row_each(trials)["val_dice_percent"]) == [40.0] * 5
    assert read_trials([]).empty


def test_of_several_studies_of_a_method_that_used_last_counts(tmp_path):
    sweep_file.add(tmp_path, "sweep", cells=[], teachers=[], storage=default_storage(tmp_path))
    first, second = Study(tmp_path, name="first"), Study(tmp_path, name="second")
    first.open(opened=1)
    second.open(opened=2)
    assert [tuned.study_name for tuned in read_studies(tmp_path, "sweep")] == ["second"]
    first.open(opened=3)
    Study(tmp_path, name="of a command killed while it opened it").study.set_user_attr("sweep", "sweep")
    assert [tuned.study_name for tuned in read_studies(tmp_path, "sweep")] == ["first"]
