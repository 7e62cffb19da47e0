"""Find the methods of a sweep's jobs, give each its budget, and refuse what would make their comparison unfair."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdsweep.config import grid, identity
from kdsweep.core.errors import InputError
from kdsweep.sweep import plan
from kdsweep.sweep.executors import worker
from kdsweep.sweep.executors.worker import Process
from kdsweep.sweep.plan import Job
from kdsweep.tuning import book, space
from kdsweep.tuning.study import Study

log = logging.getLogger(__name__)

Reader = Callable[[Sequence[Sequence[str]]], list[Job]]
UNITS = ("epochs", "steps", "seconds")


@dataclass(frozen=True)
class Options:
    """Options of the sweeper beyond the jobs; see conf/experiment/tuned.yaml.

    Attributes:
        search: the keys that are tuned, and their values.
        trials: of each method on each split, the configured settings among them.
        round: how many of them are trained side by side; what a round has shown guides the sampler in the next.
        sampler: ``_target_`` and arguments of one of Optuna's; empty for TPE.
        pruner: the same of a pruner; empty for successive halving (``pruning.make``).
        storage: address of Optuna's database; None for a SQLite file in the store.
        budget: of each trial, such as ``{"steps": 2000}``; empty for ``train.epochs``.
    """

    search: Mapping[str, Any]
    trials: int = 16
    round: int = 8
    sampler: Mapping[str, Any] = field(default_factory=dict)
    pruner: Mapping[str, Any] = field(default_factory=dict)
    storage: str | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("trials", "round"):
            if getattr(self, name) < 1:
                raise InputError(f"hydra.sweeper.{name}={getattr(self, name)} is not allowed: it must be at least 1")
        for name in ("search", "sampler", "pruner", "budget"):
            if not isinstance(own := getattr(self, name), Mapping):
                raise InputError(f"hydra.sweeper.{name}={own} is not allowed: it must be {{KEY: VALUE, ...}}")
        if self.budget:
            told = dict(self.budget)
            if len(told) != 1 or next(iter(told)) not in UNITS:
                raise InputError(f"hydra.sweeper.budget={told} is not allowed: it must be one of {', '.join(UNITS)}")
            ((unit, value),) = told.items()
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise InputError(f"hydra.sweeper.budget.{unit}={value} is not allowed: it must be a number > 0")


@dataclass(eq=False)
class Method:
    """One method on one split: a job of the sweep as it is configured, and its study.

    Attributes:
        job: the first one of the method, by whose seed the trials are trained.
        role: ``distilled``, ``baseline`` or ``teacher``.
        words: overrides of its trials before those of the study: of the job, the budget, the chosen Teacher.
        space: the part of the search space that it uses.
        name: of the study.
        study: of the trials, once the storage is open.
    """

    job: Job
    role: str
    words: list[str]
    space: space.Space
    name: str
    study: Study = field(init=False)

    @property
    def cell(self) -> grid.Cell:
        """Return the cell as it is configured: the job's own, or its Teacher."""
        cell = self.job.cell.teacher if self.role == "teacher" else self.job.cell
        assert cell is not None
        return cell

    @property
    def epochs(self) -> int:
        """Return the epochs of a whole trial."""
        settings = self.job.settings
        return settings.teacher_epochs if self.role == "teacher" else settings.train.epochs

    @property
    def seed(self) -> int:
        """Return the seed of the batches of its trials."""
        return self.job.settings.teacher.seed if self.role == "teacher" else self.job.settings.seed

    def chosen_words(self) -> list[str]:
        """Return the overrides of the chosen trial; none without a study, or where no trial came to its end.

        Trial 0 has the configured settings, which may lie outside the space.
        """
        best = self.study.best() if self.space else None
        return [] if best is None or best.number == 0 else words_of(best.params)


def check_jobs(jobs: list[Job], words: list[list[str]], *, whole: space.Space, waits: bool, read: Reader) -> None:
    """Raise InputError if jobs cannot be tuned fairly.

    Args:
        jobs: as they are configured.
        words: their overrides.
        whole: the search space.
        waits: whether the launcher waits for its groups.
        read: reads jobs from their overrides.
    """
    if not waits:
        raise InputError("hydra.launcher.wait=false: the next trials depend on those before; leave it out")
    for key in ("store", "sweep_name"):
        if len(values := {getattr(job.settings, key) for job in jobs}) > 1:
            raise InputError(f"{key}={','.join(sorted(values))}: one command tunes one sweep; give one value")
    for key in plan.swept_keys(words, [job.settings for job in jobs]):
        if key in whole:
            raise InputError(f"{space.KEY}: {key} is swept by the command too; tune it or sweep it")
    for job in jobs:
        train, taught = job.settings.train, job.settings.is_taught
        if train.monitor != "dice":
            raise InputError(f"train.monitor={train.monitor}: all methods are chosen by one measure; give dice")
        if taught and job.settings.teacher.monitor != "dice":
            raise InputError("teacher.monitor=loss: all methods are chosen by one measure; give dice")
        if train.patience < train.epochs:
            raise InputError(
                f"train.patience={train.patience}: a method would be stopped by its own curve, so that budgets "
                "differ; give train.patience=${train.epochs}"
            )
    parts = [(role, job) for job in jobs for role, _ in _cells(job)]
    idle = [key for key in whole if not any(_uses(whole, key, role, job) for role, job in parts)]
    if idle:
        names = ", ".join(dict.fromkeys(job.cell.notation for job in jobs))
        raise InputError(f"{space.KEY}: {idle[0]} is used by none of {names}; {space.KEY}.{idle[0]}=null leaves it out")
    _check_ends(jobs, whole, read)


