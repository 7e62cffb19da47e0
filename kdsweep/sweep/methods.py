"""Find the methods of a sweep's jobs, and refuse what would make their comparison unfair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdsweep.config import grid, identity
from kdsweep.core.errors import InputError
from kdsweep.sweep import plan
from kdsweep.sweep.plan import Job
from kdsweep.tuning import space
from kdsweep.tuning.study import Study

Reader = Callable[[Sequence[Sequence[str]]], list[Job]]


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
    """

    search: Mapping[str, Any]
    trials: int = 16
    round: int = 8
    sampler: Mapping[str, Any] = field(default_factory=dict)
    pruner: Mapping[str, Any] = field(default_factory=dict)
    storage: str | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "round"):
            if getattr(self, name) < 1:
                raise InputError(f"hydra.sweeper.{name}={getattr(self, name)} is not allowed: it must be at least 1")
        for name in ("search", "sampler", "pruner"):
            if not isinstance(own := getattr(self, name), Mapping):
                raise InputError(f"hydra.sweeper.{name}={own} is not allowed: it must be {{KEY: VALUE, ...}}")


@dataclass(eq=False)
class Method:
    """One method on one split: a job of the sweep as it is configured, and its study.

    Attributes:
        job: the first one of the method, by whose seed the trials are trained.
        role: ``distilled``, ``baseline`` or ``teacher``.
        overrides: of its trials before those of the study: of the job, the chosen Teacher.
        space: the part of the search space that it uses.
        study: of the trials, once the storage is open.
    """

    job: Job
    role: str
    overrides: list[str]
    space: space.Space
    study: Study = field(init=False)

    @property
    def name(self) -> str:
        """Return the name of its study."""
        cell = self.cell
        return f"{self.job.settings.sweep_name}/{cell.notation}/split{cell.split}/{key_of(cell)[:8]}"

    @property
    def cell(self) -> grid.Cell:
        """Return the cell as it is configured: the job's own, or its Teacher."""
        cell = self.job.cell.teacher if self.role == "teacher" else self.job.cell
        assert cell is not None
        return cell

    @property
    def epochs(self) -> int:
        """Return the epochs of a complete trial."""
        settings = self.job.settings
        return settings.teacher_epochs if self.role == "teacher" else settings.train.epochs

    @property
    def seed(self) -> int:
        """Return the seed of the batches of its trials."""
        return self.job.settings.teacher.seed if self.role == "teacher" else self.job.settings.seed

    def chosen_overrides(self) -> list[str]:
        """Return the overrides of the chosen trial; none if nothing is tuned or no trial is complete."""
        best = self.study.best() if self.space else None
        return overrides_of(best.params) if best is not None and best.number else []


def check_jobs(jobs: list[Job], *, whole: space.Space, waits: bool, read: Reader) -> None:
    """Raise InputError if jobs cannot be tuned fairly.

    Args:
        jobs: as they are configured.
        whole: the search space.
        waits: whether the launcher waits for its groups.
        read: reads jobs from their overrides.
    """
    if not waits:
        raise InputError("hydra.launcher.wait=false: the next trials depend on those before; leave it out")
    for key in ("store", "sweep_name"):
        if len(values := {getattr(job.settings, key) for job in jobs}) > 1:
            raise InputError(f"{key}={','.join(sorted(values))}: one command tunes one sweep; give one value")
    for key in plan.swept_keys([job.overrides for job in jobs], [job.settings for job in jobs]):
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
            read([[*job.overrides, *overrides_of({key: value})]])


def methods_of(jobs: list[Job], *, whole: space.Space) -> tuple[list[Method], list[Method]]:
    """Return the Students and the Teachers of jobs, each once for all its seeds; of the Teachers those to be tuned.

    Args:
        jobs: as they are configured.
        whole: the search space.
    """
    students: dict[str, Method] = {}
    teachers: dict[str, Method] = {}
    for job in jobs:
        params = identity.params(job.settings)
        for role, cell in _cells(job):
            methods = teachers if role == "teacher" else students
            used = space.used(whole, role=role, params=params)
            methods.setdefault(key_of(cell), Method(job, role, list(job.overrides), used))
    return list(students.values()), [own for own in teachers.values() if own.space]


def key_of(cell: grid.Cell) -> str:
    """Return what the seeds of one method on one split share."""
    evidence = {key: value for key, value in cell.evidence.items() if key != "teacher"}
    return grid.digest([cell.role, cell.notation, cell.split, cell.settings, evidence])


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """Return values as overrides; trial 0 has none, since the configured settings may be outside the space."""
    return [f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()]


def _cells(job: Job) -> list[tuple[str, grid.Cell]]:
    """Return the role and the cell of a job's Student, and of its Teacher if it has one."""
    teacher = job.cell.teacher
    return [(job.cell.role, job.cell), *([("teacher", teacher)] if teacher is not None else [])]
