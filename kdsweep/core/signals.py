"""Ctrl-C and SIGTERM: they end the program at once or, during a training step, as soon as nothing is half done."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 5.0  # a step that takes longer is given up; its learner goes on from its last checkpoint
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The user or the system wants the program to end.

    Args:
        number: the signal's number.

    Attributes:
        killed: number of processes that did not end in time, so that some of their work was not saved.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.killed = number, 0

    def told(self) -> str:
        """Return one line that names the signal and says what is saved."""
        saved = "all is saved" if not self.killed else "there was no time to save all, the last checkpoints stay"
        return f"{self}; {saved}: the same command goes on from here"

    @property
    def exit_code(self) -> int:
        """Return the exit code that a shell expects: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.number


def is_stop(error: BaseException) -> bool:
    """Return whether an exception comes from a signal; a user's code may raise KeyboardInterrupt too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        return isinstance(error, KeyboardInterrupt)
    return isinstance(error, Stopped)


class _State:
    """This process's state: whether signals are deferred, and the number of the signal that has come."""

    deferring = False
    pending: int | None = None


def install() -> None:
    """Have the first SIGINT or SIGTERM raise Stopped in the main thread; later ones are ignored."""
    _State.deferring, _State.pending = False, None
    for number in SIGNALS:
        signal.signal(number, _handle)


def _handle(number: int, _: FrameType | None) -> None:
    if _State.deferring:
        _State.deferring, _State.pending = False, number
        signal.signal(signal.SIGALRM, _handle_alarm)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)
        return
    if _State.pending is None:
        _State.pending = number
        _stop(number)


def _handle_alarm(_: int, __: FrameType | None) -> None:
    if _State.pending is not None:
        _stop(_State.pending)


def _stop(number: int) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    raise Stopped(number)


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
        _stop(_State.pending)
