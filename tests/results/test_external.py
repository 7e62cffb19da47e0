"""The table of other data sets, from scores made here: drop, order and what distillation is worth there."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr, ttest_rel
from test_tables import ALL, FakeSweep, dice_all, fingerprint, run_row, score_rows

from kdsweep.results import paper, stats
from kdsweep.results.table import Options
from kdsweep.results.tables import external

CLINIC = 30  # images


def outside_of(notation):
    """Scores on the clinic's images: the paths L and H in reverse order, HReg far above the Student."""
    order = 0.2 if notation.startswith("HReg") else -0.01 * ALL.index(notation)
    noise = np.random.default_rng(ALL.index(notation)).uniform(0, 0.05, CLINIC)
    return np.random.default_rng(99).uniform(0.3, 0.6, CLINIC) + order + noise


def external_rows(name, notation, split):
    images = [f"{name}{i:02d}" for i in range(CLINIC)]
    rows = pd.DataFrame({"image": images, "dice": outside_of(notation)})
    return rows.assign(fingerprint=fingerprint(notation, split), data_set=f"{name}-0123abcd")


@pytest.fixture(scope="module")
def sweep():
    places = [(notation, split) for notation in ALL for split in (0, 1, 2)]
    dice = {"H_KLD": 0.9}
    runs = pd.DataFrame([run_row(*place, val_dice=dice.get(place[0], 0.6)) for place in places])
    scores = pd.concat([score_rows(*place) for place in places])
    parts = [external_rows(name, *place) for name in ("clinic", "other") for place in places]
    return FakeSweep("s", runs, scores, external=pd.concat(parts))


def test_three_sentences_say_drop_order_and_worth(sweep, tmp_path):
    table = external.make(sweep, Options(tmp_path))
    rows = table.frame[table.frame["data_set"] == "clinic"].set_index("notation")
    best = rows.loc["H_KLD"]
    assert best["internal_dice_percent"] == pytest.approx(100 * dice_all("H_KLD").mean())
    assert best["drop_points"] == pytest.approx(100 * (outside_of("H_KLD").mean() - dice_all("H_KLD").mean()))

    names = paper.students(ALL)
    inside, outside = ([of(name).mean() for name in names] for of in (dice_all, outside_of))
    expected = spearmanr(inside, outside).statistic
    assert rows["rank_correlation"].tolist() == pytest.approx([expected] * len(rows))

    p_values = pd.Series({n: ttest_rel(outside_of(n), outside_of("Student")).pvalue for n in paper.CELLS})
    corrected = stats.holm(p_values)
    for name in paper.CELLS:
        difference = 100 * (outside_of(name) - outside_of("Student")).mean()
        assert rows.loc[name, "student_difference_points"] == pytest.approx(difference)
        assert rows.loc[name, "student_p_holm"] == pytest.approx(corrected[name], rel=1e-6, abs=0)
    assert rows.loc[["Teacher", "Student"], "student_p_holm"].isna().all()

    higher, lower = (
        sum(corrected[n] < 0.05 and sign * rows.loc[n, "student_difference_points"] > 0 for n in paper.CELLS)
        for sign in (1, -1)
    )
    assert higher == 4
    assert lower > 2
    drop, order, worth = table.lead
    assert drop.startswith(f"Drop: H_KLD, the best cell in validation, has {best['internal_dice_percent']:.2f} %")
    assert (
        f"{best['drop_points']:+.2f} ({best['low_points']:+.2f} to {best['high_points']:+.2f}) on clinic and " in drop
    )
    assert drop.endswith("on other.")
    assert f"is {expected:.2f} (" in order
    assert f"4 of 12 cells score higher than Student and {lower} lower on clinic and 4 of 12" in worth
    assert max(map(len, table.screen("title", width=100).splitlines())) <= 100


def test_a_network_that_was_not_scored_is_a_gap_that_the_notes_name(sweep, tmp_path):
    kept = sweep.external["fingerprint"] != fingerprint("L_MSE", 1)
    table = external.make(replace(sweep, external=sweep.external[kept]), Options(tmp_path))
    row = table.frame[(table.frame["data_set"] == "other") & (table.frame["notation"] == "L_MSE")].iloc[0]
    assert row["gap"] == "not scored: split 1"
    assert row[["drop_points", "student_difference_points", "student_p_holm"]].isna().all()
    assert any("L_MSE (not scored: split 1)" in line for line in table.notes)
    assert "of 11 cells" in table.lead[2]


def test_a_gap_is_named_once_for_all_data_sets(sweep, tmp_path):
    runs = sweep.runs.assign(status=sweep.runs["status"].mask(sweep.runs["notation"] == "H_MSE", "RUNNING"))
    (line,) = [line for line in external.make(replace(sweep, runs=runs), Options(tmp_path)).notes if "Gaps" in line]
    assert line.count("H_MSE") == 1


def test_a_sweep_without_student_or_cells_still_has_its_drops(sweep, tmp_path):
    is_teacher = sweep.runs["role"] == "teacher"
    table = external.make(replace(sweep, runs=sweep.runs[is_teacher]), Options(tmp_path))
    assert set(table.frame["notation"]) == {"Teacher", "Teacher_WAug"}
    assert table.frame["drop_points"].notna().all()
    assert table.lead == []
