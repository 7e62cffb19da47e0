"""Scores of each test image: Dice, IoU, precision, sensitivity, HD95.

Counts come from segmentation-models-pytorch, HD95 from MONAI. If either the prediction or the ground truth is empty,
Dice, IoU, precision and sensitivity are 0 and HD95 is the image diagonal, the worst possible. If both are empty the
prediction is perfect: 1, 1, 1, 1 and 0.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import Tensor

RATIOS = ("dice", "iou", "precision", "sensitivity")
SCORES = (*RATIOS, "hd95_px")


def per_image(*, prediction: Tensor, mask: Tensor) -> dict[str, np.ndarray]:
    """Return scores by name, one float per image: fractions 0 to 1, HD95 in pixels.

    Args:
        prediction: (N, 1, H, W) bool, probabilities thresholded at 0.5.
        mask: (N, 1, H, W), ground truth in {0, 1}.
    """
    ratios = overlap(prediction=prediction, mask=mask)
    return {**ratios, "hd95_px": hd95_px(prediction=prediction, mask=mask)}


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

    prediction, mask = prediction.bool().cpu(), mask.bool().cpu()
    has_prediction, has_mask = prediction.flatten(1).any(dim=1), mask.flatten(1).any(dim=1)
    distances = np.where((has_prediction | has_mask).numpy(), math.hypot(*mask.shape[2:]), 0.0)
    both = (has_prediction & has_mask).nonzero().flatten()
    if len(both):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI's own calls use an argument that it deprecates
            found = compute_hausdorff_distance(prediction[both], mask[both], include_background=True, percentile=95)
        distances[both.numpy()] = found.flatten().numpy()
    return distances


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
