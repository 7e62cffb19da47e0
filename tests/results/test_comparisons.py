"""Settings against each other and seeds against cells, from scores made here, computed a second time by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel, wilcoxon
from test_tables import (
    DASH,
    FakeSweep,
    dice_all,
    dice_of,
    fingerprint,
    interval_of,
    rates,
    run_row,
    score_rows,
    shown,
    sweep_of,
    written,
)

from kdsweep.core.errors import InputError
from kdsweep.results import notes as footnotes
from kdsweep.results import stats
from kdsweep.results.table import Options
from kdsweep.results.tables import command as tables
from kdsweep.results.tables import seeds, settings

CELLS = ("L_MSE", "H_KLD_WAug")


def aligned(shift=0.05, noise=0.02, notations=("Student", *CELLS)):
    """Two alignments; the second one's cells lead by the shift, and a little more or less in each image."""
    sweep = rates({"none": 0.0, "warp": shift}, key="kd.align", notations=("Teacher", "Teacher_WAug", *notations))
    students = sweep.runs[sweep.runs["notation"] == "Student"]
    sweep = replace(sweep, runs=sweep.runs.drop(students[students["fingerprint"].str.endswith("-warp")].index))
    scores = sweep.scores[sweep.scores["fingerprint"].isin(sweep.runs["fingerprint"])].copy()
    moved = scores["fingerprint"].str.endswith("-warp")
    scores.loc[moved, "dice"] += np.random.default_rng(3).normal(0, noise, moved.sum())
    return replace(sweep, scores=scores)


def scores_of(sweep, notation, setting):
    names = [f"{fingerprint(notation, split)}-{setting}" for split in (0, 1, 2)]
    return np.concatenate([sweep.scores.loc[sweep.scores["fingerprint"] == name, "dice"] for name in names])


def of_seeds(means, splits=(0, 1)):
    """Cells whose mean Dice (%) at each seed is given, the same in each split."""
    places = [(name, split, seed) for name in means for split in splits for seed in range(len(means[name]))]
    runs = [run_row(*place, teacher=fingerprint("Teacher", place[1])) for place in places]
    spread = np.array([-0.1, 0.1])
    scores = [score_rows(*place, dice=means[place[0]][place[2]] / 100 + spread) for place in places]
    teachers = [run_row("Teacher", split) for split in splits]
    scores += [score_rows("Teacher", split, dice=0.8 + spread) for split in splits]
    return FakeSweep("seeds", pd.DataFrame([*runs, *teachers]), pd.concat(scores, ignore_index=True))


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("test", "reference"), [("ttest", ttest_rel), ("wilcoxon", wilcoxon)])
def test_each_cell_and_all_together_are_paired_over_the_same_images(test, reference):
    sweep = aligned()
    table = settings.numbers(sweep, test=test)
    assert table["notation"].tolist() == [*CELLS, "all cells"]  # the Student is one run for both: nothing to compare
    assert set(zip(table["settings"], table["against"], strict=True)) == {("kd.align=warp", "kd.align=none")}
    pairs = {name: (scores_of(sweep, name, "warp"), scores_of(sweep, name, "none")) for name in CELLS}
    pairs["all cells"] = tuple(sum(pairs[name][side] for name in CELLS) / 2 for side in (0, 1))
    for row, (ours, base) in zip(table.to_dict("records"), pairs.values(), strict=True):
        points = 100 * (ours - base)
        assert row["mean_dice_percent"] == pytest.approx(100 * ours.mean())
        assert row["against_mean_dice_percent"] == pytest.approx(100 * base.mean())
        assert row["difference_points"] == pytest.approx(points.mean())
        assert row["p"] == pytest.approx(reference(ours, base).pvalue, rel=1e-6)
        assert (row["low_points"], row["high_points"]) == pytest.approx(tuple(interval_of(points)))
        assert row["n_images"] == 36
    assert table["p_holm"].tolist()[:2] == pytest.approx(stats.holm(table["p"][:2]).tolist())
    assert table["p_holm"][2] == table["p"][2]  # a family of its own


