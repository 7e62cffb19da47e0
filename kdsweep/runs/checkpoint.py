"""Files that appear whole or not at all, and a training's state that is known to be what was written.

Torch is imported by the functions that need it: who looks for finished cells must not wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

if TYPE_CHECKING:
    from torch import nn

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
DIGEST_BYTES = hashlib.sha256().digest_size


class DamagedError(Exception):
    """A file is not what was written: cut short, or with other bytes. One line that names it."""


@contextlib.contextmanager
def _appearing(file: Path) -> Iterator[BinaryIO]:
    """Write beside, flush to disk, rename: a reader sees the old file or the whole new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with scratch.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error  # a full disk does not name the file
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what a process that was killed in the midst of writing has left."""
    for scratch in folder.glob(".*.part*"):
        scratch.unlink(missing_ok=True)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    with _appearing(file) as stream:
        stream.write(content)


def write_text(file: Path, content: str) -> None:
    """``write_bytes`` for text in UTF-8."""
    write_bytes(file, content.encode())


def write_json(file: Path, content: Any) -> None:
    """``write_bytes`` for a value made of dicts, lists, strings and numbers."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Hashing:
    """A stream that passes on what is written to it and keeps the SHA-256 of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.sha256 = stream, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, part: Any) -> int:
        self.sha256.update(part)
        try:
            return self.stream.write(part)
        except OSError as error:
            self.error = error  # torch makes another error of it
            raise

    def flush(self) -> None:
        self.stream.flush()


def save_state(file: Path, state: dict[str, Any]) -> None:
    """Write nested tensors and plain values, readable without running code from the file (``torch.load`` reads it).

    The SHA-256 of all that is before ends the file. What the file held until now stays beside it as the previous one.
    """
    import torch

    previous = file.with_name(PREVIOUS)
    with _appearing(file) as stream:
        hashing = _Hashing(stream)
        try:
            torch.save(state, cast("IO[bytes]", hashing))
        except Exception as error:
            raise hashing.error or error from error
        stream.write(hashing.sha256.digest())
        if file.exists():
            with contextlib.suppress(OSError):  # where files cannot have two names there is no previous one
                previous.unlink(missing_ok=True)
                os.link(file, previous)


def load_state(file: Path) -> dict[str, Any]:
    """What ``save_state`` wrote, on the CPU.

    Raises:
        DamagedError: the file is not what was written.
        FileNotFoundError: there is none.
    """
    import torch

    with file.open("rb") as stream:
        sha256, left = hashlib.sha256(), file.stat().st_size - DIGEST_BYTES
        while left > 0 and (part := stream.read(min(left, 1 << 24))):
            sha256.update(part)
            left -= len(part)
        if left != 0 or stream.read() != sha256.digest():
            raise DamagedError(f"{file}: damaged, its checksum does not fit its {file.stat().st_size} bytes")
        stream.seek(0)
        try:
            state: dict[str, Any] = torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds, whatever the bytes are taken for
            raise DamagedError(f"{file}: not a checkpoint: {' '.join(str(error).split())[:200]}") from error
    return state


def save_network(file: Path, network: nn.Module) -> None:
    """A network's weights alone as safetensors, which any tool reads and which cannot carry code."""
    import safetensors.torch

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_bytes(file, safetensors.torch.save(weights))


def load_network(file: Path, network: nn.Module) -> None:
    """Read what ``save_network`` wrote into a network of the same architecture."""
    import safetensors.torch

    network.load_state_dict(safetensors.torch.load(file.read_bytes()))


def save_predictions(file: Path, predictions: np.ndarray, *, ids: list[str]) -> None:
    """Predicted masks (N, H, W) bool, eight pixels a byte, with the ids of their images."""
    shape = np.array(predictions.shape)
    with _appearing(file) as stream:
        np.savez_compressed(stream, bits=np.packbits(predictions), shape=shape, ids=np.array(ids))


def load_predictions(file: Path | BinaryIO) -> dict[str, np.ndarray]:
    """What ``save_predictions`` wrote: the predicted mask (H, W) bool of each image id."""
    with np.load(file, allow_pickle=False) as stored:
        shape = tuple(stored["shape"])
        masks = np.unpackbits(stored["bits"], count=int(np.prod(shape))).reshape(shape).astype(bool)
        return dict(zip(stored["ids"].tolist(), masks, strict=True))
