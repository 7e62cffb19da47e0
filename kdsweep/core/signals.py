"""Signals that stop the program: at once or, during a training step, after it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

GRACE_S = 5.0  # a step that takes longer is dropped; its learner resumes from its last checkpoint
AGAIN_S = 0.5  # a SIGINT this long after the first is a second Ctrl-C; some programs send one signal twice at once
JOB_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # SLURM sends them before a job's time is over
SIGNALS = (signal.SIGINT, signal.SIGTERM, *JOB_SIGNALS)


class Stopped(KeyboardInterrupt):
    """A signal (``number``) that the program should end.

    ``killed`` counts the processes that did not end in time, so that some of their work was not saved. The exit code is
    what a shell expects: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.killed, self.exit_code = number, 0, 128 + number

    def message(self) -> str:
        """Return one line that names the signal and says what is saved."""
        saved = "all is saved" if not self.killed else "there was no time to save all, the last checkpoints stay"
        return f"{self}; {saved}: run the same command to resume"


def is_stop(error: BaseException) -> bool:
    """Return whether an exception comes from a signal; a user's code may raise KeyboardInterrupt too."""
    is_installed = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    return isinstance(error, Stopped if is_installed else KeyboardInterrupt)


class _State:
    """This process's state: whether signals are deferred, the signal that has come, and when."""

    deferring = False
    pending: int | None = None
    since_s = 0.0


def install(numbers: Sequence[int] = SIGNALS) -> None:
    """Have the first of these signals raise Stopped in the main thread; a second Ctrl-C ends the process at once."""
    _State.deferring, _State.pending = False, None
    for number in numbers:
        signal.signal(number, _handle)


def _handle(number: int, _: FrameType | None) -> None:
    if _State.pending is not None:
        if number == signal.SIGINT and time.monotonic() - _State.since_s > AGAIN_S:
            os.write(2, b"kdsweep: stopped by a second SIGINT; the last checkpoints stay\n")
            os._exit(128 + number)
        return
    _State.pending, _State.since_s = number, time.monotonic()
    if not _State.deferring:
        check()
    _State.deferring = False
    signal.signal(signal.SIGALRM, lambda *_: check())
    signal.setitimer(signal.ITIMER_REAL, GRACE_S)


@contextmanager
def deferred() -> Iterator[None]:
    """Make signals wait inside until ``check`` is called, at most GRACE_S seconds."""
    before, _State.deferring = _State.deferring, _State.pending is None
    try:
        yield
    finally:
        _State.deferring = before and _State.pending is None
    check()


def pending() -> bool:
    """Return whether a signal has come."""
    return _State.pending is not None


def check() -> None:
    """Raise Stopped if a signal has come; call this where nothing is half done."""
    if _State.pending is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise Stopped(_State.pending)