def test_what_a_varied_key_changes_is_told():
    line, methods = settings.sentences(settings.numbers(aligned()))
    assert methods == "kd.align=warp against kd.align=none, these methods: unknown, that takes several seeds."
    assert line.startswith("kd.align=warp against kd.align=none, these networks: a difference is shown (+")
    assert ") points over all cells, p " in line
    assert "; single cells that differ: L_MSE by +" in line
    line, _ = settings.sentences(settings.numbers(aligned(shift=0.0, noise=0.05)))
    assert ": no difference is shown (" in line
    assert line.endswith("no single cell differs.")


def test_a_student_that_the_key_concerns_has_a_row_and_is_no_cell():
    table = settings.numbers(rates({"1": 0.0, "2": -0.1}, notations=("Teacher", "Student", "L_MSE")))
    assert table["notation"].tolist() == ["L_MSE", "Student", "all cells"]
    assert table["difference_points"].tolist() == pytest.approx([-10, -10, -10])
    assert set(table["settings"]) == {"train.lr=2"}


def test_each_value_stands_against_the_first():
    table = settings.numbers(rates({"1": 0.0, "2": 0.1, "10": 0.3}, notations=("Teacher", "L_MSE")))
    assert table["settings"].tolist() == ["train.lr=2"] * 2 + ["train.lr=10"] * 2
    assert table["difference_points"].tolist() == pytest.approx([10, 10, 30, 30])


def test_a_missing_run_is_a_gap_and_all_cells_are_never_fewer():
    sweep = aligned()
    gone = sweep.runs["fingerprint"] == f"{fingerprint('L_MSE', 1)}-warp"
    sweep = replace(sweep, runs=sweep.runs.assign(status=sweep.runs["status"].mask(gone, "FAILED")))
    table = settings.numbers(sweep).set_index("notation")
    assert table["gap"].tolist() == ["failed: split 1", "", "needs L_MSE"]
    assert np.isnan(table.loc["all cells", "difference_points"])
    text = shown(settings, table.reset_index())
    assert text["DSC %"].tolist()[0] == f"{DASH} (failed: split 1)"
    assert text["n images"].tolist() == [DASH, "36", DASH]
    line, _ = settings.sentences(table.reset_index())
    assert "unknown over all cells, it needs L_MSE" in line


def test_a_cell_that_one_setting_alone_asked_for_is_a_gap():
    sweep = aligned()
    gone = sweep.runs["fingerprint"].str.startswith("L_MSE-") & sweep.runs["fingerprint"].str.endswith("-warp")
    table = settings.numbers(replace(sweep, runs=sweep.runs[~gone])).set_index("notation")
    assert table["gap"].to_dict() == {"L_MSE": "not run", "H_KLD_WAug": "", "all cells": "needs L_MSE"}


def test_a_sweep_without_further_keys_has_nothing_to_compare(tmp_path):
    with pytest.raises(InputError, match=r"sweep study varies no key beyond its factors"):
        settings.numbers(sweep_of())
    assert tables.applicable(sweep_of(), store=Path()) == ["effects", "table3", "table4", "table5"]
    assert tables.applicable(aligned(), store=Path()) == ["effects", "settings", "table3", "table4", "table5"]
    mixed = replace(aligned(), varied=())
    assert "settings" not in tables.applicable(
        replace(mixed, runs=mixed.runs.assign(variant=[{}] * len(mixed.runs))), store=Path()
    )


def test_the_table_of_settings_is_written(tmp_path):
    written("settings", aligned(), tmp_path)
    back = pd.read_csv(tmp_path / "settings.csv").set_index("notation")
    ours, base = (np.concatenate([scores_of(aligned(), "L_MSE", setting)]) for setting in ("warp", "none"))
    assert back.loc["L_MSE", "difference_points"] == pytest.approx(100 * (ours - base).mean())
    assert back.loc["L_MSE", "test"] == "ttest"
    assert "against kd.align=none, these networks: a difference is shown" in (tmp_path / "settings.md").read_text(
        encoding="utf-8"
    )


# ---- seeds ---------------------------------------------------------------------------------------------------------