def _uses(whole: space.Space, key: str, role: str, job: Job) -> bool:
    params = identity.params(job.settings)
    return key in space.used({key: whole[key]}, role=role, params=params)


def _check_ends(jobs: list[Job], whole: space.Space, read: Reader) -> None:
    """Raise InputError if a key does not take the values that bound its range."""
    for key, values in space.ends(whole).items():
        job = next(job for job in jobs if any(_uses(whole, key, role, job) for role, _ in _cells(job)))
        for value in values:
            read([[*job.overrides, *words_of({key: value})]])


def with_budget(words: list[list[str]], jobs: list[Job], *, budget: Mapping[str, Any]) -> list[list[str]]:
    """Return the overrides of the jobs with the epochs that the budget gives to each.

    Args:
        words: overrides of the jobs.
        jobs: as they are configured.
        budget: such as ``{"steps": 2000}``; empty for the epochs that they have.
    """
    if not budget:
        return words
    ((unit, amount),) = budget.items()
    own = [(cell, job) for job in jobs for _, cell in _cells(job)]
    if unit == "seconds":
        epoch_s = _epoch_s(jobs)
        epochs = {key_of(cell): int(amount / epoch_s[key_of(cell)]) for cell, _ in own}
    else:
        epochs = {key_of(cell): int(amount) // (_steps(job) if unit == "steps" else 1) for cell, job in own}
    for cell, _ in own:
        if epochs[key_of(cell)] < 1:
            raise InputError(f"hydra.sweeper.budget.{unit}={amount}: less than one epoch of {cell.title}")
    # Equal for all: a Teacher is the same one for whatever method it teaches.
    longest = f"train.patience={max(epochs.values())}"
    return [[*typed, *_epochs_words(job, epochs), longest] for typed, job in zip(words, jobs, strict=True)]


def _epoch_s(jobs: list[Job]) -> dict[str, float]:
    """Return the seconds of an epoch of each method and Teacher by key, timed once and then kept in the store."""
    first = jobs[0]
    known = dict(book.read(first.cell.store, first.settings.sweep_name).epoch_s)
    missing = {key_of(cell): (job, role) for job in jobs for role, cell in _cells(job) if key_of(cell) not in known}
    if missing:
        log.info("timing an epoch of each of %d methods and Teachers, for equal seconds", len(missing))
        timed = Process(worker.time_epochs, list(missing.values())).result()
        known |= dict(zip(missing, timed, strict=True))
        book.write(first.cell.store, first.settings.sweep_name, epoch_s=known)
    return known


def methods_of(jobs: list[Job], words: list[list[str]], *, whole: space.Space) -> tuple[list[Method], list[Method]]:
    """Return the Students and the Teachers of jobs, each once for all its seeds; of the Teachers those to be tuned.

    Args:
        jobs: as they are configured.
        words: their overrides.
        whole: the search space.
    """
    students: dict[str, Method] = {}
    teachers: dict[str, Method] = {}
    for job, own in zip(jobs, words, strict=True):
        params = identity.params(job.settings)
        for role, _ in _cells(job):
            found = teachers if role == "teacher" else students
            method = Method(job, role, list(own), space.used(whole, role=role, params=params), "")
            key = key_of(method.cell)
            method.name = f"{job.settings.sweep_name}/{method.cell.notation}/split{method.cell.split}/{key[:8]}"
            found.setdefault(key, method)
    return list(students.values()), [own for own in teachers.values() if own.space]


def key_of(cell: grid.Cell) -> str:
    """Return what the seeds of one method on one split share."""
    evidence = {key: value for key, value in cell.evidence.items() if key != "teacher"}
    return grid.digest([cell.role, cell.notation, cell.split, cell.settings, evidence])


def words_of(values: Mapping[str, Any]) -> list[str]:
    """Return values as overrides."""
    return [f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()]


def _steps(job: Job) -> int:
    """Return the optimizer steps of an epoch."""
    images = len(identity.split_ids(job.settings)["train"])
    return -(-images // job.settings.train.batch_size)


def _cells(job: Job) -> list[tuple[str, grid.Cell]]:
    """Return the role and the cell of a job's Student, and of its Teacher if it has one."""
    teacher = job.cell.teacher
    return [(job.cell.role, job.cell), *([("teacher", teacher)] if teacher is not None else [])]


def _epochs_words(job: Job, epochs: Mapping[str, int]) -> list[str]:
    keys = {"teacher": "teacher.epochs"}
    return [f"{keys.get(role, 'train.epochs')}={epochs[key_of(cell)]}" for role, cell in _cells(job)]
