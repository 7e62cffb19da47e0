"""The KD paths: which tensors of Teacher and Student are compared."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from kdsweep.models.unet import Outputs


class KDPath(nn.Module, ABC):
    """What the training loop uses of a path; a path that lacks a method is refused when it is built.

    Parameters that a path owns are trained with the Student, kept in its checkpoint, and absent from the exported one.

    Attributes:
        needs_logits: False lets the Teacher run its encoder alone; ``logits`` of its outputs is empty then.
    """

    needs_logits: bool

    @abstractmethod
    def teacher_map(self, outputs: Outputs) -> Tensor:
        """What is taken of the Teacher: (N, C, h, w)."""

    @abstractmethod
    def student_map(self, outputs: Outputs) -> Tensor:
        """What is taken of the Student: (N, C, h, w), as of the Teacher."""


class Logits(KDPath):
    """L, KD-Logits: the final logits before any activation (PAPER, Figure 1). Both maps are (N, 1, H, W)."""

    needs_logits = True

    def teacher_map(self, outputs: Outputs) -> Tensor:
        """The Teacher's logits."""
        return outputs.logits

    def student_map(self, outputs: Outputs) -> Tensor:
        """The Student's logits."""
        return outputs.logits


class Hidden(KDPath):
    """H, KD-Hidden: the deepest feature map averaged over channels (PAPER, Figure 1). Both maps are (N, 1, h, w)."""

    needs_logits = False

    def teacher_map(self, outputs: Outputs) -> Tensor:
        """The Teacher's channel mean."""
        return outputs.hidden.float().mean(dim=1, keepdim=True)

    def student_map(self, outputs: Outputs) -> Tensor:
        """The Student's channel mean."""
        return outputs.hidden.float().mean(dim=1, keepdim=True)


class HiddenRegressor(KDPath):
    """HR, KD-HiddenRegressor: a regressor raises the Student's hidden channels to the Teacher's (PAPER, Figure 1).

    Two convolutions, each followed by a ReLU because the Teacher's hidden map is non-negative. Both maps are
    (N, teacher_channels, h, w). Kernel size and inner width: paper silent.

    Args:
        student_channels: channels of the Student's hidden map.
        teacher_channels: channels of the Teacher's hidden map.
        inner_channels: channels between the two convolutions.
        kernel_size: odd; the maps keep their size.
    """

    needs_logits = False

    def __init__(
        self, *, student_channels: int, teacher_channels: int, inner_channels: int = 512, kernel_size: int = 1
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.regressor = nn.Sequential(
            nn.Conv2d(student_channels, inner_channels, kernel_size, padding=padding),
            nn.ReLU(),
            nn.Conv2d(inner_channels, teacher_channels, kernel_size, padding=padding),
            nn.ReLU(),
        )

    def teacher_map(self, outputs: Outputs) -> Tensor:
        """The Teacher's hidden map as it is."""
        return outputs.hidden

    def student_map(self, outputs: Outputs) -> Tensor:
        """The Student's hidden map through the regressor."""
        regressed: Tensor = self.regressor(outputs.hidden)
        return regressed
