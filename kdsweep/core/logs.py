"""Logs of cells that are trained together: each cell's file gets the lines about this cell and those about all.

A traceback goes to the file alone; the screen gets one line.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    errors: dict[Path, OSError] = {}
    with ExitStack() as stack:
        for screen in logging.getLogger().handlers:
            if not isinstance(screen, logging.FileHandler):
                stack.callback(screen.setFormatter, screen.formatter)
                stack.callback(screen.removeFilter, _is_for_screen)
                screen.setFormatter(_OneLine(screen.formatter))
                screen.addFilter(_is_for_screen)
        for folder in folders:
            try:
                stack.enter_context(_log_file(folder))
            except OSError as error:
                errors[folder] = error
        yield errors


@contextmanager
def _log_file(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    cell, handler = folder.resolve(), logging.FileHandler(folder / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.addFilter(lambda record: _about.get() in (None, cell) and getattr(record, "place", "file") == "file")
    _open.add(cell)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        _open.discard(cell)


def _is_for_screen(record: logging.LogRecord) -> bool:
    return getattr(record, "place", "screen") == "screen"