def test_spread_between_seeds_by_hand():
    table = seeds.numbers(of_seeds({"L_MSE": (60, 62, 64), "H_KLD": (70, 71, 72)}))
    assert table["notation"].tolist() == ["H_KLD", "L_MSE"]  # the best first
    assert table[[f"mean_dice_percent_seed{seed}" for seed in range(3)]].to_numpy().tolist() == [
        pytest.approx([70, 71, 72]),
        pytest.approx([60, 62, 64]),
    ]
    assert table["mean_dice_percent"].tolist() == pytest.approx([71, 62])
    assert table["std_dice_percent_seeds"].tolist() == pytest.approx([1, 2])
    assert table["to_best_points"].tolist() == pytest.approx([0, -9])
    # s^2 = (1 + 4) / 2; 1.96 sqrt(2) sqrt(2.5) = 4.3827
    assert seeds.repeatability_points(table) == pytest.approx(4.3827, abs=1e-4)


def test_a_seeds_mean_is_over_the_images_of_all_splits():
    table = seeds.numbers(sweep_of(("Teacher", "L_MSE", "Student"), seeds=(0, 1))).set_index("notation")
    assert table.loc["L_MSE", "mean_dice_percent_seed0"] == pytest.approx(100 * dice_all("L_MSE").mean())
    by_hand = np.mean([100 * dice_of("L_MSE", split, 1).mean() for split in range(3)])
    assert table.loc["L_MSE", "mean_dice_percent_seed1"] == pytest.approx(by_hand)
    assert set(table.index) == {"L_MSE", "Student"}  # no Teacher


def test_what_seeds_tell_about_cells():
    near = seeds.numbers(of_seeds({"L_MSE": (60, 62, 64), "H_KLD": (61, 61.5, 65), "Student": (40, 42, 44)}))
    lines = seeds.sentences(near)
    # s^2 = (4 + 4.75 + 4) / 3
    assert lines[0].startswith("Two trainings of one cell with other seeds differ by less than 5.71 points in 95 %")
    assert "2.06 points, the standard deviation between 3 seeds, pooled over 3 models" in lines[0]
    assert lines[1] == "H_KLD is 0.50 points above L_MSE on average, and above it in 2 of 3 seeds."
    assert lines[2:] == ["No further from it than seeds alone make: L_MSE.", "Further: Student."]


def test_a_cell_without_one_of_the_seeds_is_a_gap():
    sweep = of_seeds({"L_MSE": (60, 62), "H_KLD": (70, 71)})
    gone = (sweep.runs["notation"] == "H_KLD") & (sweep.runs["seed"] == 1) & (sweep.runs["split"] == 1)
    sweep = replace(sweep, runs=sweep.runs.assign(status=sweep.runs["status"].mask(gone, "KILLED")))
    table = seeds.numbers(sweep)
    assert table["notation"].tolist() == ["L_MSE", "H_KLD"]
    assert table["gap"].tolist() == ["", "killed: split 1 seed 1"]
    assert table.loc[1, ["mean_dice_percent_seed0", "mean_dice_percent", "to_best_points"]].isna().all()
    assert f"{DASH} (killed: split 1 seed 1)" in shown(seeds, table)["DSC % of seed 0, 1"].tolist()
    assert "H_KLD (killed: split 1 seed 1)" in footnotes.gaps(table)[0]


def test_seeds_of_each_setting_stand_for_themselves():
    table = seeds.numbers(rates({"1": 0.0, "2": 0.1}, notations=("Teacher", "L_MSE"), seeds=(0, 1)))
    assert table["settings"].tolist() == ["train.lr=1", "train.lr=2"]
    assert table["to_best_points"].tolist() == [0, 0]
    assert [line.partition(": ")[0] for line in seeds.sentences(table)] == ["With train.lr=1", "With train.lr=2"]


def test_one_seed_has_no_spread():
    with pytest.raises(InputError, match=r"sweep study has one seed, so no spread: run its cells with seed=0,1,2"):
        seeds.make(sweep_of(), Options(Path()))


def test_the_table_of_seeds_is_written(tmp_path):
    sweep = of_seeds({"L_MSE": (60, 62, 64), "H_KLD": (70, 71, 72)})
    assert tables.applicable(sweep, store=Path()) == ["effects", "seeds", "table3", "table4", "table5"]
    text = written("seeds", sweep, tmp_path)
    assert "| H_KLD   | 70.00 / 71.00 / 72.00 " in text
    assert "Two trainings of one cell with other seeds differ by less than 4.38 points" in text
    assert pd.read_csv(tmp_path / "seeds.csv")["std_dice_percent_seeds"].tolist() == pytest.approx([1, 2])
