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
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from kdsweep.config import composition, overrides
from kdsweep.config.identity import Job
from kdsweep.core.errors import InputError
from kdsweep.core.files import without_folders
from kdsweep.core.progress import duration
from kdsweep.sweep import estimate, plan
from kdsweep.sweep.estimate import Preview
from kdsweep.sweep.executors import worker
from kdsweep.sweep.executors.executor import Executor, Result, Work, run

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
    typed = overrides.with_ensembles(typed)  # Hydra composes them once before it divides a sweep into its jobs
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
    overrides.check([f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()], multirun=True)
    for override in config.hydra.overrides.hydra:
        if override.lstrip("+~").replace("/", ".").startswith(UNUSED):
            raise InputError(
                f"{override} has no effect: a cell has its folder in the store, with its log; leave it out"
            )
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
        self.hydra_context, self.config = hydra_context, config

    def read(self, job_overrides: Sequence[Sequence[str]]) -> list[Job]:
        """Compose and check the configurations of these jobs."""
        return plan.read_jobs(composition.compose_jobs(self.hydra_context.config_loader, self.config, job_overrides))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compute the cells of these jobs; return one result per job, in their order."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = self.read(job_overrides)
        gc.freeze()  # they stay to the end: else each collection of garbage would go through all of them again
        if self.plan:
            with self.executor:
                self._obtain(jobs)
            return [job_return(job.overrides, math.nan) for job in jobs]
        self.executor.check(plan.waiting(jobs))
        from kdsweep.tracking import sync  # with mlflow, which takes seconds to import

        plan.watch(jobs, command=command_line())
        self._call_back("on_job_start", job_overrides, [{"task_function": train_cell} for _ in jobs])
        try:
            with self.executor:  # within: MLflow logs how those that are stopped have ended
                results = self._obtain(jobs)
        finally:
            sync.close_all()
        returns = [job_return(job.overrides, results[job.cell.fingerprint]) for job in jobs]
        self._call_back("on_job_end", job_overrides, [{"job_return": each} for each in returns])
        return returns

    def _call_back(self, event: str, job_overrides: Sequence[Sequence[str]], values: Sequence[dict[str, Any]]) -> None:
        """Call the user's Hydra callbacks for each job."""
        callbacks = self.hydra_context.callbacks
        if callbacks.callbacks:
            configs = composition.compose_jobs(self.hydra_context.config_loader, self.config, job_overrides)
            for config, each in zip(configs, values, strict=True):
                getattr(callbacks, event)(config=config, **each)

    def _obtain(self, jobs: list[Job]) -> dict[str, Result]:
        """Return the results of all cells by fingerprint, read or computed; a plan is shown and gives none."""
        # The queue first: what has left it by then has written its results, so that nothing is submitted twice.
        queued = self.executor.queued(plan.waiting(jobs))
        jobs = plan.read_states(jobs)
        groups, preview = list[list[Job]](), None
        if waiting := plan.waiting(jobs):
            preview = self.executor.preview(plan.kinds(waiting), times=self.plan)
            groups = plan.form_groups(waiting, devices=preview.devices, largest=self.executor.largest, apart=queued)
        if self.plan:
            sys.stdout.write(estimate.overview(jobs, groups=groups, preview=preview) + "\n")
            estimate.log_idle(jobs)
            return {}
        log.info("%s", estimate.describe(jobs, groups=groups, preview=preview))
        for line in estimate.ignored_lines(jobs):
            log.warning("%s", line)
        estimate.log_changes(jobs)
        estimate.log_idle(jobs)
        results = _read_results(jobs)
        return results if preview is None else results | self._train(groups, preview)

    def _train(self, groups: list[list[Job]], preview: Preview) -> dict[str, Result]:
        """Return the results of groups by fingerprint; cells that fail are tried again if their settings say so."""
        jobs = [job for group in groups for job in group]
        seconds = {group[0]: estimate.group_s(group, preview) for group in groups}
        before = []
        if self.executor.machines or preview.places > 1:  # else groups wait for Teachers in turn
            before = teacher_works(jobs, preview)
            groups = sorted(groups, key=lambda group: -seconds[group[0]])  # the last ones to end are short
        results: dict[Job, Result] = {}
        ended_s, start_s = list[float](), time.monotonic()
        for ended in self._run(groups, preview, before=before):
            results |= ended
            if not all(isinstance(value, float) and math.isnan(value) for value in ended.values()):  # only submitted
                ended_s.append(seconds[next(iter(ended))])
                passed_s = time.monotonic() - start_s
                estimate.log_progress(ended_s, list(seconds.values()), places=preview.places, passed_s=passed_s)
        again = [job for job in jobs if job.settings.retry_failed and isinstance(results[job], Exception)]
        if again:
            log.info("trying the cells that failed a second time, each alone: %d", len(again))
            for ended in self._run([[job] for job in again], preview):
                results |= ended
        failed = {job: str(results[job]) for job in jobs if isinstance(results[job], Exception)}
        if ended_s:
            passed = duration(time.monotonic() - start_s)
            log.info("%d of %d cells done in %s", len(jobs) - len(failed), len(jobs), passed)
        for job, text in failed.items():
            lead = "" if text.startswith(job.cell.title) else f"{job.cell.title}: "
            log.error("failed: %s%s; log: %s", lead, text, job.cell.folder / "kdsweep.log")
        return {job.cell.fingerprint: result for job, result in results.items()}

    def _run(
        self, groups: list[list[Job]], preview: Preview, *, before: Sequence[Work] = ()
    ) -> Iterator[dict[Job, Result]]:
        """Train groups; yield the results of each as it ends."""
        works = [
            Work(worker.train_cells, group, preview.devices[group[0].settings.device], [job.cell for job in group])
            for group in groups
        ]
        for work, values in run(self.executor, works, before=before):
            yield dict(zip(work.jobs, values, strict=True))


def _read_results(jobs: Sequence[Job]) -> dict[str, Result]:
    """Return the results of finished cells by fingerprint, and log where they are."""
    from kdsweep.tracking import sync

    results: dict[str, Result] = {}
    for job in plan.unique(jobs):
        if job.finished is not None:
            run_id, folder = sync.run_id(job.cell.folder) or "not in MLflow yet", job.cell.folder
            log.info("%s: finished already, run %s in %s", job.cell.title, run_id, folder)
            results[job.cell.fingerprint] = job.finished["test/dice"]
    return results


def job_return(typed: Sequence[str], result: Any) -> JobReturn:
    """Return the JobReturn of a job from its overrides and its value or error."""
    status = JobStatus.FAILED if isinstance(result, Exception) else JobStatus.COMPLETED
    return JobReturn(overrides=typed, status=status, _return_value=result)


def teacher_works(jobs: Sequence[Job], preview: Preview) -> list[Work]:
    """Return a work for each Teacher that these jobs lack."""
    return [
        Work(worker.train_teachers, [job], preview.devices[job.settings.device], cells=[cell])
        for cell, job in plan.missing_teachers(jobs)
    ]


def command_line() -> str:
    """Return the command without passwords and folders, since MLflow and the report keep it."""
    typed = ["python", "-m", "kdsweep"]
    for argument in arguments:
        key, equals, value = re.sub(r"://[^/\s]+@", "://USER:PASSWORD@", argument).partition("=")
        named = ",".join(map(without_folders, value.split(",")))
        typed.append("store=STORE" if key == "store" and named != value else key + equals + named)
    return shlex.join(typed)
