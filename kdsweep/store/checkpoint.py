"""Checkpoints with a checksum, weights and predictions, in files that appear complete or not at all.

Torch is imported by the functions that need it, so that a look for finished cells need not wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from kdsweep.core.files import DamagedError, complete_file, write_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
DIGEST_BYTES = hashlib.sha256().digest_size


def save_state(file: Path, state: dict[str, Any]) -> None:
    """Write nested tensors and plain values, readable without running code from the file (``torch.load`` reads it).

    The file ends with the SHA-256 of all bytes before. The checkpoint that it replaces is kept as PREVIOUS.
    """
    import torch

    content = io.BytesIO()
    torch.save(state, content)
    with complete_file(file) as stream:
        stream.write(content.getbuffer())
        stream.write(hashlib.sha256(content.getbuffer()).digest())
        if file.exists():
            with contextlib.suppress(OSError):  # without hard links there is no previous one
                file.with_name(PREVIOUS).unlink(missing_ok=True)
                os.link(file, file.with_name(PREVIOUS))


def load_state(file: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what ``save_state`` wrote, all tensors onto one device.

    Raises:
        DamagedError: the file is not what was written.
        FileNotFoundError: there is no such file.
    """
    import torch

    content = file.read_bytes()
    if hashlib.sha256(memoryview(content)[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        raise DamagedError(f"{file}: damaged, its checksum does not fit its {len(content)} bytes")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
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
    """Write predicted masks (N, H, W) with the ids of their images: bool as bits, or class indices uint8."""
    is_one_class = predictions.dtype == np.bool_
    masks = {"bits": np.packbits(predictions), "shape": predictions.shape} if is_one_class else {"indices": predictions}
    with complete_file(file) as stream:
        np.savez_compressed(stream, **masks, ids=np.array(ids))


def load_predictions(file: Path | BinaryIO) -> dict[str, np.ndarray]:
    """Read what ``save_predictions`` wrote: the predicted mask (H, W) of each image id, bool or class indices uint8."""
    with np.load(file, allow_pickle=False) as stored:
        if "indices" in stored:
            masks = stored["indices"]
        else:
            shape = tuple(stored["shape"])
            masks = np.unpackbits(stored["bits"], count=int(np.prod(shape))).reshape(shape).astype(bool)
        return dict(zip(stored["ids"].tolist(), masks, strict=True))
