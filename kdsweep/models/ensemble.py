"""Several Teachers as one: the mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsweep.models.networks import LOGITS, Network, Outputs


class Ensemble(Network):
    """Networks whose mean probability per pixel is that of this one.

    Source: Hinton et al., Distilling the knowledge in a neural network, 2015 (the arithmetic mean of an ensemble).

    Args:
        networks: by name.
    """

    stages = (LOGITS,)

    def __init__(self, networks: Mapping[str, Network]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.name = f"mean of {', '.join(network.name for network in networks.values())}"

    def forward(self, images: Tensor, stages: Collection[str] = (LOGITS,)) -> Outputs:
        """Return the logits (N, C, H, W) of the mean probability of normalized images (N, 3, H, W)."""
        self.check_stages(stages)
        logits = torch.stack([network(images, (LOGITS,)).logits.float() for network in self.networks.values()])
        if logits.shape[2] > 1:
            return Outputs({LOGITS: _log_mean(logits.log_softmax(dim=2))})
        return Outputs({LOGITS: _log_mean(F.logsigmoid(logits)) - _log_mean(F.logsigmoid(-logits))})

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Return the states of all networks, each name behind that of its network."""
        states = {name: network.state_dict(*args, **options) for name, network in self.networks.items()}
        return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load the states of all networks."""
        for name, network in self.networks.items():
            lead = f"{name}."
            state = {key.removeprefix(lead): value for key, value in state_dict.items() if key.startswith(lead)}
            network.load_state_dict(state, *args, **options)


def _log_mean(logarithms: Tensor) -> Tensor:
    """Return the logarithm of the mean over the first dimension of numbers whose logarithms these are."""
    return logarithms.logsumexp(dim=0) - math.log(len(logarithms))
