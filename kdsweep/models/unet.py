"""Teacher and Student: U-Nets of segmentation-models-pytorch, and the one call that returns logits and hidden together.

``python -m kdsweep.models.unet`` prints parameters, MACs and the hidden shape of both.
"""

from __future__ import annotations

import logging
import pickle
import sys
from pathlib import Path
from typing import NamedTuple

import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.encoders._base import EncoderMixin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdsweep.core.errors import InputError

log = logging.getLogger(__name__)

# What a classification network has beside its encoder; ignored when a whole classifier's weights are offered.
CLASSIFIER_PREFIXES = ("fc.", "classifier.", "conv_head.", "norm_head.", "last_linear.")


HUB = "hub:"  # leads the name of weights on the Hugging Face hub


class Outputs(NamedTuple):
    """What one forward of a network gives.

    Attributes:
        logits: (N, 1, H, W), before any activation.
        hidden: (N, C, H / 32, W / 32), the encoder's deepest feature map.
    """

    logits: Tensor
    hidden: Tensor


class TrimmedMobileNetV3Small(nn.Module, EncoderMixin):
    """MobileNetV3-small-100 without its last 1 x 1 convolution and without the last of its three stride-32 blocks.

    The paper's Student has a "modified MobileNetV3-small-100" encoder and 0.82 M parameters in all; the stock U-Net
    has 3.6 M, of which most sit in the stride-32 stage and the decoder it asks for. Every kept tensor has timm's name
    and shape, so ImageNet weights load. timm's plain variant is taken because it pads symmetrically: its 7 x 7 cells
    lie over the ResNeXt Teacher's, those of the ``tf_`` variant lie almost one cell beside them.
    """

    removed_prefixes = ("blocks.4.2.", "blocks.5.")

    def __init__(self, depth: int = 5, output_stride: int = 32, **_: object) -> None:
        super().__init__()
        if depth != 5 or output_stride != 32:
            raise ValueError(f"the trimmed encoder has depth 5 and stride 32, got {depth} and {output_stride}")
        full = timm.create_model("mobilenetv3_small_100", pretrained=False)
        full.prune_intermediate_layers([5], extra_blocks=True)
        self.conv_stem, self.bn1, self.blocks = full.conv_stem, full.bn1, full.blocks
        self.blocks[4] = self.blocks[4][:2]
        self._depth, self._in_channels, self._output_stride = 5, 3, 32
        self._out_channels = [3, 16, 16, 24, 48, 96]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps at strides 1, 2, 4, 8, 16 and 32 of images (N, 3, H, W)."""
        stem = self.bn1(self.conv_stem(images))
        stride_4 = self.blocks[0](stem)
        stride_8 = self.blocks[1](stride_4)
        stride_16 = self.blocks[3](self.blocks[2](stride_8))
        return [images, stem, stride_4, stride_8, stride_16, self.blocks[4](stride_16)]


smp.encoders.encoders["mobilenetv3_small_trimmed"] = {
    "encoder": TrimmedMobileNetV3Small,
    "params": {},
    "pretrained_settings": {},  # ImageNet weights are read by load_weights
}


class UNet(smp.Unet):
    """smp's U-Net with one logit per pixel; its state dict is that of ``smp.Unet`` with the same arguments."""

    def forward(self, images: Tensor) -> Outputs:
        """Logits and hidden map of normalised images (N, 3, H, W), H and W multiples of 32."""
        features = self.encoder(images)
        return Outputs(logits=self.segmentation_head(self.decoder(features)), hidden=features[-1])

    def hidden(self, images: Tensor) -> Tensor:
        """The encoder's deepest feature map (N, C, H / 32, W / 32) alone: what the paths H and HR need."""
        features: list[Tensor] = self.encoder(images)
        return features[-1]


def unet(*, encoder: str, decoder_channels: list[int], weights: str, seed: int) -> UNet:
    """Build a network; equal arguments give equal initial weights whatever else has drawn random numbers.

    Args:
        encoder: a name known to smp, or ``mobilenetv3_small_trimmed``.
        decoder_channels: output channels of the five decoder blocks, deepest first.
        weights: ``none``, a file (see ``load_weights``), or ``hub:REPOSITORY@REVISION`` of ImageNet weights.
        seed: of the random initialisation.

    Raises:
        InputError: the encoder is not known, or its weights cannot be had.
    """
    if encoder not in smp.encoders.encoders and not encoder.startswith("tu-"):
        raise InputError(f"encoder={encoder} is not known to segmentation-models-pytorch; see smp.encoders")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(encoder, encoder_weights=None, decoder_channels=decoder_channels, in_channels=3, classes=1)
    if weights.startswith(HUB):
        load_weights(network, imagenet_file(weights.removeprefix(HUB)), label=f"ImageNet weights of {encoder}")
    elif weights != "none":
        load_weights(network, Path(weights), label=f"weights={weights}")
    return network


