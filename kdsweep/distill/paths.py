"""The KD paths: which tensors of Teacher and Student are compared."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from kdsweep.models.networks import HIDDEN, Outputs


class KDPath(nn.Module, ABC):
    """The interface of a KD path; a path that lacks a method is refused when it is built.

    A path's parameters are trained with the Student, kept in its checkpoint, and absent from its exported weights.

    Attributes:
        stages: the stages of the Student that the path takes, such as ``encoder.5``; neither network runs further than
            a cell needs. None: those of the configuration's ``representation``.
        teacher_stages: those of the Teacher; None: the same.
        resize: bring the Student's map to the size of the Teacher's, bilinearly, where these differ; else refuse them.
    """

    stages: tuple[str, ...] | None = None
    teacher_stages: tuple[str, ...] | None = None
    resize = False

    @abstractmethod
    def teacher_map(self, outputs: Outputs) -> Tensor:
        """Return the Teacher's map to compare: (N, C, h, w)."""

    @abstractmethod
    def student_map(self, outputs: Outputs) -> Tensor:
        """Return the Student's map to compare: (N, C, h, w), of the Teacher's size unless ``resize`` is set."""


class Logits(KDPath):
    """L, KD-Logits: the final logits before any activation (PAPER, Figure 1).

    Both maps are (N, 1, H, W) or, of K classes, (N, K + 1, H, W).
    """

    stages = ("logits",)

    def teacher_map(self, outputs: Outputs) -> Tensor:
        """Return the Teacher's logits."""
        return outputs.logits

    def student_map(self, outputs: Outputs) -> Tensor:
        """Return the Student's logits."""
        return outputs.logits


class Hidden(KDPath):
    """H, KD-Hidden: the deepest feature map averaged over channels (PAPER, Figure 1). Both maps are (N, 1, h, w).

    Args:
        stage: another one than the deepest.
    """

    def __init__(self, *, stage: str = HIDDEN) -> None:
        super().__init__()
        self.stage, self.stages = stage, (stage,)

    def teacher_map(self, outputs: Outputs) -> Tensor:
        """Return the Teacher's channel mean."""
        return outputs[self.stage].float().mean(dim=1, keepdim=True)

    def student_map(self, outputs: Outputs) -> Tensor:
        """Return the Student's channel mean."""
        return outputs[self.stage].float().mean(dim=1, keepdim=True)


class HiddenRegressor(KDPath):
    """HR, KD-HiddenRegressor: a regressor raises the Student's hidden channels to the Teacher's (PAPER, Figure 1).

    Two convolutions, each followed by a ReLU because the Teacher's hidden map is non-negative. Both maps are
    (N, teacher_channels, h, w). Kernel size and inner width: paper silent.

    Args:
        student_channels: channels of the Student's hidden map.
        teacher_channels: channels of the Teacher's hidden map.
        inner_channels: channels between the two convolutions.
        kernel_size: odd; the maps keep their size.
        stage: another one than the deepest.
    """

    def __init__(
        self,
        *,
        student_channels: int,
        teacher_channels: int,
        inner_channels: int = 512,
        kernel_size: int = 1,
        stage: str = HIDDEN,
    ) -> None:
        super().__init__()
        self.stage, self.stages = stage, (stage,)
        padding = kernel_size // 2
        self.regressor = nn.Sequential(
            nn.Conv2d(student_channels, inner_channels, kernel_size, padding=padding),
            nn.ReLU(),
            nn.Conv2d(inner_channels, teacher_channels, kernel_size, padding=padding),
            nn.ReLU(),
        )

    def teacher_map(self, outputs: Outputs) -> Tensor:
        """Return the Teacher's hidden map as it is."""
        return outputs[self.stage]

    def student_map(self, outputs: Outputs) -> Tensor:
        """Return the Student's hidden map through the regressor."""
        regressed: Tensor = self.regressor(outputs[self.stage])
        return regressed


class Stage(KDPath):
    """The maps of one stage as they are, the Student's through an adapter if ``adapter`` is set.

    Args:
        student_channels: channels of the Student's stage.
        teacher_channels: channels of the Teacher's stage.
        stage: such as ``decoder.3`` or ``logits``, of both networks.
        teacher_stage: of the Teacher, if it is another one.
        adapter: a 1 x 1 convolution (without bias) raises the Student's channels to the Teacher's, for losses that
            compare channel by channel. Source: FitNets' regressor (Romero et al., ICLR 2015, section 2.2).
        resize: bring the Student's maps to the size of the Teacher's, bilinearly, where these differ.
    """

    def __init__(
        self,
        *,
        student_channels: int,
        teacher_channels: int,
        stage: str,
        teacher_stage: str | None = None,
        adapter: bool = False,
        resize: bool = False,
    ) -> None:
        super().__init__()
        self.student_stage, self.teacher_stage = stage, teacher_stage or stage
        self.resize = resize
        self.stages, self.teacher_stages = (self.student_stage,), (self.teacher_stage,)
        self.adapter = nn.Conv2d(student_channels, teacher_channels, 1, bias=False) if adapter else nn.Identity()

    def teacher_map(self, outputs: Outputs) -> Tensor:
        """Return the Teacher's maps (N, C, h, w)."""
        return outputs[self.teacher_stage]

    def student_map(self, outputs: Outputs) -> Tensor:
        """Return the Student's maps, adapted as configured."""
        maps: Tensor = self.adapter(outputs[self.student_stage])
        return maps


class MaskedGeneration(Stage):
    """MGD: the Student's maps, part of their positions erased, from which a generator makes the Teacher's.

    In evaluation the same positions are erased in each batch. Source: Yang et al., Masked generative distillation, ECCV
    2022: a generator of two 3 x 3 convolutions with a ReLU between, 75 % erased for segmentation.

    Args:
        student_channels: channels of the Student's stage.
        teacher_channels: channels of the Teacher's stage.
        stage: such as ``decoder.3``: the generator has 18 C^2 weights for C channels of the Teacher.
        erased: share of positions, 0.75 in the source.
    """

    def __init__(self, *, student_channels: int, teacher_channels: int, stage: str, erased: float) -> None:
        differ = student_channels != teacher_channels
        super().__init__(
            student_channels=student_channels, teacher_channels=teacher_channels, stage=stage, adapter=differ
        )
        self.erased = erased
        self.generator = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def student_map(self, outputs: Outputs) -> Tensor:
        """Return the maps (N, C, h, w) that the generator makes of what was left."""
        maps = super().student_map(outputs)
        # Evaluated without erasing, the generator would see four times what it has learned from.
        chance = None if self.training else torch.Generator(maps.device).manual_seed(0)
        drawn = torch.rand(maps[:, :1].shape, generator=chance, device=maps.device)
        maps = maps * (drawn >= self.erased)
        made: Tensor = self.generator(maps)
        return made
