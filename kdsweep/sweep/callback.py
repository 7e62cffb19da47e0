"""Messages to the user before cells are trained and between those trained one by one; errors in one line."""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from kdsweep.config import composition, overrides
from kdsweep.core.errors import CellError, InputError, one_line, report

if TYPE_CHECKING:
    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.plan import Job

log = logging.getLogger(__name__)

at_end = contextlib.ExitStack()  # what the program closes last


class SweepCallback(Callback):
    """Hydra callback for cells that run one by one: checks all first, says what will run, reports progress."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.failed: list[str] = []
        self.started_s = 0.0

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Compose and check all jobs; a wrong one ends the program before anything is trained."""
        params = config.hydra.sweeper.get("params") or {}
        _or_exit(lambda: len(overrides.check([f"{key}={value}" for key, value in params.items()], multirun=True)))
        if _is_own(config):
            return  # the lockstep launchers do all this themselves
        self.total = _or_exit(lambda: prepare(compose_jobs(config), command=command_line(config)))
        self.started_s = time.monotonic()

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Check a single cell in the same way."""
        if _is_own(config) and not config.hydra.launcher._target_.endswith(".LockstepLauncher"):
            name = config.hydra.runtime.choices["hydra/launcher"]
            raise SystemExit(f"kdsweep: error: hydra/launcher={name} runs sweeps: add -m, or leave it out")
        if config.hydra.sweeper.get("search"):
            raise SystemExit("kdsweep: error: hydra.sweeper.search tunes sweeps: add -m, or leave it out")
        if config.hydra.launcher.get("plan"):
            _or_exit(lambda: show_plan([config]))
            raise SystemExit(0)
        _or_exit(lambda: prepare([config], command=command_line(config)))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Report progress and the time left, and after the last job what failed."""
        from kdsweep.core.progress import duration, left_s

        if not self.total:
            return
        self.done += 1
        if job_return.status == JobStatus.FAILED:
            folder = config.hydra.runtime.output_dir
            self.failed.append(f"{one_line(job_return._return_value)}; log: {folder}/kdsweep.log")
        passed_s = time.monotonic() - self.started_s
        if self.done < self.total:
            about_s = left_s(passed_s=passed_s, done=self.done, left=self.total - self.done)
            log.info("%d of %d jobs done, about %s left", self.done, self.total, duration(about_s))
            return
        log.info("%d of %d jobs done in %s", self.done, self.total, duration(passed_s))
        for line in self.failed:
            log.error("failed: %s", line)


def _is_own(config: DictConfig) -> bool:
    return str(config.hydra.launcher._target_).startswith("hydra_plugins.kdsweep_lockstep.")


def _or_exit(prepare: Callable[[], int]) -> int:
    """End the program on an error: Hydra would turn a callback's exceptions into warnings and go on."""
    try:
        return prepare()
    except Exception as error:
        raise SystemExit(report(error, user_message(error))) from error


def command_line(config: DictConfig) -> str:
    """Return the command as it can be typed again: a multirun with all of its values; without passwords."""
    hydra, words = config.hydra, ["python", "-m", "kdsweep"]
    words += ["-m"] if "hydra.mode=MULTIRUN" in hydra.overrides.hydra else []
    for source in hydra.runtime.config_sources:
        words += ["--config-dir", source.path] if source.provider == "command-line" else []
    words += [word for word in hydra.overrides.hydra if not word.startswith("hydra.mode=")]
    # MLflow's tags and the report keep this, and others than the user read them.
    return shlex.join(re.sub(r"://[^/\s]+@", "://USER:PASSWORD@", word) for word in [*words, *hydra.overrides.task])


def _preview(waiting: list[Job]) -> Preview:
    """Check jobs that Hydra runs one after the other in this process, so on the first device, and time a step."""
    from kdsweep.sweep import plan
    from kdsweep.sweep.engines import worker

    preview = worker.preview_cells([job.config for job in plan.kinds(waiting)], [])
    return replace(preview, devices={device: names[:1] for device, names in preview.devices.items()})


def prepare(configs: list[DictConfig], *, command: str) -> int:
    """Check every job in this process, record what the sweep asks for, say what will run; return the number of jobs."""
    from kdsweep.sweep import estimate, plan, typed
    from kdsweep.tracking import sync

    jobs = plan.read_jobs(configs)
    plan.watch(jobs, command=command)
    at_end.callback(sync.close_all)
    waiting = plan.waiting(jobs)
    preview = _preview(waiting) if waiting else None
    log.info("%s", estimate.describe(jobs, groups=[[job] for job in waiting], preview=preview))
    estimate.log_ignored(jobs)
    plan.tell_changes(jobs)
    typed.name_idle(jobs)
    return len(jobs)


def show_plan(configs: list[DictConfig]) -> int:
    """Check every job and say what would run, without writing anything; return the number of jobs."""
    from kdsweep.sweep import estimate, plan, typed

    jobs = plan.read_jobs(configs)
    waiting = plan.waiting(jobs)
    preview = _preview(waiting) if waiting else None
    sys.stdout.write(estimate.overview(jobs, groups=[waiting] if waiting else [], preview=preview) + "\n")
    typed.name_idle(jobs)
    return len(jobs)


def compose_jobs(config: DictConfig) -> list[DictConfig]:
    """Compose the configuration of every job of a multirun, in the order of Hydra's basic sweeper."""
    loader = GlobalHydra.instance().config_loader()
    fixed = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=loader)
    parsed = parser.parse_overrides([*fixed, *config.hydra.overrides.task])
    (batch,) = BasicSweeper.split_arguments(parsed, None)
    return [loader.load_sweep_config(config, list(job)) for job in batch]


def user_message(error: BaseException, words: Sequence[str] = ()) -> str:
    """Return a message that the user can act on, from an exception and its causes.

    Args:
        error: the exception.
        words: overrides of the command.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError | CellError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    if type(error).__module__.startswith(("hydra", "omegaconf")):
        return composition.one_line(error, words)
    return one_line(error)
