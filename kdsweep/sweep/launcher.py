"""The lockstep launcher, where Hydra ends: it checks a sweep, shows its plan, and submits its groups to an executor."""

from __future__ import annotations

import gc
import logging
import math
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.utils import get_args_parser
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from kdsweep.config import composition, overrides
from kdsweep.config.composition import Composed, Composer
from kdsweep.core.errors import InputError

# This module is imported whenever Hydra starts (see plugins/): what is heavier comes when it is needed.
if TYPE_CHECKING:
    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.executors.executor import Executor, Result, Work
    from kdsweep.sweep.plan import Job

    Look = tuple[Preview | None, list[list[Job]]]  # at what waits, and its groups

log = logging.getLogger(__name__)

LAUNCHERS = "lockstep, lockstep_slurm, lockstep_ray or one_by_one"
# Options of Hydra's jobs, which cells are not: each has its folder in the store, with its log and its settings.
UNUSED = ("hydra.run.", "hydra.sweep.subdir", "hydra.output_subdir", "hydra.job.env_set", "hydra.job_logging")
arguments: list[str] = []  # of the command, which each sweep keeps


def train_cell(config: DictConfig) -> float:
    """Refuse to train a cell: the task function of all jobs, which the launchers of this module never call."""
    name = config.hydra.runtime.choices["hydra/launcher"]
    raise InputError(f"hydra/launcher={name} trains no cells: it must be {LAUNCHERS}")


def as_sweep(options: list[str], words: list[str]) -> list[str]:
    """Return the arguments of a command for Hydra: a command without -m is a sweep of one cell in this process.

    Args:
        options: such as ``-m``.
        words: its overrides.
    """
    words = ["hydra/launcher=one_by_one" if word == "hydra/launcher=basic" else word for word in words]
    parsed = get_args_parser().parse_args(options)
    if parsed.multirun or parsed.cfg or parsed.info or parsed.shell_completion or "hydra.mode=MULTIRUN" in words:
        return [*options, *words]  # Hydra takes no option between overrides
    if not any(word.startswith("hydra/launcher=") for word in words):
        words.append("hydra/launcher=one_by_one")
    options = [option for option in options if option not in ("-r", "--run")]
    return [*options, "-m", *words, "hydra.sweeper.is_one_cell=true"]


def check_sweep(config: DictConfig, *, is_one_cell: bool) -> None:
    """Check what Hydra's part of the configuration asks for.

    Args:
        config: of the sweep.
        is_one_cell: whether the command has no -m.

    Raises:
        InputError: the grid of an experiment is wrong, or the command needs -m.
    """
    sweeper, choice = config.hydra.sweeper, config.hydra.runtime.choices["hydra/launcher"]
    params = sweeper.get("params") or {}
    overrides.check([f"{key}={value}" for key, value in params.items()], multirun=True)
    for word in config.hydra.overrides.hydra:
        if word.lstrip("+~").replace("/", ".").startswith(UNUSED):
            raise InputError(f"{word} has no effect: a cell has its folder in the store, with its log; leave it out")
    if not is_one_cell:
        return
    if choice in ("lockstep_slurm", "lockstep_ray"):
        raise InputError(f"hydra/launcher={choice} runs sweeps: add -m, or leave it out")
    if sweeper.get("search"):
        raise InputError("hydra.sweeper.search tunes sweeps: add -m, or leave it out")
    with read_write(config), open_dict(config):
        config.hydra.mode = RunMode.RUN
        composition.check_grid(config, list(config.hydra.overrides.task))
        config.hydra.mode = RunMode.MULTIRUN


