"""Figures from what MLflow holds: contours of several models on the same test images.

Usage: ``python -m kdsweep.figures --models Teacher_WAug,Student,L_KLD_WAug --out FILE [Hydra overrides of the sweep]``.
The overrides say which sweep, split and data set: images are read from the data set, MLflow never holds any.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from kdsweep import cells, checkpoint, tracking
from kdsweep.data import Images
from kdsweep.errors import InputError, exit_code
from kdsweep.tracking import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUTH, PREDICTION = "#00c853", "#ff1744"  # green and red, as in the paper's Figure 2
QUANTILES = {1: (0.5,), 2: (0.25, 0.75), 3: (0.25, 0.5, 0.75)}


def pick_images(dice: pd.Series, *, count: int) -> list[str]:
    """Ids of the images at even quantiles of a model's Dice, so that good and bad ones show alike.

    Args:
        dice: fractions by image id.
        count: 1 (the median image), 2 or 3 (quartiles).
    """
    ordered = dice.sort_values(kind="stable")
    return [str(ordered.index[round(q * (len(ordered) - 1))]) for q in QUANTILES[count]]


def draw_contours(
    *,
    images: dict[str, np.ndarray],
    masks: dict[str, np.ndarray],
    predictions: dict[str, dict[str, np.ndarray]],
    dice: dict[str, pd.Series],
    file: Path,
) -> None:
    """One row per image, one column per model: ground truth in green, prediction in red and dashed.

    Args:
        images: (H, W, 3) uint8 by image id; the rows.
        masks: (H, W) in {0, 1} by image id.
        predictions: (H, W) bool by model and image id; the columns.
        dice: fractions by model, each by image id.
        file: .png, .svg or .pdf.
    """
    columns = ["image", *predictions]
    figure, grid = plt.subplots(
        len(images), len(columns), figsize=(2.4 * len(columns), 2.55 * len(images)), squeeze=False, layout="constrained"
    )
    for row, (image_id, image) in zip(grid, images.items(), strict=True):
        for axes, model in zip(row, columns, strict=True):
            axes.imshow(image, interpolation="bicubic")
            axes.set_axis_off()
            if model == "image":
                axes.set_title(image_id, fontsize=10)
                continue
            _contour(axes, masks[image_id], color=TRUTH, style="-")
            _contour(axes, predictions[model][image_id], color=PREDICTION, style="--")
            axes.set_title(f"{model}: Dice {dice[model][image_id]:.2f}", fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _contour(axes: Axes, mask: np.ndarray, *, color: str, style: str) -> None:
    if mask.any() and not mask.all():
        axes.contour(mask.astype(float), levels=[0.5], colors=color, linestyles=style, linewidths=1.6)


def contours(
    sweep: Sweep, *, store: Path, uri: str | None, split: int, images: Images, models: list[str], count: int, file: Path
) -> None:
    """Draw models of a sweep on test images of one split, picked by the Dice of the last model.

    Args:
        sweep: as ``tracking.read_sweep`` gives it.
        store: folder of the runs.
        uri: of the MLflow server, or None for the file in the store.
        split: index of the random split.
        images: the data set that the sweep ran on.
        models: notations; the columns.
        count: how many images.
        file: .png, .svg or .pdf.

    Raises:
        InputError: the sweep has no finished run of a model.
    """
    runs = sweep.runs[(sweep.runs["status"] == "FINISHED") & (sweep.runs["split"] == split)]
    predictions, dice = {}, {}
    for model in models:
        own = runs[runs["notation"] == model]
        if own.empty:
            known = ", ".join(sorted(set(runs["notation"]))) or "none"
            raise InputError(f"--models {model}: not finished in sweep {sweep.name} split {split}; finished: {known}")
        run = own.iloc[0]
        found = tracking.artifact(store=store, uri=uri, run_id=run["run_id"], name="test_predictions.npz")
        predictions[model] = checkpoint.load_predictions(found)
        scores = sweep.scores[sweep.scores["fingerprint"] == run["fingerprint"]]
        dice[model] = scores.set_index("image")["dice"]
    place = {image_id: index for index, image_id in enumerate(images.ids)}
    chosen = pick_images(dice[models[-1]], count=count)
    draw_contours(
        images={i: images.eval_images[place[i]] for i in chosen},
        masks={i: images.eval_masks[place[i]] for i in chosen},
        predictions=predictions,
        dice=dice,
        file=file,
    )


def main(argv: list[str] | None = None) -> int:
    """Draw one figure; 0, or 1 after one line on stderr that says what to mend."""
    parser = argparse.ArgumentParser(prog="python -m kdsweep.figures", description="Contours of models on test images.")
    parser.add_argument("--models", default="Teacher_WAug,Student,L_KLD_WAug", help="notations, comma between them")
    parser.add_argument("--images", type=int, choices=sorted(QUANTILES), default=3, help="how many test images (3)")
    parser.add_argument("--out", type=Path, default=Path("contours.png"), help=".png, .svg or .pdf (contours.png)")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the sweep, such as profile=quick split=1")
    options = parser.parse_args(argv)
    mpl.use("Agg")

    def work() -> None:
        cfg = cells.compose(options.overrides)
        cells.check(cfg)
        store, uri = Path(cfg.store), cfg.tracking.uri
        contours(
            tracking.read_sweep(store=store, uri=uri, name=cfg.sweep_name),
            store=store,
            uri=uri,
            split=cfg.split,
            images=cells.images(cfg),
            models=options.models.split(","),
            count=options.images,
            file=options.out,
        )
        sys.stdout.write(f"wrote {options.out}\n")

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
