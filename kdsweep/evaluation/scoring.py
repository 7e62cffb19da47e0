"""Predictions of complete images by a trained network, and their scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kdsweep.core.device import Compute
from kdsweep.data.loaders import EvalPart
from kdsweep.data.views import normalize
from kdsweep.evaluation import metrics
from kdsweep.models.networks import Network


def eval_batches(part: EvalPart, compute: Compute) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield normalized complete images under both views' names (here they are the same), with their masks."""
    for images, masks in part.batches(compute.eval_batch):
        ready = normalize(images.to(compute.device))
        yield {"strong": ready, "weak": ready}, masks.to(compute.device)


def predict(network: Network, part: EvalPart, *, compute: Compute) -> Tensor:
    """Return predictions (N, 1, H, W) of complete images on the CPU, see ``metrics.predicted``."""
    network.eval()
    with torch.no_grad(), compute.autocast():
        batches = eval_batches(part, compute)
        return torch.cat([metrics.predicted(network(views["strong"]).logits).cpu() for views, _ in batches])


def score(predictions: Tensor, part: EvalPart, *, nsd_tolerance_px: float) -> pd.DataFrame:
    """Return one row per image: image, label, lesion_px (of the ground truth), predicted_px, then those of metrics.py.

    Behind the label comes the column group, where there are groups, and behind either number of pixels that of each
    class, where there are classes.
    """
    tolerance, names = nsd_tolerance_px, part.class_names
    scores = metrics.per_image(prediction=predictions, mask=part.masks, nsd_tolerance_px=tolerance, class_names=names)
    about: dict[str, Any] = {"image": part.ids, "label": part.labels}
    about |= {"group": part.groups} if part.groups else {}
    for column, maps in (("lesion_px", part.masks), ("predicted_px", predictions)):
        about[column] = _pixels(maps.bool())
        about |= {f"{column}_{name}": _pixels(maps == index) for index, name in enumerate(names, start=1)}
    return pd.DataFrame(about | scores)


def _pixels(region: Tensor) -> np.ndarray:
    return region.flatten(1).sum(dim=1).numpy()
