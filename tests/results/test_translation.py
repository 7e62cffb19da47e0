"""The same predictions by other publications' habits, computed a second time from masks."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_tables import FakeSweep, fingerprint, run_row
from torchmetrics.functional.segmentation import dice_score

from kdsweep.data.loaders import EvalPart
from kdsweep.evaluation import scoring
from kdsweep.results.table import Options
from kdsweep.results.tables import translation

NOTATIONS = ("Teacher", "Student", "L_MSE", "H_KLD")
COUNTS = {0: 5, 1: 8}  # images of each split


def maps_of(notation, split, classes):
    """Predictions and masks (N, 1, 16, 16) of lesions of unlike size."""
    random = torch.Generator().manual_seed(100 * NOTATIONS.index(notation) + split)
    sizes = torch.linspace(0.05, 0.9, COUNTS[split])[:, None, None, None]
    masks = torch.rand((COUNTS[split], 1, 16, 16), generator=random) < sizes
    flipped = torch.rand(masks.shape, generator=random) < 0.1 + 0.02 * NOTATIONS.index(notation)
    if not classes:
        return masks ^ flipped, masks.to(torch.uint8)
    kinds = torch.randint(1, 3, masks.shape, generator=random)
    return torch.where(flipped, 0, masks * kinds).to(torch.uint8), (masks * kinds).to(torch.uint8)


def sweep_of(classes=()):
    runs, scores = [], []
    params = {"data.classes": "{'a': 1, 'b': 2}"} if classes else {}
    for notation in NOTATIONS:
        for split in COUNTS:
            chosen = {"best_test_epoch_dice": 0.7 + 0.01 * split, "val_dice": 0.9 if notation == "H_KLD" else 0.5}
            runs.append(run_row(notation, split, **chosen, params=params))
            predictions, masks = maps_of(notation, split, classes)
            ids = [f"{split}-{i}" for i in range(len(masks))]
            images = torch.zeros(len(masks), 16, 16, 3)
            part = EvalPart(ids, ["b"] * len(masks), images, masks, class_names=classes)
            table = scoring.score(predictions, part, nsd_tolerance_px=2.0)
            scores.append(table.assign(fingerprint=fingerprint(notation, split)))
    return FakeSweep("s", pd.DataFrame(runs), pd.concat(scores))


@pytest.mark.parametrize("classes", [(), ("a", "b")])
def test_pooled_dice_is_torchmetrics_of_all_images_as_one(classes):
    sweep = sweep_of(classes)
    table = translation.numbers(sweep, classes).set_index("notation")
    for notation in NOTATIONS:
        expected = []
        for split in COUNTS:
            long = (maps.long().reshape(1, -1) for maps in maps_of(notation, split, classes))
            number = len(classes) or 1
            dice = dice_score(*long, num_classes=number + 1, include_background=False, input_format="index")
            expected.append(float(dice.mean()))
        mean = 100 * np.average(expected, weights=list(COUNTS.values()))
        assert table.loc[notation, "pooled_dice_percent"] == pytest.approx(mean, abs=1e-3)
        per_image = 100 * sweep.scores[sweep.scores["fingerprint"].str.startswith(f"{notation}-")]["dice"].mean()
        assert table.loc[notation, "mean_dice_percent"] == pytest.approx(per_image)
        assert table.loc[notation, "chosen_dice_percent"] == pytest.approx((5 * 70 + 8 * 71) / 13)
    assert table["pooled_points"].abs().max() > 0.5, "the habits differ"


def test_the_best_cell_leads_and_what_is_not_recorded_is_said(tmp_path):
    sweep = sweep_of()
    table = translation.make(sweep, Options(tmp_path))
    row = table.frame.set_index("notation").loc["H_KLD"]
    assert table.lead == [
        f"H_KLD, the best cell in validation: {row['mean_dice_percent']:.2f} % per image, "
        f"{row['pooled_dice_percent']:.2f} % with pixels pooled, {row['chosen_dice_percent']:.2f} % at the epoch that "
        "is best on the test images (wrong)."
    ]
    assert translation.applies(sweep, tmp_path)
    assert {"points by pooling", "points by the wrong epoch"} <= set(table.text())

    begun = replace(sweep, runs=sweep.runs.assign(status="RUNNING"), scores=sweep.scores.iloc[:0])
    table = translation.make(begun, Options(tmp_path))
    assert table.lead == []
    assert set(table.frame["gap"]) == {"running: split 0, 1"}
    assert table.frame[["mean_dice_percent", "pooled_dice_percent", "chosen_points"]].isna().all(axis=None)

    one = sweep.runs["best_test_epoch_dice"].where(sweep.runs["fingerprint"] != fingerprint("L_MSE", 1))
    mixed = translation.numbers(replace(sweep, runs=sweep.runs.assign(best_test_epoch_dice=one))).set_index("notation")
    assert mixed["chosen_dice_percent"].isna().to_dict() == {name: name == "L_MSE" for name in NOTATIONS}

    runs = sweep.runs.drop(columns="best_test_epoch_dice")
    earlier = replace(sweep, runs=runs, scores=sweep.scores.drop(columns="predicted_px"))
    assert not translation.applies(earlier, tmp_path)
    table = translation.make(earlier, Options(tmp_path))
    assert table.lead == [f"H_KLD, the best cell in validation: {row['mean_dice_percent']:.2f} % per image."]
    assert table.frame[["pooled_dice_percent", "chosen_dice_percent"]].isna().all(axis=None)
    assert sum("not recorded" in line for line in table.notes) == 2
