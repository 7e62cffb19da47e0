"""The process of a group, on this machine or another of a cluster: a function, with logs in its cells' folders."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kdsweep.core import logs, signals
from kdsweep.core.errors import CellError, InputError, LostError, one_line, portable
from kdsweep.core.files import write_text

if TYPE_CHECKING:
    from kdsweep.config.identity import Job
    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.executors.executor import Result, Work
    from kdsweep.tuning.pruning import Pruning

log = logging.getLogger(__name__)

STOP_WITHIN_S = 10.0
# Imported once, by the server that processes are forked from: 9 s of a CPU. They must not touch CUDA, which does not
# survive a fork. The second is imported by the first step of an optimizer.
PRELOAD = ["kdsweep.sweep.rehearsal", "torch._dynamo"]
# The server and its processes are born with these blocked: SLURM's, which the process above passes on, and the one that
# would end the server where it is sent to a group of processes.
BLOCKED = (*signals.JOB_SIGNALS, signal.SIGTERM)
IDENTITY = ".identity"
REMEDY = "put store, data and environment on a file system that all machines share, under the same name"


@contextmanager
def _blocked() -> Iterator[None]:
    """Block the signals in what is started inside."""
    resource_tracker.ensure_running()  # it would unblock them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_server() -> None:
    """Start the server that processes are forked from, which takes its time to import; return at once."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    with _blocked():
        forkserver.ensure_running()