class LockstepLauncher(Launcher):
    """Hydra launcher: cells that share all batches are trained together, each group in a fresh process.

    Args:
        executor: computes the groups.
        plan: say what would run and for how long, and run nothing.
    """

    def __init__(self, executor: Executor, *, plan: bool = False) -> None:
        self.executor, self.plan = executor, plan

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what ``launch`` needs.

        Raises:
            InputError: the jobs are those of another program.
        """
        if task_function is not train_cell:
            name = config.hydra.runtime.choices["hydra/launcher"]
            raise InputError(f"hydra/launcher={name} trains kdsweep's cells alone; this program needs another launcher")
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compute the cells of these jobs.

        Returns:
            One per job, in their order.
        """
        from kdsweep.sweep import plan
        from kdsweep.tracking import sync

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        composer = Composer(self.hydra_context.config_loader, self.config)
        configs = Composed(composer, job_overrides, first=initial_job_idx)
        jobs = plan.read_jobs(configs)
        gc.freeze()  # they stay to the end: else each collection of garbage would go through all of them again
        if not self.plan:
            self.executor.check(plan.waiting(jobs))
        # The queue first: what has left it by then has written its results, so that nothing is submitted twice.
        queued = self.executor.queued(plan.waiting(jobs))
        jobs = plan.read_again(jobs)
        if self.plan:
            with self.executor_open():
                self._show_plan(jobs, configs, self._look(jobs, queued, times=True))
            return [job_return(job.overrides, (job.finished or {}).get("test/dice", math.nan)) for job in jobs]
        plan.watch(jobs, command=command_line())
        self._call_back("on_job_start", configs, task_function=self.task_function)
        try:
            with self.executor_open():  # within: MLflow logs how those that are stopped have ended
                results = self._obtain(jobs, configs, self._look(jobs, queued, times=False))
        finally:
            sync.close_all()
        returns = [job_return(job.overrides, results[job.cell.fingerprint]) for job in jobs]
        self._call_back("on_job_end", configs, job_return=returns)
        return returns

    def _call_back(self, event: str, configs: Composed, **values: Any) -> None:
        """Call the user's Hydra callbacks for each job."""
        callbacks = self.hydra_context.callbacks
        if not callbacks.callbacks:
            return
        for number, config in enumerate(configs):
            each = {key: value[number] if isinstance(value, list) else value for key, value in values.items()}
            getattr(callbacks, event)(config=config, **each)

    @contextmanager
    def executor_open(self) -> Iterator[None]:
        """Close the executor at the end, in whatever way that comes."""
        try:
            yield
        except BaseException as error:
            self.executor.close(error)
            raise
        self.executor.close(None)

    def _look(self, jobs: list[Job], queued: set[Path], *, times: bool) -> Look:
        """Check what waits with its real networks and form its groups."""
        from kdsweep.sweep import plan

        waiting = plan.waiting(jobs)
        if not waiting:
            return None, []
        preview = self.executor.preview(list(plan.kinds(waiting)), times=times)
        largest = self.executor.largest
        return preview, plan.form_groups(waiting, devices=preview.devices, largest=largest, apart=queued)

    def _show_plan(self, jobs: list[Job], configs: Composed, look: Look) -> None:
        """Print what would run; no cell is trained, one step is timed; phantoms are made."""
        from kdsweep.sweep import estimate, typed

        preview, groups = look
        sys.stdout.write(estimate.overview(jobs, groups=groups, preview=preview) + "\n")
        typed.name_idle(jobs, configs)

    def _obtain(self, jobs: list[Job], configs: Composed, look: Look) -> dict[str, Result]:
        """Return the results of all cells by fingerprint, read or computed."""
        from kdsweep.sweep import estimate, plan, typed

        preview, groups = look
        log.info("%s", estimate.describe(jobs, groups=groups, preview=preview))
        estimate.log_ignored(jobs)
        plan.tell_changes(jobs)
        typed.name_idle(jobs, configs)
        results: dict[str, Result] = {}
        for job in plan.unique(jobs):
            if job.finished is not None:
                plan.tell_finished(job)
                results[job.cell.fingerprint] = float(job.finished["test/dice"])
        return results | (self._train(groups, preview) if preview is not None else {})

    def _train(self, groups: list[list[Job]], preview: Preview) -> dict[str, Result]:
        from kdsweep.sweep import estimate

        first: list[Work] = []
        if self.executor.machines or preview.places > 1:  # else groups wait for Teachers in turn
            first = teacher_works([job for group in groups for job in group], preview)
            # The last ones to end are short.
            groups = sorted(groups, key=lambda group: -estimate.group_s(group, preview))
        report = Report(groups, preview)
        results = self._train_groups(groups, preview, report, first=first)
        failed = [job for group in groups for job in group if job.cell.fingerprint in report.failed]
        if again := [[job] for job in failed if job.settings.retry_failed]:
            log.info("trying the cells that failed a second time, each alone: %d", len(again))
            results |= self._train_groups(again, preview, report, first=[])
        report.end()
        return results

    def _train_groups(
        self, groups: list[list[Job]], preview: Preview, report: Report, *, first: list[Work]
    ) -> dict[str, Result]:
        from kdsweep.sweep.executors import worker
        from kdsweep.sweep.executors.executor import Work, run

        devices = preview.devices
        members = {
            Work(worker.train_cells, group, devices[group[0].settings.device], [job.cell for job in group]): group
            for group in groups
        }
        results: dict[str, Result] = {}
        for work, values in run(self.executor, list(members), before=first):
            results |= {job.cell.fingerprint: value for job, value in zip(work.jobs, values, strict=True)}
            report.add(members[work], values)
        return results


