"""The lockstep launcher: checks a whole sweep, shows its plan, and runs each group of cells in a process of its own."""

from __future__ import annotations

import gc
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, read_write

from kdsweep.config.composition import Composed, Composer
from kdsweep.core.errors import InputError
from kdsweep.sweep.engines.engine import SUBMITTED, Engine, Unit, run_units

# This module is imported whenever Hydra starts (see plugins/): what is heavier comes when it is needed.
if TYPE_CHECKING:
    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.plan import Job

log = logging.getLogger(__name__)


def trains_cells(task_function: TaskFunction) -> TaskFunction:
    """Mark the task function whose jobs are cells; the jobs of any other one are run one by one."""
    task_function.trains_cells = True  # type: ignore[attr-defined]
    return task_function


class LockstepLauncher(Launcher):
    """Hydra launcher: cells that share all batches are trained together, each group in a process of its own.

    Args:
        engine: what runs the groups.
        plan: say what would run and for how long, and run nothing.
    """

    def __init__(self, engine: Engine, *, plan: bool = False) -> None:
        self.engine, self.plan = engine, plan

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what ``launch`` needs."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run these jobs.

        Returns:
            One per job, in their order.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        composer = Composer(self.hydra_context.config_loader, self.config)
        configs = Composed(composer, job_overrides, first=initial_job_idx)
        if getattr(self.task_function, "trains_cells", False):
            return self._launch_cells(configs)
        with self.engine_open():
            return self._launch_others(list(configs))

    @contextmanager
    def engine_open(self) -> Iterator[None]:
        """Open the engine; close it at the end, in whatever way that comes."""
        self.engine.open(self.config)
        try:
            yield
        except BaseException as error:
            self.engine.close(error)
            raise
        self.engine.close(None)

    def _launch_cells(self, configs: Sequence[DictConfig]) -> list[JobReturn]:
        from kdsweep.sweep import callback, plan
        from kdsweep.sweep.engines import worker
        from kdsweep.tracking import sync

        jobs = plan.read_jobs(configs)
        gc.freeze()  # they stay to the end: else each collection of garbage would go through all of them again
        jobs = [replace(job, subdir=subdir) for job, subdir in zip(jobs, self.subdirs(jobs), strict=True)]
        if not self.plan:
            self.engine.check(plan.waiting(jobs))
        # The queue first: what has left it by then has written its results, so that nothing is submitted twice.
        self._queued = self.engine.queued(plan.waiting(jobs))
        jobs = plan.read_again(jobs)
        waiting = plan.waiting(jobs)
        results: dict[str, float | Exception]
        if self.plan:
            with self.engine_open():
                self._show_plan(jobs, waiting)
            results = {job.cell.fingerprint: (job.finished or {}).get("test/dice", math.nan) for job in jobs}
        else:
            plan.watch(jobs, command=callback.command_line(self.config))
            try:
                with self.engine_open():  # within: MLflow is told how those that are stopped have ended
                    results = self._obtain(jobs, waiting)
            finally:
                sync.close_all()
        return [worker.closed(job.overrides, results[job.cell.fingerprint]) for job in jobs]

    def subdirs(self, jobs: list[Job]) -> list[str]:
        """Return the name of each job's folder below the sweep's."""
        raw = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)
        if raw == {"dir": "${store}", "subdir": "${kdsweep.cell_dir:}"}:  # no need to compose them all for that
            return [str(job.cell.folder.relative_to(job.cell.store)) for job in jobs]
        return settle_folders((job.config for job in jobs), names=[job.cell.fingerprint for job in jobs])

    def _obtain(self, jobs: list[Job], waiting: list[Job]) -> dict[str, float | Exception]:
        """By fingerprint the results of all cells, read or computed."""
        from kdsweep.sweep import estimate, plan, typed

        preview, groups = self._look(waiting, times=False) if waiting else (None, [])
        log.info("%s", estimate.describe(jobs, groups=groups, preview=preview))
        estimate.log_ignored(jobs)
        plan.tell_changes(jobs)
        typed.name_idle(jobs)
        results: dict[str, float | Exception] = {}
        for job in plan.unique(jobs):
            if job.finished is not None:
                plan.tell_finished(job)
                results[job.cell.fingerprint] = float(job.finished["test/dice"])
        return results | (self._train(groups, preview) if preview is not None else {})

    def _look(self, waiting: list[Job], *, times: bool) -> tuple[Preview, list[list[Job]]]:
        from kdsweep.sweep import plan

        preview = self.engine.preview([job.config for job in plan.kinds(waiting)], times=times)
        devices, largest = preview.devices, self.engine.largest
        return preview, plan.form_groups(waiting, devices=devices, largest=largest, apart=self._queued)

    def _show_plan(self, jobs: list[Job], waiting: list[Job]) -> None:
        """Print what ``estimate.overview`` tells; no cell is trained, one step is timed; phantoms are made."""
        from kdsweep.sweep import estimate, typed

        preview, groups = self._look(waiting, times=True) if waiting else (None, [])
        sys.stdout.write(estimate.overview(jobs, groups=groups, preview=preview) + "\n")
        typed.name_idle(jobs)

    def _train(self, groups: list[list[Job]], preview: Preview) -> dict[str, float | Exception]:
        from kdsweep.sweep import estimate

        first: list[Unit] = []
        if self.engine.at_once(preview) > 1:  # else the Teachers that several groups need would be waited for by each
            first = teacher_units([job for group in groups for job in group], preview)
            # The last ones to end are short.
            groups = sorted(groups, key=lambda group: -estimate.group_s(group, preview))
        report = Report(groups, places=preview.places)
        results = self._train_groups(groups, preview, report, first=first)
        failed = [job for group in groups for job in group if job.cell.fingerprint in report.failed]
        if again := [[job] for job in failed if job.settings.retry_failed]:
            log.info("trying the cells that failed a second time, each alone: %d", len(again))
            results |= self._train_groups(again, preview, report, first=[])
        if report.done:
            report.end()
        return results

    def _train_groups(
        self, groups: list[list[Job]], preview: Preview, report: Report, *, first: list[Unit]
    ) -> dict[str, float | Exception]:
        from kdsweep.sweep import plan
        from kdsweep.sweep.engines import worker

        run = partial(worker.train_cells, hydra_context=self.hydra_context)
        members = {
            Unit(
                partial(run, variants={job.cell.fingerprint: job.cell.variant for job in group}),
                partial(_configs, group),
                preview.devices[group[0].settings.device],
                cells=[job.cell for job in group],
                waits=partial(plan.is_computed_elsewhere, group),
            ): group
            for group in groups
        }
        results: dict[str, float | Exception] = {}
        for unit, outcome in run_units(self.engine, list(members), before=first):
            if unit in first:
                log.info("%s: %s", unit.cells[0].title, outcome)
                continue
            group = members[unit]
            if isinstance(outcome, Exception):  # of the whole group: its process died
                values = [plan.outcome(job, outcome) for job in group]
            else:
                values = [math.nan] * len(group) if outcome == SUBMITTED else outcome
            results |= {job.cell.fingerprint: value for job, value in zip(group, values, strict=True)}
            if outcome != SUBMITTED:
                report.add(group, values)
        return results

    def _launch_others(self, configs: list[DictConfig]) -> list[JobReturn]:
        from kdsweep.sweep.engines import worker

        names = [f"job {number}" for number in range(len(configs))]
        for config, subdir in zip(configs, settle_folders(configs, names=names), strict=True):
            with read_write(config.hydra.sweep):
                config.hydra.sweep.subdir = subdir
            log.info("#%s : %s", config.hydra.job.num, " ".join(filter_overrides(config.hydra.overrides.task)))
        run_alone = partial(worker.one_by_one, task_function=self.task_function)
        run = partial(worker.run_jobs, hydra_context=self.hydra_context, run_group=run_alone)
        units = {Unit(run, partial(list, [config]), [""]): config for config in configs}
        results: dict[Unit, JobReturn] = {}
        for unit, outcome in self.engine.run(list(units)):
            words = list(units[unit].hydra.overrides.task)
            (results[unit],) = [worker.closed(words, outcome)] if isinstance(outcome, Exception) else outcome
        return [results[unit] for unit in units]


