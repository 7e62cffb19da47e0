"""The command as its user types it, without the seconds of its imports: forked from a process that has made them.

A real ``python -m kdsweep`` imports Hydra and MLflow, and each of its workers torch: 13 s of a CPU before anything is
done. These are forked from a server of the test process, which has imported all of it (see ``preloaded``). The rest is
as in a real one: a process with its arguments, folder, environment, output and exit code, and workers that are
processes too, given their work in the same way. What is about imports, about process trees, or about signals needs the
real one.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdsweep.sweep.executors import worker

SERVER = multiprocessing.get_context("forkserver")
start = worker.start_server


def start_server() -> None:
    """Start the server of the test process, for commands and for the groups that a test trains itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # it does not get this process's path otherwise
        start()


worker.PRELOAD, worker.start_server = ["preloaded", "commands"], start_server


def kdsweep(*arguments: str, cwd: Path, timeout: float = 570) -> subprocess.CompletedProcess[str]:
    """What ``python -m kdsweep`` with these arguments comes to in this folder."""
    with running(*arguments, cwd=cwd) as command:
        return command.result(timeout)


class Command:
    """A command that has been started; its output goes to files of this folder."""

    def __init__(self, arguments: tuple[str, ...], cwd: Path, output: Path) -> None:
        self.arguments, self.output = arguments, output
        self.process = process(_be, arguments, cwd, dict(os.environ), output, _server())
        self.process.start()

    def result(self, timeout: float = 570) -> subprocess.CompletedProcess[str]:
        """Wait for its end."""
        self.process.join(timeout)
        words = [sys.executable, "-m", "kdsweep", *self.arguments]
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(words, timeout)
        out, err = ((self.output / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(words, self.process.exitcode, out, err)

    def workers(self) -> list[int]:
        """Process ids of the workers that it has started so far."""
        return [int(line) for line in (self.output / "workers").read_text().splitlines()]


def process(target: Callable[..., None], *args: Any) -> BaseProcess:
    """A process, not started yet, that has all of these imports and calls a function of a test's module."""
    _server()
    return SERVER.Process(target=target, args=args)


def _server() -> str:
    """Address of the server, which is started if there is none yet."""
    worker.start_server()
    return forkserver._forkserver._forkserver_address


@contextlib.contextmanager
def running(*arguments: str, cwd: Path) -> Iterator[Command]:
    """A command that runs beside the test; at the end of the context it is killed if it is still there."""
    with tempfile.TemporaryDirectory(prefix="kdsweep-command-") as folder:
        command = Command(arguments, cwd, Path(folder))
        try:
            yield command
        finally:
            command.process.kill()
            command.process.join()


def _be(arguments: tuple[str, ...], cwd: Path, environment: Mapping[str, str], output: Path, server: str) -> None:
    """Be the command: this process was forked for it."""
    assert "preloaded" in sys.modules  # the server says nothing of an error in what it imports
    _inherit(environment, output)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, worker.BLOCKED)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))  # as ``python -m`` does
    sys.argv = ["kdsweep", *arguments]
    # Its workers come from the same server, which is another process's child: not asked whether it is still there.
    forkserver._forkserver._forkserver_address = server
    forkserver._forkserver.ensure_running = lambda: None
    from kdsweep import __main__

    def process_of(target: Callable[..., None], args: tuple[Any, ...]) -> BaseProcess:
        return SERVER.Process(target=_work, args=(dict(os.environ), output, target, args))

    context = SimpleNamespace(Pipe=SERVER.Pipe, Process=process_of)
    worker.multiprocessing = SimpleNamespace(
        get_context=lambda _: context, parent_process=multiprocessing.parent_process
    )
    worker.start_server = lambda: None
    try:
        sys.exit(__main__.main())
    finally:
        atexit._run_exitfuncs()


def _work(environment: Mapping[str, str], output: Path, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Be a worker of a command."""
    _inherit(environment, output)
    with (output / "workers").open("a") as file:
        file.write(f"{os.getpid()}\n")
    target(*args)


def _inherit(environment: Mapping[str, str], output: Path) -> None:
    """Take what a process has from the one that starts it: this one was started by the server."""
    for number, name in (1, "out"), (2, "err"):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
