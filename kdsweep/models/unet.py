"""Teacher and Student: U-Nets of segmentation-models-pytorch, and the one call that returns their maps.

``python -m kdsweep models`` prints parameters, MACs and the hidden shape of both.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdsweep.config.schema import STAGES
from kdsweep.data.images import IMAGENET_MEAN, IMAGENET_STD
from kdsweep.models.encoders import DEPTH, check_encoder
from kdsweep.models.weights import IMAGENET, imagenet_file, load_weights

HIDDEN = f"encoder.{DEPTH}"


class Outputs(dict[str, Tensor]):
    """The maps of one forward pass by stage.

    ``encoder.1`` to ``encoder.5`` have strides 2 to 32, ``decoder.1`` to ``decoder.5`` strides 16 to 1, ``logits``
    (N, 1, H, W) are before any activation.
    """

    @property
    def logits(self) -> Tensor:
        """Return the logits (N, 1, H, W)."""
        return self["logits"]

    @property
    def hidden(self) -> Tensor:
        """Return the encoder's deepest feature map (N, C, H / 32, W / 32)."""
        return self[HIDDEN]


class UNet(smp.Unet):
    """smp's U-Net with one logit per pixel; its state dict is that of ``smp.Unet`` with the same arguments.

    Images come normalized as for ImageNet. An encoder whose ImageNet weights have seen other statistics (mean 0.5,
    deviation 0.5 of pixels from 0 to 1: EfficientNet-Lite) gets them in these.

    Attributes:
        classifier: timm's name of the network that the encoder was cut from, where it may be needed; else empty.

    Raises:
        InputError: unknown encoder.
    """

    def __init__(self, encoder_name: str, **options: Any) -> None:
        check_encoder(encoder_name)
        super().__init__(encoder_name, **options)
        lite = encoder_name.startswith("tu-tf_efficientnet_lite")
        name = encoder_name.removeprefix("tu-") if lite else getattr(self.encoder, "classifier", "")
        self.classifier = str(name)
        if self.classifier:
            mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
            self.register_buffer("input_scale", 2 * std, persistent=False)
            self.register_buffer("input_shift", 2 * mean - 1, persistent=False)

    def forward(self, images: Tensor, stages: Collection[str] = (HIDDEN, "logits")) -> Outputs:
        """Return the maps of normalized images (N, 3, H, W), H and W multiples of 32, at these stages.

        It runs no further than the last of them, and keeps no others.
        """
        if self.classifier:
            images = images * self.input_scale + self.input_shift
        last = max(STAGES.index(stage) for stage in stages)
        features = self._encode(images, depth=min(last + 1, DEPTH))
        maps_by_stage = {f"encoder.{number}": features[number] for number in range(1, len(features))}
        if last < DEPTH:
            return Outputs({stage: maps_by_stage[stage] for stage in stages})
        # As UnetDecoder.forward does, whose blocks' maps are not to be had from outside.
        maps = self.decoder.center(features[-1])
        for number in range(1, min(last + 1 - DEPTH, DEPTH) + 1):
            below, skip = features[DEPTH - number], features[DEPTH - number] if number < DEPTH else None
            maps = self.decoder.blocks[number - 1](maps, *below.shape[2:], skip_connection=skip)
            if f"decoder.{number}" in stages:
                maps_by_stage[f"decoder.{number}"] = maps
        if "logits" in stages:
            maps_by_stage["logits"] = self.segmentation_head(maps)
        return Outputs({stage: maps_by_stage[stage] for stage in stages})

    def _encode(self, images: Tensor, *, depth: int) -> list[Tensor]:
        """Return the image and the encoder's maps, down to ``depth`` of them where the encoder can stop there."""
        if depth == DEPTH:
            features: list[Tensor] = self.encoder(images)
            return features
        self.encoder._depth = depth
        try:
            return list(self.encoder(images))
        finally:
            self.encoder._depth = DEPTH


def unet(*, encoder: str, decoder_channels: list[int], weights: str, seed: int) -> UNet:
    """Build a network; equal arguments give equal initial weights whatever else has drawn random numbers.

    Args:
        encoder: a name of smp's, or one of ``models.encoders``.
        decoder_channels: output channels of the five decoder blocks, deepest first.
        weights: ``none``, a file (see ``load_weights``), or ``imagenet:`` and a source (see ``imagenet_file``).
        seed: of the random initialization.

    Raises:
        InputError: the encoder is unknown, or its weights cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(encoder, encoder_weights=None, decoder_channels=decoder_channels, in_channels=3, classes=1)
    if weights.startswith(IMAGENET):
        load_weights(network, imagenet_file(weights.removeprefix(IMAGENET)), label=f"ImageNet weights of {encoder}")
    elif weights != "none":
        load_weights(network, Path(weights), label=f"weights={weights}")
    return network


@cache
def stage_channels(encoder: str, decoder_channels: tuple[int, ...]) -> dict[str, int]:
    """Return how many channels each stage of a network has, without making its weights."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        widths = UNet(encoder, encoder_weights=None, in_channels=3, classes=1).encoder.out_channels[1:]
    return dict(zip(STAGES, (*widths, *decoder_channels, 1), strict=True))


def stage_size(stage: str, *, image_size: int) -> int:
    """Return the side of a stage's maps, for square images of ``image_size`` pixels."""
    kind, _, number = stage.partition(".")
    halved = {"encoder": int(number or 0), "decoder": DEPTH - int(number or 0), "logits": 0}[kind]
    return image_size >> halved


def freeze(network: UNet) -> UNet:
    """Put a Teacher into the state that distillation relies on: eval mode, no gradients."""
    return network.eval().requires_grad_(requires_grad=False)


def in_bfloat16(network: UNet) -> UNet:
    """Return a frozen network with the weights of its convolutions in bf16, as autocast rounds them.

    Under autocast it computes the same bits as the original, with which it shares all other tensors: batch norms keep
    fp32, in which autocast uses them.
    """
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    rounded = copy.deepcopy(network, shared)
    for module in rounded.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))
    return rounded


def count_parameters(network: nn.Module) -> int:
    """Return the number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: UNet, *, image_size: int) -> int:
    """Count the multiply-accumulates of one image of image_size x image_size pixels (PyTorch's counter, FLOPs / 2)."""
    device = next(network.parameters()).device
    mode = network.training
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, image_size, image_size, device=device))
    network.train(mode)
    return counter.get_total_flops() // 2


def summary(*, teacher: UNet, student: UNet, image_size: int) -> str:
    """Return a Markdown table of parameters, MACs and hidden shapes; the networks lose their weights (meta device)."""
    lines = ["| network | encoder | parameters | MACs | hidden (C x H x W) |", "| --- | --- | ---: | ---: | --- |"]
    for label, network in (("Teacher", teacher), ("Student", student)):
        with torch.device("meta"), torch.no_grad():
            hidden = network.to("meta").eval()(torch.zeros(1, 3, image_size, image_size), stages=[HIDDEN]).hidden
        shape = " x ".join(str(size) for size in hidden.shape[1:])
        macs, parameters = count_macs(network, image_size=image_size), count_parameters(network)
        encoder = network.name.removeprefix("u-")
        lines.append(f"| {label} | {encoder} | {parameters:,} | {macs / 1e9:.2f} G | {shape} |")
    return "\n".join(lines)
