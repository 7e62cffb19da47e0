"""End trials of a lockstep group early: report each epoch to Optuna's storage, then ask its pruner.

All trials of a study in a group reach an epoch together. All report it before the pruner decides about the first, and
it decides in the order of their numbers, so no answer depends on which trial was faster. A pruned trial has that
state in the storage at once; a process that resumes reports the epochs that the storage lacks, and asks from there.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from kdsweep.core.errors import InputError
from kdsweep.tuning import study as studies

FIRST_RUNG, REDUCTION = 6, 3

Curve = Sequence[tuple[float, float]]  # validation Dice and seconds of each epoch


class LockstepHalving(BasePruner):
    """Successive halving of trials side by side: the best third after a sixth of the epochs, of these after half.

    Algorithm 1 of Jamieson and Talwalkar 2016. ``optuna.pruners.SuccessiveHalvingPruner`` compares a trial with those
    decided before it; this one with all that have reached the epoch: those of its group, which have equal
    ``batches``, and those of earlier rounds. Its answers follow from the reported values alone.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether a trial is not among the best third at a rung."""
        attrs, step = study.user_attrs, trial.last_step
        first, size = -(-attrs["epochs"] // FIRST_RUNG), int(attrs["round"])
        if step is None or step not in (first, first * REDUCTION):
            return False
        peers = [
            other
            for other in studies.trials_of(study)
            if other.number // size < trial.number // size
            or other.user_attrs.get("batches") == trial.user_attrs.get("batches")
        ]
        values = sorted(peer.intermediate_values[step] for peer in peers if step in peer.intermediate_values)
        return trial.intermediate_values[step] < values[-max(1, len(values) // REDUCTION)]


def make(options: Mapping[str, Any]) -> BasePruner:
    """Return the pruner that these options name; without them ``LockstepHalving``."""
    pruner: BasePruner = studies.make(options, key=studies.PRUNER) if options else LockstepHalving()
    return pruner


class Trial:
    """A trial of a group, open in Optuna's storage."""

    def __init__(self, storage: RDBStorage, name: str, number: int, pruner: BasePruner) -> None:
        sampler = optuna.samplers.RandomSampler()  # which has nothing to sample
        self.study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
        stored = studies.trials_of(self.study)[number]
        self.trial, self.epochs = optuna.Trial(self.study, stored._trial_id), self.study.user_attrs["epochs"]
        self.reported, self.is_pruned = stored.last_step or 0, stored.state is TrialState.PRUNED

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
    """Reports and prunes the trials of a lockstep group; plain values, since another process receives it."""

    storage: str  # address of Optuna's database
    options: Mapping[str, Any]  # of the pruner, for ``make``
    trials: Mapping[Path, Sequence[tuple[str, int]]]  # by folder of a cell its studies and numbers: equal values share
    host: str = field(default_factory=platform.node)  # of the command, the only one that may write to a SQLite file

    def begin(self) -> Callable[[int, Mapping[Path, Curve]], set[Path]]:
        """See ``training.lockstep.Pruning``.

        Raises:
            InputError: the storage cannot be used from this machine.
        """
        if self.storage.startswith("sqlite") and self.host != platform.node():
            raise InputError(
                f"hydra.sweeper.storage={self.storage}: workers on several machines cannot share a SQLite file; "
                "name a database that all reach, hydra.sweeper.storage=postgresql+psycopg://USER@HOST/optuna"
            )
        storage = studies.open_storage(self.storage)
        with studies.using(self.storage):
            opened = {
                folder: [Trial(storage, name, number, make(self.options)) for name, number in trials]
                for folder, trials in self.trials.items()
            }

        def after(epochs: int, curves: Mapping[Path, Curve]) -> set[Path]:
            running = [(trial, curves[name]) for name in curves for trial in opened[name] if not trial.is_pruned]
            running.sort(key=lambda pair: pair[0].trial.number)
            with studies.using(self.storage):
                for trial, curve in running:
                    trial.report(curve)
                for trial, curve in running:
                    # What was reported beyond this epoch was decided before this process began.
                    if trial.reported == epochs < trial.epochs:
                        trial.prune(curve)
            return {folder for folder in curves if all(trial.is_pruned for trial in opened[folder])}

        return after
