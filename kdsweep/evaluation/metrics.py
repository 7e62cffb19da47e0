"""Scores of each test image: Dice, IoU, precision, sensitivity, HD95, NSD.

Counts come from segmentation-models-pytorch, HD95 and NSD from MONAI. If either the prediction or the ground truth is
empty, the fractions are 0 and HD95 is the image diagonal, the worst possible. If both are empty the prediction is
perfect: fractions 1, HD95 0.

Predictions and masks of K classes hold indices, 0 for background. Each class is scored by itself, and an image by the
mean over those classes that are in its prediction or its ground truth; an image without any is perfect.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import Tensor

RATIOS = ("dice", "iou", "precision", "sensitivity")
SCORES = (*RATIOS, "hd95_px", "nsd")


def predicted(logits: Tensor) -> Tensor:
    """Return the class of each pixel: (N, 1, H, W), on the logits' device.

    Args:
        logits: (N, 1, H, W): bool, probability above 0.5; or, of K classes, (N, K + 1, H, W): uint8, the most probable
            of background (0) and classes (1 to K), of equal ones the first.
    """
    if logits.shape[1] == 1:
        return logits > 0
    return logits.max(dim=1, keepdim=True).indices.to(torch.uint8)  # argmax takes 14 times as long on a CPU


def per_image(
    *, prediction: Tensor, mask: Tensor, nsd_tolerance_px: float, class_names: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Return scores by name, one float per image: fractions 0 to 1, HD95 in pixels.

    Args:
        prediction: (N, 1, H, W), see ``predicted``.
        mask: (N, 1, H, W), ground truth in {0, 1} or {0, ..., K}.
        nsd_tolerance_px: how far a contour may be off in ``nsd``.
        class_names: of K classes; the scores of each, such as ``dice_NAME``, come behind the means and are NaN for an
            image that has the class neither in its prediction nor in its ground truth.
    """
    measure = partial(_of_region, nsd_tolerance_px=nsd_tolerance_px)
    return _of_classes(measure, prediction=prediction, mask=mask, class_names=class_names)


def _of_region(*, prediction: Tensor, mask: Tensor, nsd_tolerance_px: float) -> dict[str, np.ndarray]:
    distances = {
        "hd95_px": hd95_px(prediction=prediction, mask=mask),
        "nsd": nsd(prediction=prediction, mask=mask, tolerance_px=nsd_tolerance_px),
    }
    return _overlap(prediction=prediction, mask=mask) | distances


