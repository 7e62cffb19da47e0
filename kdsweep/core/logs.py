"""Log lines of cells that are trained together: each cell's file gets its own lines and those that concern all.

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

# ``extra`` of a line: what each of many cells has to tell is one line together on the screen.
FILE_ONLY = {"place": "file"}
SCREEN_ONLY = {"place": "screen"}


@contextmanager
def about(folder: Path) -> Iterator[None]:
    """Lines logged inside concern the cell of this folder alone; a Teacher's concern all whom it teaches."""
    own = folder.resolve()
    token = _about.set(own if own in _claimed else None)
    try:
        yield
    finally:
        _about.reset(token)


class _Own(logging.Filter):
    """Lets pass what concerns one cell, or all of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def filter(self, record: logging.LogRecord) -> bool:
        return _about.get() in (None, self.folder) and getattr(record, "place", "file") == "file"


class _Screen(logging.Filter):
    """Lets pass what is not for files alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        return getattr(record, "place", "screen") == "screen"


class _OneLine(logging.Formatter):
    """Another formatter's lines without tracebacks."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        record.exc_info = record.exc_text = None
        return self.inner.format(record)


def claim(folder: Path) -> list[logging.Handler]:
    """Make the log files that are open now a cell's own, and other handlers one-line; gives the files' handlers."""
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
