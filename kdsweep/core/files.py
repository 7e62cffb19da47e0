"""Files that appear complete or not at all, and the paths and addresses below a store."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kdsweep.core.errors import InputError, one_line

CHECKOUT = Path(__file__).resolve().parents[2]
# A path from the root or the home folder inside a text; its last name is the group.
COMPLETE_PATH = re.compile(r"(?:(?<![^\s='\"(\[])|(?<=file:)|(?<=sqlite:))[/~](?:[^/\s]*/)*([^/\s]+)")


@contextlib.contextmanager
def complete_file(file: Path) -> Iterator[BinaryIO]:
    """Open a scratch file, flush it to disk and rename it: a reader sees the old file or the complete new one.

    A file keeps its permissions. A symbolic link stays and its target is written; a device or a pipe is written
    directly.
    """
    target = Path(os.path.realpath(file))
    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if file.exists() and not file.is_file():
            with file.open("wb") as stream:  # a folder raises IsADirectoryError
                yield stream
            return
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if target.exists():
            scratch.chmod(stat.S_IMODE(target.stat().st_mode))
        scratch.replace(target)
    except OSError as error:
        # A full disk does not name the file; of a parent that is a file mkdir says that it exists.
        if isinstance(error, FileExistsError):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(file)) from error
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove the scratch files of processes that were killed while writing."""
    for scratch in folder.glob(".*.part*"):
        scratch.unlink(missing_ok=True)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all."""
    with complete_file(file) as stream:
        stream.write(content)


def write_text(file: Path, content: str) -> None:
    """Write text in UTF-8 as ``write_bytes`` does."""
    write_bytes(file, content.encode())


def write_json(file: Path, content: Any) -> None:
    """Write a value made of dicts, lists, strings and numbers as ``write_bytes`` does."""
    write_text(file, json.dumps(content, indent=1) + "\n")


class DamagedError(InputError):
    """A file does not hold what was written; the message is one line that names it."""


def read_json(file: Path, *keys: str) -> dict[str, Any] | None:
    """Return the dict with these keys that ``write_json`` wrote, or None if there is no such file.

    Raises:
        DamagedError: the file holds something else.
        InputError: the file cannot be read.
    """
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(one_line(error)) from error
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise DamagedError(f"{file} is damaged")
    return content


def below(store: Path, *names: str) -> Path:
    """Return a path below a store; raise InputError if the names lead out of it."""
    path = store.joinpath(*names)
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(store)):
        raise InputError(f"{'/'.join(names)} is outside of the store {store}; rename it")
    return path


def is_locked(file: Path) -> bool:
    """Return whether a process holds a lock; the file may belong to another user and is not changed."""
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or one that this user may not read
        return False
    return False


def without_folders(value: Any) -> Any:
    """Return plain nested values in whose texts a complete path is its last name alone: records go to others."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry) for entry in value]
    if isinstance(value, str):
        return Path(value).name if value.startswith(("/", "~/")) else COMPLETE_PATH.sub(r"\1", value)
    return value


def folded(name: str) -> str:
    """Return a name in the form by which images, masks and rows are matched: Unicode NFC, lower case."""
    return unicodedata.normalize("NFC", name).lower()


def private_path(path: Path | None, option: str, *, default: str) -> Path:
    """Return the path that an option names for pictures of patients; for None one in the user's cache.

    Raises:
        InputError: the path is in kdsweep's checkout.
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
