"""Pruning in a group: what is reported to Optuna's storage, and which trials end when."""

import functools
import platform
import random
import tempfile
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from kdsweep.core.errors import InputError
from kdsweep.tuning.pruning import Pruning, make
from kdsweep.tuning.study import open_storage

EPOCHS = 12
FIRST, SECOND = 2, 6  # the rungs: a sixth of the epochs, and half
HALVING = {"_target_": "optuna.pruners.SuccessiveHalvingPruner", "min_resource": FIRST, "reduction_factor": 3}
MEDIAN = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 3, "n_warmup_steps": 4}
PRUNERS = {"default": {}, "halving": HALVING, "median": MEDIAN}


def curves(count=9, *, seed=0):
    """Rising curves of unlike height, with noise."""
    chance = np.random.default_rng(seed)
    heights = np.linspace(0.2, 0.8, count)
    return {
        number: tuple(float(height * (step / EPOCHS) ** 0.3 + chance.normal(0, 0.01)) for step in range(1, EPOCHS + 1))
        for number, height in enumerate(heights)
    }


class Studies:
    """Studies in a database, whose trials are trained in a group."""

    def __init__(self, folder, *, options=None, size=9):
        self.file, self.options, self.size = Path(folder) / "optuna.db", options or {}, size
        self.storage = f"sqlite:///{self.file}"

    @functools.cached_property
    def database(self):
        return open_storage(self.storage)

    def study(self, name="study"):
        study = optuna.create_study(storage=self.database, study_name=name, direction="maximize", load_if_exists=True)
        if not study.user_attrs:
            study.set_user_attr("round", str(self.size))
            study.set_user_attr("epochs", EPOCHS)
        return study

    def ask(self, count, *, name="study", **attrs):
        if name == "study" and not attrs and not self.file.exists():
            self.file.write_bytes(empty_study(count, self.size))
            return
        self.ask_for(count, name=name, **attrs)

    def ask_for(self, count, *, name="study", **attrs):
        study = self.study(name)
        for _ in range(count):
            trial = study.ask()
            for key, value in attrs.items():
                trial.set_user_attr(key, value)

    def pruning(self, trials):
        """Of {folder's name: (study, number)}."""
        return Pruning(self.storage, self.options, {Path(folder): [values] for folder, values in trials.items()})

    def train(self, values, *, name="study", first=0, last=EPOCHS, stop=None):
        """Train the trials of these curves in a group from an epoch to another; leave it after one as if killed."""
        after = self.pruning({str(number): (name, number) for number in values}).begin()
        leave = {int(str(folder)) for folder in after(first, rows(values, first))}
        for epochs in range(first + 1, (stop or last) + 1):
            left = {number: curve for number, curve in values.items() if number not in leave}
            leave |= {int(str(folder)) for folder in after(epochs, rows(left, epochs))}

    def pruned(self, name="study"):
        """Return after how many epochs trials were pruned, by number."""
        trials = self.study(name).trials
        return {trial.number: trial.last_step for trial in trials if trial.state is TrialState.PRUNED}

    def ends(self):
        """Return what was pruned, and all that was reported."""
        return self.pruned(), [trial.intermediate_values for trial in self.study().trials]


