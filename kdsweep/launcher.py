"""The lockstep launcher: checks a whole sweep, shows its plan, and runs each group of cells in a process of its own."""

from __future__ import annotations

import gc
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, read_write

from kdsweep.composition import Composer
from kdsweep.engine import SUBMITTED, Engine, Unit
from kdsweep.errors import InputError

# This module is imported whenever Hydra starts (see plugins/): what is heavier comes when it is needed.
if TYPE_CHECKING:
    from kdsweep.plan import Job, Look

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
        configs = [composer.compose(job, number=number) for number, job in enumerate(job_overrides, initial_job_idx)]
        gc.freeze()  # they stay to the end: else each collection of garbage would go through all of them again
        if getattr(self.task_function, "trains_cells", False):
            return self._launch_cells(configs)
        with self._engine_open():
            return self._launch_others(configs)

    @contextmanager
    def _engine_open(self) -> Iterator[None]:
        self.engine.open(self.config)
        try:
            yield
        except BaseException as error:
            self.engine.close(error)
            raise
        self.engine.close(None)

    def _launch_cells(self, configs: list[DictConfig]) -> list[JobReturn]:
        from kdsweep import mirror, plan, worker

        jobs = plan.read_jobs(configs)
        settle_folders(configs, names=[job.cell.fingerprint for job in jobs])
        waiting = plan.waiting(jobs)
        if self.plan:
            with self._engine_open():
                self._show_plan(jobs, waiting)
            return [worker.closed(job.config, (job.finished or {}).get("test/dice", math.nan)) for job in jobs]
        self.engine.check(waiting)
        plan.watch(jobs)
        try:
            with self._engine_open():  # within: MLflow is told how those that are stopped have ended
                results = self._obtain(jobs, waiting)
        finally:
            mirror.close_all()
        returns = [results[job.cell.fingerprint] for job in jobs]
        return [
            own if own.overrides == list(config.hydra.overrides.task) else worker.closed(config, own._return_value)
            for own, config in zip(returns, configs, strict=True)
        ]

    def _obtain(self, jobs: list[Job], waiting: list[Job]) -> dict[str, JobReturn]:
        """By fingerprint the results of all cells, read or computed."""
        from kdsweep import plan, worker

        look, groups = self._look(waiting, times=False) if waiting else (None, [])
        log.info("%s", plan.describe(jobs, groups=groups, look=look))
        plan.tell_changes(jobs)
        results: dict[str, JobReturn] = {}
        for job in plan.unique(jobs):
            if job.finished is not None:
                plan.tell_finished(job)
                results[job.cell.fingerprint] = worker.closed(job.config, float(job.finished["test/dice"]))
        return results | (self._train(groups, look) if look is not None else {})

    def _look(self, waiting: list[Job], *, times: bool) -> tuple[Look, list[list[Job]]]:
        from kdsweep import plan

        look = self.engine.look([job.config for job in waiting], times=times)
        apart = self.engine.queued(waiting)
        return look, plan.form_groups(waiting, devices=look.devices, largest=self.engine.largest, apart=apart)

    def _show_plan(self, jobs: list[Job], waiting: list[Job]) -> None:
        """Print what ``plan.overview`` tells; nothing is written and nothing is trained but one timed step."""
        from kdsweep import plan

        look, groups = self._look(waiting, times=True) if waiting else (None, [])
        sys.stdout.write(plan.overview(jobs, groups=groups, look=look) + "\n")

    def _train(self, groups: list[list[Job]], look: Look) -> dict[str, JobReturn]:
        from kdsweep import plan

        first: list[Unit] = []
        if self.engine.at_once(look) > 1:  # else the Teachers that several groups need would be waited for by each
            first = _teacher_units([job for group in groups for job in group], look)
            groups = sorted(groups, key=lambda group: -plan.group_s(group, look))  # the last ones to end are short
        report = Report(groups)
        results = self._train_groups(groups, look, report, first=first)
        failed = [job for group in groups for job in group if job.cell.fingerprint in report.failed]
        if again := [[job] for job in failed if job.config.retry_failed]:
            log.info("trying the cells that failed a second time, each alone: %d", len(again))
            results |= self._train_groups(again, look, report, first=[])
        if report.done:
            report.end()
        return results

    def _train_groups(
        self, groups: list[list[Job]], look: Look, report: Report, *, first: list[Unit]
    ) -> dict[str, JobReturn]:
        from kdsweep import plan, worker

        run = partial(worker.run_jobs, hydra_context=self.hydra_context, run_group=worker.run_cells)
        members = {id(group[0].config): group for group in groups}
        units = [
            Unit(
                run,
                [job.config for job in group],
                look.devices[str(group[0].config.device)],
                cells=[job.cell for job in group],
                waits=partial(plan.is_computed_elsewhere, group),
            )
            for group in groups
        ]
        results: dict[str, JobReturn] = {}
        for unit, outcome in self.engine.run(units, before=first):
            if unit in first:
                log.info("%s: %s", unit.cells[0].title, outcome)
                continue
            group = members[id(unit.configs[0])]
            if outcome == SUBMITTED:
                results |= {job.cell.fingerprint: worker.closed(job.config, math.nan) for job in group}
                continue
            if isinstance(outcome, Exception):  # of the whole group: its process died
                outcome = [worker.closed(job.config, plan.outcome(job, outcome)) for job in group]
            results |= {job.cell.fingerprint: own for job, own in zip(group, outcome, strict=True)}
            report.add(group, outcome)
        return results

    def _launch_others(self, configs: list[DictConfig]) -> list[JobReturn]:
        from kdsweep import worker

        settle_folders(configs, names=[f"job {number}" for number in range(len(configs))])
        for config in configs:
            log.info("#%s : %s", config.hydra.job.num, " ".join(filter_overrides(config.hydra.overrides.task)))
        run_alone = partial(worker.one_by_one, task_function=self.task_function)
        run = partial(worker.run_jobs, hydra_context=self.hydra_context, run_group=run_alone)
        results: dict[int, JobReturn] = {}
        for unit, outcome in self.engine.run([Unit(run, [config], [""]) for config in configs]):
            (own,) = [worker.closed(unit.configs[0], outcome)] if isinstance(outcome, Exception) else outcome
            results[id(unit.configs[0])] = own
        return [results[id(config)] for config in configs]


