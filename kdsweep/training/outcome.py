"""The end of a training: the best weights are tested, and all files of a finished cell are written."""

from __future__ import annotations

import logging
import math
import statistics

import pandas as pd

from kdsweep.config.grid import weights_file
from kdsweep.core.device import Compute
from kdsweep.core.files import write_text
from kdsweep.data.loaders import EvalPart
from kdsweep.evaluation import metrics
from kdsweep.evaluation.scoring import predict, score
from kdsweep.store import cell_folder, checkpoint
from kdsweep.store.cell_folder import HISTORY, PREDICTIONS, SCORES, SPLIT
from kdsweep.training.learner import Learner

log = logging.getLogger(__name__)


def finish(learner: Learner, *, part: EvalPart, compute: Compute) -> dict[str, float]:
    """Test the weights of the best epoch and write all files, the marker of a finished cell last.

    The outcome of the training is written before: a failed test costs no training, the next command tests again.

    Returns:
        The final values, ``test/dice`` among them.
    """
    folder, weights = learner.folder, weights_file(learner.role)
    learner.save_outcome()
    learner.restore_best()
    predictions = predict(learner.network, part, compute=compute)
    table = score(predictions, part, nsd_tolerance_px=learner.nsd_tolerance_px)
    values = _final_values(learner, table, part)
    checkpoint.save_network(folder / weights, learner.network)
    write_text(folder / HISTORY, pd.DataFrame(learner.history or {"epoch": []}).to_csv(index=False))
    checkpoint.save_predictions(folder / PREDICTIONS, predictions[:, 0].numpy(), ids=part.ids)
    write_text(folder / SCORES, table.to_csv(index=False))
    (folder / checkpoint.PREVIOUS).unlink(missing_ok=True)
    cell_folder.write_finished(folder, values=values, files=[weights, HISTORY, PREDICTIONS, SCORES, SPLIT])
    dice = f"test Dice {values['test/dice']:.4f} ± {values['test/dice_std']:.4f} over {len(part.ids)} images"
    best = f" (best epoch {learner.best_epoch + 1} of {learner.epoch + 1})" if learner.history else ""
    log.info("%s: %s%s", learner.title, dice, best)
    return values


def _final_values(learner: Learner, table: pd.DataFrame, part: EvalPart) -> dict[str, float]:
    of_classes = [f"{score}_{name}" for score in metrics.SCORES for name in part.class_names]
    means = table[[*metrics.SCORES, *of_classes]].mean().dropna()  # none of a class that no image shows
    values = {f"test/{name}": float(mean) for name, mean in means.items()}
    values["test/dice_std"] = float(table["dice"].std())
    values["test/trivial_dice"] = metrics.trivial_dice(part.masks, part.class_names)
    if not learner.history:  # it came trained
        return values
    values |= {"best_epoch": float(learner.best_epoch), "epochs": float(learner.epoch + 1)}
    trained = learner.history[: learner.best_epoch + 1]
    values["best/val_dice"] = trained[-1]["val/dice"]
    if all("test/dice_by_epoch" in row for row in learner.history):
        values["test/dice_of_best_test_epoch"] = max(row["test/dice_by_epoch"] for row in learner.history)
    if ratios := [ratio for row in trained if (ratio := row.get("train/kd_gradient_ratio"))]:
        values["kd/gradient_ratio"] = statistics.geometric_mean(ratios)
    if "train/kd_weight" in trained[-1]:
        values["kd/weight"] = trained[-1]["train/kd_weight"]
    return values


def end_trial(learner: Learner) -> dict[str, float]:
    """Save a trial that has had its last epoch; return the validation Dice of its best one."""
    learner.save() if learner.is_pruned else learner.save_outcome()
    return {"best/val_dice": learner.history[learner.best_epoch]["val/dice"] if learner.history else math.nan}
