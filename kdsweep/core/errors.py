"""Errors whose message to the user is one line."""

from __future__ import annotations

import contextlib
import os
import pwd
import sys
from collections.abc import Callable
from pathlib import Path


class InputError(Exception):
    """A mistake in the command, the configuration or the data, which the user can mend.

    The message is one line that names the file or key, the value and the remedy; the program prints it without a
    traceback and exits with code 1.
    """


class CellError(Exception):
    """The failure of a cell, in one line; the traceback is in the cell's log."""


class DeviceError(CellError):
    """The device computes nothing more in this process; in a fresh one it may."""


def one_line(error: BaseException) -> str:
    """Return an error as one line, led by its type unless its message was written for the user."""
    text = " ".join(str(error).split())
    if text.startswith("CUDA error"):
        text = str(error).splitlines()[0]  # advice for developers of PyTorch follows
    if isinstance(error, InputError | CellError):
        return text
    if isinstance(error, OSError) and error.filename is not None:
        owner = _owner(Path(os.fsdecode(error.filename))) if isinstance(error, PermissionError) else ""
        return f"{error.filename}: {error.strerror}{owner}; when that is mended the same command goes on"
    return f"{type(error).__name__}: {text}"


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


def exit_code(work: Callable[[], object]) -> int:
    """Run a command-line tool; return 0, or 1 after one line on stderr that says what to mend."""
    try:
        work()
    except InputError as error:
        sys.stderr.write(f"kdsweep: error: {error}\n")
        return 1
    return 0
