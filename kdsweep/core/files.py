"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kdsweep.core.errors import InputError

CHECKOUT = Path(__file__).resolve().parents[2]
WHOLE_PATH = re.compile(r"(?<![^\s='\"(])[/~](?:[^/\s]*/)*([^/\s]+)")  # its last name is the group


@contextlib.contextmanager
def _appearing(file: Path) -> Iterator[BinaryIO]:
    """Open a scratch file, flush it to disk and rename it: a reader sees the old file or the complete new one.

    A symbolic link stays and its target is written. A device or a pipe stays and is written directly.
    """
    try:
        if file.exists() and not file.is_file():
            with file.open("wb") as stream:  # a folder raises IsADirectoryError
                yield stream
        else:
            target = Path(os.path.realpath(file))
            if target.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            with _renamed(target) as stream:
                yield stream
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error  # a full disk does not name the file


@contextlib.contextmanager
def _renamed(file: Path) -> Iterator[BinaryIO]:
    """Open a scratch file next to a regular file, which takes its name and its permissions at the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with scratch.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if file.exists():
            scratch.chmod(stat.S_IMODE(file.stat().st_mode))
        scratch.replace(file)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove the scratch files of processes that were killed while writing."""
    for scratch in folder.glob(".*.part*"):
        scratch.unlink(missing_ok=True)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    with _appearing(file) as stream:
        stream.write(content)


def write_text(file: Path, content: str) -> None:
    """Write text in UTF-8 as ``write_bytes`` does."""
    write_bytes(file, content.encode())


def write_json(file: Path, content: Any) -> None:
    """Write a value made of dicts, lists, strings and numbers as ``write_bytes`` does."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def without_folders(value: Any) -> Any:
    """Return plain nested values in whose texts a file or folder with its whole path is its last name alone."""
    if isinstance(value, dict):
        return {key: without_folders(own) for key, own in value.items()}
    return WHOLE_PATH.sub(r"\1", value) if isinstance(value, str) else value


def private_path(path: Path | None, option: str, *, default: str) -> Path:
    """Return a path for pictures of patients, which must not be in kdsweep's checkout.

    Args:
        path: the one that the user names, or None.
        option: that names it.
        default: the path in kdsweep's folder of the user's cache that takes its place.

    Raises:
        InputError: the path is in the checkout.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    chosen = (path.expanduser() if path else cache / "kdsweep" / default).resolve()
    if chosen.is_relative_to(CHECKOUT) and (CHECKOUT / ".git").exists():
        raise InputError(f"{option} {chosen}: is in kdsweep's checkout; the pictures show patients, put them elsewhere")
    return chosen


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
