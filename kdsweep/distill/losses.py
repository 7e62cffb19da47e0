"""The loss terms: pure functions of tensors. Each says its formula, its reduction and its source.

A KD loss takes ``student``, ``teacher`` and ``valid`` by keyword and returns a scalar. ``valid`` marks the positions to
compare: where the Teacher saw another view, the Student's frame is not covered everywhere (see ``distillation.warp``).
Gradients flow into ``student`` alone: the Teacher's maps come without a graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import BINARY_MODE, DiceLoss
from torch import Tensor

DICE = DiceLoss(BINARY_MODE, from_logits=True)


def cross_entropy(*, logits: Tensor, mask: Tensor) -> Tensor:
    """Pixel-wise binary cross-entropy, mean over all pixels: the supervised term (PAPER, Eq. I, L_sup).

    -[y log s(z) + (1 - y) log(1 - s(z))] with s the logistic function.

    Args:
        logits: (N, 1, H, W), one per pixel, before activation.
        mask: (N, 1, H, W), ground truth in {0, 1}.

    Example:
        >>> cross_entropy(logits=torch.zeros(1, 1, 2, 2), mask=torch.ones(1, 1, 2, 2))  # -log(1/2)
        tensor(0.6931)
    """
    return F.binary_cross_entropy_with_logits(logits.float(), mask.float())


def cross_entropy_and_dice(*, logits: Tensor, mask: Tensor) -> Tensor:
    """Pixel-wise binary cross-entropy plus 1 - the soft Dice of the batch's pixels together.

    2 sum(s(z) y) / (sum(s(z)) + sum(y)) with s the logistic function. Source of the sum: Isensee et al., nnU-Net,
    Nature Methods 18, 2021.

    Args:
        logits: (N, 1, H, W), one per pixel, before activation.
        mask: (N, 1, H, W), ground truth in {0, 1}.

    Example:
        >>> logits, mask = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> cross_entropy_and_dice(logits=logits, mask=mask)  # log 2 + 1 - 2 * 2 / (2 + 4)
        tensor(1.0265)
    """
    dice: Tensor = DICE(logits.float(), mask.float())
    return cross_entropy(logits=logits, mask=mask) + dice


def mse(*, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Mean squared difference over channels and valid positions (PAPER, Eq. II).

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        valid: (N, 1, H, W) bool.

    Example:
        >>> ones = torch.ones(1, 1, 1, 2)
        >>> mse(student=3 * ones, teacher=ones, valid=ones > 0)  # (3 - 1)^2
        tensor(4.)
    """
    squared = (student.float() - teacher.float()).square()
    return torch.where(valid, squared, 0.0).sum() / (valid.sum() * student.shape[1]).clamp(min=1)


def kld_pixels(*, student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of each pixel's two-class distribution, mean over valid pixels (PAPER, Eq. III).

    With one logit z per pixel the distribution is Bernoulli, P(lesion) = s(z / T):
    P log(P / Q) + (1 - P) log((1 - P) / (1 - Q)). A softmax over the single channel would be constantly 1.
    T^2 keeps the gradient's size when T changes (Hinton et al. 2015, section 2).

    Args:
        student: (N, 1, H, W) logits, Q.
        teacher: (N, 1, H, W) logits, P.
        valid: (N, 1, H, W) bool.
        temperature: T > 0.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0).log()
        >>> kld_pixels(student=student, teacher=teacher, valid=student == 0)  # 3/4 log(3/2) + 1/4 log(1/2)
        tensor(0.1308)
    """
    z_student, z_teacher = student.float() / temperature, teacher.float() / temperature
    p = torch.sigmoid(z_teacher)
    lesion = p * (F.logsigmoid(z_teacher) - F.logsigmoid(z_student))
    background = (1 - p) * (F.logsigmoid(-z_teacher) - F.logsigmoid(-z_student))
    divergence = torch.where(valid, lesion + background, 0.0)
    return temperature**2 * divergence.sum() / valid.sum().clamp(min=1)


def kld_positions(*, student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of each channel's softmax over positions, mean over channels and images.

    Channel-wise distillation (Shu et al., ICCV 2021; PAPER, Eq. III): P_i = exp(t_i / T) / sum_j exp(t_j / T)
    over the valid positions i of one channel, the divergence summed over positions.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        valid: (N, 1, H, W) bool; other positions have probability 0 in both distributions.
        temperature: T > 0.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[3.0, 1.0]]]]).log()
        >>> kld_positions(student=student, teacher=teacher, valid=student == 0)  # 3/4 log(3/2) + 1/4 log(1/2)
        tensor(0.1308)
    """
    inside = valid.flatten(2)
    lowest = torch.finfo(torch.float32).min  # finite: an image without any valid position contributes 0, not NaN
    log_q = F.log_softmax((student.float().flatten(2) / temperature).masked_fill(~inside, lowest), dim=2)
    log_p = F.log_softmax((teacher.float().flatten(2) / temperature).masked_fill(~inside, lowest), dim=2)
    divergence = torch.where(inside, log_p.exp() * (log_p - log_q), 0.0)
    return temperature**2 * divergence.sum(dim=2).mean()
