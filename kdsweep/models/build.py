"""Build the networks that settings describe, with their weights.

``python -m kdsweep models`` prints parameters, MACs and the hidden shape of both.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import nn

from kdsweep.config import composition
from kdsweep.config.networks import Architecture
from kdsweep.core.errors import InputError
from kdsweep.models.module import ModuleNetwork
from kdsweep.models.networks import HIDDEN, Network, count_macs, count_parameters
from kdsweep.models.unet import UNet
from kdsweep.models.weights import IMAGENET, imagenet_file, load_weights


def new_network(architecture: Architecture, *, logits: int = 1, weights: str, seed: int) -> Network:
    """Build a network; equal arguments give equal initial weights whatever else has drawn random numbers.

    Args:
        architecture: a U-Net, or any module.
        logits: of a pixel.
        weights: ``none``, a file (see ``load_weights``), or ``imagenet:`` and a source (see ``imagenet_file``).
        seed: of the random initialization.

    Raises:
        InputError: the network cannot be built, or its weights cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _untrained(architecture, logits)
    if weights.startswith(IMAGENET):
        file, label = imagenet_file(weights.removeprefix(IMAGENET)), f"ImageNet weights of {architecture.name}"
        load_weights(network, file, label=label)
    elif weights != "none":
        load_weights(network, Path(weights), label=f"weights={weights}")
    return network


def _untrained(architecture: Architecture, logits: int) -> Network:
    if architecture.network is None:
        channels = architecture.decoder_channels
        return UNet(architecture.name, encoder_weights=None, decoder_channels=channels, in_channels=3, classes=logits)
    module = composition.build(architecture.network)
    if not isinstance(module, nn.Module):
        raise InputError(f"_target_={architecture.network['_target_']}: gives {type(module).__name__}, not a Module")
    statistics = architecture.input.plain() if architecture.input is not None else {}
    stages, output = architecture.stages or {}, architecture.output
    return ModuleNetwork(module, stages=stages, logits=logits, output=output, **statistics)


def stage_channels(architecture: Architecture, *, logits: int = 1, image_size: int) -> dict[str, int]:
    """Return how many channels each stage of a network has, from one forward of an image."""
    return _stage_channels(architecture.as_json(), logits, image_size)


@cache
def _stage_channels(architecture: str, logits: int, image_size: int) -> dict[str, int]:
    try:  # without making weights, where all layers can do so
        return _read_channels(architecture, logits, image_size, torch.device("meta"))
    except (RuntimeError, NotImplementedError, InputError):  # of a layer without meta tensors; others come up again
        return _read_channels(architecture, logits, image_size, torch.device("cpu"))


def _read_channels(architecture: str, logits: int, image_size: int, device: torch.device) -> dict[str, int]:
    with torch.random.fork_rng(devices=[]), torch.no_grad(), device:
        network = _untrained(Architecture.model_validate_json(architecture), logits).eval()
        maps = network(torch.zeros(1, 3, image_size, image_size), network.stages)
    return {stage: each.shape[1] for stage, each in maps.items()}


def summary(*, teacher: Network, student: Network, image_size: int) -> str:
    """Return a Markdown table of the networks' parameters, MACs and maps of the stage ``encoder.5``."""
    lines = ["| network | encoder | parameters | MACs | hidden (C x H x W) |", "| --- | --- | ---: | ---: | --- |"]
    for label, network in (("Teacher", teacher), ("Student", student)):
        image = torch.zeros(1, 3, image_size, image_size, device=next(network.parameters()).device)
        with torch.no_grad():
            maps = network.eval()(image, stages=network.stages)
        shape = " x ".join(str(size) for size in maps[HIDDEN].shape[1:]) if HIDDEN in maps else "-"
        macs, parameters = count_macs(network, image_size=image_size), count_parameters(network)
        encoder = network.name.removeprefix("u-")
        lines.append(f"| {label} | {encoder} | {parameters:,} | {macs / 1e9:.2f} G | {shape} |")
    return "\n".join(lines)