def _configs(group: list[Job]) -> list[DictConfig]:
    return [job.config for job in group]


def teacher_units(jobs: list[Job], preview: Preview) -> list[Unit]:
    """Return a unit for each Teacher that these jobs lack."""
    from kdsweep.sweep import plan
    from kdsweep.sweep.engines import worker

    return [
        Unit(worker.train_teachers, partial(_configs, [job]), preview.devices[job.settings.device], cells=[cell])
        for cell, job in plan.missing_teachers(jobs)
    ]


class Report:
    """Keeps the user posted on a sweep's groups.

    Args:
        groups: all of them.
        places: where groups run at the same time, as far as that is known.
    """

    def __init__(self, groups: Sequence[Sequence[Job]], *, places: int) -> None:
        self.places = places
        self.groups, self.cells = len(groups), sum(len(group) for group in groups)
        self.done = self.done_cells = 0
        self.failed: dict[str, str] = {}
        self.started_s = time.monotonic()

    def add(self, group: Sequence[Job], values: Sequence[float | Exception]) -> None:
        """One more group has ended; of each cell its test Dice, or what ended it."""
        from kdsweep.core.progress import duration, left_s
        from kdsweep.sweep import plan

        self.done, self.done_cells = self.done + 1, self.done_cells + len(group)
        for job, value in zip(group, values, strict=True):
            self.failed.pop(job.cell.fingerprint, None)
            if isinstance(value, Exception):
                self.failed[job.cell.fingerprint] = plan.failure(job.cell, value)
        if self.done >= self.groups:
            return
        passed_s = time.monotonic() - self.started_s
        if self.places == 1:
            about_s = left_s(passed_s=passed_s, done=self.done_cells, left=self.cells - self.done_cells)
        else:  # those that run beside it began with it: they are about as far
            done, rounds = -(-self.done // self.places), -(-self.groups // self.places)
            about_s = left_s(passed_s=passed_s, done=done, left=rounds - done)
        is_last = 1 < self.places >= self.groups - self.done
        left = "the others are running" if is_last else f"about {duration(about_s)} left"
        log.info("%d of %d groups done, %s", self.done, self.groups, left)

    def end(self) -> None:
        """All have ended: how long it took, and what failed."""
        from kdsweep.core.progress import duration

        done = self.cells - len(self.failed)
        log.info("%d of %d cells done in %s", done, self.cells, duration(time.monotonic() - self.started_s))
        for line in self.failed.values():
            log.error("failed: %s", line)


def settle_folders(configs: Iterable[DictConfig], *, names: Sequence[str]) -> list[str]:
    """Name of each job's folder below the sweep's.

    Raises:
        InputError: jobs of different names have one folder, so that one would overwrite the other.
    """
    owners: dict[Path, tuple[str, int]] = {}
    found = []
    before = HydraConfig.instance().cfg
    for number, (config, name) in enumerate(zip(configs, names, strict=True)):
        HydraConfig.instance().set_config(config)  # what ${hydra:...} in a folder's name refers to
        subdir = str(OmegaConf.select(config, "hydra.sweep.subdir"))
        folder = Path(str(config.hydra.sweep.dir)) / subdir
        owner, first = owners.setdefault(folder, (name, number))
        if owner != name:
            raise InputError(
                f"hydra.sweep.subdir={subdir}: jobs {first} and {number} would write to one folder; "
                "name every swept key in it"
            )
        found.append(subdir)
    HydraConfig.instance().cfg = before
    return found
