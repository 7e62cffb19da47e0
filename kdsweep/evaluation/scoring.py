"""What a trained network is worth: predictions of whole images, their scores, and a cell's last files."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pandas as pd
import torch
from torch import Tensor

from kdsweep.core.device import Compute
from kdsweep.data.loaders import EvalPart
from kdsweep.data.views import normalise
from kdsweep.evaluation import metrics
from kdsweep.models.unet import UNet
from kdsweep.runs import checkpoint, records
from kdsweep.training.learner import Learner

log = logging.getLogger(__name__)

SCORES, PREDICTIONS, HISTORY = "test_scores.csv", "test_predictions.npz", "history.csv"


def eval_batches(part: EvalPart, compute: Compute) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Normalised whole images under both views' names (they are the same here), with their masks."""
    for images, masks in part.batches(compute.eval_batch):
        ready = normalise(images.to(compute.device))
        yield {"strong": ready, "weak": ready}, masks.to(compute.device)


def predict(network: UNet, part: EvalPart, *, compute: Compute) -> Tensor:
    """Predictions (N, 1, H, W) bool of whole images on the CPU: probability above 0.5."""
    network.eval()
    with torch.no_grad(), compute.autocast():
        return torch.cat([(network(views["strong"]).logits > 0).cpu() for views, _ in eval_batches(part, compute)])


def score(predictions: Tensor, part: EvalPart) -> pd.DataFrame:
    """One row per image: image, label, dice, iou, precision, sensitivity, hd95_px (see metrics.py)."""
    table = pd.DataFrame(metrics.per_image(prediction=predictions, mask=part.masks))
    table.insert(0, "image", part.ids)
    table.insert(1, "label", part.labels)
    return table


def conclude(learner: Learner, *, part: EvalPart, compute: Compute) -> dict[str, float]:
    """Test the weights with the best validation loss and write all files; the marker of a finished cell comes last.

    Returns:
        The final values, ``test/dice`` among them.
    """
    learner.restore_best()
    predictions = predict(learner.network, part, compute=compute)
    table = score(predictions, part)
    values = {f"test/{name}": float(table[name].mean()) for name in metrics.SCORES}
    values["test/dice_std"] = float(table["dice"].std())
    values["test/trivial_dice"] = metrics.trivial_dice(part.masks)
    values |= {"best_epoch": float(learner.best_epoch), "epochs": float(learner.epoch + 1)}
    folder = learner.folder
    weights = f"{'teacher' if learner.role == 'teacher' else 'student'}.safetensors"
    checkpoint.save_network(folder / weights, learner.network)
    checkpoint.write_text(folder / HISTORY, pd.DataFrame(learner.history).to_csv(index=False))
    checkpoint.save_predictions(folder / PREDICTIONS, predictions[:, 0].numpy(), ids=part.ids)
    checkpoint.write_text(folder / SCORES, table.to_csv(index=False))
    learner.save_outcome()
    (folder / checkpoint.PREVIOUS).unlink(missing_ok=True)
    records.write_finished(folder, values=values, files=[weights, HISTORY, PREDICTIONS, SCORES, "split.json"])
    log.info(
        "%s: test Dice %.4f ± %.4f over %d images (best epoch %d of %d)",
        learner.title,
        values["test/dice"],
        values["test/dice_std"],
        len(table),
        learner.best_epoch + 1,
        learner.epoch + 1,
    )
    return values
