"""The literature's comparisons between the classes of a pixel (conf/method/), for logits of several classes.

They are losses like those of losses.py, computed in single precision, of logits (N, K + 1, H, W) of K classes and the
background. Of one logit per pixel they say nothing, so they refuse it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdsweep.core.errors import InputError
from kdsweep.distill.losses import kld_pixels
from kdsweep.distill.methods import in_single_precision


@in_single_precision
def decoupled(
    *,
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    student_mask: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) of each pixel, mean over valid pixels (DKD).

    The target is the class that the pixel has in the Student's mask. TCKD is KL(teacher || student) of the target's
    probability and the rest, NCKD that of the other classes' probabilities among themselves, from softmax(z / T).
    Source: Zhao et al., Decoupled knowledge distillation, CVPR 2022; alpha 1, beta 8 and T 4 are the defaults of their
    code (CIFAR-100).

    Args:
        student: (N, K + 1, H, W) logits.
        teacher: (N, K + 1, H, W) logits.
        valid: (N, 1, H, W) bool.
        student_mask: (N, K, H, W).
        alpha: weight of the target's part.
        beta: weight of the other classes' part.
        temperature: T > 0.

    Raises:
        InputError: the logits have one channel.

    Example:
        >>> student, teacher = torch.zeros(1, 3, 1, 1), torch.tensor([2.0, 3.0, 1.0]).log()[None, :, None, None]
        >>> mask = torch.tensor([1.0, 0.0])[None, :, None, None]  # target 3 of 6, others 2 and 1
        >>> maps = {"student": student, "teacher": teacher, "valid": student[:, :1] == 0, "student_mask": mask}
        >>> decoupled(**maps, beta=0.0, temperature=1.0)  # 1/2 log(3/2) + 1/2 log(3/4)
        tensor(0.0589)
        >>> decoupled(**maps, alpha=0.0, beta=1.0, temperature=1.0)  # 2/3 log(4/3) + 1/3 log(2/3)
        tensor(0.0566)
    """
    _refuse_one_channel(student, loss="decoupled")
    is_target = torch.cat([1 - student_mask.sum(dim=1, keepdim=True), student_mask], dim=1) > 0  # background first
    lowest = torch.finfo(torch.float32).min  # finite: its probability is 0, and 0 times a difference of two is 0

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = logits / temperature
        others = scaled.masked_fill(is_target, lowest)
        target = torch.where(is_target, scaled, 0.0).sum(dim=1, keepdim=True)
        return target - others.logsumexp(dim=1, keepdim=True), others  # log-odds of the target

    (q_target, q_others), (p_target, p_others) = parts(student), parts(teacher)
    of_target = kld_pixels(student=q_target, teacher=p_target, valid=valid)
    of_others = kld_pixels(student=q_others, teacher=p_others, valid=valid)
    return temperature**2 * (alpha * of_target + beta * of_others)


@in_single_precision
def inter_class_relation(*, student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 (1 - Pearson correlation) of each pixel's probabilities over classes, mean over valid pixels (DIST).

    The inter-class term, of softmax(z / T). Source: Huang et al., Knowledge distillation from a stronger teacher,
    NeurIPS 2022, for segmentation as their code has it.

    Args:
        student: (N, K + 1, H, W) logits.
        teacher: (N, K + 1, H, W) logits.
        valid: (N, 1, H, W) bool.
        temperature: T > 0.

    Raises:
        InputError: the logits have one channel.

    Example:
        >>> student, teacher = torch.tensor([1.0, 2.0, 3.0]).log(), torch.tensor([1.0, 3.0, 2.0]).log()
        >>> maps = {"student": student[None, :, None, None], "teacher": teacher[None, :, None, None]}
        >>> inter_class_relation(**maps, valid=torch.ones(1, 1, 1, 1) > 0)  # 1 - 1/2
        tensor(0.5000)
    """
    _refuse_one_channel(student, loss="inter_class_relation")
    # Of C probabilities the mean is 1 / C.
    q, p = ((maps / temperature).softmax(dim=1) - 1 / maps.shape[1] for maps in (student, teacher))
    distance = 1 - F.cosine_similarity(q, p, dim=1)[:, None]
    return temperature**2 * torch.where(valid, distance, 0.0).sum() / valid.sum().clamp(min=1)


@in_single_precision
def kld_standardized(*, student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 KL(teacher || student) of each pixel's standardized logits, mean over valid pixels (logit standardization).

    A pixel's logits have their mean over classes taken off and are divided by their standard deviation (of a sample,
    plus 1e-7); then as ``losses.kld_pixels``. Source: Sun et al., Logit standardization in knowledge distillation, CVPR
    2024, temperature 2 as their code has it.

    Args:
        student: (N, K + 1, H, W) logits.
        teacher: (N, K + 1, H, W) logits.
        valid: (N, 1, H, W) bool.
        temperature: T > 0.

    Raises:
        InputError: the logits have one channel.

    Example:
        >>> student, teacher = torch.tensor([5.0, 0.0, -5.0]), torch.tensor([1.0, 2.0, 3.0])  # (1, 0, -1), (-1, 0, 1)
        >>> maps = {"student": student[None, :, None, None], "teacher": teacher[None, :, None, None]}
        >>> kld_standardized(**maps, valid=torch.ones(1, 1, 1, 1) > 0, temperature=1.0)  # 2 (e - 1/e) / (1/e + 1 + e)
        tensor(1.1504)
    """
    _refuse_one_channel(student, loss="kld_standardized")

    def standard(logits: Tensor) -> Tensor:
        return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)

    return kld_pixels(student=standard(student), teacher=standard(teacher), valid=valid, temperature=temperature)


def _refuse_one_channel(logits: Tensor, *, loss: str) -> None:
    """Raise InputError for logits (N, 1, H, W)."""
    if logits.shape[1] == 1:
        raise InputError(f"loss {loss} compares several classes, and the logits have one channel; set data.classes")
