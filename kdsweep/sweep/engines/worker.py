"""Spawned processes that compute, and the functions that they run with the Hydra jobs of a group.

A process per group survives the death of another one, which the pools of the standard library do not.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cloudpickle
from hydra import version
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, env_override, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from kdsweep.config import composition, identity
from kdsweep.config.grid import Cell
from kdsweep.config.identity import Job
from kdsweep.core import logs, signals
from kdsweep.core.errors import CellError, DeviceError, InputError, one_line
from kdsweep.sweep.engines.engine import DONE

if TYPE_CHECKING:
    from kdsweep.sweep.estimate import Preview
    from kdsweep.tuning.pruning import Pruning

log = logging.getLogger(__name__)

STOP_WITHIN_S = 10.0


class Worker:
    """A process that calls the functions sent to it, one at a time; they and their results are pickled."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        with _withheld():
            self.process.start()
        theirs.close()
        atexit.register(self.connection.close)  # else the end of this program would wait for the process for ever

    def send(self, function: Callable[..., Any], *args: Any) -> None:
        """Make the process call the function; ``receive`` returns the result."""
        message = cloudpickle.dumps((function, args))
        with contextlib.suppress(ConnectionError):  # it has died: receive says how
            self.connection.send_bytes(message)

    def receive(self) -> Any:
        """Return the result of the last function sent.

        Raises:
            InputError: raised by the function.
            CellError: any other error of the function, or the process died.
        """
        try:
            result, error = cloudpickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise CellError(f"its process ended early, {_ending(self.process.exitcode)}") from error
        if error is not None:
            raise error
        return result

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Send a function and receive its result."""
        self.send(function, *args)
        return self.receive()

    def outcome(self) -> Any:
        """Return the result of ``receive``, or the error that it raises."""
        try:
            return self.receive()
        except (InputError, CellError) as error:
            return error

    def close(self) -> None:
        """Let the process end, and wait for it."""
        atexit.unregister(self.connection.close)
        self.connection.close()
        self.process.join()


def start(config: DictConfig) -> Worker:
    """Start a worker with this process's Hydra state and log.

    Args:
        config: of the sweep.
    """
    started = Worker()
    started.call(set_up, config, Singleton.get_state())
    return started


@contextlib.contextmanager
def _withheld() -> Iterator[None]:
    """Block, in processes started inside, the signals that SLURM sends to a whole job: they are fatal there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop(workers: Sequence[Worker], number: int) -> int:
    """Make processes save their state and end; kill those that take too long and return their number.

    Args:
        workers: the processes.
        number: of the signal to send.
    """
    for worker in workers:
        if worker.process.is_alive() and worker.process.pid is not None:
            os.kill(worker.process.pid, number)
    killed, deadline_s = 0, time.monotonic() + STOP_WITHIN_S
    for worker in workers:
        worker.process.join(max(deadline_s - time.monotonic(), 0.0))
        if worker.process.is_alive():
            log.warning("process %d did not end in time and is killed", worker.process.pid)
            worker.process.kill()
            killed += 1
        worker.close()
    return killed


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (was the memory full?)" if name == "SIGKILL" else "")
    return f"exit code {code}"


def _serve(connection: Connection) -> None:
    """Call what comes in until the sender is gone; this is the worker's main function."""
    signals.install()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError, signals.Stopped):
        while True:
            function, args = cloudpickle.loads(connection.recv_bytes())
            # Not ``send``: a plugin that Hydra has loaded twice has classes that pickle does not take.
            connection.send_bytes(cloudpickle.dumps(_answer(function, args)))


