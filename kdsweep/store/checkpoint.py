"""Checkpoints with a checksum, weights and predictions, in files that appear complete or not at all.

Torch is imported by the functions that need it, so that a look for finished cells need not wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from kdsweep.core.files import _appearing, write_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
DIGEST_BYTES = hashlib.sha256().digest_size


class DamagedError(Exception):
    """A file was cut short or holds other bytes than were written; the message is one line that names it."""


class _Hashing:
    """A stream that passes on what is written to it and keeps its SHA-256."""

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

    The file ends with the SHA-256 of all bytes before. The checkpoint that it replaces is kept beside it.
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
            with contextlib.suppress(OSError):  # without hard links there is no previous one
                previous.unlink(missing_ok=True)
                os.link(file, previous)


def load_state(file: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what ``save_state`` wrote, all tensors onto one device.

    Raises:
        DamagedError: the file is not what was written.
        FileNotFoundError: there is no such file.
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
            state: dict[str, Any] = torch.load(stream, map_location=device, weights_only=True)
        except Exception as error:  # of many kinds, whatever the bytes are taken for
            raise DamagedError(f"{file}: not a checkpoint: {' '.join(str(error).split())[:200]}") from error
    return state


def save_network(file: Path, network: nn.Module) -> None:
    """Write a network's weights alone as safetensors, which any tool reads and which cannot carry code."""
    import safetensors.torch

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_bytes(file, safetensors.torch.save(weights))


def load_network(file: Path, network: nn.Module) -> None:
    """Read what ``save_network`` wrote into a network of the same architecture."""
    import safetensors.torch

    network.load_state_dict(safetensors.torch.load(file.read_bytes()))


def save_predictions(file: Path, predictions: np.ndarray, *, ids: list[str]) -> None:
    """Write predicted masks (N, H, W) bool, eight pixels a byte, with the ids of their images."""
    shape = np.array(predictions.shape)
    with _appearing(file) as stream:
        np.savez_compressed(stream, bits=np.packbits(predictions), shape=shape, ids=np.array(ids))


def load_predictions(file: Path | BinaryIO) -> dict[str, np.ndarray]:
    """Read what ``save_predictions`` wrote: the predicted mask (H, W) bool of each image id."""
    with np.load(file, allow_pickle=False) as stored:
        shape = tuple(stored["shape"])
        masks = np.unpackbits(stored["bits"], count=int(np.prod(shape))).reshape(shape).astype(bool)
        return dict(zip(stored["ids"].tolist(), masks, strict=True))
