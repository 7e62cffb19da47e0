"""Logs of cells that are trained together: each cell's file gets the lines about this cell and those about all.

A traceback goes to the file alone; the screen gets one line.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_about: ContextVar[Path | None] = ContextVar("about", default=None)
_claimed: set[Path] = set()

# ``extra`` of a log line: what each of many cells logs to its file appears on the screen as one common line.
FILE_ONLY = {"place": "file"}
SCREEN_ONLY = {"place": "screen"}


@contextmanager
def about(folder: Path) -> Iterator[None]:
    """Send the lines logged inside to this cell's log alone; lines about a Teacher go to all the cells it teaches."""
    own = folder.resolve()
    token = _about.set(own if own in _claimed else None)
    try:
        yield
    finally:
        _about.reset(token)


class _Own(logging.Filter):
    """A filter that passes the lines about one cell or about all of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def filter(self, record: logging.LogRecord) -> bool:
        return _about.get() in (None, self.folder) and getattr(record, "place", "file") == "file"


class _Screen(logging.Filter):
    """A filter that drops the lines meant for files alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        return getattr(record, "place", "screen") == "screen"


class _OneLine(logging.Formatter):
    """A formatter that drops the tracebacks from another formatter's lines."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        record.exc_info = record.exc_text = None
        return self.inner.format(record)


def claim(folder: Path) -> list[logging.Handler]:
    """Reserve the open log files for a cell, drop tracebacks from the other handlers, return the files' handlers."""
    root = logging.getLogger()
    files: list[logging.Handler] = []
    for handler in root.handlers:
        if isinstance(handler, logging.FileHandler):
            _claimed.add(folder.resolve())
            handler.addFilter(_Own(folder.resolve()))
            files.append(handler)
        elif not isinstance(handler.formatter, _OneLine):
            handler.setFormatter(_OneLine(handler.formatter or logging.Formatter()))
            handler.addFilter(_Screen())
    return files
