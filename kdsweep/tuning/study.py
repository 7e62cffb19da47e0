"""Studies: the trials of one method on one split, in Optuna's storage, and the choice among them.

A trial is in the storage, RUNNING, from the moment it is asked for until it has ended. A command that was killed finds
there which trials it asked for and what they have reported, and their checkpoints in the folders of their cells.
"""

from __future__ import annotations

import inspect
import math
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GridSampler, QMCSampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from kdsweep.core import databases
from kdsweep.core.errors import InputError, one_line
from kdsweep.tuning import pruning
from kdsweep.tuning import space as spaces
from kdsweep.tuning.space import Space

KEY = "hydra.sweeper.sampler"


class Study:
    """The trials of one method on one split.

    Args:
        storage: Optuna's database.
        name: of the study.
        space: of the keys that the method uses.
        defaults: the configured values of these keys, which trial 0 has.
        fixed: what else decides the trials' results; it is kept with them, and must stay as it is.
        about: ``sweep``, ``notation``, ``split``, ``role``, ``trials`` (how many there are to be) and ``epochs`` (of a
            complete trial).

    Raises:
        InputError: the storage cannot be used, or holds trials of that name in another space.
    """

    def __init__(
        self,
        *,
        storage: RDBStorage,
        name: str,
        space: Space,
        defaults: Mapping[str, Any],
        fixed: Mapping[str, str],
        about: Mapping[str, Any],
    ) -> None:
        self.name, self.space, self.storage = name, space, storage.url
        known = {key: defaults[key] for key in space}
        self._configured = {key: value for key, value in known.items() if spaces.contains(space[key], value)}
        with pruning.using(self.storage):
            self._study = optuna.create_study(
                storage=storage, study_name=name, direction="maximize", load_if_exists=True
            )
        self.settle({"space": spaces.in_words(space), **fixed})
        for key, value in {**about, "opened": time.time()}.items():
            self._study.set_user_attr(key, value)

    def settle(self, fixed: Mapping[str, Any]) -> None:
        """Record what decides the trials' results.

        Raises:
            InputError: the trials in the storage were made with other values.
        """
        before = self._study.user_attrs
        for key, value in fixed.items():
            if key not in before:
                self._study.set_user_attr(key, value)
            elif before[key] != value:
                where = f"hydra.sweeper.storage={databases.shown(self.storage)}: study {self.name}"
                change = f"has trials with another {key} ({before[key]}, now {value})"
                raise InputError(f"{where} {change}; give another sweep_name")

    @property
    def trials(self) -> list[FrozenTrial]:
        """Return all trials, in the order of their numbers."""
        return self._study.get_trials(deepcopy=False)

    @property
    def ended(self) -> int:
        """Return how many trials have ended."""
        return sum(trial.state.is_finished() for trial in self.trials)

    def ask(self, sampler: Mapping[str, Any], *, count: int) -> list[FrozenTrial]:
        """Ask for trials until there are so many; return those that are RUNNING.

        Trial 0 has the settings as they are configured. A trial that an earlier command has half asked for gets the
        values that it would have had.

        Args:
            sampler: ``_target_`` and arguments of one of Optuna's; by default TPE with seed 0.
            count: of the trials.

        Raises:
            InputError: the sampler cannot draw from this space.
        """
        if not self.trials:
            self._study.enqueue_trial(self._configured)
        for number in range(count):
            keys = list(self.space if number else self._configured)
            known = self.trials[number] if number < len(self.trials) else None
            if known is None or known.state is TrialState.WAITING or not known.params.keys() >= set(keys):
                self._ask(sampler, number, keys, known)
        return [trial for trial in self.trials[:count] if trial.state is TrialState.RUNNING]

    def _ask(self, sampler: Mapping[str, Any], number: int, keys: Sequence[str], known: FrozenTrial | None) -> None:
        """Ask for one trial, or for what one lacks that was asked for before."""
        try:
            self._study.sampler = make_sampler(sampler, self.space, seed_of=f"{number}")
            is_begun = known is not None and known.state is TrialState.RUNNING
            trial = optuna.Trial(self._study, known._trial_id) if known and is_begun else self._study.ask()
            for key in keys:
                self._study.sampler = make_sampler(sampler, self.space, seed_of=f"{number} {key}")
                _suggest(trial, key, self.space[key])
        except InputError:
            raise
        except Exception as error:  # of the sampler, such as a range where it takes lists
            raise InputError(f"{KEY}: {one_line(error)}") from error
        finally:
            self._study.sampler = optuna.samplers.RandomSampler()  # some samplers do not let a trial be told

    def annotate(self, number: int, about: Mapping[str, Any]) -> None:
        """Record something of a trial that has not ended."""
        trial = self.trials[number]
        for key, value in about.items():
            if trial.user_attrs.get(key) != value:
                optuna.Trial(self._study, trial._trial_id).set_user_attr(key, value)

    def tell(self, number: int, outcome: float | Exception, *, seconds: Sequence[float]) -> None:
        """End a trial, unless it was pruned: with its validation Dice, or as failed.

        Args:
            number: of the trial.
            outcome: validation Dice of the weights that it would be tested with, or its error.
            seconds: of each epoch.
        """
        if self.trials[number].state.is_finished():
            return
        error = {"error": str(outcome)} if isinstance(outcome, Exception) else {}
        self.annotate(number, {"seconds": list(seconds), **error})
        if isinstance(outcome, Exception):
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, outcome)

    def best(self) -> FrozenTrial | None:
        """Return the chosen trial; see ``best_of``."""
        return best_of(self.trials)