def _of_classes(
    measure: Callable[..., dict[str, np.ndarray]], *, prediction: Tensor, mask: Tensor, class_names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the scores that ``measure`` gives: of the one class, or the means over classes and those of each."""
    if not class_names:
        return measure(prediction=prediction, mask=mask)
    regions = [(prediction == index, mask == index) for index in range(1, len(class_names) + 1)]
    is_present = np.stack([(one | other).flatten(1).any(dim=1).numpy(force=True) for one, other in regions])  # (K, N)
    by_class = [measure(prediction=one, mask=other) for one, other in regions]
    means: dict[str, np.ndarray] = {}
    parts: dict[str, np.ndarray] = {}
    for score in by_class[0]:
        values = np.stack([scores[score] for scores in by_class])
        sums = np.where(is_present, values, 0.0).sum(axis=0)
        # Without any class, each is empty in prediction and ground truth: the first one has the score of that.
        means[score] = np.where(is_present.any(axis=0), sums / is_present.sum(axis=0).clip(min=1), values[0])
        names = [f"{score}_{name}" for name in class_names]
        parts |= dict(zip(names, np.where(is_present, values, np.nan), strict=True))
    return means | parts


def overlap(*, prediction: Tensor, mask: Tensor, class_names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Return Dice, IoU, precision and sensitivity of each image; arguments and results as for ``per_image``."""
    return _of_classes(_overlap, prediction=prediction, mask=mask, class_names=class_names)


def _overlap(*, prediction: Tensor, mask: Tensor) -> dict[str, np.ndarray]:
    counts = smp.metrics.get_stats(prediction.long(), mask.long(), mode="binary")
    functions = (
        smp.metrics.f1_score,
        smp.metrics.iou_score,
        smp.metrics.precision,
        smp.metrics.sensitivity,
    )
    tp, fp, fn, _ = counts
    both_empty = (tp + fp + fn) == 0
    ratios = {}
    for name, function in zip(RATIOS, functions, strict=True):
        values = function(*counts, reduction="none", zero_division=0.0)
        ratios[name] = torch.where(both_empty, 1.0, values.double()).flatten().numpy(force=True)
    return ratios


def hd95_px(*, prediction: Tensor, mask: Tensor) -> np.ndarray:
    """Return the 95th percentile Hausdorff distance in pixels, the larger of the two directed ones (as MONAI does).

    Arguments as for ``per_image``, of one class. It is the image diagonal if one set is empty, and 0 if both are.
    """
    from monai.metrics import compute_hausdorff_distance  # takes seconds to import: only scoring pays for it

    worst = math.hypot(*mask.shape[2:])
    measure = partial(compute_hausdorff_distance, include_background=True, percentile=95)
    return _of_surfaces(measure, prediction=prediction, mask=mask, one_empty=worst, both_empty=0.0)


def nsd(*, prediction: Tensor, mask: Tensor, tolerance_px: float) -> np.ndarray:
    """Return the normalized surface Dice: the share of both contours within the tolerance of the other one.

    Arguments as for ``per_image``, of one class. It is 0 if one set is empty, and 1 if both are. Source: Nikolov et
    al., Clinically applicable segmentation of head and neck anatomy for radiotherapy, J. Med. Internet Res. 23, 2021;
    as in MONAI.
    """
    from monai.metrics import compute_surface_dice

    measure = partial(compute_surface_dice, class_thresholds=[tolerance_px], include_background=True)
    return _of_surfaces(measure, prediction=prediction, mask=mask, one_empty=0.0, both_empty=1.0)


def _of_surfaces(
    measure: Callable[[Tensor, Tensor], Tensor],
    *,
    prediction: Tensor,
    mask: Tensor,
    one_empty: float,
    both_empty: float,
) -> np.ndarray:
    prediction, mask = prediction.bool().cpu(), mask.bool().cpu()
    has_prediction, has_mask = prediction.flatten(1).any(dim=1), mask.flatten(1).any(dim=1)
    values = np.where((has_prediction | has_mask).numpy(), one_empty, both_empty)
    both = (has_prediction & has_mask).nonzero().flatten()
    if len(both):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI calls itself with an argument that it deprecates
            values[both.numpy()] = measure(prediction[both], mask[both]).flatten().numpy()
    return values


def trivial_dice(masks: Tensor, class_names: Sequence[str] = ()) -> float:
    """Return the mean Dice of predicting lesion everywhere, which any learning must beat.

    Of several classes the one whose prediction everywhere has the highest mean.

    Args:
        masks: (N, 1, H, W), ground truth in {0, 1} or {0, ..., K}.
        class_names: of K classes.
    """
    constant = (torch.full_like(masks, index) for index in range(1, max(len(class_names), 1) + 1))
    scores = (overlap(prediction=each, mask=masks, class_names=class_names) for each in constant)
    return max(float(score["dice"].mean()) for score in scores)


def mean_dice(*, logits: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over images of the Dice of ``predicted`` classes as ``per_image`` defines it, on their device.

    Args:
        logits: (N, 1, H, W) or, of K classes, (N, K + 1, H, W).
        mask: (N, 1, H, W), ground truth in {0, 1} or {0, ..., K}.
    """
    indices = torch.arange(1, max(logits.shape[1], 2), device=logits.device)[:, None]
    prediction, truth = (maps.flatten(2) == indices for maps in (predicted(logits), mask))  # (N, K, pixels)
    total = prediction.sum(dim=2) + truth.sum(dim=2)
    dice = 2 * (prediction & truth).sum(dim=2) / total.clamp(min=1)
    is_present = total > 0
    mean = (dice * is_present).sum(dim=1) / is_present.sum(dim=1).clamp(min=1)
    return torch.where(is_present.any(dim=1), mean, 1.0).mean()
