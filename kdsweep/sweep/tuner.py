"""Tune every method of a sweep with the same number of trials, then train and test what was chosen.

The jobs of the sweep are the methods as they are configured. Each has a study of its own on each split (tuning/). All
trials of a round are trained side by side, and are not tested. Then the sweep is run twice by the launcher: as it is
configured, under its own name, and with the chosen settings, under that name with ``-tuned`` behind it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from filelock import Timeout
from hydra.core.utils import JobReturn, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from kdsweep.config import identity
from kdsweep.config.composition import Composed, Composer
from kdsweep.core import databases
from kdsweep.core.errors import InputError
from kdsweep.core.progress import duration, left_s, plural
from kdsweep.store import cell_folder, checkpoint, sweep_file
from kdsweep.sweep import estimate, launcher, plan
from kdsweep.sweep.estimate import Preview
from kdsweep.sweep.executors import worker
from kdsweep.sweep.executors.executor import Result, Work, run
from kdsweep.sweep.launcher import job_return
from kdsweep.sweep.methods import Options, check_jobs
from kdsweep.sweep.plan import Job
from kdsweep.tracking.database import store_uri
from kdsweep.tuning import book, pruning, space, tune
from kdsweep.tuning.study import Study, read_studies, read_trials
from kdsweep.tuning.tune import Method, Trial, key_of, methods_of

log = logging.getLogger(__name__)


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
        jobs = self._jobs(job_overrides)
        waits = bool(getattr(launcher.executor, "wait", True))
        check_jobs(jobs, whole=self.space, waits=waits, read=self._jobs)
        self._check_storage(jobs)
        book.check_name(jobs[0].cell.store, jobs[0].settings.sweep_name)
        students, teachers = methods_of(jobs, whole=self.space)
        methods = [method for method in [*teachers, *students] if method.space]
        if launcher.plan:
            with launcher.executor_open():
                sys.stdout.write(self._overview(students, methods, self._preview(jobs)) + "\n")
            return [job_return(job.overrides, math.nan) for job in jobs]
        launcher.executor.check(jobs)
        with self._held(jobs[0]):
            self._open(methods)
            if any(method.study.ended < self.options.trials for method in methods):
                with launcher.executor_open():
                    self._tune(students, teachers, self._preview(jobs))
        returns = launcher.launch([*job_overrides, *self._chosen(jobs, students, teachers)], initial_job_idx)
        self._remove_checkpoints(methods)
        return returns

    def _tune(self, students: list[Method], teachers: list[Method], preview: Preview) -> None:
        """Bring all studies to their number of trials: of the Teachers first, for the others learn from the chosen."""
        tuned = [method for method in students if method.space]
        log.info("%s", self._describe([*teachers, *tuned], preview))
        self._run(teachers, preview)
        for method in tuned:
            method.teacher = _teacher_overrides(method.job, teachers)
            if method.role == "distilled":  # with more trials another Teacher may have been chosen since
                method.study.settle({"Teacher": " ".join(method.teacher) or "as configured"})
        self._run(tuned, preview)

    # ---- jobs and storage ------------------------------------------------------------------------------------------

    @cached_property
    def _composer(self) -> Composer:
        return Composer(self.launcher.hydra_context.config_loader, self.launcher.config)

    def _jobs(self, overrides: Sequence[Sequence[str]]) -> list[Job]:
        """Return the jobs of these overrides, which they keep: a plan's jobs have none of the keys that are tuned."""
        jobs = plan.read_jobs(Composed(self._composer, overrides, first=0))
        return [replace(job, overrides=list(own)) for job, own in zip(jobs, overrides, strict=True)]

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
        option = self.options.storage
        return databases.absolute(option) if option else book.default_storage(first.cell.store)

    def _check_storage(self, jobs: list[Job]) -> None:
        """Raise InputError if trials and runs would be kept in one database: both packages call a table the same."""
        storage = self._storage(jobs[0])
        for job in jobs:
            uri = store_uri(job.cell.store, job.settings.tracking.uri)
            if databases.database_of(uri) == databases.database_of(storage):
                keys = f"hydra.sweeper.storage={databases.shown(storage)} and tracking.uri={databases.shown(uri)}"
                raise InputError(f"{keys} are one database: MLflow and Optuna need one each; give another storage")

    def _open(self, methods: list[Method]) -> None:
        """Open the studies and ask for their first trials: a wrong option ends it before anything is trained."""
        options, first = self.options, methods[0].job
        sweep, storage = first.settings.sweep_name, pruning.open_storage(self._storage(first))
        for method in methods:
            pruning.make(options.pruner, epochs=method.epochs, round_size=options.round)
            params, cell = identity.params(method.job.settings), method.cell
            about = {"sweep": sweep, "notation": cell.notation, "split": cell.split, "role": method.role}
            method.study = Study(
                storage=storage,
                name=method.name,
                space=method.space,
                defaults={key: params.get(key) for key in method.space},
                fixed={
                    "round": str(options.round),
                    "sampler": str(dict(options.sampler)),
                    "pruner": str(dict(options.pruner)),
                    "seed": str(method.seed),
                },
                about={**about, "trials": options.trials, "epochs": method.epochs},
            )
            method.study.ask(options.sampler, count=min(options.round, options.trials))
        book.write(first.cell.store, sweep, storage=storage.url)

    # ---- text ------------------------------------------------------------------------------------------------------

    def _describe(self, methods: list[Method], preview: Preview) -> str:
        """Return one line on what will be tuned."""
        first, options = methods[0].job.settings, self.options
        trials, done = len(methods) * options.trials, self._ended(methods)
        names = len({method.cell.notation for method in methods})
        line = f"tuning {plural(names, 'method')} on {plural(len({own.cell.split for own in methods}), 'split')}: "
        line += f"{trials} trials, {options.trials} of each, {done} of them done"
        pruner = str(options.pruner.get("_target_", "successive halving")).rpartition(".")[2]
        line += f"; rounds of {options.round}, pruner {pruner}; {first.train.epochs} epochs at most"
        line += f"; {estimate.describe_data(first)}"
        if preview.timed_on:
            longest_s = self._device_s(methods, preview) * (trials - done) / trials / preview.places
            line += f"; device {preview.timed_on}; at most about {duration(longest_s)} without pruning"
        return f"{line}; profile={first.profile}; sweep {first.sweep_name}, then {first.sweep_name}{book.TUNED}"

    def _ended(self, methods: list[Method]) -> int:
        """Return how many trials of these methods have ended; a plan opens no study, so the storage is read."""
        first = methods[0].job
        storage = book.read(first.cell.store, first.settings.sweep_name)
        if not storage:
            return 0
        names = {method.name for method in methods}
        studies = [own for own in read_studies(storage, first.settings.sweep_name) if own.study_name in names]
        counts = read_trials(studies)[["notation", "split"]].value_counts()
        return int(counts.clip(upper=self.options.trials).sum())

    def _device_s(self, methods: list[Method], preview: Preview) -> float:
        """Return the seconds of all trials on one device if none is pruned, with Teachers that are not tuned."""
        trials, rounds = self.options.trials, -(-self.options.trials // self.options.round)
        epoch_s = {"teacher": preview.teacher_epoch_s}
        own = [(trials * one.epochs, epoch_s.get(one.role, preview.student_epoch_s)) for one in methods]
        distilled = [one for one in methods if one.role == "distilled"]
        views = {(one.cell.split, estimate.forward_of(one.job)) for one in distilled}
        shared = (rounds * len(views) * max(one.epochs for one in methods), preview.forward_epoch_s)
        is_tuned = any(one.role == "teacher" for one in methods)
        teachers_s = 0.0 if is_tuned else estimate.teachers_s([one.job for one in distilled], preview)
        return left_s([[*own, shared]]) + teachers_s

    def _overview(self, students: list[Method], methods: list[Method], preview: Preview) -> str:
        """Return what would be tuned, a line per method."""
        lines = [self._describe(methods, preview)]
        for own in methods:
            values = "; ".join(f"{key}: {values}" for key, values in space.in_words(own.space).items())
            lines.append(f"{own.cell.notation} split {own.cell.split}: {values}")
        idle = dict.fromkeys(own.cell.notation for own in students if not own.space)
        lines += [f"{', '.join(idle)}: nothing of the space is used, so nothing is tuned"] if idle else []
        cells = len({own.job.cell.notation for own in students})
        after = f"then {plural(cells, 'method')} as configured and as chosen, with each seed, tested once"
        hours = self._device_s(methods, preview) / 3600
        lines.append(f"{after}; at most {hours:.2g} device hours of trials without pruning; nothing was started")
        return "\n".join(lines)

    # ---- rounds ----------------------------------------------------------------------------------------------------

    def _run(self, methods: list[Method], preview: Preview) -> None:
        """Bring studies to their number of trials, round by round: ask, train all trials in lockstep, tell."""
        started_s, done, options = time.monotonic(), 0, self.options
        counts = [*range(options.round, options.trials, options.round), options.trials]
        for number, count in enumerate(counts, start=1):
            ask = partial(tune.ask, sampler=options.sampler, count=count, read=self._jobs)
            trials = [trial for method in methods for trial in ask(method)]
            if not trials:
                continue
            groups = tune.groups_of(trials, largest=min(plan.LARGEST, -(-len(trials) // preview.places)))
            log.info(
                "round %d of %d: %d trials of %d %s in %s", number, len(counts), len(trials), len(methods),
                "study" if len(methods) == 1 else "studies", plural(len(groups), "lockstep group"),
            )  # fmt: skip
            for trial, result in self._train(groups, preview):
                trial.method.study.tell(trial.number, result, seconds=cell_folder.read(trial.cell.folder).seconds)
            done += 1
            states = [trial.method.study.trials[trial.number].state.name for trial in trials]
            about_s = left_s([[(len(counts) - number, (time.monotonic() - started_s) / done)]])
            log.info(
                "round %d of %d done: %d pruned, %d failed, about %s left",
                number, len(counts), states.count("PRUNED"), states.count("FAIL"), duration(about_s),
            )  # fmt: skip

    def _train(self, groups: list[list[Trial]], preview: Preview) -> Iterator[tuple[Trial, Result]]:
        """Train the trials of a round; yield each with its validation Dice or its error as its group ends."""
        executor, works = self.launcher.executor, {self._work(group, preview): group for group in groups}
        first = []
        if executor.machines or preview.places > 1:
            distilled = [trial.job for group in groups for trial in group if trial.method.role == "distilled"]
            first = launcher.teacher_works(distilled, preview)
        executor.queued([replace(trial.job, cell=trial.cell) for trials in groups for trial in trials])  # waited for
        for work, results in run(executor, list(works), before=first):
            by_folder = {cell.folder: result for cell, result in zip(work.cells, results, strict=True)}
            for trial in works[work]:
                if isinstance(result := by_folder[trial.cell.folder], InputError):
                    raise result
                yield trial, result

    def _work(self, group: list[Trial], preview: Preview) -> Work:
        first, unique = group[0], {trial.cell.folder: trial for trial in group}
        pruning = tune.pruning_of(group, storage=self._storage(first.job), options=self.options.pruner)
        return Work(
            partial(worker.train_trials, pruning=pruning, role=first.method.role),
            [trial.job for trial in unique.values()],
            preview.devices.get(first.job.settings.device) or next(iter(preview.devices.values())),
            cells=[trial.cell for trial in unique.values()],
            is_requested=False,
        )

    # ---- afterwards ------------------------------------------------------------------------------------------------

    def _chosen(self, jobs: list[Job], students: list[Method], teachers: list[Method]) -> list[list[str]]:
        """Return the overrides of the jobs with the chosen settings."""
        by_key = {key_of(method.cell): method for method in students}
        tuned = []
        for job in jobs:
            method = by_key[key_of(job.cell)]
            if method.space and method.study.best() is None:
                log.error("%s: none of its trials came to its end, so nothing is chosen", method.cell.title)
                continue
            kept = [override for override in job.overrides if not override.lstrip("+").startswith("sweep_name=")]
            chosen = method.chosen_overrides()
            log.info("%s: chosen %s", job.cell.title, ", ".join(chosen) or "the configured settings")
            name = f"sweep_name={job.settings.sweep_name}{book.TUNED}"
            tuned.append([*kept, *_teacher_overrides(job, teachers), *chosen, name])
        return tuned

    def _remove_checkpoints(self, methods: list[Method]) -> None:
        """Remove the checkpoints of trials that no sweep has asked for: their curves are in the studies."""
        store = methods[0].cell.store
        try:
            requested = sweep_file.folders(store)
        except InputError as error:  # of a sweep that may have requested these trials
            log.warning("the checkpoints of trials are kept: %s", error)
            return
        known = [own.user_attrs for method in methods for own in method.study.trials]
        folders = {store / attrs["folder"] for attrs in known if "folder" in attrs}
        for folder in (own for own in folders - requested if not cell_folder.is_held(own)):
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


def _teacher_overrides(job: Job, teachers: list[Method]) -> list[str]:
    """Return the chosen settings of the Teacher that a job learns from; none for one that is not tuned."""
    if job.cell.teacher is None:
        return []
    own = next((teacher for teacher in teachers if key_of(teacher.cell) == key_of(job.cell.teacher)), None)
    return own.chosen_overrides() if own is not None else []
