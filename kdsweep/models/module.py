"""Any ``torch.nn.Module`` as Teacher or Student; its stages are submodules, whose outputs hooks capture."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch.nn.functional as F
from torch import Tensor, nn

from kdsweep.core.errors import InputError
from kdsweep.models.networks import LOGITS, Network, Outputs

USUAL_KEYS = ("out", "logits")  # of networks that return a dict: torchvision's, Transformers'


class ModuleNetwork(Network):
    """A module that maps images (N, 3, H, W) to logits (N, C, h, w), with its own names in the state dict.

    Logits smaller than the images are resized to them, bilinearly. A forward ends where the last needed map is
    captured.

    Args:
        module: returns a tensor, a dict with one of USUAL_KEYS, or several outputs of which ``output`` chooses one.
        stages: submodules by name of the stage, such as ``{"encoder.5": "backbone.layer4"}``. Their output is a map
            (N, C, h, w) or (N, h, w, C), or tokens (N, L, C) of a square map, those of classes and registers first.
        logits: C, 1 of one class, else their number and one for the background.
        output: key or index of the logits among the outputs.
        mean: of each channel that the module expects, with pixels from 0 to 1; None: ImageNet's.
        std: the standard deviations.
        size: side in pixels of the images that it takes, resized bilinearly; None: any.

    Raises:
        InputError: a stage names no submodule.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        stages: Mapping[str, str],
        logits: int = 1,
        output: str | int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.module, self.name = module, type(module).__name__
        self.stages = (*stages, LOGITS)
        self.logits, self.output, self.size = logits, output, size
        names = dict(module.named_modules())
        for stage, name in stages.items():
            if name not in names or not name:
                near = difflib.get_close_matches(name, names, n=3) or [each for each, _ in module.named_children()]
                raise InputError(
                    f"stages.{stage}={name} is not a submodule of {self.name}; near are: {', '.join(near)}"
                )
        self.submodules = dict(stages)
        if mean is not None and std is not None:
            self.expect(mean, std)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Return the module's state: weights keep the names that the module gives them."""
        return self.module.state_dict(*args, **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load the module's state."""
        return self.module.load_state_dict(state_dict, *args, **options)

    def forward(self, images: Tensor, stages: Collection[str] = (LOGITS,)) -> Outputs:
        """Return the maps of normalized images (N, 3, H, W) at these stages.

        Raises:
            InputError: the module gives no such map.
        """
        self.check_stages(stages)
        needed = [stage for stage in stages if stage != LOGITS]
        maps, output = Outputs(), None
        ends_early = LOGITS not in stages

        def capture(stage: str, _: nn.Module, __: Any, captured: Any) -> None:
            if stage not in maps:
                maps[stage] = self._as_map(captured, stage)
            if ends_early and len(maps) == len(needed):
                raise _AllCapturedError

        hooks = [
            self.module.get_submodule(self.submodules[stage]).register_forward_hook(partial(capture, stage))
            for stage in needed
        ]
        try:
            output = self.module(self._resized(self.expected(images)))
        except _AllCapturedError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if missing := [stage for stage in needed if stage not in maps]:
            raise InputError(f"stages.{missing[0]}={self.submodules[missing[0]]} does not run in {self.name}'s forward")
        if LOGITS in stages:
            maps[LOGITS] = self._logits(output, images)
        return Outputs({stage: maps[stage] for stage in stages})

    def _resized(self, images: Tensor) -> Tensor:
        if self.size is None or images.shape[2:] == (self.size, self.size):
            return images
        return F.interpolate(images, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)

    def _as_map(self, captured: Any, stage: str) -> Tensor:
        """Return the output of a submodule as a map (N, C, h, w), copied: what runs next may change it in place."""
        if not isinstance(captured, Tensor) or captured.ndim not in (3, 4):
            kind = f"a tensor of shape {tuple(captured.shape)}" if isinstance(captured, Tensor) else type(captured)
            raise InputError(
                f"stages.{stage}={self.submodules[stage]} gives {kind}; it must give a map (N, C, h, w), or tokens"
            )
        if captured.ndim == 3:  # the class token and registers are before those of the map
            side = math.isqrt(captured.shape[1])
            return captured[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side)).contiguous()
        height, width, channels = captured.shape[1:]
        is_channels_last = height == width != channels  # square images have square maps
        return (captured.permute(0, 3, 1, 2) if is_channels_last else captured).clone()

    def _logits(self, output: Any, images: Tensor) -> Tensor:
        """Return the module's logits at the size of the images."""
        if self.output is not None:
            try:
                output = output[self.output]
            except (KeyError, IndexError, TypeError) as error:
                raise InputError(f"output={self.output} is not an output of {self.name}; {_listed(output)}") from error
        elif isinstance(output, Mapping):
            output = next((output[key] for key in USUAL_KEYS if key in output), output)
        if not isinstance(output, Tensor):
            raise InputError(f"{self.name} gives {type(output).__name__}; choose with output=...: {_listed(output)}")
        if output.ndim != 4 or output.shape[1] != self.logits:
            needed = f"(N, {self.logits}, h, w)" + ("" if self.logits == 1 else ", data.classes and the background")
            raise InputError(f"{self.name} gives logits of shape {tuple(output.shape)}; they must be {needed}")
        if output.shape[2:] == images.shape[2:]:
            return output
        return F.interpolate(output.float(), images.shape[2:], mode="bilinear", align_corners=False)


class _AllCapturedError(Exception):
    """Ends a forward whose remaining layers are not needed."""


def _listed(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"it has {', '.join(map(str, output))}"
    return f"it has 0 to {len(output) - 1}" if isinstance(output, list | tuple) else "it has one output, a tensor"


class PatchSegmenter(nn.Module):
    """A vision transformer of timm with a linear head.

    Source: Strudel et al., Segmenter: transformer for semantic segmentation, ICCV 2021, section 3.2 (linear decoder).

    Args:
        encoder: timm's name, such as ``vit_small_patch16_224``.
        size: side in pixels of its images.
        classes: C, logits of each patch.
    """

    def __init__(self, encoder: str, *, size: int, classes: int = 1) -> None:
        super().__init__()
        self.encoder = timm.create_model(encoder, pretrained=False, num_classes=0, img_size=size)
        self.head = nn.Linear(self.encoder.num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, C, size / patch, size / patch) of images (N, 3, size, size)."""
        tokens = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        side = math.isqrt(tokens.shape[1])
        patches: Tensor = self.head(tokens).transpose(1, 2).unflatten(2, (side, side))
        return patches
