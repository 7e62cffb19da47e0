"""Errors that are told in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(Exception):
    """Something in the command, the configuration or the data is wrong; the user can mend it.

    The message is one line that names the file or key, the value and the remedy; the program prints it without a
    traceback and exits with code 1.
    """


class CellError(Exception):
    """A cell failed, in one line; the traceback is in the cell's log."""


def one_line(error: BaseException) -> str:
    """An error in one line, led by its type where its message was not written for the user."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError | CellError):
        return text
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; when that is mended the same command goes on"
    return f"{type(error).__name__}: {text}"


def exit_code(work: Callable[[], object]) -> int:
    """Do the work of a command-line tool: 0, or 1 after one line on stderr that says what to mend."""
    try:
        work()
    except InputError as error:
        sys.stderr.write(f"kdsweep: error: {error}\n")
        return 1
    return 0
