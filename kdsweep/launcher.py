"""The lockstep launcher: checks a whole sweep, shows its plan, and runs each group of cells in a process of its own."""

from __future__ import annotations

import logging
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from kdsweep.errors import CellError, InputError

# This module is imported whenever Hydra starts (see plugins/): what is heavier comes when it is needed.
if TYPE_CHECKING:
    from kdsweep.plan import Job, Look
    from kdsweep.worker import Worker

log = logging.getLogger(__name__)

TRACEBACK = "KDSWEEP_TRACEBACK"  # environment: 1 shows the traceback of an error that ends the program


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
    """

    call: Callable[[list[DictConfig]], Any]
    configs: list[DictConfig]
    places: list[str]


class LockstepLauncher(Launcher):
    """Hydra launcher: cells that share all batches are trained together, each group in a spawned process.

    Args:
        devices: where groups run at the same time, such as ``[cuda:0,cuda:1]``; by default all that ``device`` names.
    """

    def __init__(self, devices: list[str] | None = None) -> None:
        self.devices = list(devices or [])
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
        finally:
            if self.idle is not None:
                self.idle.close()

    def _compose(self, overrides: Sequence[str], number: int) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _launch_cells(self, configs: list[DictConfig]) -> list[JobReturn]:
        from kdsweep import plan, worker

        jobs = plan.read_jobs(configs)
        settle_folders(configs, names=[job.cell.fingerprint for job in jobs])
        plan.ask(jobs)
        waiting = plan.waiting(jobs)
        results: dict[str, JobReturn] = {}
        if waiting:
            self.idle = self._start()
            look = self.idle.call(worker.look_at_cells, [job.config for job in waiting], self.devices)
            groups = plan.form_groups(waiting, devices=look.devices)
            log.info("%s", plan.describe(jobs, groups=groups, look=look))
        else:
            log.info("%s", plan.describe(jobs, groups=[], look=None))
        for job in plan.unique(jobs):
            if job.finished is not None:
                plan.tell_finished(job)
                results[job.cell.fingerprint] = closed(job.config, float(job.finished["test/dice"]))
        if waiting:
            results |= self._train(groups, look)
        returns = [results[job.cell.fingerprint] for job in jobs]
        return [
            own if own.overrides == list(config.hydra.overrides.task) else closed(config, own._return_value)
            for own, config in zip(returns, configs, strict=True)
        ]

    def _train(self, groups: list[list[Job]], look: Look) -> dict[str, JobReturn]:
        from kdsweep import cells, plan, worker

        places = list(dict.fromkeys(name for names in look.devices.values() for name in names))
        if self.devices:
            places = self.devices  # one of them may stand there twice
        if len(places) > 1:  # else the Teachers that several groups need would be trained by each
            missing = list(plan.missing_teachers([job for group in groups for job in group]).values())
            units = [Unit(worker.train_teachers, [config], look.devices[str(config.device)]) for config in missing]
            for unit, outcome in self._run(units, places):
                log.info("%s: %s", cells.teacher_cell(unit.configs[0]).title, outcome or "done")
        run = partial(worker.run_jobs, hydra_context=self.hydra_context, run_group=worker.run_cells)
        members = {id(group[0].config): group for group in groups}
        units = [
            Unit(run, [job.config for job in group], look.devices[str(group[0].config.device)]) for group in groups
        ]
        report = Report(groups)
        results: dict[str, JobReturn] = {}
        for unit, outcome in self._run(units, places):
            group = members[id(unit.configs[0])]
            if isinstance(outcome, Exception):
                outcome = [closed(job.config, outcome) for job in group]
            results |= {job.cell.fingerprint: own for job, own in zip(group, outcome, strict=True)}
            report.add(group, outcome)
        report.end()
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
            (own,) = [closed(unit.configs[0], outcome)] if isinstance(outcome, Exception) else outcome
            results[id(unit.configs[0])] = own
        return [results[id(config)] for config in configs]

    def _start(self) -> Worker:
        from kdsweep import worker

        started = worker.Worker()
        started.call(worker.set_up, self.config, Singleton.get_state())
        return started

    def _run(self, units: list[Unit], places: list[str]) -> Iterator[tuple[Unit, Any]]:
        """Run each unit in a process of its own, one at a time at each place; gives results or errors as they come."""
        from kdsweep.worker import pin

        waiting = list(units)
        busy: dict[int, tuple[Unit, Worker]] = {}
        try:
            while waiting or busy:
                for number, place in enumerate(places):
                    unit = next((unit for unit in waiting if place in unit.places), None)
                    if unit is not None and number not in busy:
                        waiting.remove(unit)
                        process, self.idle = self.idle or self._start(), None
                        busy[number] = unit, process
                        process.send(pin, unit.call, unit.configs, place if len(places) > 1 else "")
                ready = wait([process.connection for _, process in busy.values()])
                for number, (unit, process) in list(busy.items()):
                    if process.connection in ready:
                        outcome = process.outcome()
                        del busy[number]
                        process.close()
                        yield unit, outcome
        except BaseException:
            for _, process in busy.values():
                process.interrupt()
            raise


class Report:
    """Keeps the user posted on a sweep's groups."""

    def __init__(self, groups: Sequence[Sequence[Job]]) -> None:
        self.groups, self.cells = len(groups), sum(len(group) for group in groups)
        self.done = self.done_cells = 0
        self.failed: list[str] = []
        self.started_s = time.monotonic()

    def add(self, group: Sequence[Job], outcome: Sequence[JobReturn]) -> None:
        """One more group has ended."""
        from kdsweep.progress import duration

        self.done, self.done_cells = self.done + 1, self.done_cells + len(group)
        for job, own in zip(group, outcome, strict=True):
            if own.status == JobStatus.FAILED:
                self.failed.append(f"{job.cell.folder}: {own._return_value}")
        passed_s = time.monotonic() - self.started_s
        if self.done < self.groups:
            left_s = passed_s / self.done_cells * (self.cells - self.done_cells)
            log.info("%d of %d groups done, about %s left", self.done, self.groups, duration(left_s))

    def end(self) -> None:
        """All have ended: how long it took, and what failed."""
        from kdsweep.progress import duration

        done = self.cells - len(self.failed)
        log.info("%d of %d cells done in %s", done, self.cells, duration(time.monotonic() - self.started_s))
        for line in self.failed:
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