def _suggest(trial: optuna.Trial, key: str, values: BaseDistribution) -> None:
    if isinstance(values, CategoricalDistribution):
        trial.suggest_categorical(key, values.choices)
    elif isinstance(values, IntDistribution):
        trial.suggest_int(key, values.low, values.high)
    elif isinstance(values, FloatDistribution):
        trial.suggest_float(key, values.low, values.high, log=values.log)


def make_sampler(options: Mapping[str, Any], space: Space, *, seed_of: str) -> BaseSampler:
    """Make the sampler that draws one value; its seed follows from that of the options and what it draws.

    So a trial's values do not depend on what was drawn before a break, and methods with equal keys begin with equal
    values. A sequence (QMCSampler, GridSampler) has one seed for all trials: a trial is the point of its number.

    Args:
        options: ``_target_`` and arguments of one of Optuna's, or none of them.
        space: of the study.
        seed_of: number of the trial, and the key.

    Raises:
        InputError: there is no such sampler, or it cannot be made for this space.
    """
    options = {"_target_": "optuna.samplers.TPESampler", **options}
    try:
        kind = hydra.utils.get_class(options["_target_"])
        takes = inspect.signature(kind).parameters
        if issubclass(kind, GridSampler):
            options["search_space"] = _grid(space)
        if "seed" in takes:
            seed = options.get("seed", 0)
            is_sequence = issubclass(kind, QMCSampler | GridSampler)
            options["seed"] = seed if is_sequence else zlib.crc32(f"{seed} {seed_of}".encode())
        if issubclass(kind, QMCSampler):  # the first trials are drawn by another sampler: documented
            options.setdefault("warn_independent_sampling", False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # QMC is, since 3.0
            sampler = hydra.utils.instantiate(options, _convert_="all")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{KEY}={options}: {one_line(error.__cause__ or error)}") from error
    if not isinstance(sampler, BaseSampler):
        raise InputError(f"{KEY}._target_={options['_target_']} is not one of optuna.samplers")
    return sampler


def _grid(space: Space) -> dict[str, list[Any]]:
    for key, values in space.items():
        if not isinstance(values, CategoricalDistribution):
            raise InputError(f"{spaces.KEY}: {key} is a range, and GridSampler takes lists of values")
    return spaces.ends(space)


# ---- readers -------------------------------------------------------------------------------------------------------


def read_studies(storage: str, sweep: str) -> list[optuna.Study]:
    """Return the studies of a sweep; of several of one method and split, with other settings, that used last.

    Args:
        storage: address of Optuna's database.
        sweep: its name.

    Raises:
        InputError: the storage cannot be read.
    """
    opened = pruning.open_storage(storage)
    with pruning.using(storage):
        attrs = {own.study_name: own.user_attrs for own in optuna.get_all_study_summaries(opened)}
        # The last attribute that is set is "opened": a study without it was begun by a command that was killed.
        names = [name for name, own in attrs.items() if own.get("sweep") == sweep and "opened" in own]
        names.sort(key=lambda name: attrs[name]["opened"])
        latest = {(attrs[name]["notation"], attrs[name]["split"]): name for name in names}
        return [optuna.load_study(study_name=name, storage=opened) for name in latest.values()]


def planned(studies: Sequence[optuna.Study]) -> int:
    """Return how many trials studies are to have."""
    return sum(study.user_attrs["trials"] for study in studies)


def read_trials(studies: Sequence[optuna.Study]) -> pd.DataFrame:
    """Return the ended trials of studies.

    Returns:
        A row per trial: notation, split, role, number, round (from 0), state, is_chosen, value (validation Dice of a
        complete one, the last one of a pruned one), params (tuned values, as a dict), dice and seconds (of each epoch).
    """
    rows = []
    for study in studies:
        attrs, trials = study.user_attrs, study.get_trials(deepcopy=False)
        best = best_of(trials)
        for trial in (own for own in trials if own.state.is_finished()):
            about = {key: attrs[key] for key in ("notation", "split", "role")}
            about |= {"number": trial.number, "round": trial.number // int(attrs["round"]), "state": trial.state.name}
            dice = [value for _, value in sorted(trial.intermediate_values.items())]
            curves = {"dice": dice, "seconds": list(trial.user_attrs.get("seconds", []))}
            rows.append({**about, "is_chosen": trial is best, "value": trial.value, "params": trial.params, **curves})
    columns = ["notation", "split", "role", "number", "round", "state", "is_chosen", "value", "params"]
    return pd.DataFrame(rows, columns=[*columns, "dice", "seconds"])


def one_row_each(trials: pd.DataFrame) -> pd.DataFrame:
    """Return trials for a file.

    Args:
        trials: as ``read_trials`` gives them.

    Returns:
        A row per trial: notation, split, number, state, is_chosen, epochs (that were trained), val_dice_percent (the
        best of these, NaN of none), seconds, and a column per tuned key, NaN where the method does not use it.
    """
    about = trials[["notation", "split", "number", "state", "is_chosen"]].reset_index(drop=True)
    best = [100 * max(dice) if dice else math.nan for dice in trials["dice"]]
    counted = about.assign(epochs=[len(dice) for dice in trials["dice"]], val_dice_percent=best)
    counted["seconds"] = [sum(seconds) for seconds in trials["seconds"]]
    values = pd.DataFrame(list(trials["params"]), index=counted.index)
    return counted.join(values[sorted(values, key=str)]).sort_values(["notation", "split", "number"])


def best_of(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Return the trial with the best validation Dice of those that are complete; the first of equal ones.

    No test score enters: none is computed before the choice.
    """
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    return max(complete, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)
