"""End trials of a lockstep group early: report each epoch to Optuna's storage, then ask its pruner.

All trials of a study in a group reach an epoch together. All report it before the pruner is asked about the first, and
it is asked in the order of their numbers, so no answer depends on which trial was faster. A pruned trial has that
state in the storage at once; a process that resumes reports the epochs that the storage lacks, and asks from there.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import optuna
from optuna.pruners import BasePruner
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from kdsweep.core import databases
from kdsweep.core.errors import InputError, one_line

KEY = "hydra.sweeper.pruner"
FIRST_RUNG, REDUCTION = 6, 3

Curve = Sequence[tuple[float, float]]  # validation Dice and seconds of each epoch


class LockstepHalving(BasePruner):
    """Successive halving of trials side by side: the best third after a sixth of the epochs, of these after half.

    Algorithm 1 of Jamieson and Talwalkar 2016. ``optuna.pruners.SuccessiveHalvingPruner`` compares a trial with those
    that were asked about before it; this one with all that have reached the epoch: those of its group, which have
    equal ``batches``, and those of earlier rounds. Its answers follow from the reported values alone.

    Args:
        epochs: of a complete trial.
        round_size: trials of a round.
    """

    def __init__(self, *, epochs: int, round_size: int) -> None:
        first = -(-epochs // FIRST_RUNG)
        self.rungs, self.round_size = (first, first * REDUCTION), round_size

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether a trial is not among the best third at a rung."""
        step = trial.last_step
        if step not in self.rungs:
            return False
        peers = [own for own in study.get_trials(deepcopy=False) if self._is_compared(own, trial)]
        values = sorted(own.intermediate_values[step] for own in peers if step in own.intermediate_values)
        return trial.intermediate_values[step] < values[-max(1, len(values) // REDUCTION)]

    def _is_compared(self, other: FrozenTrial, trial: FrozenTrial) -> bool:
        is_earlier = other.number // self.round_size < trial.number // self.round_size
        return is_earlier or other.user_attrs.get("batches") == trial.user_attrs.get("batches")


def make(options: Mapping[str, Any], *, epochs: int, round_size: int) -> BasePruner:
    """Make a pruner from its options: one of Optuna's, or ``LockstepHalving``.

    Args:
        options: ``_target_`` and arguments, or none of them.
        epochs: of a complete trial.
        round_size: trials of a round.

    Raises:
        InputError: there is no such pruner, or it needs a number that it would guess from complete trials.
    """
    if not options:
        return LockstepHalving(epochs=epochs, round_size=round_size)
    name = str(options.get("_target_", "")).rpartition(".")[2]
    needed = {"SuccessiveHalvingPruner": ("min_resource", "auto"), "HyperbandPruner": ("max_resource", "auto")}
    argument, default = needed.get(name, ("_target_", 0))
    if name in needed and not isinstance(options.get(argument, default), int):
        raise InputError(f"{KEY}.{argument} is missing: {name} needs a number of epochs, from 1 to {epochs}")
    try:
        pruner = hydra.utils.instantiate(dict(options))
    except Exception as error:
        raise InputError(f"{KEY}={dict(options)}: {one_line(error.__cause__ or error)}") from error
    if not isinstance(pruner, BasePruner):
        raise InputError(f"{KEY}._target_={options.get('_target_')} is not one of optuna.pruners")
    return pruner


@contextlib.contextmanager
def using(storage: str) -> Iterator[None]:
    """Turn every error of Optuna, SQLAlchemy or a driver into one line that names the storage.

    Args:
        storage: its address.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        where = f"hydra.sweeper.storage={databases.shown(storage)}"
        raise InputError(f"{where} cannot be used ({one_line(error)}); check it and run the same command") from error


def open_storage(storage: str) -> RDBStorage:
    """Open Optuna's database; a SQLite file waits for its other writers.

    Args:
        storage: its address.

    Raises:
        InputError: it cannot be opened.
    """
    options = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else None
    with using(storage):
        return RDBStorage(storage, engine_kwargs=options)


@dataclass
class Trial:
    """A trial of a group, open in Optuna's storage.

    Attributes:
        study: that it belongs to.
        trial: for reports and questions.
        epochs: of a complete trial of the study.
        reported: epochs that the storage holds.
        is_pruned: whether the storage says so.
    """

    study: optuna.Study
    trial: optuna.Trial
    epochs: int
    reported: int
    is_pruned: bool

    def report(self, curve: Curve) -> None:
        """Report the epochs that the storage lacks."""
        for dice, _ in curve[self.reported :]:
            self.reported += 1
            self.trial.report(dice, self.reported)

    def prune(self, curve: Curve) -> None:
        """End the trial if the pruner says so."""
        if self.trial.should_prune():
            self.trial.set_user_attr("seconds", [seconds for _, seconds in curve])
            self.study.tell(self.trial, state=TrialState.PRUNED)
            self.is_pruned = True


@dataclass(frozen=True)
class Pruning:
    """Reports and prunes the trials of a lockstep group; plain values, since another process receives it.

    Attributes:
        storage: address of Optuna's database.
        options: of the pruner, for ``make``.
        trials: study and number of the trials that each cell trains, by its folder; equal settings share one.
        host: machine of the command, the only one that may write to a SQLite file.
    """

    storage: str
    options: Mapping[str, Any]
    trials: Mapping[Path, Sequence[tuple[str, int]]]
    host: str = field(default_factory=platform.node)

    def begin(self) -> Callable[[int, Mapping[Path, Curve]], set[Path]]:
        """See ``training.runner.Pruning``.

        Raises:
            InputError: the storage cannot be used from this machine.
        """
        if self.storage.startswith("sqlite") and self.host != platform.node():
            raise InputError(
                f"hydra.sweeper.storage={self.storage}: workers on several machines cannot share a SQLite file; "
                "name a database that all reach, hydra.sweeper.storage=postgresql+psycopg://USER@HOST/optuna"
            )
        with using(self.storage):
            opened = self._open()

        def after(epochs: int, curves: Mapping[Path, Curve]) -> set[Path]:
            running = [(own, curves[folder]) for folder in curves for own in opened[folder] if not own.is_pruned]
            with using(self.storage):
                for own, curve in running:
                    own.report(curve)
                for own, curve in sorted(running, key=lambda pair: pair[0].trial.number):
                    # What was reported beyond this epoch was asked about before this process began.
                    if own.reported == epochs < own.epochs:
                        own.prune(curve)
            return {folder for folder in curves if all(own.is_pruned for own in opened[folder])}

        return after

    def _open(self) -> dict[Path, list[Trial]]:
        storage, sampler = open_storage(self.storage), optuna.samplers.RandomSampler()  # which has nothing to sample
        studies: dict[str, optuna.Study] = {}
        opened: dict[Path, list[Trial]] = {folder: [] for folder in self.trials}
        for folder, (name, number) in ((folder, own) for folder, trials in self.trials.items() for own in trials):
            if name not in studies:
                studies[name] = optuna.load_study(study_name=name, storage=storage, sampler=sampler)
            study = studies[name]
            epochs, round_size = study.user_attrs["epochs"], int(study.user_attrs["round"])
            study.pruner = make(self.options, epochs=epochs, round_size=round_size)
            stored = study.get_trials(deepcopy=False)[number]
            trial = optuna.Trial(study, stored._trial_id)
            is_pruned = stored.state is TrialState.PRUNED
            opened[folder].append(Trial(study, trial, epochs, stored.last_step or 0, is_pruned))
        return opened