@functools.cache
def empty_study(count, size):
    """Return the database of a study that was asked for so many trials and for nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        studies = Studies(folder, size=size)
        studies.ask_for(count)
        studies.database.engine.dispose()
        return studies.file.read_bytes()


def rows(values, epochs):
    return {Path(str(number)): [(dice, 1.0) for dice in curve[:epochs]] for number, curve in values.items()}


def by_hand(rising):
    """Of nine trials three continue after epoch 2 (a sixth), and one of these after epoch 6 (half)."""
    after_2 = sorted(rising, key=lambda number: -rising[number][1])
    after_6 = sorted(after_2[:3], key=lambda number: -rising[number][5])
    return dict.fromkeys(after_2[3:], 2) | dict.fromkeys(after_6[1:], 6)


@pytest.mark.parametrize("seed", range(3))
def test_by_default_the_best_third_continues_at_each_rung(tmp_path, seed):
    rising = curves(seed=seed)
    studies = Studies(tmp_path)
    studies.ask(9)
    studies.train(rising)
    assert studies.pruned() == by_hand(rising)
    assert sum(len(trial.intermediate_values) for trial in studies.study().trials) == EPOCHS * 9 / 3


def test_small_rounds_keep_their_best_trial(tmp_path):
    studies = Studies(tmp_path, size=2)
    studies.ask(2)
    studies.train(curves(2))
    assert studies.pruned() == {0: FIRST}


@pytest.fixture(scope="module", params=PRUNERS.values(), ids=PRUNERS)
def unbroken(request, tmp_path_factory):
    """The options of a pruner, what it ended and all reports of a group that was not stopped."""
    studies = Studies(tmp_path_factory.mktemp("unbroken"), options=request.param)
    studies.ask(9)
    studies.train(curves())
    return request.param, studies.ends()


def test_the_answers_do_not_depend_on_the_order_of_the_trials(tmp_path, unbroken):
    rising, (options, (pruned, _)) = curves(), unbroken
    numbers = list(rising)
    random.Random(1).shuffle(numbers)
    assert numbers != list(rising)
    studies = Studies(tmp_path, options=options)
    studies.ask(9)
    studies.train({number: rising[number] for number in numbers})
    assert studies.pruned() == pruned


@pytest.mark.parametrize(("stop", "resumed"), [(FIRST, 1), (SECOND, SECOND), (8, 3)])
def test_a_resumed_group_decides_as_an_unbroken_one_and_reports_nothing_twice(tmp_path, unbroken, stop, resumed):
    """Killed after an epoch, resumed from checkpoints of an earlier one."""
    rising, (options, ends) = curves(), unbroken
    studies = Studies(tmp_path, options=options)
    studies.ask(9)
    studies.train(rising, stop=stop)
    left = {number: curve for number, curve in rising.items() if number not in studies.pruned()}
    studies.train({number: (0.0,) * stop + curve[stop:] for number, curve in left.items()}, first=resumed)
    assert studies.ends() == ends


def test_a_group_killed_between_its_decisions_makes_the_others(tmp_path, monkeypatch):
    rising = curves()
    studies = Studies(tmp_path)
    studies.ask(9)
    tell, ended = optuna.Study.tell, []

    def dying(*args, **options):
        if len(ended) == 2:
            raise KeyboardInterrupt
        ended.append(tell(*args, **options))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "tell", dying)
        studies.train(rising)
    assert len(studies.pruned()) == 2
    studies.train({number: curve for number, curve in rising.items() if number not in studies.pruned()}, first=FIRST)
    assert studies.pruned() == by_hand(rising)


def test_a_group_killed_between_its_reports_makes_the_others(tmp_path, monkeypatch):
    """Among those that reported before the kill, the best ones, a third would be fewer."""
    rising = dict(enumerate(reversed(curves().values())))
    studies = Studies(tmp_path)
    studies.ask(9)
    report = optuna.Trial.report

    def dying(trial, value, step):
        if step == FIRST and trial.number == 5:
            raise KeyboardInterrupt
        report(trial, value, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Trial, "report", dying)
        studies.train(rising)
    studies.train(rising, first=FIRST - 1)
    assert studies.pruned() == by_hand(rising)


def test_a_trial_that_another_process_pruned_leaves_at_once(tmp_path):
    studies = Studies(tmp_path)
    studies.ask(2)
    after = studies.pruning({"0": ("study", 0), "1": ("study", 1)})
    studies.study().tell(0, state=TrialState.PRUNED)
    assert after.begin()(0, rows(curves(2), 0)) == {Path("0")}


def test_trials_of_earlier_rounds_count_and_of_this_one_those_with_equal_batches(tmp_path):
    """The best of its group is pruned if earlier trials were better, and not if others of its round are."""
    rising = curves()
    studies = Studies(tmp_path, size=3)
    studies.ask(3, batches="c")
    studies.train({number: rising[8 - number] for number in range(3)})
    studies.ask(1, batches="a")
    studies.ask(2, batches="b")
    studies.train({4: rising[8], 5: rising[7]})
    assert studies.pruned()[5] == FIRST
    assert 4 not in studies.pruned()
    studies.train({3: rising[1]})
    assert studies.pruned()[3] == FIRST
    (tmp_path / "alone").mkdir()
    alone = Studies(tmp_path / "alone", size=6)
    alone.ask(2, batches="a")
    alone.ask(1, batches="b")
    alone.train({0: rising[8], 1: rising[7]})
    alone.train({2: rising[1]})
    assert 2 not in alone.pruned()


def test_studies_of_a_group_are_compared_apart(tmp_path):
    """The worst trial of a good method continues next to the best of a bad one, as it would alone."""
    studies, rising = Studies(tmp_path, size=6), {"good": curves(6, seed=1), "bad": curves(6, seed=2)}
    for name in rising:
        studies.ask(6, name=name)
    values = {f"good{number}": [0.1 + value for value in curve] for number, curve in rising["good"].items()}
    values |= {f"bad{number}": [0.1 * value for value in curve] for number, curve in rising["bad"].items()}
    after = studies.pruning({f"{name}{n}": (name, n) for name in rising for n in range(6)}).begin()
    for epochs in range(1, EPOCHS + 1):
        for folder in after(epochs, rows(values, epochs)):
            values.pop(str(folder), None)
    for name, curve in rising.items():
        (tmp_path / name).mkdir()
        alone = Studies(tmp_path / name, size=6)
        alone.ask(6)
        alone.train(curve)
        assert alone.pruned() == studies.pruned(name) != {}


def test_the_median_pruner_compares_with_complete_trials_as_in_optuna(tmp_path):
    """Those of the same round are not complete before the end, so the first round is not pruned."""
    rising = curves()
    studies = Studies(tmp_path, options=MEDIAN)
    studies.ask(9)
    studies.train(rising)
    assert studies.pruned() == {}
    for number in rising:
        studies.study().tell(number, max(rising[number]))
    studies.ask(1)
    studies.train({9: rising[1]})
    medians = [np.median([curve[step - 1] for curve in rising.values()]) for step in (4, 5)]
    assert max(rising[1][:4]) < medians[0]
    assert studies.pruned() == {9: 4}


def test_equal_settings_are_trained_once_and_leave_when_both_trials_are_pruned(tmp_path):
    studies, rising = Studies(tmp_path, size=4), curves(3)
    studies.ask(4)
    trials = {Path("0"): [("study", 0), ("study", 3)], Path("1"): [("study", 1)], Path("2"): [("study", 2)]}
    after = Pruning(studies.storage, {}, trials).begin()
    assert after(1, rows(rising, 1)) == set()
    assert after(FIRST, rows(rising, FIRST)) == {Path("0"), Path("1")}
    assert studies.pruned() == dict.fromkeys((0, 1, 3), FIRST)


def test_a_sqlite_file_is_refused_on_another_machine(tmp_path, monkeypatch):
    studies = Studies(tmp_path)
    studies.ask(1)
    pruning = studies.pruning({"0": ("study", 0)})
    monkeypatch.setattr(platform, "node", lambda: "another")
    with pytest.raises(InputError, match=r"^hydra\.sweeper\.storage=sqlite:.* several machines .*=postgresql"):
        pruning.begin()


def test_a_storage_that_fails_is_one_line(tmp_path):
    studies = Studies(tmp_path)
    studies.ask(1)
    after = studies.pruning({"0": ("study", 0)}).begin()
    (tmp_path / "optuna.db").write_bytes(b"not a database")
    with pytest.raises(InputError, match=r"^hydra\.sweeper\.storage=sqlite:.* cannot be used") as error:
        after(1, rows(curves(1), 1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"_target_": "optuna.pruners.Nothing"}, "Nothing"),
        ({"_target_": "optuna.samplers.TPESampler"}, "is not one of optuna.pruners"),
        ({"_target_": "optuna.pruners.MedianPruner", "n_startup": 1}, "n_startup"),
    ],
)
def test_an_unknown_pruner_is_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=f"hydra.sweeper.pruner.*{message}") as error:
        make(options)
    assert "\n" not in str(error.value)
