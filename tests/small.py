"""Small networks and the options that make whole runs small, where what they prove does not depend on their size."""

from __future__ import annotations

from torch import Tensor, nn

from kdsweep.config.networks import Architecture
from kdsweep.models.build import new_network
from kdsweep.models.unet import UNet

# One of timm's networks for tests: 0.3 M parameters instead of 14 M, and not as many hidden channels as the Student.
TEACHER = ["teacher.encoder=tu-test_byobnet", "teacher.decoder_channels=[32,16,8,8,4]"]
# The same for the Student: a step takes a fifth of the time.
STUDENT = ["student.encoder=tu-test_byobnet", "student.decoder_channels=[16,8,8,4,4]"]


def unet(*, encoder: str, decoder_channels: list[int], weights: str, seed: int) -> UNet:
    """Build a U-Net."""
    network = new_network(Architecture(encoder=encoder, decoder_channels=decoder_channels), weights=weights, seed=seed)
    assert isinstance(network, UNet)
    return network


class Stub(nn.Module):
    """Two layers, with statistics of batches: for what happens around a training, which is then short."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, channels, 4, stride=4), nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(images))
        return logits


STUBS = [
    word
    for side, channels in (("teacher", 6), ("student", 4))
    for word in (
        f"{side}=module",
        f"++{side}.network._target_=small.Stub",
        f"++{side}.network.channels={channels}",
        f"++{side}.stages={{encoder.5:encoder}}",
    )
]
