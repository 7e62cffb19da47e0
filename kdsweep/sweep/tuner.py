"""Tune every method of a sweep with the same number of trials, then train and test what was chosen.

The jobs of the sweep are the methods as they are configured. Each has its study on each split (tuning/). All trials of
a round are trained side by side, and are not tested. Then the launcher runs the sweep twice: as it is configured, under
its name, and with the chosen settings, under that name with ``-tuned`` behind it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from kdsweep.config.identity import Job
from kdsweep.core import databases
from kdsweep.core.errors import InputError
from kdsweep.core.progress import duration, left_s, plural
from kdsweep.store import cell_folder, checkpoint, sweep_file
from kdsweep.sweep import estimate, launcher, plan
from kdsweep.sweep.estimate import Preview
from kdsweep.sweep.executors import worker
from kdsweep.sweep.executors.executor import Result, Work, run
from kdsweep.tracking.database import store_uri
from kdsweep.tuning import pruning, space, study, tune
from kdsweep.tuning.tune import Method, Options, Trial, key_of

log = logging.getLogger(__name__)


class Tuner(Launcher):
    """Runs the jobs of a sweep through a launcher, tuned by the options of the sweeper."""

    def __init__(self, launcher: launcher.LockstepLauncher, options: Options) -> None:
        self.launcher, self.options = launcher, options
        self.space = space.read(options.search)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Leave it to the other launcher, which Hydra has set up."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Tune the methods that these jobs are, and run the jobs as they are configured, then as they are chosen.

        Raises:
            InputError: before anything is trained, if the space, the storage or the jobs are not fit for it.
        """
        setup_globals()
        configure_log(self.launcher.config.hydra.hydra_logging, self.launcher.config.hydra.verbose)
        if not self.launcher.executor.wait:
            raise InputError("hydra.launcher.wait=false: the next trials depend on those before; leave it out")
        jobs = self._read(job_overrides)
        store, sweep = jobs[0].cell.store, jobs[0].settings.sweep_name
        tune.check(jobs, space=self.space, read=self._read)
        self._check_storage(jobs)
        methods = tune.methods_of(jobs, self.space)
        tuned = [method for method in methods.values() if method.space]
        if self.launcher.plan:
            with self.launcher.executor:
                sys.stdout.write(self._overview(tuned, self._preview(jobs)) + "\n")
            return [launcher.job_return(job.overrides, math.nan) for job in jobs]
        self.launcher.executor.check(jobs)
        with _held(store, sweep):
            self._open(tuned, store, sweep)
            if any(study.ended(method.study) < self.options.trials for method in tuned):
                with self.launcher.executor:
                    self._tune(methods, tuned, self._preview(jobs))
        returns = self.launcher.launch([*job_overrides, *self._chosen(jobs, methods)], initial_job_idx)
        _remove_checkpoints(store, tuned)
        return returns

    def _open(self, tuned: list[Method], store: Path, sweep: str) -> None:
        """Open the studies, and note where they are: the database in the store moves with it."""
        pruning.make(self.options.pruner)
        storage = study.open_storage(self._storage(store))
        for method in tuned:
            method.open(storage, self.options)
        address = "" if self.options.storage is None else storage.url
        sweep_file.add(store, sweep, cells=[], teachers=[], storage=address)

    def _tune(self, methods: Mapping[str, Method], tuned: list[Method], preview: Preview) -> None:
        """Bring all studies to their number of trials: of the Teachers first, for the others learn from the chosen."""
        log.info("%s", self._describe(tuned, preview))
        self._run([method for method in tuned if method.role == "teacher"], preview)
        for method in (each for each in tuned if each.role == "distilled"):
            method.teacher = _teacher_overrides(method.job, methods)
            # With more trials another Teacher may have been chosen since.
            study.settle(method.study, {"Teacher": " ".join(method.teacher) or "as configured"})
        self._run([method for method in tuned if method.role != "teacher"], preview)

    def _run(self, methods: list[Method], preview: Preview) -> None:
        """Bring studies to their number of trials, round by round, the trials of each in lockstep."""
        started_s, done = time.monotonic(), 0
        counts = [*range(self.options.round, self.options.trials, self.options.round), self.options.trials]
        for number, count in enumerate(counts, start=1):
            trials = [trial for method in methods for trial in method.trials(self.options, count, self._read)]
            if not trials:
                continue
            log.info("round %d of %d: %s", number, len(counts), plural(len(trials), "trial"))
            for trial, result in self._train(trials, preview):
                seconds = cell_folder.read(trial.job.cell.folder).seconds
                study.tell(trial.method.study, trial.number, result, seconds=seconds)
            done += 1
            states = Counter(study.trials_of(trial.method.study)[trial.number].state.name for trial in trials)
            ends = f"{states['PRUNED']} pruned, {states['FAIL']} failed"
            rest_s = left_s([[(len(counts) - number, (time.monotonic() - started_s) / done)]])
            log.info("round %d of %d done: %s, about %s left", number, len(counts), ends, duration(rest_s))

    def _train(self, trials: list[Trial], preview: Preview) -> Iterator[tuple[Trial, Result]]:
        """Train the trials of a round; yield each with its validation Dice or its error as its group ends."""
        groups = tune.groups_of(trials, largest=min(plan.LARGEST, -(-len(trials) // preview.places)))
        executor, works = self.launcher.executor, {self._work(group, preview): group for group in groups}
        jobs = [trial.job for trial in trials]
        before = launcher.teacher_works(jobs, preview) if executor.machines or preview.places > 1 else []
        executor.queued(jobs)  # those that an earlier command has left in a queue are waited for
        for work, results in run(executor, list(works), before=before):
            by_folder = {cell.folder: result for cell, result in zip(work.cells, results, strict=True)}
            for trial in works[work]:
                if isinstance(result := by_folder[trial.job.cell.folder], InputError):
                    raise result
                yield trial, result

    def _work(self, group: list[Trial], preview: Preview) -> Work:
        jobs = {trial.job.cell.folder: trial.job for trial in group}  # trials with equal values share a cell
        trials: dict[Path, list[tuple[str, int]]] = {folder: [] for folder in jobs}
        for trial in group:
            trials[trial.job.cell.folder].append((trial.method.name, trial.number))
        settings, cells = group[0].job.settings, [job.cell for job in jobs.values()]
        ending = pruning.Pruning(self._storage(cells[0].store), self.options.pruner, trials)
        call = partial(worker.train_trials, pruning=ending)
        return Work(call, list(jobs.values()), preview.devices[settings.device], cells, is_requested=False)

    # ---- jobs and storage ------------------------------------------------------------------------------------------

    def _read(self, overrides: Sequence[Sequence[str]]) -> list[Job]:
        """Return the jobs of these overrides, which they keep: a plan's jobs have none of the keys that are tuned."""
        jobs = self.launcher.read(overrides)
        return [replace(job, overrides=list(typed)) for job, typed in zip(jobs, overrides, strict=True)]

    def _preview(self, jobs: list[Job]) -> Preview:
        return self.launcher.executor.preview(list(plan.kinds(plan.unique(jobs))), times=True)

    def _storage(self, store: Path) -> str:
        option = self.options.storage
        return databases.absolute(option) if option else study.default_storage(store)

    def _check_storage(self, jobs: list[Job]) -> None:
        """Raise InputError if trials and runs would be kept in one database: both packages call a table the same."""
        storage = self._storage(jobs[0].cell.store)
        for uri in {store_uri(job.cell.store, job.settings.tracking.uri) for job in jobs}:
            if databases.database_of(uri) == databases.database_of(storage):
                keys = f"hydra.sweeper.storage={databases.shown(storage)} and tracking.uri={databases.shown(uri)}"
                raise InputError(f"{keys} are one database: MLflow and Optuna need one each; give another storage")

    # ---- text ------------------------------------------------------------------------------------------------------

    def _describe(self, tuned: list[Method], preview: Preview) -> str:
        """Return one line on what will be tuned; a plan opens no study, so the storage is read."""
        settings, count, names = tuned[0].job.settings, self.options.trials, {method.name for method in tuned}
        studies = study.read_studies(tuned[0].job.cell.store, settings.sweep_name)
        trials, done = len(tuned) * count, sum(study.ended(each) for each in studies if each.study_name in names)
        notations, splits = ({getattr(method.job.cell, key) for method in tuned} for key in ("notation", "split"))
        line = f"tuning {plural(len(notations), 'method')} on {plural(len(splits), 'split')}: {trials} trials, "
        line += f"{count} of each, {done} of them done; rounds of {self.options.round}, "
        line += f"{settings.train.epochs} epochs at most; {estimate.describe_data(settings)}"
        if preview.timed_on:
            longest_s = self._device_s(tuned, preview) * max(0, trials - done) / trials / preview.places
            line += f"; device {preview.timed_on}; at most about {duration(longest_s)} without pruning"
        sweep = settings.sweep_name
        return f"{line}; profile={settings.profile}; sweep {sweep}, then {sweep}{sweep_file.TUNED}"

    def _device_s(self, tuned: list[Method], preview: Preview) -> float:
        """Return the seconds of all trials on one device if none is pruned, with Teachers that are not tuned."""
        rounds = -(-self.options.trials // self.options.round)
        distilled = [method for method in tuned if method.role == "distilled"]
        views = {(each.job.cell.split, estimate.forward_of(each.job)) for each in distilled}
        works = [(rounds * len(views) * max(method.epochs for method in tuned), preview.forward_epoch_s)]
        epoch_s = {"teacher": preview.teacher_epoch_s}
        for method in tuned:
            works.append((self.options.trials * method.epochs, epoch_s.get(method.role, preview.student_epoch_s)))
        has_teachers = any(method.role == "teacher" for method in tuned)
        as_configured = [] if has_teachers else [method.job for method in distilled]
        return left_s([works]) + estimate.teachers_s(as_configured, preview)

    def _overview(self, tuned: list[Method], preview: Preview) -> str:
        """Return what would be tuned, a line per method."""
        lines = [self._describe(tuned, preview)]
        for method in tuned:
            values = "; ".join(f"{key}: {space.in_words(values)}" for key, values in method.space.items())
            lines.append(f"{method.job.cell.notation} split {method.job.cell.split}: {values}")
        after = "then each method as configured and as chosen, with each seed, tested once"
        hours = self._device_s(tuned, preview) / 3600
        lines.append(f"{after}; at most {hours:.2g} device hours of trials without pruning; nothing was started")
        return "\n".join(lines)

    # ---- afterwards ------------------------------------------------------------------------------------------------

    def _chosen(self, jobs: list[Job], methods: Mapping[str, Method]) -> list[list[str]]:
        """Return the overrides of the jobs with the chosen settings."""
        chosen = []
        for job in jobs:
            method = methods[key_of(job.cell)]
            if method.space and study.best_of(method.study) is None:
                log.error("%s: none of its trials came to its end, so nothing is chosen", job.cell.title)
                continue
            values = method.chosen()
            log.info("%s: chosen %s", job.cell.title, ", ".join(values) or "the configured settings")
            kept = [override for override in job.overrides if not override.lstrip("+").startswith("sweep_name=")]
            name = f"sweep_name={job.settings.sweep_name}{sweep_file.TUNED}"
            chosen.append([*kept, *_teacher_overrides(job, methods), *values, name])
        return chosen


def tuned(of: Launcher | None, tuning: Mapping[str, Any]) -> Launcher:
    """Return a launcher that tunes its jobs before it runs them through another one; ``tuning``: fields of ``Options``.

    Raises:
        InputError: the other launcher trains no groups, or an option is wrong.
    """
    if not isinstance(of, launcher.LockstepLauncher):
        raise InputError("hydra.sweeper.search needs hydra/launcher=lockstep, lockstep_slurm or lockstep_ray")
    plain: Any = OmegaConf.to_container(OmegaConf.create(dict(tuning)))
    return Tuner(of, Options(**{key: value for key, value in plain.items() if value is not None}))


@contextlib.contextmanager
def _held(store: Path, sweep: str) -> Iterator[None]:
    """Keep other commands from tuning the same sweep."""
    file = sweep_file.tuning_lock(store, sweep)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(file, thread_local=False).acquire(timeout=0)
    except Timeout:
        status = "python -m kdsweep status shows how far it is"
        raise InputError(f"sweep_name={sweep} is being tuned by another command; {status}") from None
    with held:
        yield


def _remove_checkpoints(store: Path, tuned: list[Method]) -> None:
    """Remove the checkpoints of trials that no sweep has requested: their curves are in the studies."""
    trials = [trial for method in tuned for trial in study.trials_of(method.study)]
    folders = {store / trial.user_attrs["folder"] for trial in trials} - sweep_file.folders(store)
    for folder in folders:
        for name in (checkpoint.CHECKPOINT, checkpoint.PREVIOUS) if not cell_folder.is_held(folder) else ():
            (folder / name).unlink(missing_ok=True)


def _teacher_overrides(job: Job, methods: Mapping[str, Method]) -> list[str]:
    """Return the chosen settings of the Teacher that a job learns from; none for one that is not tuned."""
    return methods[key_of(job.cell.teacher)].chosen() if job.cell.teacher is not None else []
