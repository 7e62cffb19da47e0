"""The comparisons of the literature's methods (conf/method/), as losses like those of losses.py.

Each is computed in single precision, whatever the networks ran in. ``student_mask`` and ``teacher_mask`` (N, 1, h, w)
in {0, 1} are the lesion in the frame and at the size of the maps; the Teacher's is warped as its maps are.
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


# ---- positions -----------------------------------------------------------------------------------------------------


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
    """T^2 (1 - Pearson correlation) of each class's probabilities over the batch's valid pixels (DIST, intra-class).

    With one logit z per pixel the probabilities are s(z / T) and 1 - s(z / T), whose correlations are equal. Source:
    Huang et al., Knowledge distillation from a stronger teacher, NeurIPS 2022.

    Args:
        student: (N, 1, H, W) logits.
        teacher: (N, 1, H, W) logits.
        valid: (N, 1, H, W) bool.
        temperature: T > 0.
    """

    def centered(logits: Tensor) -> Tensor:
        lesion = torch.sigmoid(logits / temperature)
        mean = torch.where(valid, lesion, 0.0).sum() / valid.sum().clamp(min=1)
        return torch.where(valid, lesion - mean, 0.0).flatten()

    return temperature**2 * (1 - F.cosine_similarity(centered(student), centered(teacher), dim=0))


@in_single_precision
def squared_sum(*, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Sum of squared differences over channels and valid positions, mean over images (MGD).

    Source: Yang et al., Masked generative distillation, ECCV 2022; their code divides by the images.

    Args:
        student: (N, C, h, w), generated (see ``paths.MaskedGeneration``).
        teacher: (N, C, h, w).
        valid: (N, 1, h, w) bool.
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


# ---- pairs of positions or images ----------------------------------------------------------------------------------


@in_single_precision
def pairwise(*, student: Tensor, teacher: Tensor, valid: Tensor, granularity: int = 2) -> Tensor:
    """Mean squared difference of the cosines between all pairs of nodes of an image (SKD, pair-wise).

    A node is the maximum of granularity x granularity positions. Source: Liu et al., Structured knowledge distillation
    for semantic segmentation, CVPR 2019, with granularity 2 x 2 and every pair connected. Their code pools to 2 x 2
    nodes in all.

    Args:
        student: (N, C, h, w).
        teacher: (N, D, h, w).
        valid: (N, 1, h, w) bool; a node counts if all of its positions do.
        granularity: positions of a node's side.
    """
    inside = -F.max_pool2d(-valid.float(), granularity).flatten(2)

    def affinities(maps: Tensor) -> Tensor:
        nodes = F.normalize(F.max_pool2d(maps, granularity).flatten(2), dim=1)
        return nodes.transpose(1, 2) @ nodes

    pairs = inside.transpose(1, 2) * inside
    squared = (affinities(student) - affinities(teacher)).square()
    return (squared * pairs).sum() / pairs.sum().clamp(min=1)


@in_single_precision
def cross_image(*, student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 0.1) -> Tensor:
    """KL(teacher || student) of each position's similarities to the positions of every image, mean over all (CIRKD).

    For images i and j of the batch and position p of i: softmax over the positions q of j of cos(p, q) / T. Source:
    Yang et al., Cross-image relational knowledge distillation for semantic segmentation, CVPR 2022 (mini-batch, pixel
    to pixel), temperature 0.1.

    Args:
        student: (N, C, h, w).
        teacher: (N, D, h, w).
        valid: (N, 1, h, w) bool.
        temperature: T > 0.
    """
    inside = valid.flatten(2)[:, 0]  # (N, P)
    lowest = torch.finfo(torch.float32).min

    def similarities(maps: Tensor) -> Tensor:
        units = F.normalize(maps.flatten(2), dim=1)
        cosines = torch.einsum("icp,jcq->ijpq", units, units) / temperature
        return F.log_softmax(cosines.masked_fill(~inside[None, :, None, :], lowest), dim=3)

    log_q, log_p = similarities(student), similarities(teacher)
    counted = inside[:, None, :, None] & inside[None, :, None, :]
    divergence = torch.where(counted, log_p.exp() * (log_p - log_q), 0.0)
    return divergence.sum() / (inside.sum() * len(inside)).clamp(min=1)


@in_single_precision
def batch_similarity(*, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared difference of the batch's row-normalized Gram matrices, over N^2 (SPKD).

    Source: Tung and Mori, Similarity-preserving knowledge distillation, ICCV 2019. A batch of one image has nothing to
    compare and gives 0.

    Args:
        student: (N, C, h, w).
        teacher: (N, D, h, w).
        valid: (N, 1, h, w) bool; other positions are 0 in both.
    """

    def gram(maps: Tensor) -> Tensor:
        flat = torch.where(valid, maps, 0.0).flatten(1)
        return F.normalize(flat @ flat.T, dim=1)

    return (gram(student) - gram(teacher)).square().sum() / len(student) ** 2


