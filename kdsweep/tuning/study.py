"""Studies: the trials of one method on one split, kept by Optuna in the store, and the choice among them.

A study holds ended trials alone. Which settings come next follows from those and from the sampler's seed, so a command
that was killed proposes the same trials again and finds their checkpoints.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import hydra
import optuna
import pandas as pd
from optuna.samplers import BaseSampler, GridSampler, QMCSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from kdsweep.core.errors import InputError, one_line
from kdsweep.tuning import space as spaces
from kdsweep.tuning.book import Entry
from kdsweep.tuning.pruning import Curve
from kdsweep.tuning.space import Space

KEY = "hydra.sweeper.sampler"


@dataclass(frozen=True)
class Proposal:
    """Settings to be tried.

    Attributes:
        number: of the trial in its study; 0 are the settings as they are configured.
        values: of the keys that are tuned, by key; none for trial 0.
        marks: what the sampler has noted of the trial.
    """

    number: int
    values: dict[str, Any]
    marks: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """The end of a trial.

    Attributes:
        curve: its state and validation Dice after each epoch.
        seconds: of training and validation in each epoch, with the Teacher's forwards as if it had been alone.
        value: validation Dice of the weights that it would be tested with; None if it has not come to an end.
        error: of a failed one.
        folder: of its files, below the store.
        times_ms: when it was begun and when its last epoch ended, in milliseconds since 1970.
    """

    curve: Curve
    seconds: tuple[float, ...] = ()
    value: float | None = None
    error: str = ""
    folder: str = ""
    times_ms: tuple[int, int] | None = None


class Study:
    """The trials of one method on one split.

    Args:
        storage: address of Optuna's database.
        name: of the study.
        space: of the keys that the method uses.
        defaults: the configured values of these keys, which trial 0 has.
        about: what else decides the trials' results; it is written beside them.

    Raises:
        InputError: the storage cannot be opened, or holds trials of that name in another space.
    """

    def __init__(
        self, *, storage: str, name: str, space: Space, defaults: Mapping[str, Any], about: Mapping[str, str]
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.name, self.space, self.defaults = name, space, defaults
        self._study = _open(storage, name)
        self._storage = storage
        self.settle({"space": spaces.in_words(space), **about})

    def settle(self, about: Mapping[str, Any]) -> None:
        """Write down what decides the trials' results.

        Raises:
            InputError: the trials that are there were made with other values.
        """
        known = self._study.user_attrs
        for key, value in about.items():
            if key in known and known[key] != value:
                raise InputError(
                    f"hydra.sweeper.storage={self._storage}: study {self.name} has trials with another {key} "
                    f"({known[key]}, now {value}); give another sweep_name"
                )
        for key, value in about.items():
            if key not in known:
                self._study.set_user_attr(key, value)

    @property
    def trials(self) -> list[FrozenTrial]:
        """Return the ended trials, in the order of their numbers."""
        return self._study.get_trials(deepcopy=False)

    def curves(self, *, before: int) -> dict[int, Curve]:
        """Return the curves of the trials with smaller numbers."""
        return {trial.number: curve_of(trial) for trial in self.trials[:before]}

    def propose(self, sampler: Mapping[str, Any], *, first: int, count: int) -> list[Proposal]:
        """Return the trials of a round.

        Args:
            sampler: ``_target_`` and arguments of one of Optuna's; by default TPE with seed 0.
            first: number of the first one; the trials before it have ended.
            count: how many.
        """
        own = []
        for number in range(first, first + count):
            if number == 0:
                known = {key: self.defaults[key] for key in self.space}
                inside = {key: value for key, value in known.items() if spaces.contains(self.space[key], value)}
                own.append(Proposal(0, inside, {}))
                continue
            scratch = optuna.create_study(direction="maximize", sampler=make_sampler(sampler, self.space, number))
            if isinstance(scratch.sampler, QMCSampler):
                for _ in range(number - 1):  # it counts in the study how far its sequence is
                    scratch.ask(self.space)
            for trial in self.trials[:first]:
                scratch.add_trial(trial)
            for other in own:  # of the same round, not ended: TPE keeps away from them
                scratch.add_trial(_frozen(other, self.space, state=TrialState.RUNNING))
            try:
                scratch.ask(self.space)
            except Exception as error:  # of the sampler, such as a range where it takes lists
                raise InputError(f"{KEY}: {one_line(error)}") from error
            asked = scratch.get_trials(deepcopy=False)[-1]
            own.append(Proposal(number, dict(asked.params), dict(asked.system_attrs)))
        return own

    def add(self, proposal: Proposal, outcome: Outcome) -> None:
        """Add a trial that has ended; to be called in the order of their numbers."""
        state = TrialState[outcome.curve.state]
        self._study.add_trial(_frozen(proposal, self.space, state=state, outcome=outcome))

    def best(self) -> FrozenTrial | None:
        """Return the chosen trial; see ``best_of``."""
        return best_of(self.trials)


def _open(storage: str, name: str) -> optuna.Study:
    try:
        return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    except Exception as error:  # of Optuna, SQLAlchemy or a driver
        raise InputError(f"hydra.sweeper.storage={storage} cannot be opened: {one_line(error)}") from error


def make_sampler(options: Mapping[str, Any], space: Space, number: int) -> BaseSampler:
    """Make the sampler that draws one trial; its seed is that of the options plus the trial's number.

    A new one for each: what a sampler has drawn before a break is not kept, what it would draw is.

    Args:
        options: ``_target_`` and arguments of one of Optuna's, or none of them.
        space: of the study.
        number: of the trial.

    Raises:
        InputError: there is no such sampler, or it cannot be made for this space.
    """
    options = {"_target_": "optuna.samplers.TPESampler", **options}
    try:
        kind = hydra.utils.get_class(options["_target_"])
        takes = inspect.signature(kind).parameters
        if issubclass(kind, GridSampler):
            options["search_space"] = _grid(space)
        is_sequence = issubclass(kind, QMCSampler | GridSampler)  # of which a trial is the point of its number
        if "seed" in takes:
            options["seed"] = options.get("seed", 0) + (0 if is_sequence else number)
        if issubclass(kind, QMCSampler):  # lists of values are drawn by another sampler: known
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
    # Its public method, replaced on this object: the sampler would draw at random until a trial is complete, and in a
    # round none is. A subclass would do the same, but the user names the class.
    if isinstance(sampler, QMCSampler):
        lists = optuna.distributions.CategoricalDistribution
        numbers = {key: own for key, own in space.items() if not isinstance(own, lists)}
        sampler.infer_relative_search_space = lambda study, trial: numbers  # type: ignore[method-assign]
    return sampler


def _grid(space: Space) -> dict[str, list[Any]]:
    for key, own in space.items():
        if not isinstance(own, optuna.distributions.CategoricalDistribution):
            raise InputError(f"{spaces.KEY}: {key} is a range, and GridSampler takes lists of values")
    return spaces.ends(space)


def _frozen(proposal: Proposal, space: Space, *, state: TrialState, outcome: Outcome | None = None) -> FrozenTrial:
    values = dict(enumerate(outcome.curve.dice, start=1)) if outcome is not None else {}
    told = {}
    if outcome is not None:
        told = {"seconds": list(outcome.seconds), "folder": outcome.folder, "error": outcome.error}
    value = outcome.value if outcome is not None and state is TrialState.COMPLETE else None
    if state is TrialState.PRUNED and outcome is not None and outcome.curve.dice:
        value = outcome.curve.dice[-1]  # as Optuna's own loop has it
    trial = create_trial(
        state=state,
        value=value,
        params=proposal.values,
        distributions={key: space[key] for key in proposal.values},
        intermediate_values=values,
        user_attrs=told,
        system_attrs=proposal.marks,
    )
    if outcome is not None and outcome.times_ms is not None:
        trial.datetime_start, trial.datetime_complete = map(_datetime, outcome.times_ms)
    return trial


def _datetime(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000)


def curve_of(trial: FrozenTrial) -> Curve:
    """Return the curve of an ended trial."""
    return Curve(trial.state.name, tuple(trial.intermediate_values[step] for step in sorted(trial.intermediate_values)))


def read_trials(storage: str, entries: Mapping[str, Entry]) -> pd.DataFrame:
    """Return the ended trials of studies, those of a study that is not there left out.

    Args:
        storage: address of Optuna's database.
        entries: by name of the study.

    Returns:
        A row per trial: notation, split, role, number, round (from 0), state, is_chosen, value (validation Dice of a
        complete one, the last one of a pruned one), params (tuned values, as a dict), dice and seconds (of each epoch).

    Raises:
        InputError: the storage cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        there = set(optuna.get_all_study_names(storage))
        studies = {name: optuna.load_study(study_name=name, storage=storage) for name in there & entries.keys()}
    except Exception as error:  # of Optuna, SQLAlchemy or a driver
        raise InputError(f"{storage} cannot be read: {one_line(error)}") from error
    rows = []
    for name, own in studies.items():
        entry, size = entries[name], int(own.user_attrs.get("round", 1))
        trials = own.get_trials(deepcopy=False)
        best = best_of(trials)
        for trial in trials:
            about = {"notation": entry.notation, "split": entry.split, "role": entry.role, "number": trial.number}
            state = {"round": trial.number // size, "state": trial.state.name, "is_chosen": trial is best}
            curves = {"dice": list(curve_of(trial).dice), "seconds": list(trial.user_attrs.get("seconds", []))}
            rows.append({**about, **state, "value": trial.value, "params": trial.params, **curves})
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
    """Return the trial with the best validation Dice of those that came to their end; the first of equal ones.

    No test score enters: none is computed before the choice.
    """
    ended = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    return max(ended, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)
