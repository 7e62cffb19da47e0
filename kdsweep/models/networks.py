"""A network as training, tests and export see it: one call returns its maps by stage."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdsweep.core.errors import InputError
from kdsweep.data.images import IMAGENET_MEAN, IMAGENET_STD

HIDDEN = "encoder.5"  # the stage of a path that names none: the deepest of a U-Net
LOGITS = "logits"


class Outputs(dict[str, Tensor]):
    """The maps of one forward pass by stage.

    In a U-Net ``encoder.1`` to ``encoder.5`` have strides 2 to 32, ``decoder.1`` to ``decoder.5`` strides 16 to 1.
    ``logits`` (N, C, H, W) are before any activation.
    """

    @property
    def logits(self) -> Tensor:
        """Return the logits (N, C, H, W)."""
        return self[LOGITS]

    @property
    def hidden(self) -> Tensor:
        """Return the encoder's deepest feature map (N, C, h, w)."""
        return self[HIDDEN]


class Network(nn.Module):
    """The base of all networks; ``forward(images, stages)`` returns the ``Outputs`` of normalized images (N, 3, H, W).

    Attributes:
        name: in messages.
        stages: the names of the maps that it can return, ``logits`` the last.
    """

    name: str
    stages: tuple[str, ...]
    input_scale: Tensor
    input_shift: Tensor
    _shifts_input = False

    def expect(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Give the network images of these statistics per channel (pixels from 0 to 1) instead of ImageNet's."""
        imagenet = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        scale, shift = imagenet[1] / torch.tensor(std), (imagenet[0] - torch.tensor(mean)) / torch.tensor(std)
        self.register_buffer("input_scale", scale[:, None, None], persistent=False)
        self.register_buffer("input_shift", shift[:, None, None], persistent=False)
        self._shifts_input = True

    def expected(self, images: Tensor) -> Tensor:
        """Return normalized images with the statistics that the network expects."""
        return images * self.input_scale + self.input_shift if self._shifts_input else images

    def measured_parameters(self) -> list[nn.Parameter]:
        """Return the parameters over which gradients of loss terms are compared: of the encoder, else all."""
        module = getattr(self, "module", self)
        return list(getattr(module, "encoder", module).parameters())

    def check_stages(self, stages: Collection[str]) -> None:
        """Raise InputError for a stage that the network does not have."""
        for stage in (each for each in stages if each not in self.stages):
            near = difflib.get_close_matches(stage, self.stages, n=1)
            hint = f"do you mean {near[0]}? " if near else ""
            raise InputError(f"stage={stage} is not a stage of {self.name}; {hint}it has: {', '.join(self.stages)}")


def freeze(network: Network) -> Network:
    """Put a Teacher into the state that distillation relies on: eval mode, no gradients."""
    return network.eval().requires_grad_(requires_grad=False)


def in_bfloat16(network: Network) -> Network:
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


def count_macs(network: Network, *, image_size: int) -> int:
    """Count the multiply-accumulates of one image of image_size x image_size pixels (PyTorch's counter, FLOPs / 2)."""
    device = next(network.parameters()).device
    mode = network.training
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, image_size, image_size, device=device))
    network.train(mode)
    return counter.get_total_flops() // 2
