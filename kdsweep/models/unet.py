"""The U-Nets of segmentation-models-pytorch, which run no further than the last stage that is needed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import segmentation_models_pytorch as smp
from torch import Tensor

from kdsweep.config.networks import STAGES
from kdsweep.models.encoders import DEPTH, check_encoder
from kdsweep.models.networks import HIDDEN, LOGITS, Network, Outputs

LITE_STATISTICS = (0.5,) * 3, (0.5,) * 3  # mean and standard deviation that EfficientNet-Lite was trained with


class UNet(smp.Unet, Network):
    """smp's U-Net with one logit per pixel; its state dict is that of ``smp.Unet`` with the same arguments.

    Attributes:
        classifier: timm's name of the network that the encoder was cut from, where it may be needed; else empty.

    Raises:
        InputError: unknown encoder.
    """

    stages = STAGES
    encoder: Any  # smp has no types
    decoder: Any
    segmentation_head: Any

    def __init__(self, encoder_name: str, **options: Any) -> None:
        check_encoder(encoder_name)
        super().__init__(encoder_name, **options)
        lite = encoder_name.startswith("tu-tf_efficientnet_lite")
        name = encoder_name.removeprefix("tu-") if lite else getattr(self.encoder, "classifier", "")
        self.classifier = str(name)
        if self.classifier:
            self.expect(*LITE_STATISTICS)

    def forward(self, images: Tensor, stages: Collection[str] = (HIDDEN, LOGITS)) -> Outputs:
        """Return the maps of normalized images (N, 3, H, W), H and W multiples of 32, at these stages.

        It runs no further than the last of them, and keeps no others.
        """
        self.check_stages(stages)
        images = self.expected(images)
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
        if LOGITS in stages:
            maps_by_stage[LOGITS] = self.segmentation_head(maps)
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