def closed(config: DictConfig, result: Any) -> JobReturn:
    """The return of a job that was not run under Hydra: finished before, asked for twice, or its process died."""
    own = config.copy()
    with read_write(own), open_dict(own):
        hydra_node = own.pop("hydra")
    return JobReturn(
        overrides=list(config.hydra.overrides.task),
        cfg=own,
        hydra_cfg=OmegaConf.create({"hydra": hydra_node}),
        working_dir=str(Path.cwd()),
        task_name=JobRuntime.instance().get("name"),
        status=JobStatus.FAILED if isinstance(result, Exception) else JobStatus.COMPLETED,
        _return_value=result,
    )


class Announce(Callback):
    """Hydra callback: where cells run one by one, checks all first, says what will run, and keeps the user posted."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.failed: list[str] = []
        self.started_s = 0.0

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Compose and check all jobs; a wrong one ends the program before anything is trained."""
        if config.hydra.launcher._target_.endswith(".LockstepLauncher"):
            return  # which does all this itself
        jobs = compose_jobs(config)
        _or_exit(lambda: announce(jobs))
        self.total, self.started_s = len(jobs), time.monotonic()

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """The same for a single cell."""
        _or_exit(lambda: announce([config]))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Say how far the sweep is, how long it still takes, and at its end what failed."""
        from kdsweep.progress import duration

        if not self.total:
            return
        self.done += 1
        if job_return.status == JobStatus.FAILED:
            self.failed.append(f"{config.hydra.runtime.output_dir}: {job_return._return_value}")
        if self.done < self.total:
            left_s = (time.monotonic() - self.started_s) / self.done * (self.total - self.done)
            log.info("%d of %d jobs done, about %s left", self.done, self.total, duration(left_s))
            return
        log.info("%d of %d jobs done in %s", self.done, self.total, duration(time.monotonic() - self.started_s))
        for line in self.failed:
            log.error("failed: %s", line)


def _or_exit(prepare: Callable[[], None]) -> None:
    """Hydra turns a callback's exceptions into warnings and goes on; what the user must mend ends the program here."""
    try:
        prepare()
    except Exception as error:
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exc()
        raise SystemExit(f"kdsweep: error: {one_line(error)}") from error


def announce(configs: list[DictConfig]) -> None:
    """Check every job in this process, write down what the sweep asks for, and tell the user what will run."""
    from kdsweep import plan, worker

    jobs = plan.read_jobs(configs)
    plan.ask(jobs)
    waiting = plan.waiting(jobs)
    look = worker.look_at_cells([job.config for job in waiting], []) if waiting else None
    log.info("%s", plan.describe(jobs, groups=[[job] for job in waiting], look=look))


def compose_jobs(config: DictConfig) -> list[DictConfig]:
    """The configuration of every job of a multirun, in order, as Hydra's basic sweeper will make them."""
    loader = GlobalHydra.instance().config_loader()
    fixed = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=loader)
    overrides = parser.parse_overrides([*fixed, *config.hydra.overrides.task])
    (batch,) = BasicSweeper.split_arguments(overrides, None)
    return [loader.load_sweep_config(config, list(job)) for job in batch]


def one_line(error: BaseException) -> str:
    """The message that the user can act on, from an exception and what caused it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError | CellError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{match[1]} is missing: give it on the command line, {match[1]}=..."
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]} is not a key of the configuration; {_known_keys(match[1])}"
    unknown_option = r"Could not find '(\S+)/([^/']+)' Available options in '\S+': (.+?)(?: Config search|$)"
    if match := re.search(unknown_option, text):
        return f"{match[1]}={match[2]} is not an option; {match[1]} has: {', '.join(match[3].split())}"
    if type(error).__module__.startswith(("hydra", "omegaconf")):
        return text
    return f"{type(error).__name__}: {text}"


def _known_keys(key: str) -> str:
    """What may stand in the place of a wrong key."""
    from kdsweep import cells

    parent, _, _ = key.rpartition(".")
    try:
        cfg = cells.compose([])
        node = OmegaConf.select(cfg, parent) if parent else cfg
        keys = ", ".join(sorted(node)) if node is not None else ""
    except (InputError, TypeError):
        keys = ""
    return f"{parent + ' has' if parent else 'it has'}: {keys}" if keys else "see python -m kdsweep --help"
