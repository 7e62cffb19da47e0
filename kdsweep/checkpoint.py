"""Files that appear whole or not at all, and the marker that says a cell is finished.

Torch is imported by the functions that need it: who looks for finished cells must not wait for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from torch import nn

CHECKPOINT, FINISHED = "checkpoint.pt", "finished.json"


@contextmanager
def _appearing(file: Path) -> Iterator[BinaryIO]:
    """Write beside, flush to disk, rename: a reader sees the old file or the whole new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(file)
    finally:
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


def save_state(file: Path, state: dict[str, Any]) -> None:
    """Write nested tensors and plain values, readable without running code from the file."""
    import torch

    with _appearing(file) as stream:
        torch.save(state, stream)


def load_state(file: Path) -> dict[str, Any]:
    """What ``save_state`` wrote, on the CPU."""
    import torch

    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
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


def load_predictions(file: Path) -> dict[str, np.ndarray]:
    """What ``save_predictions`` wrote: the predicted mask (H, W) bool of each image id."""
    with np.load(file, allow_pickle=False) as stored:
        shape = tuple(stored["shape"])
        masks = np.unpackbits(stored["bits"], count=int(np.prod(shape))).reshape(shape).astype(bool)
        return dict(zip(stored["ids"].tolist(), masks, strict=True))


def read_finished(folder: Path) -> dict[str, Any] | None:
    """The marker of a finished cell, written last of all its files; None if the cell is not finished."""
    try:
        marker: dict[str, Any] = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return marker
