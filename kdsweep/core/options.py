"""Options that several commands share."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path


def add_store(parser: ArgumentParser, *, default: Path | None = Path("multirun")) -> None:
    """Add ``--store`` and ``--tracking-uri``: where the runs are. The default is for a command that may compose one."""
    parser.add_argument("--store", type=folder, default=default, help="folder of the runs (multirun)")
    parser.add_argument("--tracking-uri", help="MLflow server or database (the one in the store)")


def folder(text: str) -> Path:
    """Return a folder, its ~ replaced: a shell leaves the one of ``--store=~/runs``."""
    return Path(text).expanduser()


def add_sweep(parser: ArgumentParser, *, default: Path | None = Path("multirun")) -> None:
    """Add the options of ``add_store`` and ``--sweep``, which ``tracking.reader.read_sweep`` takes."""
    add_store(parser, default=default)
    parser.add_argument("--sweep", help="name of the sweep (the last with a finished run)")


def add_seeds(parser: ArgumentParser) -> None:
    """Add ``--seeds``: those that ``results.frame.of_seeds`` keeps."""
    parser.add_argument("--seeds", type=_numbers, help="only these, comma between them, such as those that are done")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


_numbers.__name__ = "seed"  # argparse says "invalid seed value"


def add_published(parser: ArgumentParser) -> None:
    """Add ``--published``: the files that ``results.published.read`` takes."""
    parser.add_argument("--published", type=Path, nargs="+", metavar="FILE", help="of `publish`, instead of a store")
