"""One round of tuning: ask the studies of all methods for trials, group those that train in lockstep.

Runs without torch; the launcher trains the groups, and the process of each reports and prunes (pruning.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdsweep.config import grid, identity
from kdsweep.config.grid import Cell
from kdsweep.config.identity import Job
from kdsweep.tuning import space
from kdsweep.tuning.pruning import Pruning
from kdsweep.tuning.study import Study

Reader = Callable[[Sequence[Sequence[str]]], Sequence[Job]]


@dataclass(eq=False)
class Method:
    """One method on one split: a job of the sweep as it is configured, and its study.

    Attributes:
        job: of the sweep, the first one of the method, by whose seed the trials are trained.
        role: ``distilled``, ``baseline`` or ``teacher``.
        space: the part of the search space that it uses.
        teacher: overrides by which its trials learn from the chosen Teacher.
        study: of the trials, once the storage is open.
    """

    job: Any
    role: str
    space: space.Space
    teacher: list[str] = field(default_factory=list)
    study: Study = field(init=False)

    @property
    def cell(self) -> Cell:
        """Return the cell as it is configured: that of the job, or its Teacher."""
        return cell_of(self.job, self.role)

    @property
    def name(self) -> str:
        """Return the name of its study."""
        cell = self.cell
        return f"{self.job.settings.sweep_name}/{cell.notation}/split{cell.split}/{key_of(cell)[:8]}"

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
        return [] if best is None else overrides_of(best.number, best.params)


@dataclass(frozen=True)
class Trial:
    """A trial that has not ended.

    Attributes:
        method: that it belongs to.
        number: in its study.
        job: that trains it; the title of its cell, or of the Teacher, has the values of the trial.
    """

    method: Method
    number: int
    job: Any

    @property
    def cell(self) -> Cell:
        """Return the cell that is trained."""
        return cell_of(self.job, self.method.role)


def methods_of(jobs: Sequence[Job], *, whole: space.Space) -> tuple[list[Method], list[Method]]:
    """Return the Students and the Teachers of jobs, each once for all its seeds; of the Teachers those to be tuned.

    Args:
        jobs: as they are configured.
        whole: the search space.
    """
    students: dict[str, Method] = {}
    teachers: dict[str, Method] = {}
    for job in jobs:
        params = identity.params(job.settings)
        for role in roles(job):
            method = Method(job, role, space.used(whole, role=role, params=params))
            (teachers if role == "teacher" else students).setdefault(key_of(method.cell), method)
    return list(students.values()), [method for method in teachers.values() if method.space]


def roles(job: Job) -> list[str]:
    """Return the role of a job's Student, and ``teacher`` if it has one."""
    return [job.cell.role, *(["teacher"] if job.cell.teacher is not None else [])]


def cell_of(job: Job, role: str) -> Cell:
    """Return the cell of a job, or for the role ``teacher`` its Teacher."""
    cell = job.cell.teacher if role == "teacher" else job.cell
    assert cell is not None
    return cell


def key_of(cell: Cell) -> str:
    """Return what the seeds of one method on one split share."""
    evidence = {key: value for key, value in cell.evidence.items() if key != "teacher"}
    return grid.digest([cell.role, cell.notation, cell.split, cell.settings, evidence])


def overrides_of(number: int, values: Mapping[str, Any]) -> list[str]:
    """Return the values of a trial as overrides; none of trial 0, whose settings may be outside the space."""
    typed = [f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()]
    return typed if number else []


def ask(method: Method, *, sampler: Mapping[str, Any], count: int, read: Reader) -> list[Trial]:
    """Return the trials of a method up to a number that have not ended.

    Args:
        method: its study is asked for those that it lacks.
        sampler: for ``Study.ask``.
        count: of the trials.
        read: reads jobs from their overrides.
    """
    running = method.study.ask(sampler, count=count)
    jobs = read([[*method.job.overrides, *method.teacher, *overrides_of(own.number, own.params)] for own in running])
    trials = []
    for own, job in zip(running, jobs, strict=True):
        trial = Trial(method, own.number, _named(job, own.params, role=method.role))
        folder = trial.cell.folder.relative_to(trial.cell.store)
        batches = identity.batches_key(job.settings, seed=method.seed)
        method.study.annotate(own.number, {"folder": str(folder), "batches": batches})
        trials.append(trial)
    return trials


def _named(job: Job, values: Mapping[str, Any], *, role: str) -> Job:
    """Return a job whose title has the values of its trial."""
    named = replace(cell_of(job, role), variant={key: f"{value}" for key, value in values.items()})
    return replace(job, cell=replace(job.cell, teacher=named) if role == "teacher" else named)


def groups_of(trials: Sequence[Trial], *, largest: int) -> list[list[Trial]]:
    """Form lockstep groups of trials that can share every batch; those of a study stay together.

    Args:
        trials: of a round.
        largest: trials of several studies in a group, at most.
    """
    groups: list[list[Trial]] = []
    keys = [identity.batches_key(trial.job.settings, seed=trial.method.seed) for trial in trials]
    for members in grid.group_by(keys):
        studies: dict[Method, list[Trial]] = {}
        for position in members:
            studies.setdefault(trials[position].method, []).append(trials[position])
        group: list[Trial] = []
        for part in sorted(studies.values(), key=lambda part: part[0].job.cell.evidence.get("teacher", "")):
            if group and len(group) + len(part) > largest:
                groups.append(group)
                group = []
            group = [*group, *part]
        groups.append(group)
    return groups


def pruning_of(group: Sequence[Trial], *, storage: str, options: Mapping[str, Any]) -> Pruning:
    """Return the pruning of a group; trials with equal values share a cell.

    Args:
        group: that is trained in lockstep.
        storage: address of Optuna's database.
        options: of the pruner.
    """
    trials: dict[Any, list[tuple[str, int]]] = {}
    for trial in group:
        trials.setdefault(trial.cell.folder, []).append((trial.method.name, trial.number))
    return Pruning(storage=storage, options=options, trials=trials)
