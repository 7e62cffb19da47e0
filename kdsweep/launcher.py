"""The lockstep launcher: checks a whole sweep, shows its plan, and runs each group of cells in a process of its own."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from kdsweep.errors import CellError, InputError
from kdsweep.interrupts import Stopped

# This module is imported whenever Hydra starts (see plugins/): what is heavier comes when it is needed.
if TYPE_CHECKING:
    from kdsweep.plan import Job, Look
    from kdsweep.worker import Worker

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


def trains_cells(task_function: TaskFunction) -> TaskFunction:
    """Mark the task function whose jobs are cells; the jobs of any other one are run one by one."""
    task_function.trains_cells = True  # type: ignore[attr-defined]
    return task_function


@dataclass(frozen=True, eq=False)
class Unit:
    """What one process does: a function of worker.py with a group's configurations.

    Attributes:
        call: the function, first argument the configurations.
        configs: of the group.
        places: names of the devices where it can run.
        waits: whether it must not be started yet.
    """

    call: Callable[[list[DictConfig]], Any]
    configs: list[DictConfig]
    places: list[str]
    waits: Callable[[], bool] = lambda: False


class LockstepLauncher(Launcher):
    """Hydra launcher: cells that share all batches are trained together, each group in a spawned process.

    Args:
        devices: where groups run at the same time, such as ``[cuda:0,cuda:1]``; by default all that ``device`` names.
        processes: on the CPU, how many groups run at the same time; they share its threads.
        plan: say what would run and for how long, and run nothing.
    """

    def __init__(self, devices: list[str] | None = None, *, processes: int = 1, plan: bool = False) -> None:
        if processes < 1:
            raise InputError(f"hydra.launcher.processes={processes} is not allowed: it must be at least 1")
        self.devices = list(devices or []) or (["cpu"] * processes if processes > 1 else [])
        self.plan = plan
        self.idle: Worker | None = None  # started, and used by the first group

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
        configs = [self._compose(job, initial_job_idx + number) for number, job in enumerate(job_overrides)]
        try:
            if getattr(self.task_function, "trains_cells", False):
                return self._launch_cells(configs)
            return self._launch_others(configs)
        except Stopped as stop:
            self._stop([], stop)
            raise
        finally:
            if self.idle is not None:
                self.idle.close()

    def _stop(self, busy: list[Worker], error: BaseException) -> None:
        """End processes early: they save what they do, as the signal that ended this one would have them."""
        from kdsweep import worker

        idle, self.idle = [self.idle] if self.idle is not None else [], None
        worker.stop([*busy, *idle], error.number if isinstance(error, Stopped) else signal.SIGTERM)

    def _compose(self, overrides: Sequence[str], number: int) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _launch_cells(self, configs: list[DictConfig]) -> list[JobReturn]:
        from kdsweep import mirror, plan, worker

        jobs = plan.read_jobs(configs)
        settle_folders(configs, names=[job.cell.fingerprint for job in jobs])
        waiting = plan.waiting(jobs)
        if self.plan:
            self._show_plan(jobs, waiting)
            return [worker.closed(job.config, (job.finished or {}).get("test/dice", math.nan)) for job in jobs]
        plan.watch(jobs)
        try:
            results: dict[str, JobReturn] = {}
            if waiting:
                self.idle = self._start()
                look = self.idle.call(worker.look_at_cells, [job.config for job in waiting], self.devices)
                groups = plan.form_groups(waiting, devices=look.devices)
                log.info("%s", plan.describe(jobs, groups=groups, look=look))
                plan.tell_changes(jobs)
            else:
                log.info("%s", plan.describe(jobs, groups=[], look=None))
            for job in plan.unique(jobs):
                if job.finished is not None:
                    plan.tell_finished(job)
                    results[job.cell.fingerprint] = worker.closed(job.config, float(job.finished["test/dice"]))
            if waiting:
                results |= self._train(groups, look)
        finally:
            mirror.close_all()
        returns = [results[job.cell.fingerprint] for job in jobs]
        return [
            own if own.overrides == list(config.hydra.overrides.task) else worker.closed(config, own._return_value)
            for own, config in zip(returns, configs, strict=True)
        ]

    def _show_plan(self, jobs: list[Job], waiting: list[Job]) -> None:
        """Print what ``plan.overview`` tells; nothing is written and nothing is trained but one timed step."""
        from kdsweep import plan, worker

        groups, look = [], None
        if waiting:
            self.idle = self._start()
            look = self.idle.call(worker.look_at_cells, [job.config for job in waiting], self.devices)
            groups = plan.form_groups(waiting, devices=look.devices)
        sys.stdout.write(plan.overview(jobs, groups=groups, look=look) + "\n")

    def _train(self, groups: list[list[Job]], look: Look) -> dict[str, JobReturn]:
        from kdsweep import cells, plan, worker

        places = list(dict.fromkeys(name for names in look.devices.values() for name in names))
        if self.devices:
            places = self.devices  # one of them may stand there twice
        if len(places) > 1:  # else the Teachers that several groups need would be waited for by each
            missing = list(plan.missing_teachers([job for group in groups for job in group]).values())
            units = [Unit(worker.train_teachers, [config], look.devices[str(config.device)]) for config in missing]
            for unit, outcome in self._run(units, places):
                log.info("%s: %s", cells.teacher_cell(unit.configs[0]).title, outcome or "done")
            groups = sorted(groups, key=lambda group: -plan.group_s(group, look))  # the last ones to end are short
        report = Report(groups)
        results = self._train_groups(groups, look, places, report)
        failed = [job for group in groups for job in group if job.cell.fingerprint in report.failed]
        if again := [[job] for job in failed if job.config.retry_failed]:
            log.info("trying the cells that failed a second time, each alone: %d", len(again))
            results |= self._train_groups(again, look, places, report)
        report.end()
        return results

    def _train_groups(
        self, groups: list[list[Job]], look: Look, places: list[str], report: Report
    ) -> dict[str, JobReturn]:
        from kdsweep import plan, worker

        run = partial(worker.run_jobs, hydra_context=self.hydra_context, run_group=worker.run_cells)
        members = {id(group[0].config): group for group in groups}
        units = [
            Unit(
                run,
                [job.config for job in group],
                look.devices[str(group[0].config.device)],
                waits=partial(plan.is_computed_elsewhere, group),
            )
            for group in groups
        ]
        results: dict[str, JobReturn] = {}
        for unit, outcome in self._run(units, places):
            group = members[id(unit.configs[0])]
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
        for unit, outcome in self._run([Unit(run, [config], [""]) for config in configs], [""]):
            (own,) = [worker.closed(unit.configs[0], outcome)] if isinstance(outcome, Exception) else outcome
            results[id(unit.configs[0])] = own
        return [results[id(config)] for config in configs]

    def _start(self) -> Worker:
        from kdsweep import worker

        started = worker.Worker()
        started.call(worker.set_up, self.config, Singleton.get_state())
        return started

    def _run(self, units: list[Unit], places: list[str]) -> Iterator[tuple[Unit, Any]]:
        """Run each unit in a process of its own, one at a time at each place; gives results or errors as they come.

        A unit whose device does not compute any more is run at another place, as long as there is one.
        """
        from kdsweep.worker import pin

        waiting, lost = list(units), set[str]()
        busy: dict[int, tuple[Unit, Worker]] = {}
        told = False
        try:
            while waiting or busy:
                for orphan in [unit for unit in waiting if set(unit.places) <= lost]:
                    waiting.remove(orphan)
                    yield orphan, CellError(f"{', '.join(orphan.places)} does not compute any more")
                ready = [unit for unit in waiting if not unit.waits()]
                for number, place in enumerate(places):
                    unit = next((unit for unit in ready if place in unit.places), None)
                    if unit is not None and number not in busy and place not in lost:
                        waiting.remove(unit)
                        ready.remove(unit)
                        process, self.idle = self.idle or self._start(), None
                        busy[number] = unit, process
                        name = place if len(places) > 1 else ""
                        process.send(pin, unit.call, unit.configs, name, places.count(place))
                if waiting and not busy:
                    if not told:
                        log.info("all that is left is computed by another command: waiting for it")
                    told = True
                    time.sleep(LOOK_EVERY_S)
                arrived = wait([process.connection for _, process in busy.values()], timeout=LOOK_EVERY_S)
                for number, (unit, process) in list(busy.items()):
                    if process.connection in arrived:
                        outcome = process.outcome()
                        del busy[number]
                        process.close()
                        place = places[number]
                        elsewhere = set(unit.places) - lost - {place}
                        if elsewhere and _failed(outcome) and (place in lost or self._is_lost(place)):
                            log.warning("%s does not compute any more: its group moves to another device", place)
                            lost.add(place)
                            waiting.insert(0, unit)
                        else:
                            yield unit, outcome
        except BaseException as error:
            self._stop([process for _, process in busy.values()], error)
            raise

    def _is_lost(self, place: str) -> bool:
        """Whether a CUDA device does not answer a fresh process either."""
        from kdsweep import worker

        if not place.startswith("cuda"):
            return False
        process = self._start()
        process.send(worker.probe, place)
        outcome = process.outcome()
        process.close()
        return isinstance(outcome, Exception)


def _failed(outcome: Any) -> bool:
    """Whether anything of a unit failed."""
    if isinstance(outcome, list):
        return any(own.status == JobStatus.FAILED for own in outcome)
    return isinstance(outcome, Exception)


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