def _teacher_units(jobs: list[Job], look: Look) -> list[Unit]:
    """One for each Teacher that these jobs lack."""
    from kdsweep import cells, plan, worker

    missing = plan.missing_teachers(jobs).values()
    return [
        Unit(worker.train_teachers, [cfg], look.devices[str(cfg.device)], cells=[cells.teacher_cell(cfg)])
        for cfg in missing
    ]


class Report:
    """Keeps the user posted on a sweep's groups."""

    def __init__(self, groups: Sequence[Sequence[Job]]) -> None:
        self.groups, self.cells = len(groups), sum(len(group) for group in groups)
        self.done = self.done_cells = 0
        self.failed: dict[str, str] = {}
        self.started_s = time.monotonic()

    def add(self, group: Sequence[Job], outcome: Sequence[JobReturn]) -> None:
        """One more group has ended."""
        from kdsweep import plan
        from kdsweep.progress import duration

        self.done, self.done_cells = self.done + 1, self.done_cells + len(group)
        for job, own in zip(group, outcome, strict=True):
            self.failed.pop(job.cell.fingerprint, None)
            if own.status == JobStatus.FAILED:
                self.failed[job.cell.fingerprint] = plan.failure(job.cell, own._return_value)
        passed_s = time.monotonic() - self.started_s
        if self.done < self.groups:
            left_s = passed_s / self.done_cells * (self.cells - self.done_cells)
            log.info("%d of %d groups done, about %s left", self.done, self.groups, duration(left_s))

    def end(self) -> None:
        """All have ended: how long it took, and what failed."""
        from kdsweep.progress import duration

        done = self.cells - len(self.failed)
        log.info("%d of %d cells done in %s", done, self.cells, duration(time.monotonic() - self.started_s))
        for line in self.failed.values():
            log.error("failed: %s", line)


def settle_folders(configs: Sequence[DictConfig], *, names: Sequence[str]) -> None:
    """Write each job's folder into its configuration.

    Raises:
        InputError: jobs of different names have one folder, so that one would overwrite the other.
    """
    owners: dict[Path, tuple[str, int]] = {}
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
        with read_write(config.hydra.sweep):
            config.hydra.sweep.subdir = subdir
    HydraConfig.instance().cfg = before