# ---- regions of the mask -------------------------------------------------------------------------------------------


@in_single_precision
def intra_class_variation(
    *, student: Tensor, teacher: Tensor, valid: Tensor, student_mask: Tensor, teacher_mask: Tensor
) -> Tensor:
    """Mean squared difference, over valid positions, of the cosine between a position and its class's mean (IFVD).

    The classes are lesion and background, the mean is over the image's valid positions of that class. Source: Wang et
    al., Intra-class feature variation distillation for semantic segmentation, ECCV 2020.

    Args:
        student: (N, C, h, w).
        teacher: (N, D, h, w).
        valid: (N, 1, h, w) bool.
        student_mask: (N, 1, h, w).
        teacher_mask: (N, 1, h, w).
    """

    def similarity(maps: Tensor, mask: Tensor) -> Tensor:
        regions = torch.cat([mask, 1 - mask], dim=1)
        means = torch.einsum("nrc,nrhw->nchw", _region_means(maps, regions, valid), regions)
        return F.cosine_similarity(maps, means, dim=1)[:, None]

    squared = (similarity(student, student_mask) - similarity(teacher, teacher_mask)).square()
    return torch.where(valid, squared, 0.0).sum() / valid.sum().clamp(min=1)


@in_single_precision
def region_affinity(
    *, student: Tensor, teacher: Tensor, valid: Tensor, student_mask: Tensor, teacher_mask: Tensor
) -> Tensor:
    """Mean squared difference of the cosine between the means of lesion and background (EMKD, region affinity).

    An image without one of the two has no such cosine and does not count; without any other image the term is 0.
    Source: Qin et al., IEEE TMI 40, 2021; their code adds 1 to the count of a region's positions.

    Args:
        student: (N, C, h, w).
        teacher: (N, D, h, w).
        valid: (N, 1, h, w) bool.
        student_mask: (N, 1, h, w).
        teacher_mask: (N, 1, h, w).
    """

    def contrast(maps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        regions = torch.cat([mask, 1 - mask], dim=1)
        means = _region_means(maps, regions, valid)
        both = ((regions * valid).sum(dim=(2, 3)) > 0).all(dim=1)
        return F.cosine_similarity(means[:, 0], means[:, 1], dim=1), both

    student_values, student_has_both = contrast(student, student_mask)
    teacher_values, teacher_has_both = contrast(teacher, teacher_mask)
    has_both = (student_has_both & teacher_has_both).float()
    return ((student_values - teacher_values).square() * has_both).sum() / has_both.sum().clamp(min=1)


def _region_means(maps: Tensor, regions: Tensor, valid: Tensor) -> Tensor:
    """Return the mean (N, R, C) of maps (N, C, h, w) over the valid positions of regions (N, R, h, w); 0 if none."""
    counted = regions * valid
    return torch.einsum("nchw,nrhw->nrc", maps, counted) / counted.sum(dim=(2, 3))[..., None].clamp(min=1)
