"""The KD paths: which tensors of Teacher and Student are compared."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from kdsweep.models.unet import Outputs


class KDPath(nn.Module, ABC):
    """The interface of a KD path; a path that lacks a method is refused when it is built.

    A path's parameters are trained with the Student, kept in its checkpoint, and absent from its exported weights.
    The configuration says which representation a path takes; without logits the Teacher runs its encoder alone.
    """

    @abstractmethod
    def teacher_map(self, outputs: Outputs) -> Tensor:
        """Return the Teacher's map to compare: (N, C, h, w)."""

    @abstractmethod
    def student_map(self, outputs: Outputs) -> Tensor:
        """Return the Student's map to compare: (N, C, h, w), the Teacher's shape."""


class Logits(KDPath):
    """L, KD-Logits: the final logits before any activation (PAPER, Figure 1). Both maps are (N, 1, H, W)."""

    def teacher_map(self, outputs: Outputs) -> Tensor:
        """Return the Teacher's logits."""
        return outputs.logits

    def student_map(self, outputs: Outputs) -> Tensor:
        """Return the Student's logits."""
        return outputs.logits


class Hidden(KDPath):
    """H, KD-Hidden: the deepest feature map averaged over channels (PAPER, Figure 1). Both maps are (N, 1, h, w)."""

    def teacher_map(self, outputs: Outputs) -> Tensor:
        """Return the Teacher's channel mean."""
        return outputs.hidden.float().mean(dim=1, keepdim=True)

    def student_map(self, outputs: Outputs) -> Tensor:
        """Return the Student's channel mean."""
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
        """Return the Teacher's hidden map as it is."""
        return outputs.hidden

    def student_map(self, outputs: Outputs) -> Tensor:
        """Return the Student's hidden map through the regressor."""
        regressed: Tensor = self.regressor(outputs.hidden)
        return regressed
