"""The literature's comparisons of relations (conf/method/): between positions, images, or the regions of a mask.

They are losses like those of losses.py, computed in single precision. ``student_mask`` and ``teacher_mask``
(N, K, h, w) in {0, 1} are the lesion, of each of K classes, in the frame and at the size of the maps; the Teacher's is
warped as its maps are. The regions of a mask are its K classes and the background, which is what they leave.
"""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdsweep.distill.methods import in_single_precision


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

    Example:
        >>> student, teacher, valid = torch.ones(1, 2, 1, 2), torch.eye(2)[None, :, None], torch.ones(1, 1, 1, 2) > 0
        >>> pairwise(student=student, teacher=teacher, valid=valid, granularity=1)  # 2 of 4 pairs: (1 - 0)^2
        tensor(0.5000)
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

    Example:
        >>> student, teacher, valid = torch.ones(1, 2, 1, 2), torch.eye(2)[None, :, None], torch.ones(1, 1, 1, 2) > 0
        >>> cross_image(student=student, teacher=teacher, valid=valid, temperature=1.0)  # P = e / (1 + e), Q = 1/2
        tensor(0.1109)
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
    compare: 0.

    Args:
        student: (N, C, h, w).
        teacher: (N, D, h, w).
        valid: (N, 1, h, w) bool; other positions are 0 in both.

    Example:
        >>> student, teacher = torch.ones(2, 2, 1, 1), torch.eye(2)[..., None, None]
        >>> batch_similarity(student=student, teacher=teacher, valid=student[:, :1] > 0)  # 1 - sqrt(1/2)
        tensor(0.2929)
    """

    def gram(maps: Tensor) -> Tensor:
        flat = torch.where(valid, maps, 0.0).flatten(1)
        return F.normalize(flat @ flat.T, dim=1)

    return (gram(student) - gram(teacher)).square().sum() / len(student) ** 2


@in_single_precision
def intra_class_variation(
    *, student: Tensor, teacher: Tensor, valid: Tensor, student_mask: Tensor, teacher_mask: Tensor
) -> Tensor:
    """Mean squared difference, over valid positions, of the cosine between a position and its class's mean (IFVD).

    The classes are the regions of the mask, the mean is over the image's valid positions of that class. Source: Wang et
    al., Intra-class feature variation distillation for semantic segmentation, ECCV 2020.

    Args:
        student: (N, C, h, w).
        teacher: (N, D, h, w).
        valid: (N, 1, h, w) bool.
        student_mask: (N, K, h, w).
        teacher_mask: (N, K, h, w).

    Example:
        >>> student, teacher, mask = torch.ones(1, 2, 1, 2), torch.eye(2)[None, :, None], torch.ones(1, 1, 1, 2)
        >>> masks = {"student_mask": mask, "teacher_mask": mask}
        >>> intra_class_variation(student=student, teacher=teacher, valid=mask > 0, **masks)  # (1 - sqrt(1/2))^2
        tensor(0.0858)
    """

    def similarity(maps: Tensor, mask: Tensor) -> Tensor:
        regions = _regions(mask)
        means = torch.einsum("nrc,nrhw->nchw", _region_means(maps, regions, valid), regions)
        return F.cosine_similarity(maps, means, dim=1)[:, None]

    squared = (similarity(student, student_mask) - similarity(teacher, teacher_mask)).square()
    return torch.where(valid, squared, 0.0).sum() / valid.sum().clamp(min=1)


@in_single_precision
def region_affinity(
    *, student: Tensor, teacher: Tensor, valid: Tensor, student_mask: Tensor, teacher_mask: Tensor
) -> Tensor:
    """Mean squared difference of the cosine between the means of two regions, over pairs of regions (EMKD).

    The region affinity, of lesion and background or of each two of K classes and background. The mean is over those
    pairs of all images whose two regions are in both masks; without such a pair the term is 0. Source: Qin et al., IEEE
    TMI 40, 2021; their code adds 1 to the count of a region's positions.

    Args:
        student: (N, C, h, w).
        teacher: (N, D, h, w).
        valid: (N, 1, h, w) bool.
        student_mask: (N, K, h, w).
        teacher_mask: (N, K, h, w).

    Example:
        >>> student, mask = torch.tensor([[[[3.0, 4.0]], [[4.0, 3.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
        >>> teacher, masks = torch.eye(2)[None, :, None], {"student_mask": mask, "teacher_mask": mask}
        >>> region_affinity(student=student, teacher=teacher, valid=mask >= 0, **masks)  # (24 / 25 - 0)^2
        tensor(0.9216)
    """

    def contrast(maps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        regions = _regions(mask)
        means, present = _region_means(maps, regions, valid), (regions * valid).sum(dim=(2, 3)) > 0
        pairs = list(combinations(range(regions.shape[1]), 2))
        cosines = [F.cosine_similarity(means[:, one], means[:, other], dim=1) for one, other in pairs]
        return torch.stack(cosines), torch.stack([present[:, one] & present[:, other] for one, other in pairs])

    student_values, student_has_both = contrast(student, student_mask)
    teacher_values, teacher_has_both = contrast(teacher, teacher_mask)
    has_both = (student_has_both & teacher_has_both).float()
    return ((student_values - teacher_values).square() * has_both).sum() / has_both.sum().clamp(min=1)


def _regions(mask: Tensor) -> Tensor:
    """Return the K classes of a mask (N, K, h, w) and the background: (N, K + 1, h, w)."""
    return torch.cat([mask, 1 - mask.sum(dim=1, keepdim=True)], dim=1)


def _region_means(maps: Tensor, regions: Tensor, valid: Tensor) -> Tensor:
    """Return the mean (N, R, C) of maps (N, C, h, w) over the valid positions of regions (N, R, h, w); 0 if none."""
    counted = regions * valid
    return torch.einsum("nchw,nrhw->nrc", maps, counted) / counted.sum(dim=(2, 3))[..., None].clamp(min=1)
