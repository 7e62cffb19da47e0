"""Spawned processes that compute, and what one does with the Hydra jobs of a group.

A process per group survives the death of another one, which the pools of the standard library do not.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import cloudpickle
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from kdsweep import logs
from kdsweep.errors import CellError, InputError

if TYPE_CHECKING:
    from kdsweep.plan import Look

log = logging.getLogger(__name__)


class Worker:
    """A process that is sent functions to call, one at a time; they and their results are pickled."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()
        atexit.register(self.connection.close)  # else the end of this program would wait for the process for ever

    def send(self, function: Callable[..., Any], *args: Any) -> None:
        """Have it call the function; ``receive`` gives the result."""
        message = cloudpickle.dumps((function, args))
        with contextlib.suppress(ConnectionError):  # it has died: receive says how
            self.connection.send_bytes(message)

    def receive(self) -> Any:
        """The result of what was sent last.

        Raises:
            InputError: raised by the function.
            CellError: any other error of the function, or the process died.
        """
        try:
            result, error = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise CellError(f"its process ended early, {_ending(self.process.exitcode)}") from error
        if error is not None:
            raise error
        return result

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Send and receive."""
        self.send(function, *args)
        return self.receive()

    def outcome(self) -> Any:
        """What ``receive`` gives, or the error that it raises."""
        try:
            return self.receive()
        except (InputError, CellError) as error:
            return error

    def close(self) -> None:
        """Let it end, and wait for that."""
        atexit.unregister(self.connection.close)
        self.connection.close()
        self.process.join()

    def interrupt(self) -> None:
        """Have it stop what it does, close its runs and end."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGINT)
        self.close()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (was the memory full?)" if name == "SIGKILL" else "")
    return f"exit code {code}"


def _serve(connection: Connection) -> None:
    """The process: call what comes in until the sender is gone."""
    signal.signal(signal.SIGINT, _interrupted)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            function, args = cloudpickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError, KeyboardInterrupt):
            return
        try:
            connection.send((function(*args), None))
        except InputError as error:
            connection.send((None, InputError(str(error))))
        except KeyboardInterrupt:
            return
        except Exception as error:
            log.error("%s", traceback.format_exc())
            connection.send((None, CellError(f"{type(error).__name__}: {error}")))


def _interrupted(_: int, __: FrameType | None) -> None:
    """Ctrl-C reaches the whole family, and the parent passes it on too: once is enough."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGINT)


def set_up(config: DictConfig, singletons: dict[Any, Any]) -> None:
    """Give a new process the state of Hydra and the log of the one that started it.

    Args:
        config: of the sweep.
        singletons: Hydra's state.
    """
    Singleton.set_state(singletons)
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)


def run_jobs(
    configs: Sequence[DictConfig],
    hydra_context: HydraContext,
    run_group: Callable[[list[DictConfig]], list[Any]],
) -> list[JobReturn]:
    """Run Hydra jobs together: all are opened (folder, ``.hydra/``, log, callbacks), then computed, then closed.

    Args:
        configs: of the jobs, each with its ``hydra`` node.
        hydra_context: for ``run_job``.
        run_group: computes the jobs' results; an exception among them fails that job alone.

    Returns:
        One per job, exceptions as text.
    """
    opened: list[DictConfig] = []
    files: list[logging.Handler] = []
    results: list[Any] = []
    returns: list[JobReturn] = []
    root = logging.getLogger()

    def compute() -> None:
        for handler in files:
            root.addHandler(handler)
        try:
            results.extend(run_group(opened))
        except Exception as error:
            log.error("%s: %s", type(error).__name__, error, exc_info=error)
            results.extend([error] * len(configs))

    def task(cfg: DictConfig) -> Any:
        number = len(opened)
        opened.append(cfg)
        own = logs.claim(Path(configs[number].hydra.runtime.output_dir))
        for handler in own:
            root.removeHandler(handler)  # else opening the next job would drop it
        files.extend(own)
        if len(opened) < len(configs):
            open_next()
        else:
            compute()
        if isinstance(results[number], Exception):
            raise results[number]
        return results[number]

    def open_next() -> None:
        own = run_job(task, configs[len(opened)], "hydra.sweep.dir", "hydra.sweep.subdir", hydra_context)
        returns.append(own)

    open_next()
    for handler in files:
        root.removeHandler(handler)
        handler.close()
    return [_as_text(job) for job in reversed(returns)]


def one_by_one(configs: list[DictConfig], *, task_function: TaskFunction) -> list[Any]:
    """Run jobs that are not cells."""
    return [task_function(config) for config in configs]


def run_cells(configs: list[DictConfig]) -> list[float | Exception]:
    """``group.run_group``; the process that sends this has no torch."""
    from kdsweep import group

    return group.run_group(configs)


def train_teachers(configs: list[DictConfig]) -> None:
    """``group.obtain_teachers``; one that fails is told in its log and by the cells that need it."""
    from kdsweep import build, group

    group.obtain_teachers(configs, build.compute(configs[0]))


def look_at_cells(configs: list[DictConfig], devices: list[str]) -> Look:
    """``group.look``."""
    from kdsweep import group

    return group.look(configs, devices)


def pin(call: Callable[[list[DictConfig]], Any], configs: list[DictConfig], device: str) -> Any:
    """Call a function of configurations on one of several devices; an empty name leaves them as they are."""
    if device:
        os.environ["TQDM_DISABLE"] = "1"  # the bars of several processes would overwrite each other
        for config in configs:
            config.device = device
    return call(configs)


def _as_text(job: JobReturn) -> JobReturn:
    """An exception may not survive pickling: its text does."""
    error = job._return_value
    if isinstance(error, InputError):
        job._return_value = InputError(str(error))
    elif isinstance(error, Exception):
        job._return_value = CellError(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return job
