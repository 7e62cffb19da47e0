"""The literature's comparisons position by position (conf/method/), as losses like those of losses.py.

Each is computed in single precision, whatever the networks ran in. Comparisons of relations are in relations.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch
import torch.nn.functional as F
from torch import Tensor


def in_single_precision(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss computed outside of autocast, on maps in fp32: products of many terms need it."""

    @wraps(loss)
    def computed(*, student: Tensor, teacher: Tensor, valid: Tensor, **others: object) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):
            return loss(student=student.float(), teacher=teacher.float(), valid=valid, **others)

    return computed


@in_single_precision
def attention(*, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Mean squared difference of attention maps over valid positions (AT).

    An attention map is the channel mean of squares, divided by its L2 norm over the image. Source: Zagoruyko and
    Komodakis, Paying more attention to attention, ICLR 2017, as their code has it (utils.py, at_loss). Equation 2 of
    the paper takes the norm of the difference, not its square, and the sum over channels.

    Args:
        student: (N, C, h, w).
        teacher: (N, D, h, w).
        valid: (N, 1, h, w) bool.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
        >>> attention(student=student, teacher=teacher, valid=student >= 0)  # (1^2 + 1^2) / 2
        tensor(1.)
    """
    student_values, teacher_values = (_energy(maps, valid, power=2) for maps in (student, teacher))
    return (student_values - teacher_values).square().sum() / valid.sum().clamp(min=1)


@in_single_precision
def importance(*, student: Tensor, teacher: Tensor, valid: Tensor, power: float = 4.0) -> Tensor:
    """Sum over positions of the squared difference of importance maps, mean over images (EMKD).

    An importance map is the channel mean of |x|^power, divided by its L2 norm over the image. Source: Qin et al.,
    Efficient medical image segmentation based on knowledge distillation, IEEE TMI 40, 2021, as their code has it.

    Args:
        student: (N, C, h, w).
        teacher: (N, D, h, w).
        valid: (N, 1, h, w) bool.
        power: of the activations.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
        >>> importance(student=student, teacher=teacher, valid=student >= 0)  # 1^2 + 1^2
        tensor(2.)
    """
    student_values, teacher_values = (_energy(maps, valid, power=power) for maps in (student, teacher))
    return (student_values - teacher_values).square().sum(dim=1).mean()


def _energy(maps: Tensor, valid: Tensor, *, power: float) -> Tensor:
    energy = maps.abs().pow(power).mean(dim=1, keepdim=True)
    return F.normalize(torch.where(valid, energy, 0.0).flatten(1))


@in_single_precision
def standardized(*, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Half the mean squared difference of standardized channels, which is 1 - their Pearson correlation (PKD).

    Each channel has its mean taken off and is divided by its standard deviation, over the batch's valid positions.
    Source: Cao et al., PKD: general distillation framework for object detectors via Pearson correlation coefficient,
    NeurIPS 2022.

    Args:
        student: (N, C, h, w).
        teacher: (N, C, h, w).
        valid: (N, 1, h, w) bool.

    Example:
        >>> student = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
        >>> standardized(student=student, teacher=-student, valid=student > 0)  # (n - 1) / n of 1 - -1
        tensor(1.5000)
    """
    count = valid.sum()

    def standard(maps: Tensor) -> Tensor:
        mean = torch.where(valid, maps, 0.0).sum(dim=(0, 2, 3), keepdim=True) / count.clamp(min=1)
        centered = torch.where(valid, maps - mean, 0.0)
        variance = centered.square().sum(dim=(0, 2, 3), keepdim=True) / (count - 1).clamp(min=1)
        return centered / (variance.clamp_min(1e-24).sqrt() + 1e-6)

    squared = (standard(student) - standard(teacher)).square()
    return squared.sum() / (count * student.shape[1]).clamp(min=1) / 2


@in_single_precision
def intra_class_relation(*, student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 (1 - Pearson correlation) of a class's probabilities over the batch's valid pixels, mean over classes (DIST).

    The intra-class term. With one logit z per pixel the probabilities are s(z / T) and 1 - s(z / T), whose correlations
    are equal; with several channels they are softmax(z / T), background among them. Source: Huang et al., Knowledge
    distillation from a stronger teacher, NeurIPS 2022.

    Args:
        student: (N, C, H, W) logits.
        teacher: (N, C, H, W) logits.
        valid: (N, 1, H, W) bool.
        temperature: T > 0.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, -1.0, 1.0, -1.0]]]]), torch.tensor([[[[1.0, 1.0, -1.0, -1.0]]]])
        >>> intra_class_relation(student=student, teacher=teacher, valid=student != 0)  # 1 - 0
        tensor(1.)
    """
    inside = valid[:, 0]

    def shares(logits: Tensor) -> tuple[Tensor, ...]:
        scaled = logits / temperature
        return (torch.sigmoid(scaled) if logits.shape[1] == 1 else scaled.softmax(dim=1)).unbind(dim=1)

    def centered(share: Tensor) -> Tensor:
        mean = torch.where(inside, share, 0.0).sum() / inside.sum().clamp(min=1)
        return torch.where(inside, share - mean, 0.0).flatten()

    pairs = zip(shares(student), shares(teacher), strict=True)
    terms = [1 - F.cosine_similarity(centered(q), centered(p), dim=0) for q, p in pairs]
    return temperature**2 * torch.stack(terms).mean()


@in_single_precision
def squared_sum(*, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Sum of squared differences over channels and valid positions, mean over images (MGD).

    Source: Yang et al., Masked generative distillation, ECCV 2022; their code divides by the images.

    Args:
        student: (N, C, h, w), generated (see ``paths.MaskedGeneration``).
        teacher: (N, C, h, w).
        valid: (N, 1, h, w) bool.

    Example:
        >>> student, teacher = torch.ones(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
        >>> squared_sum(student=student, teacher=teacher, valid=teacher[:, :1] == 0)  # 2 channels of 2 positions
        tensor(4.)
    """
    return torch.where(valid, (student - teacher).square(), 0.0).sum() / len(student)


