"""The plan of a sweep: all jobs are composed and checked before the first one starts; the user sees what will run."""

from __future__ import annotations

import logging
import os
import re
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from kdsweep import grid, limits
from kdsweep.errors import InputError
from kdsweep.progress import duration

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

    from kdsweep.grid import Cell

log = logging.getLogger(__name__)

TRACEBACK = "KDSWEEP_TRACEBACK"  # environment: 1 shows the traceback of an error that ends the program


class Plan(Callback):
    """Hydra callback: checks the whole sweep first, says what will run, and keeps the user posted between the jobs."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.failed: list[str] = []
        self.started_s = 0.0

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Compose and check all jobs; a wrong one ends the program before anything is trained."""
        jobs = _checked(lambda: announce(compose_jobs(config)))
        self.total, self.started_s = len(jobs), time.monotonic()

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """The same for a single cell."""
        _checked(lambda: announce([config]))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Say how far the sweep is, how long it still takes, and at its end what failed."""
        if not self.total:
            return
        self.done += 1
        if job_return.status.name == "FAILED":
            self.failed.append(f"{config.hydra.runtime.output_dir}: {job_return._return_value}")
        if self.done < self.total:
            left_s = (time.monotonic() - self.started_s) / self.done * (self.total - self.done)
            log.info("%d of %d jobs done, about %s left", self.done, self.total, duration(left_s))
            return
        log.info("%d of %d jobs done in %s", self.done, self.total, duration(time.monotonic() - self.started_s))
        for line in self.failed:
            log.error("failed: %s", line)


def _checked(prepare: Callable[[], list[DictConfig]]) -> list[DictConfig]:
    """Hydra turns a callback's exceptions into warnings and goes on; what the user must mend ends the program here."""
    try:
        return prepare()
    except Exception as error:
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exc()
        raise SystemExit(f"kdsweep: error: {one_line(error)}") from error


def announce(jobs: list[DictConfig]) -> list[DictConfig]:
    """Check every job, write down what the sweep asks for, and tell the user what will run; gives the jobs back."""
    for job in jobs:
        own = OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"])
        values: Any = OmegaConf.to_container(own, resolve=True)
        limits.check(grid.flatten(values))  # before torch is imported, so that a typing error is told at once

    from kdsweep import build, checkpoint

    for job in jobs:
        build.check(job)
    cells = {cell.fingerprint: (cell, job) for job in jobs for cell in [build.cell(job)]}
    for cell, job in cells.values():
        if checkpoint.read_finished(cell.folder) is None:  # what is finished needs neither networks nor batches
            build.check_networks(job)
            build.feed(job, seed=job.seed)
    for sweep in sorted({job.sweep_name for job in jobs}):
        build.tracker(jobs[0]).ask(sweep, [cell for cell, job in cells.values() if job.sweep_name == sweep])
    log.info("%s", describe(list(cells.values()), jobs_count=len(jobs)))
    return jobs


def compose_jobs(config: DictConfig) -> list[DictConfig]:
    """The configuration of every job of a multirun, in order, as Hydra's basic sweeper will make them."""
    loader = GlobalHydra.instance().config_loader()
    fixed = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=loader)
    overrides = parser.parse_overrides([*fixed, *config.hydra.overrides.task])
    (batch,) = BasicSweeper.split_arguments(overrides, None)
    return [loader.load_sweep_config(config, list(job)) for job in batch]


def describe(cells: list[tuple[Cell, DictConfig]], *, jobs_count: int) -> str:
    """One line on what will run: cells, Teachers, data, device, the longest that it can take."""
    from kdsweep import build, checkpoint

    waiting = [(cell, job) for cell, job in cells if checkpoint.read_finished(cell.folder) is None]
    teachers = {
        teacher.fingerprint: job
        for cell, job in waiting
        if cell.role == "cell"
        for teacher in [build.teacher_cell(job)]
        if checkpoint.read_finished(teacher.folder) is None
    }
    job = cells[0][1]
    repeats = f" ({jobs_count - len(cells)} repeated jobs are the same cell)" if jobs_count > len(cells) else ""
    finished = len(cells) - len(waiting)
    line = (
        f"{len(cells)} cells{repeats}: {len(waiting)} to run, {finished} finished; {len(teachers)} Teachers to train; "
        f"data={job.data.name} with {len(build.images(job).ids)} images at {job.image_size} pixels; "
        f"device {build.device(job)}; profile={job.profile}; sweep {job.sweep_name}"
    )
    if not waiting:
        return line
    longest_s = estimate_s(cells=[job for _, job in waiting], teachers=list(teachers.values()))
    return f"{line}; at most about {duration(longest_s)} if no early stop ends a cell sooner"


def estimate_s(*, cells: list[DictConfig], teachers: list[DictConfig]) -> float:
    """Seconds for these trainings over all their epochs, from one timed step of the first cell's networks."""
    from kdsweep import build, timing, train

    train.keep_freed_memory()
    job = cells[0]
    where = build.compute(job)
    timed = {"image_size": job.image_size, "compute": where}
    student = timing.time_step_s(build.student_network(job, weights="none"), **timed)
    taught = [job for job in cells if job.path.kd_path is not None]
    step_s = {"student": student.train, "teacher": 0.0, "taught": student.train}
    if taught:
        teacher = timing.time_step_s(build.teacher_network(taught[0], weights="none"), **timed)
        step_s = {"student": student.train, "teacher": teacher.train, "taught": student.train + teacher.forward}
    images = len(build.split_ids(job)["train"])
    total = sum(job.train.epochs * step_s["taught" if job.path.kd_path is not None else "student"] for job in cells)
    return images * (total + sum(job.train.epochs * step_s["teacher"] for job in teachers))


def one_line(error: BaseException) -> str:
    """The message that the user can act on, from an exception and what caused it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
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
    from kdsweep import build

    parent, _, _ = key.rpartition(".")
    try:
        cfg = build.compose([])
        node = OmegaConf.select(cfg, parent) if parent else cfg
        keys = ", ".join(sorted(node)) if node is not None else ""
    except (InputError, TypeError):
        keys = ""
    return f"{parent + ' has' if parent else 'it has'}: {keys}" if keys else "see python -m kdsweep --help"
