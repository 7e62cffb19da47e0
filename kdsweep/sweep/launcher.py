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
from typing import TYPE_CHECKING, Any

from hydra._internal.utils import get_args_parser
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from kdsweep.config import composition, overrides
from kdsweep.config.composition import Composed
from kdsweep.core.errors import InputError

# This module is imported whenever Hydra starts (see plugins/): what is heavier comes when it is needed.
if TYPE_CHECKING:
    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.executors.executor import Executor, Result, Work
    from kdsweep.sweep.plan import Job

log = logging.getLogger(__name__)

UNUSED = (  # options of Hydra's jobs, which cells are not: each has its folder in the store, with its log and settings
    *("hydra.run.", "hydra.sweep.subdir", "hydra.output_subdir", "hydra.job.env_set", "hydra.job_logging"),
    "hydra.job.chdir=true",
)
arguments: list[str] = []  # of the command, which each sweep keeps


def train_cell(config: DictConfig) -> float:
    """Refuse to train a cell: the task function of all jobs, which the launchers of this module never call."""
    name = config.hydra.runtime.choices["hydra/launcher"]
    names = "lockstep, lockstep_slurm, lockstep_ray or one_by_one"
    raise InputError(f"hydra/launcher={name} trains no cells: it must be {names}")


def as_sweep(options: list[str], typed: list[str]) -> list[str]:
    """Return a command's options and overrides for Hydra: without -m it is a sweep of one cell in this process."""
    typed = ["hydra/launcher=one_by_one" if override == "hydra/launcher=basic" else override for override in typed]
    parsed = get_args_parser().parse_args(options)
    if parsed.multirun or parsed.cfg or parsed.info or parsed.shell_completion or "hydra.mode=MULTIRUN" in typed:
        return [*options, *typed]  # Hydra takes no option between overrides
    if not any(override.startswith("hydra/launcher=") for override in typed):
        typed.append("hydra/launcher=one_by_one")
    options = [option for option in options if option not in ("-r", "--run")]
    return [*options, "-m", *typed, "hydra.sweeper.is_one_cell=true"]


def check_sweep(config: DictConfig, *, is_one_cell: bool) -> None:
    """Raise InputError if the grid of an experiment is wrong, an option is idle, or one cell asks for a sweep."""
    sweeper, choice = config.hydra.sweeper, config.hydra.runtime.choices["hydra/launcher"]
    params = sweeper.get("params") or {}
    overrides.check([f"{key}={value}" for key, value in params.items()], multirun=True)
    for override in config.hydra.overrides.hydra:
        if override.lstrip("+~").replace("/", ".").startswith(UNUSED):
            why = "a cell has its folder in the store, with its log"
            raise InputError(f"{override} has no effect: {why}; leave it out")
    if not is_one_cell:
        return
    if choice in ("lockstep_slurm", "lockstep_ray"):
        raise InputError(f"hydra/launcher={choice} runs sweeps: add -m, or leave it out")
    if sweeper.get("search"):
        raise InputError("hydra.sweeper.search tunes sweeps: add -m, or leave it out")
    composition.check_grid(config, list(config.hydra.overrides.task), multirun=False)