@in_single_precision
def hierarchical_context(
    *, student: Tensor, teacher: Tensor, valid: Tensor, sizes: tuple[int, ...] = (4, 2, 1)
) -> Tensor:
    """Mean squared difference of the maps and of their averages over 4 x 4, 2 x 2 and 1 x 1 parts (ReviewKD's HCL).

    Weighted 1, 1/2, 1/4, 1/8, divided by the sum of the weights; a size that the maps do not exceed is left out.
    Source: Chen et al., Distilling knowledge via knowledge review, CVPR 2021, weights as in their code (hcl).

    Args:
        student: (N, C, h, w).
        teacher: (N, C, h, w).
        valid: (N, 1, h, w) bool; a part's average is over its valid positions.
        sizes: parts of a side, falling.

    Example:
        >>> student = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
        >>> hierarchical_context(student=student, teacher=student.flip(3), valid=student >= 0)  # (1 + 0/2) / (1 + 1/2)
        tensor(0.6667)
    """
    inside = valid.float()
    difference = torch.where(valid, student - teacher, 0.0)
    total, weight, weights = _mean_square(difference, inside), 1.0, 1.0
    for size in sizes:
        if size >= student.shape[2]:
            continue
        share = _averages(inside, size)
        averages = _averages(difference, size) / share.clamp_min(1e-12)
        weight /= 2
        weights += weight
        total = total + weight * _mean_square(averages, (share > 0).float())
    return total / weights


def _averages(maps: Tensor, size: int) -> Tensor:
    """Return ``F.adaptive_avg_pool2d`` (N, C, size, size), whose gradient on CUDA is deterministic in this form."""
    rows, columns = (_parts(length, size, maps.device).to(maps.dtype) for length in maps.shape[2:])
    return torch.einsum("ph,nchw,qw->ncpq", rows, maps, columns)


@cache
def _parts(length: int, size: int, device: torch.device) -> Tensor:
    """Return (size, length): the weights of the mean over each part of a side."""
    positions, parts = torch.arange(length, device=device), torch.arange(size, device=device)[:, None]
    inside = (positions >= parts * length // size) & (positions * size < (parts + 1) * length)
    return inside.float() / inside.sum(dim=1, keepdim=True)


def _mean_square(maps: Tensor, inside: Tensor) -> Tensor:
    return (maps.square() * inside).sum() / (inside.sum() * maps.shape[1]).clamp(min=1)
