"""Logs of cells that are trained together: each cell's file gets the lines about this cell and those about all.

A traceback goes to the file alone; the screen gets one line.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

LOG = "kdsweep.log"
FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"

# ``extra`` of a log line: each of many cells logs to its file, and one line for all is on the screen.
FILE_ONLY, SCREEN_ONLY = {"place": "file"}, {"place": "screen"}

_about: ContextVar[Path | None] = ContextVar("about", default=None)
_open: set[Path] = set()  # folders whose log files are open


@contextmanager
def about(folder: Path) -> Iterator[None]:
    """Send the lines logged inside to this cell's log alone; lines about a Teacher go to the logs of all cells."""
    token = _about.set(folder.resolve() if folder.resolve() in _open else None)
    try:
        yield
    finally:
        _about.reset(token)


def to_screen(level: int) -> None:
    """Have a new process log lines of at least this level to the standard output."""
    logging.raiseExceptions = False  # a full disk must not turn each line into a traceback
    logging.basicConfig(level=level, stream=sys.stdout, format=FORMAT)


class _OneLine(logging.Formatter):
    """A formatter that drops the tracebacks from another formatter's lines."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self.inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        record.exc_info = record.exc_text = None
        return self.inner.format(record)


@contextmanager
def to_files(folders: Sequence[Path]) -> Iterator[dict[Path, OSError]]:
    """Log to a file in each of these folders too; the screen gets no tracebacks and no lines meant for files alone.

    Yields:
        The errors of the folders that cannot be written to.
    """
    root, before, errors, files = logging.getLogger(), list(_open), dict[Path, OSError](), []
    screens = [
        (handler, handler.formatter) for handler in root.handlers if not isinstance(handler, logging.FileHandler)
    ]
    for screen, formatter in screens:
        screen.setFormatter(_OneLine(formatter))
        screen.addFilter(_is_for_screen)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files.append(_file_handler(folder))
        except OSError as error:
            errors[folder] = error
    try:
        yield errors
    finally:
        for file in files:
            root.removeHandler(file)
            file.close()
        for screen, formatter in screens:
            screen.setFormatter(formatter)
            screen.removeFilter(_is_for_screen)
        _open.intersection_update(before)


def _file_handler(folder: Path) -> logging.FileHandler:
    handler = logging.FileHandler(folder / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    cell = folder.resolve()
    handler.addFilter(lambda record: _about.get() in (None, cell) and getattr(record, "place", "file") == "file")
    _open.add(cell)
    logging.getLogger().addHandler(handler)
    return handler


def _is_for_screen(record: logging.LogRecord) -> bool:
    return getattr(record, "place", "screen") == "screen"