def _answer(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    """Return a call's result, or its error as one that survives pickling."""
    try:
        return function(*args), None
    except Exception as error:
        if not isinstance(error, InputError):
            log.error("%s", traceback.format_exc())
        return None, _as_text(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def set_up(config: DictConfig, singletons: dict[Any, Any]) -> None:
    """Give a new process the Hydra state and the log of the one that started it.

    Args:
        config: of the sweep.
        singletons: Hydra's state.
    """
    Singleton.set_state(singletons)
    logging.raiseExceptions = False  # a full disk must not turn each line into a traceback
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)


@contextlib.contextmanager
def open_job(config: DictConfig, hydra_context: HydraContext, task_function: TaskFunction) -> Iterator[JobReturn]:
    """Open a Hydra job as ``run_job`` does, but let the body set the result instead of the task function."""
    hydra, state, before = config.hydra, HydraConfig.instance(), HydraConfig.instance().cfg
    state.set_config(config)  # what ${hydra:...} in the folder's name refers to
    try:
        folder = Path(str(hydra.sweep.dir), str(hydra.sweep.subdir)).absolute()
        with read_write(hydra.runtime), open_dict(hydra.runtime):
            hydra.runtime.output_dir = str(folder)
        state.set_config(config)  # it keeps a copy, now with the folder
        own, about = copy.deepcopy(config), cast(DictConfig, copy.deepcopy(state.cfg))
        with read_write(own), open_dict(own):
            del own["hydra"]
        (folder / (hydra.output_subdir or "")).mkdir(parents=True, exist_ok=True)
        chdir = not version.base_at_least("1.2") if hydra.job.chdir is None else hydra.job.chdir
        with contextlib.chdir(folder if chdir else "."):
            configure_log(hydra.job_logging, hydra.verbose)
            if hydra.output_subdir is not None:
                for name, part in ("config", own), ("hydra", about), ("overrides", hydra.overrides.task):
                    OmegaConf.save(part, folder / hydra.output_subdir / f"{name}.yaml")
            job = JobReturn(list(hydra.overrides.task), own, about, working_dir=str(Path.cwd()))
            with env_override(hydra.job.env_set):
                hydra_context.callbacks.on_job_start(config=config, task_function=task_function)
                yield job
            job.task_name = JobRuntime.instance().get("name")
            hydra_context.callbacks.on_job_end(config=config, job_return=job)
    finally:
        state.cfg = before


def run_jobs(
    configs: Sequence[DictConfig], hydra_context: HydraContext, run_group: Callable[[list[Any]], list[Any]]
) -> list[JobReturn]:
    """Open Hydra jobs, compute them together, close them; return one JobReturn per job, exceptions as text.

    Args:
        configs: of the jobs, each with its ``hydra`` node.
        hydra_context: of the sweep.
        run_group: computes the jobs' results; an exception among them fails that job alone.
    """
    returns: list[JobReturn] = []
    files: list[logging.Handler] = []
    with contextlib.ExitStack() as jobs:
        for config in configs:
            try:
                returns.append(jobs.enter_context(open_job(config, hydra_context, run_group)))
            except OSError as error:  # its folder cannot be written to: the other jobs go on
                log.error("%s", one_line(error), extra=logs.SCREEN_ONLY)
                returns.append(closed(config.hydra.overrides.task, _as_text(error)))
            else:
                files += logs.claim(Path(config.hydra.runtime.output_dir))
        for handler in files:
            logging.getLogger().addHandler(handler)  # again: opening a job removes those of the others
        opened = [job for job in returns if job.status == JobStatus.UNKNOWN]
        try:
            results = run_group([job.cfg for job in opened])
        except Exception as error:
            log.error("%s", one_line(error), exc_info=error)
            results = [error] * len(opened)
        for job, result in zip(opened, results, strict=True):
            job.status = JobStatus.FAILED if isinstance(result, Exception) else JobStatus.COMPLETED
            job.return_value = _as_text(result)
    for handler in files:
        logging.getLogger().removeHandler(handler)
        handler.close()
    return returns


def one_by_one(configs: list[DictConfig], *, task_function: TaskFunction) -> list[Any]:
    """Run jobs that are not cells."""
    return [task_function(config) for config in configs]


def train_cells(
    configs: Sequence[DictConfig], hydra_context: HydraContext, variants: dict[str, dict[str, str]]
) -> list[float | Exception]:
    """Run ``group.run_group`` as Hydra jobs; torch is imported here, the sending process has none.

    Returns:
        The test Dice of each cell, or the error that ended it.
    """
    from kdsweep.training import group

    def run_group(own: list[DictConfig]) -> list[float | Exception]:
        return group.run_group(jobs_of(own, variants))

    return [own._return_value for own in run_jobs(configs, hydra_context, run_group)]


def train_trials(
    configs: Sequence[DictConfig],
    hydra_context: HydraContext,
    pruning: Pruning,
    role: str,
    variants: dict[str, dict[str, str]],
) -> list[float | Exception]:
    """Run ``group.run_trials``, Students as Hydra jobs; torch is imported here.

    Returns:
        The validation Dice of each trial's best epoch, or the error that ended it.
    """
    from kdsweep.training import group

    def run_group(own: list[DictConfig]) -> list[float | Exception]:
        return group.run_trials(jobs_of(own, variants), pruning=pruning, role=role)

    if role == "teacher":  # a job's folder is that of its Student
        logs.claim(
            Path(str(configs[0].store))
        )  # there is no log of their own: what each trial says stays off the screen
        return [_as_text(result) for result in run_group(list(configs))]
    return [own._return_value for own in run_jobs(configs, hydra_context, run_group)]


def jobs_of(configs: Sequence[DictConfig], variants: Mapping[str, dict[str, str]] | None = None) -> list[Job]:
    """Return the jobs of configurations, their cells and Teachers with these variants by fingerprint."""
    found = []
    for config in configs:
        job = identity.job(composition.read(config))
        teacher = job.cell.teacher and named(job.cell.teacher, variants or {})
        found.append(replace(job, cell=replace(named(job.cell, variants or {}), teacher=teacher)))
    return found


def named(cell: Cell, variants: Mapping[str, dict[str, str]]) -> Cell:
    """Return a cell with its variant."""
    return replace(cell, variant=variants.get(cell.fingerprint, {}))


def time_epochs(parts: list[tuple[DictConfig, str]]) -> list[float]:
    """Run ``preview.time_epoch_s`` for each configuration and role."""
    from kdsweep.sweep import preview

    return [preview.time_epoch_s(jobs_of([config])[0], role=role) for config, role in parts]


def train_teachers(configs: list[DictConfig]) -> str:
    """Run ``group.obtain_teachers``; a failure is logged, and reported by the cells that need the Teacher."""
    from kdsweep.training import group

    group.obtain_teachers(jobs_of(configs))
    return DONE


def preview_cells(configs: list[DictConfig], devices: list[str]) -> Preview:
    """Run ``preview.preview_cells``."""
    from kdsweep.sweep import preview

    return preview.preview_cells(jobs_of(configs), devices)


def preview_remote(configs: list[DictConfig], place: str, *, times: bool) -> Preview:
    """Run ``preview.preview_remote``."""
    from kdsweep.sweep import preview

    return preview.preview_remote(jobs_of(configs), place, times=times)


def pin(call: Callable[[list[DictConfig]], Any], configs: list[DictConfig], device: str, share: int = 1) -> Any:
    """Call a function of configurations on one of several devices.

    Args:
        call: the function.
        configs: its argument.
        device: its name; an empty one leaves the configurations as they are.
        share: how many processes compute on this device: on the CPU each takes its part of the threads.
    """
    if device:
        os.environ["TQDM_DISABLE"] = "1"  # the bars of several processes would overwrite each other
        for config in configs:
            config.device = device
    if share > 1:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // share))
    return call(configs)


def probe(device: str) -> None:
    """Compute something on a device and raise whatever error that gives."""
    import torch

    torch.ones(8, device=device).sum().item()


def closed(overrides: Sequence[str], result: Any) -> JobReturn:
    """Return the JobReturn of a job that was not run here or not opened; its result is a value or its error."""
    status = JobStatus.FAILED if isinstance(result, Exception) else JobStatus.COMPLETED
    return JobReturn(overrides=overrides, status=status, _return_value=result)


def _as_text(result: Any) -> Any:
    """Replace an exception, which may not survive pickling, by one with its text."""
    if isinstance(result, Exception):
        kept = next((kind for kind in (InputError, DeviceError) if isinstance(result, kind)), CellError)
        return kept(one_line(result))
    return result