def imagenet_file(source: str) -> Path:
    """The file of an encoder's ImageNet weights, from the local cache or from the Hugging Face hub.

    Args:
        source: ``REPOSITORY@REVISION``.

    Raises:
        InputError: it could not be fetched.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = source.partition("@")
    where = {"repo_id": repository, "filename": "model.safetensors", "revision": revision}
    try:
        return Path(huggingface_hub.hf_hub_download(**where, local_files_only=True))
    except LocalEntryNotFoundError:
        log.info("fetching ImageNet weights from the hub: %s", repository)
    huggingface_hub.logging.set_verbosity_error()  # its retries are told by our one line instead
    try:
        return Path(huggingface_hub.hf_hub_download(**where))
    except Exception as error:  # the hub's client raises many kinds: network, proxy, disk, missing entry
        raise InputError(
            f"weights=imagenet: {repository}/model.safetensors could not be fetched "
            f"({type(error).__name__}); connect to the network, give a file of it with weights=FILE per network "
            "(teacher.weights=FILE student.weights=FILE), or train from scratch with weights=none"
        ) from error


def load_weights(network: UNet, file: Path, *, label: str) -> None:
    """Load a whole network's state, or the ImageNet classifier that its encoder was cut from.

    Raises:
        InputError: the file cannot be read, or does not belong to this network.
    """
    state = read_weights(file)
    if set(state) == set(network.state_dict()):
        target: nn.Module = network
    else:
        target = network.encoder
        ignored = CLASSIFIER_PREFIXES + tuple(getattr(network.encoder, "removed_prefixes", ()))
        state = {key: value for key, value in state.items() if not key.startswith(ignored)}
    wrong = _mismatches(own=target.state_dict(), offered=state)
    if wrong:
        raise InputError(
            f"{label}: the file {file} belongs to another network than {network.name}: {wrong[0]}"
            f" ({len(wrong)} such tensors); give weights of that encoder, or weights=none"
        )
    nn.Module.load_state_dict(target, state, strict=False)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file or a PyTorch state dict, never running code from the file.

    Raises:
        InputError: missing, unreadable, or not a plain state dict.
    """
    if not file.is_file():
        raise InputError(f"weights={file}: no such file; use imagenet, none, or a .safetensors or .pt file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"weights={file}: not readable as plain tensors ({type(error).__name__})") from error
    except Exception as error:  # safetensors has an error class of its own
        raise InputError(f"weights={file}: not a weights file ({error})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"weights={file}: holds no state dict of tensors by name")
    return state


def _mismatches(*, own: dict[str, Tensor], offered: dict[str, Tensor]) -> list[str]:
    counters = {key for key in own if key.endswith("num_batches_tracked")}  # absent from files of old PyTorch
    wrong = [f"{key} is missing" for key in sorted(own.keys() - offered.keys() - counters)]
    wrong += [f"{key} is not in it" for key in sorted(offered.keys() - own.keys())]
    for key in sorted(own.keys() & offered.keys()):
        if own[key].shape != offered[key].shape:
            wrong.append(f"{key} has shape {tuple(offered[key].shape)}, not {tuple(own[key].shape)}")
    return wrong


def freeze(network: UNet) -> UNet:
    """Put a Teacher into the state that distillation relies on: eval mode, no gradients."""
    return network.eval().requires_grad_(requires_grad=False)


def count_parameters(network: nn.Module) -> int:
    """Number of parameters, frozen ones too."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: UNet, *, image_size: int) -> int:
    """Multiply-accumulate operations of one image of image_size x image_size pixels (PyTorch's counter, FLOPs / 2)."""
    device = next(network.parameters()).device
    mode = network.training
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, image_size, image_size, device=device))
    network.train(mode)
    return counter.get_total_flops() // 2


def summary(*, teacher: UNet, student: UNet, image_size: int) -> str:
    """A Markdown table of parameters, MACs and hidden shapes; the networks lose their weights (meta device)."""
    lines = ["| network | encoder | parameters | MACs | hidden (C x H x W) |", "| --- | --- | ---: | ---: | --- |"]
    for label, network in (("Teacher", teacher), ("Student", student)):
        with torch.device("meta"), torch.no_grad():
            hidden = network.to("meta").eval().hidden(torch.zeros(1, 3, image_size, image_size))
        shape = " x ".join(str(size) for size in hidden.shape[1:])
        macs, parameters = count_macs(network, image_size=image_size), count_parameters(network)
        encoder = network.name.removeprefix("u-")
        lines.append(f"| {label} | {encoder} | {parameters:,} | {macs / 1e9:.2f} G | {shape} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from kdsweep.training.factory import print_models

    sys.exit(print_models(sys.argv[1:]))
