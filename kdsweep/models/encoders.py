"""The Students' encoders: networks of timm, cut down; every kept tensor has timm's name, so ImageNet weights load."""

from __future__ import annotations

import re
from functools import partial

import segmentation_models_pytorch as smp
import timm
from segmentation_models_pytorch.encoders._base import EncoderMixin
from timm.models import efficientnet
from torch import Tensor, nn

from kdsweep.core.errors import InputError

DEPTH = 5  # stages of an encoder: strides 2 to 32


class _Encoder(nn.Module, EncoderMixin):
    """An encoder of DEPTH stages, as smp's decoder needs it, from the channels of the maps at strides 2 to 32."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self._depth, self._in_channels, self._output_stride = DEPTH, 3, 32
        self._out_channels = [3, *channels]


class TrimmedMobileNetV3Small(_Encoder):
    """MobileNetV3-small-100 without its last 1 x 1 convolution and without the last of its three stride-32 blocks.

    The paper's Student has a "modified MobileNetV3-small-100" encoder and 0.82 M parameters in all; the stock U-Net
    has 3.6 M, of which most are in the stride-32 stage and the decoder that it requires. timm's plain variant is taken
    because it pads symmetrically: its 7 x 7 cells cover the same pixels as the ResNeXt Teacher's, those of the
    ``tf_`` variant are shifted by almost one cell.
    """

    removed_prefixes = ("blocks.4.2.", "blocks.5.")

    def __init__(self, **_: object) -> None:
        super().__init__([16, 16, 24, 48, 96])
        full = timm.create_model("mobilenetv3_small_100", pretrained=False)
        full.prune_intermediate_layers([5], extra_blocks=True)
        self.conv_stem, self.bn1, self.blocks = full.conv_stem, full.bn1, full.blocks
        self.blocks[4] = self.blocks[4][:2]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps at strides 1, 2, 4, 8, 16 and 32 of images (N, 3, H, W)."""
        stem = self.bn1(self.conv_stem(images))
        stride_4 = self.blocks[0](stem)
        stride_8 = self.blocks[1](stride_4)
        stride_16 = self.blocks[3](self.blocks[2](stride_8))
        return [images, stem, stride_4, stride_8, stride_16, self.blocks[4](stride_16)]


class SlimEfficientNetLite0(_Encoder):
    """EfficientNet-Lite0 with fewer blocks and channels: a family of Students of any size up to 3.4 M parameters.

    Its ImageNet weights come with a package (the extra ``weights``). Blocks leave from the end of a stage; a narrower
    network begins with evenly chosen channels of the complete one's weights (``weights.load_weights``). Convolutions
    pad as TensorFlow's do, like those of the Teacher ``efficientnet_lite2``.

    Args:
        width: share of each stage's channels, rounded to a multiple of 8 as timm does; the stem keeps its 32.
        blocks: kept of each of its seven stages, at most STAGES; the last may have none.
    """

    classifier = "tf_efficientnet_lite0"
    NAME = re.compile(r"efficientnet_lite0_w([1-9]\d|100)_b(1[12][12][1-3][1-3][1-4][01])")  # up to STAGES
    STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks of the complete network
    # The stages of timm's EfficientNet-Lite (Tan, Le 2019, arXiv 1905.11946, Table 1, without squeeze-and-excitation).
    BLOCKS = (
        "ds_r{}_k3_s1_e1_c16",
        "ir_r{}_k3_s2_e6_c24",
        "ir_r{}_k5_s2_e6_c40",
        "ir_r{}_k3_s2_e6_c80",
        "ir_r{}_k5_s1_e6_c112",
        "ir_r{}_k5_s2_e6_c192",
        "ir_r{}_k3_s1_e6_c320",
    )

    def __init__(self, width: float, blocks: tuple[int, ...], **_: object) -> None:
        kept = [[block.format(count)] for block, count in zip(self.BLOCKS, blocks, strict=True) if count]
        complete = efficientnet.EfficientNet(
            block_args=efficientnet.decode_arch_def(kept, fix_first_last=True),
            stem_size=32,
            fix_stem=True,
            num_classes=0,
            round_chs_fn=partial(efficientnet.round_channels, multiplier=width),
            pad_type="same",
            act_layer=nn.ReLU6,
            norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
        )
        widths = [efficientnet.round_channels(scale, width) for scale in (16, 24, 40, 112, 320 if blocks[6] else 192)]
        super().__init__(widths)
        self.conv_stem, self.bn1, self.blocks = complete.conv_stem, complete.bn1, complete.blocks
        self.is_narrow = width < 1
        gone = [(stage, block) for stage, count in enumerate(blocks) for block in range(count, self.STAGES[stage])]
        self.removed_prefixes = tuple(f"blocks.{stage}.{block}." for stage, block in gone)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps at strides 1, 2, 4, 8, 16 and 32 of images (N, 3, H, W)."""
        stride_2 = self.blocks[0](self.bn1(self.conv_stem(images)))
        stride_4 = self.blocks[1](stride_2)
        stride_8 = self.blocks[2](stride_4)
        stride_16 = self.blocks[4](self.blocks[3](stride_8))
        return [images, stride_2, stride_4, stride_8, stride_16, self.blocks[5:](stride_16)]


smp.encoders.encoders["mobilenetv3_small_trimmed"] = {
    "encoder": TrimmedMobileNetV3Small,
    "params": {},
    "pretrained_settings": {},  # ImageNet weights are read by load_weights
}


def check_encoder(name: str) -> None:
    """Make an encoder of this module available to smp; raise InputError for an unknown one."""
    if slim := SlimEfficientNetLite0.NAME.fullmatch(name):
        params = {"width": int(slim[1]) / 100, "blocks": tuple(map(int, slim[2]))}
        smp.encoders.encoders[name] = {"encoder": SlimEfficientNetLite0, "params": params, "pretrained_settings": {}}
    elif name.startswith("efficientnet_lite0_w"):
        raise InputError(
            f"encoder={name}: EfficientNet-Lite0 is efficientnet_lite0_wWIDTH_bBLOCKS with a width of 10 to 100 "
            "percent and, of its seven stages, 1111110 to 1223341 blocks"
        )
    elif name not in smp.encoders.encoders and not name.startswith("tu-"):
        raise InputError(f"encoder={name} is not an encoder of segmentation-models-pytorch; see smp.encoders")
