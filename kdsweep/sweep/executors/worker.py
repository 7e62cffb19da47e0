"""Spawned processes, and what they do: a group's function, with a log and the settings in the folder of each cell."""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import yaml

from kdsweep.core import logs, signals
from kdsweep.core.errors import DeviceError, InputError, LostError, one_line, portable
from kdsweep.core.files import write_text

if TYPE_CHECKING:
    from kdsweep.config.identity import Job
    from kdsweep.sweep.executors.executor import Result, Work
    from kdsweep.tuning.pruning import Pruning

log = logging.getLogger(__name__)

STOP_WITHIN_S = 10.0


class Process:
    """A fresh process that calls a function; the function, its arguments and its result are pickled.

    Args:
        function: called in the process.
        args: its arguments.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        self._receiver, sender = context.Pipe(duplex=False)
        level = logging.getLogger().level
        self._process = context.Process(target=_main, args=(sender, level, function, args))
        with _withheld():
            self._process.start()
        sender.close()

    def result(self) -> Any:
        """Return the function's result when the process has ended.

        Raises:
            InputError: raised by the function.
            CellError: any other error of the function; LostError if the process died.
        """
        try:
            value = self._receiver.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise LostError(f"its process ended early, {_ending(self._process.exitcode)}") from error
        self._process.join()
        if isinstance(value, Exception):
            raise value
        return value

    def terminate(self) -> None:
        """Have the process save its state and end."""
        self._process.terminate()

    def kill_after(self, seconds: float) -> bool:
        """Wait for the end of the process, but not for longer than this; return whether it had to be killed."""
        # ``result`` alone joins the process, in another thread: of two joins, one may miss that it has ended.
        if wait([self._process.sentinel], max(seconds, 0.0)):
            return False
        log.warning("process %d did not end in time and is killed", self._process.pid)
        self._process.kill()
        wait([self._process.sentinel])
        return True


def stop(processes: Sequence[Process]) -> int:
    """Have processes save their state and end; kill those that take too long and return their number."""
    for process in processes:
        process.terminate()
    deadline_s = time.monotonic() + STOP_WITHIN_S
    return sum(process.kill_after(deadline_s - time.monotonic()) for process in processes)


@contextlib.contextmanager
def _withheld() -> Iterator[None]:
    """Block, in processes started inside, the signals that SLURM sends to a job: the process above passes them on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (was the memory full?)" if name == "SIGKILL" else "")
    return f"exit code {code}"


def _main(sender: Connection, level: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Be the process."""
    signals.install()
    logs.to_screen(level)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = 1
    try:
        sender.send(_answer(function, args))
        code = 0
    except signals.Stopped as stopped:
        code = stopped.exit_code
    except ConnectionError:  # the process above is gone
        pass
    util._exit_function()  # type: ignore[attr-defined]  # private, and the only call that ends loader processes before os._exit
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # Python would take a second to clear what torch has imported


def _answer(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return a call's result, or its error."""
    try:
        return function(*args)
    except Exception as error:
        if not isinstance(error, InputError):
            log.error("%s", one_line(error), exc_info=error)
        return portable(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def compute(work: Work) -> list[Result]:
    """Call the function of a work with a log file open in the folder of each cell; errors come back as results."""
    results: list[Result] = [math.nan] * len(work.jobs)
    with logs.to_files([cell.folder for cell in work.cells]) as errors:
        ready = []
        for position, cell in enumerate(work.cells):
            try:
                if (error := errors.get(cell.folder)) is not None:
                    raise error
                if cell.role != "teacher":
                    _write_settings(work.jobs[position])
                ready.append(position)
            except OSError as error:  # the folder cannot be written to: the other cells are computed
                log.error("%s", one_line(error), extra=logs.SCREEN_ONLY)
                results[position] = error
        try:
            computed = work.call([work.jobs[position] for position in ready]) if ready else []
        except Exception as error:
            log.error("%s", one_line(error), exc_info=error)
            computed = [error] * len(ready)
    for position, result in zip(ready, computed, strict=True):
        results[position] = result
    return [portable(result) if isinstance(result, Exception) else result for result in results]


def _write_settings(job: Job) -> None:
    """Write the settings and overrides of a job into its cell's folder."""
    settings = job.settings.model_dump(mode="json", by_alias=True)
    write_text(job.cell.folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_text(job.cell.folder / "overrides.yaml", yaml.safe_dump(list(job.overrides), allow_unicode=True))


def compute_on(work: Work, device: str, *, share: int, is_alone: bool) -> list[Result]:
    """Do as ``compute`` on one of the devices of this machine.

    Args:
        work: what to compute.
        device: its name.
        share: how many processes compute on this device: on the CPU each takes its part of the threads.
        is_alone: whether no other process runs at the same time, whose progress bar would overwrite this one's.

    Raises:
        DeviceError: the device does not compute.
    """
    if device != "cpu":
        _touch(device)
    if not is_alone:
        os.environ["TQDM_DISABLE"] = "1"
    if share > 1:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // share))
    return compute(work)


def _touch(device: str) -> None:
    """Raise DeviceError if a device does not compute in this fresh process."""
    import torch

    try:
        torch.ones(8, device=device).sum().item()
    except Exception as error:
        raise DeviceError(f"{device} does not compute any more") from error


def train_cells(jobs: list[Job]) -> list[Result]:
    """Train the cells of a group; torch is imported here, the process that submits has none."""
    from kdsweep.training import group

    return group.run_group(jobs)


def train_trials(jobs: list[Job], *, pruning: Pruning, role: str) -> list[Result]:
    """Train the trials of a group; torch is imported here."""
    from kdsweep.training import group

    return group.run_trials(jobs, pruning=pruning, role=role)


def train_teachers(jobs: list[Job]) -> list[float]:
    """Train the Teachers of these jobs; the cells that need them report a failure."""
    from kdsweep.training import group

    group.obtain_teachers(jobs)
    return [math.nan] * len(jobs)
