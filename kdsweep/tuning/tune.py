"""The methods of a sweep that are tuned, each with its study and trials; the launcher trains them (sweep/tuner.py)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from kdsweep.config import grid, identity
from kdsweep.config.grid import Cell
from kdsweep.config.identity import Job
from kdsweep.core.errors import InputError
from kdsweep.tuning import space as spaces
from kdsweep.tuning import study
from kdsweep.tuning.space import Space

Read = Callable[[Sequence[Sequence[str]]], Sequence[Job]]  # returns the jobs of these overrides


@dataclass(frozen=True)
class Options:
    """Options of the sweeper beyond the jobs; see conf/experiment/tuned.yaml."""

    search: Mapping[str, Any]  # the keys that are tuned, and their values
    trials: int = 16  # of each method on each split, the configured settings among them
    round: int = 8  # trained side by side; what a round has shown guides the sampler in the next
    sampler: Mapping[str, Any] = field(default_factory=dict)  # ``_target_`` and arguments of Optuna's; empty for TPE
    pruner: Mapping[str, Any] = field(default_factory=dict)  # the same; empty for ``pruning.LockstepHalving``
    storage: str | None = None  # address of Optuna's database; None for a SQLite file in the store

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("trials", "round") and value < 1:
                raise InputError(f"hydra.sweeper.{name}={value} is not allowed: it must be at least 1")
            if name in ("search", "sampler", "pruner") and not isinstance(value, Mapping):
                raise InputError(f"hydra.sweeper.{name}={value} is not allowed: it must be {{KEY: VALUE, ...}}")


@dataclass(eq=False)
class Method:
    """One method on one split."""

    job: Job  # the first one of the method as it is configured; its cell is what the trials train, maybe a Teacher
    space: Space  # the part of the search space that it uses
    teacher: list[str] = field(default_factory=list)  # overrides by which its trials learn from the chosen Teacher
    study: optuna.Study = field(init=False)  # of its trials, once the storage is open

    @property
    def role(self) -> str:
        """Return the role of its cell."""
        return self.job.cell.role

    @property
    def name(self) -> str:
        """Return the name of its study."""
        return f"{self.job.settings.sweep_name}/{self.job.cell.run_name}/{key_of(self.job.cell)[:8]}"

    @property
    def epochs(self) -> int:
        """Return the epochs of a complete trial."""
        settings = self.job.settings
        return settings.teacher_epochs if self.role == "teacher" else settings.train.epochs

    def open(self, storage: RDBStorage, options: Options) -> None:
        """Open the study and ask for its first trials: a wrong option ends the command before anything is trained."""
        cell = self.job.cell
        with study.using(storage.url):
            self.study = optuna.create_study(
                storage=storage, study_name=self.name, direction="maximize", load_if_exists=True
            )
        fixed: dict[str, Any] = {"space": {key: spaces.in_words(values) for key, values in self.space.items()}}
        fixed |= {name: str(getattr(options, name)) for name in ("round", "sampler", "pruner")}
        study.settle(self.study, fixed | {"seed": str(cell.seed)})
        about = {"sweep": self.job.settings.sweep_name, "notation": cell.notation, "split": cell.split}
        about |= {"role": cell.role, "trials": options.trials, "epochs": self.epochs, "opened": time.time()}
        for key, value in about.items():
            self.study.set_user_attr(key, value)
        self._ask(options, min(options.round, options.trials))

    def _ask(self, options: Options, count: int) -> list[FrozenTrial]:
        params = identity.params(self.job.settings)
        configured = {key: params[key] for key in self.space if spaces.contains(self.space[key], params.get(key))}
        return study.ask(self.study, self.space, configured=configured, sampler=options.sampler, count=count)

    def trials(self, options: Options, count: int, read: Read) -> list[Trial]:
        """Return the trials up to a number that have not ended, those that the study lacks included."""
        running, trials = self._ask(options, count), []
        jobs = read([[*self.job.overrides, *self.teacher, *overrides_of(trial)] for trial in running])
        for trial, job in zip(running, jobs, strict=True):
            cell = job.cell.teacher if self.role == "teacher" and job.cell.teacher is not None else job.cell
            batches, folder = identity.batches_key(job.settings, seed=cell.seed), cell.folder.relative_to(cell.store)
            study.annotate(self.study, trial.number, folder=str(folder), batches=batches)
            titled = replace(cell, variant={key: f"{value}" for key, value in trial.params.items()})
            trials.append(Trial(self, trial.number, replace(job, cell=titled), batches))
        return trials

    def chosen(self) -> list[str]:
        """Return the overrides of the chosen trial; none if nothing is tuned or no trial is complete."""
        best = study.best_of(self.study) if self.space else None
        return [] if best is None else overrides_of(best)


@dataclass(frozen=True)
class Trial:
    """A trial that has not ended; trials with equal ``batches`` can share theirs."""

    method: Method
    number: int
    job: Job  # its cell's title has the values of the trial
    batches: str


def methods_of(jobs: Sequence[Job], space: Space) -> dict[str, Method]:
    """Return the Students and Teachers of jobs by ``key_of``, each once for all its seeds, Teachers first."""
    methods: dict[str, Method] = {}
    for job in jobs:
        for cell in filter(None, (job.cell.teacher, job.cell)):
            is_trained = not cell.members  # an ensemble is made of its members, which are trained as configured
            used = spaces.used(space, role=cell.role, params=identity.params(job.settings)) if is_trained else {}
            methods.setdefault(key_of(cell), Method(replace(job, cell=cell), used))
    return dict(sorted(methods.items(), key=lambda pair: pair[1].role != "teacher"))


def key_of(cell: Cell) -> str:
    """Return what the seeds of one method on one split share."""
    inputs = {key: value for key, value in cell.input_digests.items() if key != "teacher"}
    return grid.digest([cell.role, cell.notation, cell.split, cell.settings, inputs])


def overrides_of(trial: FrozenTrial) -> list[str]:
    """Return the values of a trial as overrides; none of trial 0, whose settings may be outside the space."""
    return [f"{key}={value}" for key, value in trial.params.items()] if trial.number else []


def check(jobs: Sequence[Job], *, space: Space, read: Read) -> None:
    """Raise InputError if these jobs, as they are configured, cannot be tuned fairly."""
    for name in ("store", "sweep_name"):
        if len(several := {getattr(job.settings, name) for job in jobs}) > 1:
            raise InputError(f"{name}={','.join(sorted(several))}: one command tunes one sweep; give one value")
    for settings in (job.settings for job in jobs):
        for name in ("train", "teacher") if settings.is_distilled else ("train",):
            if (monitor := getattr(settings, name).monitor) != "dice":
                raise InputError(f"{name}.monitor={monitor}: all methods are chosen by one measure; give dice")
    if not space:
        raise InputError(f"{spaces.KEY}: all of its keys are null, so nothing is tuned; give one its values")
    methods = list(methods_of(jobs, space).values())
    for method in reversed(methods):  # Teachers last: their patience may be that of the Students
        if method.role == "teacher" and not method.space:
            continue
        name, settings = "teacher" if method.role == "teacher" else "train", method.job.settings
        patience = settings.teacher_patience if name == "teacher" else settings.train.patience
        if patience < method.epochs:
            why = "a method would be stopped by its curve, so that budgets differ"
            raise InputError(f"{name}.patience={patience}: {why}; give {name}.patience={method.epochs}")
    overrides = {override.lstrip("+") for job in jobs for override in job.overrides}
    for key, values in space.items():
        if sum(override.startswith(f"{key}=") for override in overrides) > 1:
            raise InputError(f"{spaces.KEY}: {key} is swept by the command too; tune it or sweep it")
        user = next((method.job for method in methods if key in method.space), None)
        if user is None:
            names = ", ".join(dict.fromkeys(job.cell.notation for job in jobs))
            raise InputError(f"{spaces.KEY}: {key} is used by none of {names}; {spaces.KEY}.{key}=null leaves it out")
        read([[*user.overrides, f"{key}={value}"] for value in spaces.ends(values)])  # raises if one is not allowed


def groups_of(trials: Sequence[Trial], *, largest: int) -> list[list[Trial]]:
    """Form lockstep groups of trials that can share every batch; those of a study stay together, however many."""

    def likeness(trial: Trial) -> tuple[str, str, str]:
        return trial.batches, trial.method.job.cell.input_digests.get("teacher", ""), trial.method.name

    groups: list[list[Trial]] = []
    for _, part in itertools.groupby(sorted(trials, key=likeness), likeness):
        members = list(part)
        last = groups[-1] if groups and groups[-1][0].batches == members[0].batches else None
        if last is not None and len(last) + len(members) <= largest:
            last += members
        else:
            groups.append(members)
    return groups
