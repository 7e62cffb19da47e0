"""Tune every method of a sweep with the same budget, then train and test what was chosen.

The jobs of the sweep are the methods as they are configured. Each has a study of its own on each split (tuning/). All
trials of a round are trained side by side, and are not tested. Then the sweep is run twice by the launcher: as it is
configured, under its own name, and with the chosen settings, under that name with ``-tuned`` behind it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.core.utils import JobReturn, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from kdsweep.config import grid, identity
from kdsweep.config.composition import Composed, Composer
from kdsweep.core import databases
from kdsweep.core.errors import InputError
from kdsweep.core.progress import duration, left_s, plural
from kdsweep.runs import checkpoint, records, requests
from kdsweep.sweep import estimate, launcher, plan
from kdsweep.sweep.estimate import Preview
from kdsweep.sweep.executors import worker
from kdsweep.sweep.executors.executor import Work, run
from kdsweep.sweep.launcher import job_return
from kdsweep.sweep.methods import Method, Options, check_jobs, key_of, methods_of, with_budget, words_of
from kdsweep.sweep.plan import Job
from kdsweep.tracking.database import store_uri
from kdsweep.tuning import book, pruning, space
from kdsweep.tuning.pruning import Curve, Pruning
from kdsweep.tuning.study import Outcome, Proposal, Study, read_trials

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A proposed trial with the job that trains it."""

    method: Method
    proposal: Proposal
    job: Job

    @property
    def cell(self) -> grid.Cell:
        """Return the cell that is trained, its title with the proposed values."""
        cell = self.job.cell.teacher if self.method.role == "teacher" else self.job.cell
        assert cell is not None
        return replace(cell, variant={key: f"{value}" for key, value in self.proposal.values.items()})

    @property
    def named_job(self) -> Job:
        """Return the job with that cell."""
        if self.method.role == "teacher":
            return replace(self.job, cell=replace(self.job.cell, teacher=self.cell))
        return replace(self.job, cell=self.cell)


