"""End trials of a lockstep group early: by Optuna's pruners, asked so that no answer depends on who is first.

Optuna's pruners are made for trials that run at different times. In a group all trials of a method reach an epoch
together, so each is judged as if all the others had reached it before: what is still in training counts as complete
up to there. An answer then follows from the curves alone. A resumed group repeats those given before the break.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState, create_trial

from kdsweep.core.errors import InputError, one_line

KEY = "hydra.sweeper.pruner"
FIRST_RUNG, REDUCTION = 6, 3


@dataclass(frozen=True)
class Curve:
    """The validation Dice of a trial that has ended.

    Attributes:
        state: how it ended: ``COMPLETE``, ``PRUNED`` or ``FAIL``.
        dice: validation Dice after each epoch.
    """

    state: str
    dice: tuple[float, ...]


def make(options: Mapping[str, Any], *, epochs: int) -> BasePruner:
    """Make a pruner from its options.

    The default is successive halving (Jamieson and Talwalkar 2016, Algorithm 1, as Li et al. 2020 make it): the best
    third of the trials goes on after a sixth of the epochs, and the best third of these after half of them.

    Args:
        options: ``_target_`` and arguments, or none of them.
        epochs: of a whole trial.

    Raises:
        InputError: there is no such pruner, or it needs to know a number that it would guess from complete trials.
    """
    if not options:
        first = -(-epochs // FIRST_RUNG)
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=REDUCTION)
    name = str(options.get("_target_", "")).rpartition(".")[2]
    needed = {"SuccessiveHalvingPruner": ("min_resource", "auto"), "HyperbandPruner": ("max_resource", "auto")}
    if name in needed:
        argument, default = needed[name]
        if not isinstance(options.get(argument, default), int):
            raise InputError(f"{KEY}.{argument} is missing: {name} is given a number of epochs, from 1 to {epochs}")
    try:
        pruner = hydra.utils.instantiate(dict(options))
    except Exception as error:
        raise InputError(f"{KEY}={dict(options)}: {one_line(error.__cause__ or error)}") from error
    if not isinstance(pruner, BasePruner):
        raise InputError(f"{KEY}._target_={options.get('_target_')} is not one of optuna.pruners")
    return pruner


@dataclass
class Judge:
    """Decides for the trials of one study that share their batches, epoch by epoch.

    Attributes:
        name: of the study: Hyperband draws a trial's bracket from it.
        pruner: asked.
        ended: earlier trials of the study, by number.
        pruned: after how many epochs each trial was ended, by number.
        marks: what the pruner has noted of each trial, such as the rungs that it has reached.
    """

    name: str
    pruner: BasePruner
    ended: Mapping[int, Curve]
    pruned: dict[int, int] = field(default_factory=dict)
    marks: dict[int, dict[str, Any]] = field(default_factory=dict)

    def after(self, step: int, curves: Mapping[int, Sequence[float]]) -> set[int]:
        """Return the trials that end now; to be called for each epoch from the first on, in order.

        Args:
            step: number of epochs that the trials have behind them.
            curves: validation Dice after each epoch of the trials of this group, by number; a longer one is cut.
        """
        known = dict(self.ended)
        for number, dice in curves.items():
            epochs = self.pruned.get(number)
            known[number] = Curve("COMPLETE" if epochs is None else "PRUNED", tuple(dice[:epochs]))
        here = {number for number, curve in known.items() if len(curve.dice) >= step}
        judged = sorted(here & curves.keys() - self.pruned.keys())
        if not judged:
            return set()
        arrived = self._study(known, step, running=here)  # all of them, to see what the pruner notes of each
        for number in sorted(here):
            self.pruner.prune(arrived, arrived.get_trials(deepcopy=False)[number])
        marks = {trial.number: dict(trial.system_attrs) for trial in arrived.get_trials(deepcopy=False)}
        before, self.marks = self.marks, marks
        leave = {number for number in judged if self._ends(number, known, step, before=before.get(number, {}))}
        self.pruned |= dict.fromkeys(leave, step)
        return leave

    def _ends(self, number: int, known: Mapping[int, Curve], step: int, *, before: dict[str, Any]) -> bool:
        """Return whether the pruner ends a trial that comes to this epoch after all the others."""
        study = self._study(known, step, running={number}, marks={**self.marks, number: before})
        return self.pruner.prune(study, study.get_trials(deepcopy=False)[number])

    def _study(
        self,
        known: Mapping[int, Curve],
        step: int,
        *,
        running: set[int],
        marks: Mapping[int, dict[str, Any]] | None = None,
    ) -> optuna.Study:
        """Return a study in memory in which each trial is as far as this epoch; numbers are those of the real one."""
        study = optuna.create_study(study_name=self.name, direction="maximize", pruner=self.pruner)
        marks = self.marks if marks is None else marks
        for number in range(max(known) + 1):
            curve = known.get(number, Curve("FAIL", ()))
            state = TrialState.RUNNING if number in running else TrialState[curve.state if curve.dice else "FAIL"]
            study.add_trial(_frozen(curve.dice[:step], state=state, marks=marks.get(number, {})))
        return study


def _frozen(dice: Sequence[float], *, state: TrialState, marks: dict[str, Any]) -> FrozenTrial:
    value = max(dice) if state is TrialState.COMPLETE else None
    values = dict(enumerate(dice, start=1))
    return create_trial(state=state, value=value, intermediate_values=values, system_attrs=marks)


@dataclass(frozen=True)
class Pruning:
    """Pruning of a lockstep group's trials; plain values, for it is sent to another process.

    Attributes:
        options: of the pruner, for ``make``.
        epochs: of a whole trial.
        trials: study and number of each trial, by the folder of its cell.
        ended: by study its earlier trials, by number.
    """

    options: Mapping[str, Any]
    epochs: int
    trials: Mapping[Path, tuple[str, int]]
    ended: Mapping[str, Mapping[int, Curve]]

    def begin(self) -> Callable[[int, Mapping[Path, Sequence[float]]], set[Path]]:
        """See ``training.runner.Pruning``: asks the judge of each study."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        names = dict.fromkeys(name for name, _ in self.trials.values())
        judges = [Judge(name, make(self.options, epochs=self.epochs), self.ended.get(name, {})) for name in names]

        def after(step: int, curves: Mapping[Path, Sequence[float]]) -> set[Path]:
            leave = set()
            for judge in judges:
                here = [folder for folder in curves if self.trials[folder][0] == judge.name]
                own = {self.trials[folder][1]: folder for folder in here}
                ended = judge.after(step, {number: curves[folder] for number, folder in own.items()})
                leave |= {own[number] for number in ended}
            return leave

        return after
