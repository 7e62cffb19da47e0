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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ParamSpec

from kdsweep.core import signals

FULL = (errno.ENOSPC, errno.EDQUOT)  # such errors seldom name a file
TRACEBACK = "KDSWEEP_TRACEBACK"  # environment: 1 shows the traceback of an error that ends the program

P = ParamSpec("P")


class InputError(Exception):
    """An error in the user's command, configuration or data.

    The message is one line that names the file or key, the value and the remedy; the program prints it without a
    traceback and exits with code 1.
    """


class CellError(Exception):
    """The failure of a cell, in one line; the traceback is in the cell's log."""


class LostError(CellError):
    """The process that computed a cell was lost; in a fresh process the cell may be computed."""


class DeviceError(LostError):
    """The device is unusable in this process; a fresh process may recover it."""


def one_line(error: BaseException) -> str:
    """Return an error as one line, led by its type unless its message was written for the user."""
    text = " ".join(str(error).split())
    if text.startswith("CUDA error"):
        text = str(error).splitlines()[0]  # advice for developers of PyTorch follows
    if isinstance(error, InputError | CellError):
        return text
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        owner = _owner(Path(os.fsdecode(error.filename))) if isinstance(error, PermissionError) else ""
        return f"{error.filename or 'the disk'}: {error.strerror}{owner}; when that is fixed the same command resumes"
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def some(names: Sequence[str], *, most: int, separator: str = ", ") -> str:
    """Return names in one line, those after the first ``most`` as their number."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


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
    kinds = (InputError, DeviceError, LostError, CellError)
    return next((kind for kind in kinds if isinstance(error, kind)), CellError)(one_line(error))


@contextlib.contextmanager
def reading(file: Path | str, *, what: str, remedy: str) -> Iterator[None]:
    """Turn every error of reading a user's file, and of a first look at its content, into one InputError.

    Args:
        file: its path, behind the option or key that named it if there is one: ``--published scores.json.gz``.
        what: what the file must be, such as ``a file of publish``.
        remedy: what the user can do, such as ``publish writes such files``.
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
    """Make a function a command: it returns its exit code, and any error ends in one line on stderr."""

    @functools.wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        _open_streams()
        try:
            code = work(*args, **kwargs) or 0
            sys.stdout.flush()  # here a full disk or a closed pipe can still be reported
        except signals.Stopped as stop:
            sys.stderr.write(f"kdsweep: {stop.message()}\n")
            return stop.exit_code
        except KeyboardInterrupt:
            sys.stderr.write("kdsweep: stopped; what is written so far stays\n")
            return 128 + signal.SIGINT
        except Exception as error:
            return report(error, one_line(error))
        return code

    return run


def report(error: Exception, line: str) -> int:
    """Write the line of an error that ends the program, after its traceback if requested; return the exit code.

    A line that begins with the error's type was not written for the user: it says how to see the traceback. A reader of
    the output that is gone (``| head``) is not an error.
    """
    is_silent = isinstance(error, BrokenPipeError) and _reader_is_gone()
    try:
        sys.stdout.flush()
    except OSError:  # the rest goes nowhere, and the end of Python does not report it
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    if is_silent:
        return 1
    if os.environ.get(TRACEBACK, os.environ.get("HYDRA_FULL_ERROR")) == "1":
        traceback.print_exception(error)
    elif line.startswith(type(error).__name__):
        line += f"; {TRACEBACK}=1 before the command shows where"
    sys.stderr.write(f"kdsweep: error: {line}\n")
    return 1


def _reader_is_gone() -> bool:
    poll = select.poll()
    with contextlib.suppress(OSError):  # the output is not a file
        poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))  # only errors are reported


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