class Tuner(Launcher):
    """Runs the jobs of a sweep through a launcher, tuned.

    Args:
        launcher: trains the groups.
        options: of the sweeper.
    """

    def __init__(self, launcher: launcher.LockstepLauncher, options: Options) -> None:
        self.launcher, self.options = launcher, options
        self.space = space.read(options.search)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Leave it to the other launcher, which Hydra has set up."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Tune the methods that these jobs are, and run the jobs as they are configured and as they are chosen.

        Returns:
            One per run job: first those of the sweep as configured, then those that are tuned.

        Raises:
            InputError: before anything is trained, if the space, the storage or the jobs are not fit for it.
        """
        launcher = self.launcher
        setup_globals()
        configure_log(launcher.config.hydra.hydra_logging, launcher.config.hydra.verbose)
        words = [list(own) for own in job_overrides]
        jobs = self._jobs(words)
        waits = bool(getattr(launcher.executor, "wait", True))
        check_jobs(jobs, words, whole=self.space, waits=waits, read=self._jobs)
        self._check_storage(jobs)
        book.check_name(jobs[0].cell.store, jobs[0].settings.sweep_name)
        if not launcher.plan:
            launcher.executor.check(jobs)
        words = with_budget(words, jobs, budget=self.options.budget)
        jobs = self._jobs(words)
        students, teachers = methods_of(jobs, words, whole=self.space)
        if launcher.plan:
            with launcher.executor_open():
                sys.stdout.write(self._overview(students, teachers, self._preview(jobs)) + "\n")
            return [job_return(own, float("nan")) for own in words]
        with self._held(jobs[0]):
            self._open([*teachers, *students])
            if any(own.space and len(own.study.trials) < self.options.trials for own in [*teachers, *students]):
                with launcher.executor_open():
                    self._tune(students, teachers, self._preview(jobs))
        own, tuned = self._final_words(jobs, words, students, teachers)
        returns = launcher.launch([*own, *tuned], initial_job_idx)
        self._remove_checkpoints([*teachers, *students])
        return returns

    def _tune(self, students: list[Method], teachers: list[Method], preview: Preview) -> None:
        """Bring all studies to their number of trials: of the Teachers first, for the others learn from the chosen."""
        log.info("%s", self._describe(students, teachers, preview))
        self._run(teachers, preview)
        for method in students:
            method.words += _teacher_words(method.job, teachers)
            if method.role == "distilled":  # with more trials another Teacher may have been chosen since
                method.study.settle({"Teacher": " ".join(_teacher_words(method.job, teachers)) or "as configured"})
        self._run(students, preview)

    # ---- what is tuned ---------------------------------------------------------------------------------------------

    @cached_property
    def _composer(self) -> Composer:
        return Composer(self.launcher.hydra_context.config_loader, self.launcher.config)

    def _jobs(self, words: Sequence[Sequence[str]]) -> list[Job]:
        return plan.read_jobs(Composed(self._composer, words, first=0))

    def _preview(self, jobs: list[Job]) -> Preview:
        unique = plan.unique(jobs)
        return self.launcher.executor.preview(list(plan.kinds(unique)), times=True)

    @contextlib.contextmanager
    def _held(self, first: Job) -> Iterator[None]:
        """Keep other commands from tuning the same sweep."""
        lock = book.lock(first.cell.store, first.settings.sweep_name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"sweep_name={first.settings.sweep_name} is being tuned by another command; "
                "python -m kdsweep status shows how far it is"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _storage(self, first: Job) -> str:
        """Return the address of Optuna's database."""
        typed = self.options.storage
        return databases.absolute(typed) if typed else book.default_storage(first.cell.store)

    def _check_storage(self, jobs: list[Job]) -> None:
        """Raise InputError if trials and runs would be kept in one database: both packages call a table the same."""
        storage = self._storage(jobs[0])
        for job in jobs:
            uri = store_uri(job.cell.store, job.settings.tracking.uri)
            if databases.database_of(uri) == databases.database_of(storage):
                keys = f"hydra.sweeper.storage={databases.shown(storage)} and tracking.uri={databases.shown(uri)}"
                raise InputError(f"{keys} are one database: MLflow and Optuna need one each; give another storage")

    def _open(self, methods: list[Method]) -> None:
        """Open the studies; what cannot be proposed is told before anything is trained."""
        first = methods[0].job
        storage = self._storage(first)
        for method in methods:
            params = identity.params(method.job.settings)
            pruning.make(self.options.pruner, epochs=method.epochs)
            method.study = Study(
                storage=storage,
                name=method.name,
                space=method.space,
                defaults={key: params.get(key) for key in method.space},
                about={
                    "round": str(self.options.round),
                    "sampler": str(dict(self.options.sampler)),
                    "pruner": str(dict(self.options.pruner)),
                    "seed": str(method.seed),
                },
            )
            if method.space and not method.study.trials:
                method.study.propose(self.options.sampler, first=0, count=min(2, self.options.trials))
        entries = [
            book.Entry(own.name, own.cell.notation, own.cell.split, own.role, self.options.trials if own.space else 0)
            for own in methods
        ]
        book.write(first.cell.store, first.settings.sweep_name, storage=storage, entries=entries)

    # ---- text ------------------------------------------------------------------------------------------------------

    def _describe(self, students: list[Method], teachers: list[Method], preview: Preview) -> str:
        """Return one line on what will be tuned."""
        methods = [own for own in [*teachers, *students] if own.space]
        done = self._ended(methods)
        trials = len(methods) * self.options.trials
        first = methods[0].job.settings
        names = len({own.cell.notation for own in methods})
        line = f"tuning {plural(names, 'method')} on {plural(len({own.cell.split for own in methods}), 'split')}: "
        line += f"{trials} trials, {self.options.trials} of each, {done} of them done"
        pruner = str(self.options.pruner.get("_target_", "successive halving")).rpartition(".")[2]
        line += f"; rounds of {self.options.round}, pruner {pruner}; {first.train.epochs} epochs at most"
        line += f"; {estimate.describe_data(first)}"
        if preview.timed_on:
            left_s = self._longest_s(methods, preview) * (trials - done) / trials / preview.places
            line += f"; device {preview.timed_on}; at most about {duration(left_s)} without pruning"
        return f"{line}; profile={first.profile}; sweep {first.sweep_name}, then {first.sweep_name}{book.TUNED}"

    def _ended(self, methods: list[Method]) -> int:
        """Return how many trials of these methods have ended; asked of the store, for a plan opens no study."""
        first = methods[0].job
        known = book.read(first.cell.store, first.settings.sweep_name)
        entries = {own.name: known.entries[own.name] for own in methods if own.name in known.entries}
        if not entries:
            return 0
        counts = read_trials(known.storage, entries)[["notation", "split"]].value_counts()
        return int(counts.clip(upper=self.options.trials).sum())

    def _longest_s(self, methods: list[Method], preview: Preview) -> float:
        """Return the seconds of all trials on one device if none is pruned, with Teachers that are not tuned."""
        epoch_s = {True: preview.teacher_epoch_s, False: preview.student_epoch_s}
        own_s = sum(own.epochs * epoch_s[own.role == "teacher"] for own in methods) * self.options.trials
        views = {(own.cell.split, estimate.forward_of(own.job)) for own in methods if own.role == "distilled"}
        rounds = -(-self.options.trials // self.options.round)
        shared_s = len(views) * rounds * max(own.epochs for own in methods) * preview.forward_epoch_s
        is_tuned = any(own.role == "teacher" for own in methods)
        taught = [] if is_tuned else [own.job for own in methods if own.role == "distilled"]
        return own_s + shared_s + estimate.teachers_s(taught, preview)

    def _overview(self, students: list[Method], teachers: list[Method], preview: Preview) -> str:
        """Return what would be tuned, a line per method."""
        methods = [own for own in [*teachers, *students] if own.space]
        lines = [self._describe(students, teachers, preview)]
        for own in methods:
            words = "; ".join(f"{key}: {values}" for key, values in space.in_words(own.space).items())
            lines.append(f"{own.cell.notation} split {own.cell.split}: {words}")
        idle = [own.cell.notation for own in students if not own.space]
        lines += (
            [f"{', '.join(dict.fromkeys(idle))}: nothing of the space is used, so nothing is tuned"] if idle else []
        )
        cells = len({own.job.cell.notation for own in students})
        after = f"then {plural(cells, 'method')} as configured and as chosen, with each seed, tested once"
        hours = self._longest_s(methods, preview) / 3600
        lines.append(f"{after}; at most {hours:.2g} device hours of trials without pruning; nothing was started")
        return "\n".join(lines)

    # ---- rounds ----------------------------------------------------------------------------------------------------

    def _run(self, methods: list[Method], preview: Preview) -> None:
        """Bring all studies to their number of trials, round by round."""
        methods = [own for own in methods if own.space]
        started_s, done = time.monotonic(), 0
        rounds = range(0, self.options.trials, self.options.round)
        for number, first in enumerate(rounds, start=1):
            count = min(self.options.round, self.options.trials - first)
            open_ones = [own for own in methods if len(own.study.trials) < first + count]
            if not open_ones:
                continue
            trials = self._propose(open_ones, first=first, count=count)
            groups = _groups(trials, devices=preview.devices)
            log.info(
                "round %d of %d: %d trials of %s in %s",
                number, len(rounds), len(trials), plural(len(open_ones), "study").replace("studys", "studies"),
                plural(len(groups), "lockstep group"),
            )  # fmt: skip
            outcomes = self._train(groups, preview)
            for trial in trials:  # in the order of their numbers, whatever has ended first
                if trial.proposal.number >= len(trial.method.study.trials):
                    trial.method.study.add(trial.proposal, outcomes[trial.cell.folder])
            done += 1
            states = [outcomes[trial.cell.folder].curve.state for trial in trials]
            told = f"{states.count('PRUNED')} pruned, {states.count('FAIL')} failed"
            about_s = left_s([[(len(rounds) - number, (time.monotonic() - started_s) / done)]])
            log.info("round %d of %d done: %s, about %s left", number, len(rounds), told, duration(about_s))

    def _propose(self, methods: list[Method], *, first: int, count: int) -> list[Trial]:
        """Return the trials of a round, each with the job that trains it."""
        found = []
        for method in methods:
            proposals = method.study.propose(self.options.sampler, first=first, count=count)
            words = [
                [*method.words, *(words_of(own.values) if own.number else [])] for own in proposals
            ]  # trial 0: as configured
            jobs = self._jobs(words)
            found += [Trial(method, own, job) for own, job in zip(proposals, jobs, strict=True)]
        return found

    def _train(self, groups: list[list[Trial]], preview: Preview) -> dict[Path, Outcome]:
        """Train the trials of a round; return how each has ended, by folder."""
        works = {self._work(group, preview): group for group in groups}
        first = []
        if self.launcher.executor.at_once(preview) > 1:
            taught = [trial.job for group in groups for trial in group if trial.method.role == "distilled"]
            first = launcher.teacher_works(taught, preview)
        # What an earlier command has left in a queue is waited for, and its trials are then read or gone on with.
        self.launcher.executor.queued([replace(trial.job, cell=trial.cell) for group in groups for trial in group])
        outcomes: dict[Path, Outcome] = {}
        for work, results in run(self.launcher.executor, list(works), before=first):
            for trial, result in zip(_unique(works[work]), results, strict=True):
                outcomes[trial.cell.folder] = _outcome(trial, result)
        return outcomes

    def _work(self, group: list[Trial], preview: Preview) -> Work:
        own, first = _unique(group), group[0]
        names = dict.fromkeys(trial.method for trial in group)
        number = min(trial.proposal.number for trial in group)
        judged = Pruning(
            options=self.options.pruner,
            epochs=first.method.epochs,
            trials={trial.cell.folder: (trial.method.name, trial.proposal.number) for trial in own},
            ended={method.name: method.study.curves(before=number) for method in names},
        )
        call = partial(worker.train_trials, pruning=judged, role=first.method.role)
        places = preview.devices.get(first.job.settings.device) or next(iter(preview.devices.values()))
        cells = [trial.cell for trial in own]
        return Work(call, [trial.named_job for trial in own], places, cells=cells, is_requested=False)

    # ---- afterwards ------------------------------------------------------------------------------------------------

    def _final_words(
        self, jobs: list[Job], words: list[list[str]], students: list[Method], teachers: list[Method]
    ) -> tuple[list[list[str]], list[list[str]]]:
        """Return the overrides of the sweep as configured, and of the same jobs with the chosen settings."""
        by_key = {key_of(own.cell): own for own in students}
        tuned = []
        for job, own in zip(jobs, words, strict=True):
            method = by_key[key_of(job.cell)]
            if method.space and method.study.best() is None:
                log.error("%s: none of its trials came to its end, so nothing is chosen", method.cell.title)
                continue
            name = f"sweep_name={job.settings.sweep_name}{book.TUNED}"
            kept = [word for word in own if not word.lstrip("+").startswith("sweep_name=")]
            chosen = [*_teacher_words(job, teachers), *method.chosen_words()]
            log.info("%s: chosen %s", job.cell.title, ", ".join(method.chosen_words()) or "the configured settings")
            tuned.append([*kept, *chosen, name])
        return words, tuned

    def _remove_checkpoints(self, methods: list[Method]) -> None:
        """Remove the checkpoints of trials that no sweep has asked for: their curves are in the studies."""
        for method in (own for own in methods if own.space):
            store = method.cell.store
            try:
                requested = requests.folders(store)
            except InputError as error:  # of a sweep that may have requested these trials
                log.warning("the checkpoints of trials are kept: %s", error)
                return
            for trial in method.study.trials:
                folder = store / str(trial.user_attrs.get("folder", ""))
                is_free = folder not in requested and not records.is_held(folder)
                if trial.user_attrs.get("folder") and is_free:
                    for name in (checkpoint.CHECKPOINT, checkpoint.PREVIOUS):
                        (folder / name).unlink(missing_ok=True)


def tuned(of: Launcher | None, tuning: Mapping[str, Any]) -> Launcher:
    """Return a launcher that tunes its jobs before it runs them through another one.

    Args:
        of: one of launcher.py.
        tuning: fields of ``Options``, as Hydra gives them.

    Raises:
        InputError: the launcher trains no groups, or an option is wrong.
    """
    if not isinstance(of, launcher.LockstepLauncher):
        raise InputError("hydra.sweeper.search needs hydra/launcher=lockstep, lockstep_slurm or lockstep_ray")
    plain: dict[str, Any] = {
        key: OmegaConf.to_container(own) if OmegaConf.is_config(own) else own for key, own in tuning.items()
    }
    return Tuner(of, Options(**{key: own for key, own in plain.items() if own is not None}))


def _teacher_words(job: Job, teachers: list[Method]) -> list[str]:
    """Return the chosen settings of the Teacher that a job learns from; none for one that is not tuned."""
    if job.cell.teacher is None:
        return []
    own = next((teacher for teacher in teachers if key_of(teacher.cell) == key_of(job.cell.teacher)), None)
    return own.chosen_words() if own is not None else []


def _groups(trials: list[Trial], *, devices: Mapping[str, Sequence[str]]) -> list[list[Trial]]:
    """Form lockstep groups of trials that can share every batch; those of a study stay together."""
    places = max(map(len, devices.values()), default=1)
    groups: list[list[Trial]] = []
    keys = [identity.batches_key(trial.job.settings, seed=trial.method.seed) for trial in trials]
    for members in grid.group_by(keys):
        studies: dict[Method, list[Trial]] = {}
        for position in members:
            studies.setdefault(trials[position].method, []).append(trials[position])
        largest = min(plan.LARGEST, -(-len(trials) // places))
        own: list[Trial] = []
        ordered = sorted(studies.values(), key=lambda part: part[0].job.cell.evidence.get("teacher", ""))
        for part in ordered:
            if own and len(own) + len(part) > largest:
                groups.append(own)
                own = []
            own = [*own, *part]
        groups.append(own)
    return groups


def _unique(group: list[Trial]) -> list[Trial]:
    """Return the first trial of each cell: two may propose the same values."""
    return list({trial.cell.folder: trial for trial in reversed(group)}.values())[::-1]


def _outcome(trial: Trial, result: float | Exception) -> Outcome:
    """Return how a trial has ended, from the record in its folder."""
    record = records.read(trial.cell.folder)
    dice = tuple(row["val/dice"] for row in record.history)
    folder = str(trial.cell.folder.relative_to(trial.cell.store))
    times_ms = (record.started_ms, max([record.started_ms, *record.times_ms]))
    about: dict[str, Any] = {"seconds": tuple(record.seconds), "folder": folder, "times_ms": times_ms}
    if isinstance(result, Exception):
        return Outcome(Curve("FAIL", dice), error=str(result), **about)
    state = "COMPLETE" if len(dice) >= trial.method.epochs else "PRUNED"
    return Outcome(Curve(state, dice), value=result, **about)