class Processes:
    """Fresh processes, each of which calls one function; a pickled copy has none."""

    def __init__(self) -> None:
        # Reentrant: a signal may call ``stop`` in the midst of a start.
        self._lock, self._running, self._is_closed = threading.RLock(), set[Any](), False

    def __reduce__(self) -> tuple[Any, ...]:
        return Processes, ()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return the result of a function that a fresh process calls; all are pickled.

        Raises:
            InputError: raised by the function.
            CellError: any other error of the function; LostError if the process died.
        """
        start_server()
        context = multiprocessing.get_context("forkserver")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(sender, logging.getLogger().level, function, args))
        with self._lock:
            if self._is_closed:
                raise CellError("the command has ended")
            process.start()
            self._running.add(process)
        sender.close()
        try:
            value = receiver.recv()
        except (EOFError, ConnectionError):
            process.join()
            value = LostError(f"its process ended early, {_ending(process.exitcode)}")
        process.join()
        self._running.discard(process)
        if isinstance(value, Exception):
            raise value
        return value

    def stop(self) -> int:
        """Have all save their state and end; kill those that take too long and return their number."""
        with self._lock:
            self._is_closed, running = True, list(self._running)
        for process in running:
            process.terminate()
        deadline_s = time.monotonic() + STOP_WITHIN_S
        # ``call`` alone joins a process, in another thread: of two joins, one may miss that it has ended.
        late = [each for each in running if not wait([each.sentinel], max(0.0, deadline_s - time.monotonic()))]
        for process in late:
            log.warning("process %d did not end in time and is killed", process.pid)
            process.kill()
            wait([process.sentinel])
        return len(late)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (was the memory full?)" if name == "SIGKILL" else "")
    return f"exit code {code}"


def _main(sender: Connection, level: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    gc.freeze()  # the imports: else each collection goes through them
    signals.install()
    logs.to_screen(level)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        try:
            value = function(*args)
        except Exception as error:
            if not isinstance(error, InputError):
                log.error("%s", one_line(error), exc_info=error)
            value = portable(error)
        sender.send(value)
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


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def compute(work: Work) -> list[Result]:
    """Call the function of a work with a log file open in the folder of each cell; errors come back as results."""
    members = list(zip(work.jobs, work.cells, strict=True))
    with logs.to_files([cell.folder for cell in work.cells]) as errors:
        for job, cell in members:
            if cell.role != "teacher" and cell.folder not in errors:
                try:
                    _write_settings(job)
                except OSError as error:
                    errors[cell.folder] = error
        for unwritable in errors.values():  # the cells of other folders are computed
            log.error("%s", one_line(unwritable), extra=logs.SCREEN_ONLY)
        jobs = [job for job, cell in members if cell.folder not in errors]
        try:
            computed: Iterator[Any] = iter(work.call(jobs) if jobs else [])
        except Exception as error:
            log.error("%s", one_line(error), exc_info=error)
            computed = itertools.repeat(error)
    results = [errors[cell.folder] if cell.folder in errors else next(computed) for cell in work.cells]
    return [portable(result) if isinstance(result, Exception) else result for result in results]


def _write_settings(job: Job) -> None:
    settings = job.settings.model_dump(mode="json", by_alias=True)
    write_text(job.cell.folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_text(job.cell.folder / "overrides.yaml", yaml.safe_dump(list(job.overrides), allow_unicode=True))


# --- what a process calls; torch is imported here, the process that submits has none


def preview(jobs: list[Job], **options: Any) -> Preview:
    """Check and rehearse cells (rehearsal.py)."""
    from kdsweep.sweep import rehearsal

    return rehearsal.preview(jobs, **options)


def train_cells(jobs: list[Job]) -> list[Result]:
    """Train the cells of a group."""
    from kdsweep.training import group

    return group.run_group(jobs)


def train_trials(jobs: list[Job], *, pruning: Pruning) -> list[Result]:
    """Train the trials of a group."""
    from kdsweep.training import group

    return group.run_trials(jobs, pruning=pruning)


def train_teachers(jobs: list[Job]) -> list[float]:
    """Train the Teachers of these jobs; the cells that need them report a failure."""
    from kdsweep.training import group

    group.obtain_teachers(jobs)
    return [math.nan] * len(jobs)


# --- other machines of a cluster


class RemoteWork:
    """A work for another machine; the call returns its results, or its error for each of its jobs.

    Both machines must see the same store, images, code and environment under the same paths: checked by a file in the
    store and by the cells' fingerprints. Another number of CPU threads gives other sums: the machine must not choose.
    """

    def __init__(self, work: Work, *, threads: int) -> None:
        self.work, self.threads, self.processes = work, threads, Processes()
        self.identities = {cell.store: identify(cell.store) for cell in work.cells}
        self.folder, self.path, self.level = str(Path.cwd()), list(sys.path), logging.getLogger().level

    def __call__(self) -> list[Result]:
        """Compute the group in a fresh process and keep MLflow in step with the cells' folders."""
        logs.to_screen(self.level)
        try:
            self._check()
            results: list[Result] = self.processes.call(compute, self.work)
            return results
        except Exception as error:
            return [portable(error)] * len(self.work.jobs)
        finally:
            self.stop()

    def stop(self) -> None:
        """Make the process save its state and end, and update MLflow."""
        from kdsweep.tracking import sync

        self.processes.stop()
        sync.close_all()

    def _check(self) -> None:
        """Raise InputError if this machine sees other files than the submitting one; else start to log to MLflow."""
        from kdsweep.config import identity
        from kdsweep.sweep import plan

        host = socket.gethostname()
        os.chdir(self.folder)
        sys.path[:] = [*self.path, *(entry for entry in sys.path if entry not in self.path)]
        os.environ |= {"OMP_NUM_THREADS": str(self.threads), "MPLBACKEND": "Agg"}
        for store, name in self.identities.items():
            if not (store / IDENTITY).is_file() or identify(store) != name:
                raise InputError(f"store={store}: on {host} it is not the folder of the machine that submits; {REMEDY}")
        for job, cell in zip(self.work.jobs, self.work.cells, strict=True):
            of = identity.teacher_cell if cell.role == "teacher" else identity.cell
            if of(job.settings).fingerprint != cell.fingerprint:
                why = "the images or the code are not those of the machine that submits"
                raise InputError(f"{cell.title}: on {host} {why}; {REMEDY}")
        if self.work.is_requested:
            plan.watch(self.work.jobs)


def identify(store: Path) -> str:
    """Return the content of a file in a store, made at the first call: machines that read the same share the folder."""
    file = store / IDENTITY
    if not file.exists():
        store.mkdir(parents=True, exist_ok=True)
        write_text(file, uuid.uuid4().hex)
    return file.read_text(encoding="utf-8")