class LockstepLauncher(Launcher):
    """Hydra launcher: cells that share all batches are trained together, each group in a fresh process.

    Args:
        executor: computes the groups.
        plan: say what would run and for how long, and run nothing.
    """

    def __init__(self, executor: Executor, *, plan: bool = False) -> None:
        self.executor, self.plan = executor, plan

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the arguments for ``launch``; raise InputError if the jobs are those of another program."""
        if task_function is not train_cell:
            name = config.hydra.runtime.choices["hydra/launcher"]
            raise InputError(f"hydra/launcher={name} trains kdsweep's cells alone; this program needs another launcher")
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compute the cells of these jobs; return one result per job, in their order."""
        from kdsweep.sweep import estimate, plan
        from kdsweep.tracking import sync

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        configs = Composed(self.hydra_context.config_loader, self.config, job_overrides)
        jobs = plan.read_jobs(configs)
        gc.freeze()  # they stay to the end: else each collection of garbage would go through all of them again
        if self.plan:
            with self.executor_open():
                jobs, groups, preview = self._form_groups(jobs)
            sys.stdout.write(estimate.overview(jobs, groups=groups, preview=preview) + "\n")
            estimate.log_idle(jobs, configs)
            return [job_return(job.overrides, math.nan) for job in jobs]
        self.executor.check(plan.waiting(jobs))
        plan.watch(jobs, command=command_line())
        self._call_back("on_job_start", configs, task_function=self.task_function)
        try:
            with self.executor_open():  # within: MLflow logs how those that are stopped have ended
                results = self._obtain(jobs, configs)
        finally:
            sync.close_all()
        returns = [job_return(job.overrides, results[_key(job)]) for job in jobs]
        self._call_back("on_job_end", configs, job_return=returns)
        return returns

    def _call_back(self, event: str, configs: Composed, **values: Any) -> None:
        """Call the user's Hydra callbacks for each job."""
        callbacks = self.hydra_context.callbacks
        for number, config in enumerate(configs if callbacks.callbacks else ()):
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

    def _form_groups(self, jobs: list[Job]) -> tuple[list[Job], list[list[Job]], Preview | None]:
        """Check the cells that wait with their real networks; return the jobs, the groups, and what the check saw."""
        from kdsweep.sweep import plan

        # The queue first: what has left it by then has written its results, so that nothing is submitted twice.
        queued = self.executor.queued(plan.waiting(jobs))
        jobs = plan.read_states(jobs)
        waiting = plan.waiting(jobs)
        if not waiting:
            return jobs, [], None
        preview = self.executor.preview(plan.kinds(waiting), times=self.plan)
        largest = self.executor.largest
        return jobs, plan.form_groups(waiting, devices=preview.devices, largest=largest, apart=queued), preview

    def _obtain(self, jobs: list[Job], configs: Composed) -> dict[str, Result]:
        """Return the results of all cells by fingerprint, read or computed."""
        from kdsweep.sweep import estimate, plan
        from kdsweep.tracking import sync

        jobs, groups, preview = self._form_groups(jobs)
        log.info("%s", estimate.describe(jobs, groups=groups, preview=preview))
        for line in estimate.ignored_lines(jobs):
            log.warning("%s", line)
        estimate.log_changes(jobs)
        estimate.log_idle(jobs, configs)
        results: dict[str, Result] = {}
        for job in plan.unique(jobs):
            if job.finished is not None:
                run_id, folder = sync.run_id(job.cell.folder) or "not in MLflow yet", job.cell.folder
                log.info("%s: finished already, run %s in %s", job.cell.title, run_id, folder)
                results[_key(job)] = job.finished["test/dice"]
        return results if preview is None else results | self._train(groups, preview)

    def _train(self, groups: list[list[Job]], preview: Preview) -> dict[str, Result]:
        """Return the results of groups by fingerprint; cells that fail are tried again if their settings say so."""
        from kdsweep.core.progress import duration
        from kdsweep.sweep import estimate

        jobs = [job for group in groups for job in group]
        seconds = {group[0]: estimate.group_s(group, preview) for group in groups}
        first: list[Work] = []
        if self.executor.machines or preview.places > 1:  # else groups wait for Teachers in turn
            first = teacher_works(jobs, preview)
            groups = sorted(groups, key=lambda group: -seconds[group[0]])  # the last ones to end are short
        results: dict[str, Result] = {}
        ended_s: list[float] = []
        start_s = time.monotonic()
        for group, values in self._results(groups, preview, first=first):
            results |= values
            if not all(isinstance(value, float) and math.isnan(value) for value in values.values()):  # only submitted
                ended_s.append(seconds[group[0]])
                every_s, passed_s = list(seconds.values()), time.monotonic() - start_s
                estimate.log_progress(ended_s, every_s, places=preview.places, passed_s=passed_s)
        again = [job for job in jobs if job.settings.retry_failed and isinstance(results[_key(job)], Exception)]
        if again:
            log.info("trying the cells that failed a second time, each alone: %d", len(again))
            for _, values in self._results([[job] for job in again], preview, first=[]):
                results |= values
        failed = [job for job in jobs if isinstance(results[_key(job)], Exception)]
        if ended_s:
            passed = duration(time.monotonic() - start_s)
            log.info("%d of %d cells done in %s", len(jobs) - len(failed), len(jobs), passed)
        for job in failed:
            title, text = job.cell.title, str(results[_key(job)])
            lead = "" if text.startswith(title) else f"{title}: "
            log.error("failed: %s%s; log: %s", lead, text, job.cell.folder / "kdsweep.log")
        return results

    def _results(
        self, groups: list[list[Job]], preview: Preview, *, first: list[Work]
    ) -> Iterator[tuple[list[Job], dict[str, Result]]]:
        """Train groups; yield each with its results by fingerprint as it ends."""
        from kdsweep.sweep.executors import worker
        from kdsweep.sweep.executors.executor import Work, run

        devices = preview.devices
        works = [
            Work(worker.train_cells, group, devices[group[0].settings.device], [job.cell for job in group])
            for group in groups
        ]
        for work, values in run(self.executor, works, before=first):
            yield work.jobs, {_key(job): value for job, value in zip(work.jobs, values, strict=True)}


def _key(job: Job) -> str:
    return job.cell.fingerprint


def job_return(typed: Sequence[str], result: Any) -> JobReturn:
    """Return the JobReturn of a job from its overrides and its value or error."""
    status = JobStatus.FAILED if isinstance(result, Exception) else JobStatus.COMPLETED
    return JobReturn(overrides=typed, status=status, _return_value=result)


def teacher_works(jobs: Sequence[Job], preview: Preview) -> list[Work]:
    """Return a work for each Teacher that these jobs lack."""
    from kdsweep.sweep import plan
    from kdsweep.sweep.executors import worker
    from kdsweep.sweep.executors.executor import Work

    missing = plan.missing_teachers(jobs)
    return [
        Work(worker.train_teachers, [job], preview.devices[job.settings.device], cells=[cell]) for cell, job in missing
    ]


def command_line() -> str:
    """Return the command as it can be typed again, without passwords: MLflow's tags and the report keep it."""
    typed = ["python", "-m", "kdsweep", *arguments]
    return shlex.join(re.sub(r"://[^/\s]+@", "://USER:PASSWORD@", argument) for argument in typed)
