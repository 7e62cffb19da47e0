"""Strata from scores made here: members by hand, numbers by SciPy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel
from test_tables import DASH, dice_all, shown, sweep_of, with_status, written

from kdsweep.core.errors import InputError
from kdsweep.results import stats
from kdsweep.results.tables import command as tables
from kdsweep.results.tables import strata

NAMES = ("Teacher", "Student", "L_MSE", "H_MSE")


def with_lesions(sweep):
    """Every other image is malignant; areas fall from 36 x 10 px, image by image."""
    order = {image: number for number, image in enumerate(sorted(set(sweep.scores["image"])))}
    numbers = sweep.scores["image"].map(order)
    labels = np.where(numbers % 2 == 0, "benign", "malignant")
    return replace(sweep, scores=sweep.scores.assign(label=labels, lesion_px=10 * (36 - numbers), nsd=0.25))


def test_members_of_each_stratum():
    sweep = with_lesions(sweep_of(NAMES))
    strata_images = strata.members(sweep, images=set(sweep.scores["image"]))
    assert [(kind, name, len(images)) for (kind, name), images in strata_images.items()] == [
        ("label", "benign", 18),
        ("label", "malignant", 18),
        ("lesion size", "small (10 to 120 px)", 12),
        ("lesion size", "medium (130 to 240 px)", 12),
        ("lesion size", "large (250 to 360 px)", 12),
    ]
    assert strata_images["lesion size", "large (250 to 360 px)"][0] == "split0 image00"


def test_each_model_is_compared_with_student_on_the_images_of_the_stratum():
    table = strata.numbers(with_lesions(sweep_of(NAMES)))
    got = table[(table["stratum"] == "malignant")].set_index("notation")
    ours, student = (100 * dice_all(name)[1::2] for name in ("L_MSE", "Student"))
    assert got.loc["L_MSE", "mean_dice_percent"] == pytest.approx(ours.mean())
    assert got.loc["L_MSE", "difference_points"] == pytest.approx((ours - student).mean())
    assert got.loc["L_MSE", "p"] == pytest.approx(ttest_rel(ours, student).pvalue, rel=1e-6)
    assert got.loc["L_MSE", "mean_nsd_percent"] == 25
    assert got["n_images"].tolist() == [18] * 4
    assert got.loc[["L_MSE", "H_MSE"], "p_holm"].tolist() == pytest.approx(
        stats.holm(got.loc[["L_MSE", "H_MSE"], "p"]).tolist()
    )
    assert got.loc["Teacher", ["p_holm"]].isna().all()
    assert got.loc["Student", ["p", "difference_points"]].isna().all()


def test_a_missing_run_is_a_gap_in_every_stratum():
    table = strata.numbers(with_lesions(with_status(sweep_of(NAMES), "L_MSE", 1, "FAILED")))
    assert set(table.loc[table["notation"] == "L_MSE", "gap"]) == {"failed: split 1"}
    text = shown(strata, table).set_index("Model").loc["L_MSE"]
    assert set(text["DSC %"]) == {f"{DASH} (failed: split 1)"}


def test_scores_without_labels_and_areas_have_no_strata():
    sweep = sweep_of(NAMES)
    with pytest.raises(InputError, match="sweep study: its scores name neither labels nor the areas"):
        strata.numbers(replace(sweep, scores=sweep.scores.drop(columns="label")))
    assert "strata" not in tables.applicable(sweep, store=Path())


def test_the_table_of_strata_is_written(tmp_path):
    written("strata", with_lesions(sweep_of(NAMES)), tmp_path)
    text = (tmp_path / "strata.md").read_text(encoding="utf-8")
    assert "| label malignant" in text
    assert "over the KD cells of each stratum" in text