def job_return(words: Sequence[str], result: Any) -> JobReturn:
    """Return the JobReturn of a job from its overrides and its value or error."""
    status = JobStatus.FAILED if isinstance(result, Exception) else JobStatus.COMPLETED
    return JobReturn(overrides=words, status=status, _return_value=result)


def teacher_works(jobs: Sequence[Job], preview: Preview) -> list[Work]:
    """Return a work for each Teacher that these jobs lack."""
    from kdsweep.sweep import plan
    from kdsweep.sweep.executors import worker
    from kdsweep.sweep.executors.executor import Work

    return [
        Work(worker.train_teachers, [job], preview.devices[job.settings.device], cells=[cell])
        for cell, job in plan.missing_teachers(jobs)
    ]


def command_line() -> str:
    """Return the command as it can be typed again, without passwords: MLflow's tags and the report keep it."""
    words = ["python", "-m", "kdsweep", *arguments]
    return shlex.join(re.sub(r"://[^/\s]+@", "://USER:PASSWORD@", word) for word in words)


class Report:
    """Logs how far a sweep's groups are.

    Args:
        groups: all of them.
        preview: their seconds and how many run at the same time, as far as it can be said.
    """

    def __init__(self, groups: Sequence[Sequence[Job]], preview: Preview) -> None:
        from kdsweep.sweep import estimate

        self.groups, self.places = groups, preview.places
        self.seconds = [estimate.group_s(group, preview) for group in groups]
        self.done_s: list[float] = []
        self.failed: dict[str, str] = {}
        self.started_s = time.monotonic()

    def add(self, group: Sequence[Job], values: Sequence[Result]) -> None:
        """Log that one more group has ended; of each cell its test Dice, or what ended it."""
        from kdsweep.core.progress import duration, left_s
        from kdsweep.sweep import plan

        if all(isinstance(value, float) and math.isnan(value) for value in values):
            return  # submitted, and not waited for
        self.done_s += [group_s for each, group_s in zip(self.groups, self.seconds, strict=True) if each is group]
        for job, value in zip(group, values, strict=True):
            self.failed.pop(job.cell.fingerprint, None)
            if isinstance(value, Exception):
                self.failed[job.cell.fingerprint] = plan.failure(job.cell, value)
        open_groups = len(self.groups) - len(self.done_s)
        if open_groups > 0:
            # The others are as much faster or slower than estimated as those that are done.
            passed_s = time.monotonic() - self.started_s
            done_s, all_s = (
                left_s([[(1, group_s)] for group_s in s], places=self.places) for s in (self.done_s, self.seconds)
            )
            about = duration(max(0.0, passed_s / (done_s or 1.0) * all_s - passed_s))
            left = "the others are running" if 1 < self.places >= open_groups else f"about {about} left"
            log.info("%d of %d groups done, %s", len(self.done_s), len(self.groups), left)

    def end(self) -> None:
        """Log how long all took, and what failed."""
        from kdsweep.core.progress import duration

        if not self.done_s:
            return
        cells = sum(len(group) for group in self.groups)
        log.info(
            "%d of %d cells done in %s", cells - len(self.failed), cells, duration(time.monotonic() - self.started_s)
        )
        for line in self.failed.values():
            log.error("failed: %s", line)
