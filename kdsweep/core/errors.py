"""Errors whose message to the user is one line."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import pwd
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec

from kdsweep.core import signals

FULL = (errno.ENOSPC, errno.EDQUOT)  # such errors seldom name a file
TRACEBACK = "KDSWEEP_TRACEBACK"  # environment: 1 shows the traceback of an error that ends the program

P = ParamSpec("P")


class InputError(Exception):
    """A mistake in the command, the configuration or the data, which the user can mend.

    The message is one line that names the file or key, the value and the remedy; the program prints it without a
    traceback and exits with code 1.
    """


class CellError(Exception):
    """The failure of a cell, in one line; the traceback is in the cell's log."""


class LostError(CellError):
    """The process that computed a cell was lost; in a fresh process the cell may be computed."""


class DeviceError(LostError):
    """The device computes nothing more in this process; in a fresh one it may."""


def one_line(error: BaseException) -> str:
    """Return an error as one line, led by its type unless its message was written for the user."""
    text = " ".join(str(error).split())
    if text.startswith("CUDA error"):
        text = str(error).splitlines()[0]  # advice for developers of PyTorch follows
    if isinstance(error, InputError | CellError):
        return text
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        owner = _owner(Path(os.fsdecode(error.filename))) if isinstance(error, PermissionError) else ""
        name = error.filename or "the disk"
        return f"{name}: {error.strerror}{owner}; when that is mended the same command goes on"
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def _owner(path: Path) -> str:
    """Return which other user a file or its folder belongs to, and the remedy; "" if it is this user's."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    with contextlib.suppress(OSError, KeyError):
        uid = path.stat().st_uid
        if uid != os.geteuid():
            name = pwd.getpwuid(uid).pw_name
            return f" ({path} belongs to {name}: to share it, {name} types chmod -R g+w, and umask 002 before commands)"
    return ""


def portable(error: Exception) -> Exception:
    """Return an error with the same line that survives pickling, which a user's or a library's may not."""
    kinds = (InputError, DeviceError, LostError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), CellError)
    return kind(one_line(error))


@contextlib.contextmanager
def reading(file: Path | str, *, what: str, remedy: str) -> Iterator[None]:
    """Turn every error of reading a user's file into one InputError that names the file.

    ``with reading(file, what="a file of publish", remedy="publish writes such files"):`` goes around the reading and
    around the first look at the content, so that a foreign file is refused in the same way as a damaged one.

    Args:
        file: its path, behind the option or key that named it if there is one: ``--published scores.json.gz``.
        what: what the file must be.
        remedy: what the user can do.

    Raises:
        InputError: anything went wrong inside; an InputError from inside passes as it is.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except OSError as error:
        why = error.strerror or f"not {what}: {one_line(error)}"
        raise InputError(f"{file}: cannot be read ({why}); {remedy}") from error
    except Exception as error:  # json, gzip, csv, torch, openpyxl, Pillow: each parser has errors of several kinds
        raise InputError(f"{file}: is not {what} ({one_line(error)[:200]}); {remedy}") from error


def command(work: Callable[P, int | None]) -> Callable[P, int]:
    """Make a function a command: it returns its exit code, and any error ends in one line on stderr.

    This is the only place where the errors of the program and of its subcommands end. A reader of the output that is
    gone (``| head``) is not an error. With KDSWEEP_TRACEBACK=1 the traceback is shown before the line.
    """

    @functools.wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        _open_streams()
        try:
            code = work(*args, **kwargs) or 0
            sys.stdout.flush()  # here a full disk or a closed pipe can still be reported
        except KeyboardInterrupt as stop:
            return _report_stop(stop)
        except Exception as error:
            return report(error, one_line(error))
        return code

    return run


def report(error: Exception, line: str) -> int:
    """Write the line of an error that ends the program; return the exit code.

    A line that begins with the error's type was not written for the user: it is followed by how to see the traceback.
    """
    is_gone = _reader_is_gone(error)
    _flush()
    if is_gone:
        return 1
    if os.environ.get(TRACEBACK, os.environ.get("HYDRA_FULL_ERROR")) == "1":
        traceback.print_exception(error)
    elif line.startswith(type(error).__name__):
        line += f"; {TRACEBACK}=1 before the command shows where"
    sys.stderr.write(f"kdsweep: error: {line}\n")
    return 1


def _report_stop(stop: KeyboardInterrupt) -> int:
    """Write the line of a stop; return the exit code."""
    if isinstance(stop, signals.Stopped):
        line, code = stop.message(), stop.exit_code
    else:
        line, code = "stopped; what is written so far stays", 128 + signal.SIGINT
    sys.stderr.write(f"kdsweep: {line}\n")
    return code


def _open_streams() -> None:
    """Write a character that the terminal's encoding lacks as an escape, here and in the processes started later.

    A stream that the shell has closed (``>&-``) goes nowhere: else the next file that is opened would take its number.
    """
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            os.environ["PYTHONIOENCODING"] = f"{stream.encoding}:backslashreplace"


def _reader_is_gone(error: Exception) -> bool:
    """Return whether an error is that of writing to a pipe that is not read anymore, as after ``| head``."""
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except OSError:  # the output is no file
        return False
    return bool(poll.poll(0))  # whether there is an error, since no event is asked for


def _flush() -> None:
    """Write what is left of the output; if that fails, it goes nowhere, and the end of Python says nothing of it."""
    try:
        sys.stdout.flush()
    except OSError:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
