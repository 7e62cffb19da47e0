"""Scores of each test image: Dice, IoU, precision, sensitivity, HD95, NSD.

Counts come from segmentation-models-pytorch, HD95 and NSD from MONAI. If either the prediction or the ground truth is
empty, the fractions are 0 and HD95 is the image diagonal, the worst possible. If both are empty the prediction is
perfect: fractions 1, HD95 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import Tensor

RATIOS = ("dice", "iou", "precision", "sensitivity")
SCORES = (*RATIOS, "hd95_px", "nsd")


def per_image(*, prediction: Tensor, mask: Tensor, nsd_tolerance_px: float) -> dict[str, np.ndarray]:
    """Return scores by name, one float per image: fractions 0 to 1, HD95 in pixels.

    Args:
        prediction: (N, 1, H, W) bool, probabilities thresholded at 0.5.
        mask: (N, 1, H, W), ground truth in {0, 1}.
        nsd_tolerance_px: how far a contour may be off in ``nsd``.
    """
    distances = {
        "hd95_px": hd95_px(prediction=prediction, mask=mask),
        "nsd": nsd(prediction=prediction, mask=mask, tolerance_px=nsd_tolerance_px),
    }
    return overlap(prediction=prediction, mask=mask) | distances


def overlap(*, prediction: Tensor, mask: Tensor) -> dict[str, np.ndarray]:
    """Return Dice, IoU, precision and sensitivity of each image; arguments as for ``per_image``."""
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

    Arguments as for ``per_image``. It is the image diagonal if one set is empty, and 0 if both are.
    """
    from monai.metrics import compute_hausdorff_distance  # takes seconds to import: only scoring pays for it

    worst = math.hypot(*mask.shape[2:])
    measure = partial(compute_hausdorff_distance, include_background=True, percentile=95)
    return _of_surfaces(measure, prediction=prediction, mask=mask, one_empty=worst, both_empty=0.0)


def nsd(*, prediction: Tensor, mask: Tensor, tolerance_px: float) -> np.ndarray:
    """Return the normalized surface Dice: the share of both contours within the tolerance of the other one.

    Arguments as for ``per_image``. It is 0 if one set is empty, and 1 if both are. Source: Nikolov et al., Clinically
    applicable segmentation of head and neck anatomy for radiotherapy, J. Med. Internet Res. 23, 2021; as in MONAI.
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


def trivial_dice(masks: Tensor) -> float:
    """Return the mean Dice of predicting lesion everywhere, which any learning must beat.

    Args:
        masks: (N, 1, H, W), ground truth in {0, 1}.
    """
    return float(overlap(prediction=torch.ones_like(masks), mask=masks)["dice"].mean())


def mean_dice(*, logits: Tensor, mask: Tensor) -> Tensor:
    """Return the mean Dice of predictions (logits > 0, so probability > 0.5) over images, on their device.

    Args:
        logits: (N, 1, H, W).
        mask: (N, 1, H, W), ground truth in {0, 1}.
    """
    prediction, truth = (logits > 0).flatten(1), mask.bool().flatten(1)
    total = prediction.sum(dim=1) + truth.sum(dim=1)
    dice = 2 * (prediction & truth).sum(dim=1) / total.clamp(min=1)
    return torch.where(total == 0, 1.0, dice).mean()
