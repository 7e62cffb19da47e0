"""Effects of the factors from scores made here: every number is computed a second time, by hand or by SciPy."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp, wilcoxon
from test_tables import (
    DASH,
    FakeSweep,
    changed,
    dice_all,
    dice_of,
    interval_of,
    run_row,
    score_rows,
    shown,
    sweep_of,
    with_dice,
    with_status,
    without,
)

from kdsweep.core.errors import InputError
from kdsweep.results import paper, stats
from kdsweep.results.tables import effects

COLUMNS = [
    *("effect", "kind", "factor", "difference_points", "low_points", "high_points", "p", "p_holm"),
    *("methods_low_points", "methods_high_points", "p_methods", "p_methods_holm", "p_runs"),
    *("detectable_points", "methods_detectable_points", "images_detectable_points", "n_images", "gap"),
]
MAIN = ["H - L", "HReg - L", "HReg - H", "KLD - MSE", "weak - strong"]
INTERACTIONS = {
    "(KLD - MSE) x (weak - strong)": "loss x teacher augmentation",
    "(H - L) x (KLD - MSE)": "path x loss",
    "(HReg - L) x (KLD - MSE)": "path x loss",
    "(HReg - H) x (KLD - MSE)": "path x loss",
    "(H - L) x (weak - strong)": "path x teacher augmentation",
    "(HReg - L) x (weak - strong)": "path x teacher augmentation",
    "(HReg - H) x (weak - strong)": "path x teacher augmentation",
}
H = ["H_MSE", "H_MSE_WAug", "H_KLD", "H_KLD_WAug"]
L = ["L_MSE", "L_MSE_WAug", "L_KLD", "L_KLD_WAug"]
KLD = ["L_KLD", "L_KLD_WAug", "H_KLD", "H_KLD_WAug", "HReg_KLD", "HReg_KLD_WAug"]
MSE = ["L_MSE", "L_MSE_WAug", "H_MSE", "H_MSE_WAug", "HReg_MSE", "HReg_MSE_WAug"]
WEAK = ["L_MSE_WAug", "L_KLD_WAug", "H_MSE_WAug", "H_KLD_WAug", "HReg_MSE_WAug", "HReg_KLD_WAug"]
STRONG = ["L_MSE", "L_KLD", "H_MSE", "H_KLD", "HReg_MSE", "HReg_KLD"]


def mean_of(*cells, dice=dice_all):
    return sum(100 * dice(cell) for cell in cells) / len(cells)


def two_images(**points):
    """A sweep of two images in one split: 50 % everywhere, plus the points of a cell in the first and second image."""
    base = sweep_of(paper.CELLS, splits=(0,))
    for cell in paper.CELLS:
        base = with_dice(base, cell, 0, 0.5 + np.array(points.get(cell, (0, 0))) / 100)
    return base


def row(table, effect):
    return table.set_index("effect").loc[effect]


def row_of(effect="KLD - MSE", factor="loss", **changes):
    numbers = {"difference_points": 1.2, "low_points": 0.3, "high_points": 2.1, "p": 0.004, "p_holm": 0.012}
    numbers |= dict.fromkeys(["methods_low_points", "methods_high_points", "p_methods", "p_methods_holm"], np.nan)
    kind = "interaction" if " x " in factor else "main"
    return {"effect": effect, "kind": kind, "factor": factor} | numbers | {"n_images": 36, "gap": ""} | changes


def said(*rows):
    return effects.sentences(pd.DataFrame(rows))[2]  # the factor loss, these networks


@pytest.fixture(scope="module")
def sweep():
    return sweep_of()


@pytest.fixture(scope="module")
def table(sweep):
    return effects.numbers(sweep)


# ---- the numbers ---------------------------------------------------------------------------------------------------


def test_rows_and_columns(table):
    assert table.columns.tolist() == COLUMNS
    assert table["effect"].tolist() == [*MAIN, *INTERACTIONS]
    assert table["kind"].tolist() == ["main"] * 5 + ["interaction"] * 7
    assert table["factor"].tolist() == ["path"] * 3 + ["loss", "teacher augmentation", *INTERACTIONS.values()]
    assert table["n_images"].tolist() == [36] * 12
    assert table["gap"].tolist() == [""] * 12


@pytest.mark.parametrize(
    ("effect", "plus", "minus"), [("H - L", H, L), ("KLD - MSE", KLD, MSE), ("weak - strong", WEAK, STRONG)]
)
def test_main_effects_are_those_of_hand_written_means(sweep, table, effect, plus, minus):
    points = mean_of(*plus) - mean_of(*minus)
    got = row(table, effect)
    assert got["difference_points"] == pytest.approx(points.mean())
    assert got["p"] == pytest.approx(ttest_1samp(points, 0).pvalue, rel=1e-6)
    assert got[["low_points", "high_points"]].tolist() == pytest.approx(interval_of(points))
    by_ranks = row(effects.numbers(sweep, test="wilcoxon"), effect)
    assert by_ranks["p"] == pytest.approx(wilcoxon(points).pvalue, rel=1e-6)


def test_an_interaction_is_half_the_difference_of_the_simple_effects(table):
    with_kld = mean_of("H_KLD", "H_KLD_WAug") - mean_of("L_KLD", "L_KLD_WAug")
    with_mse = mean_of("H_MSE", "H_MSE_WAug") - mean_of("L_MSE", "L_MSE_WAug")
    points = (with_kld - with_mse) / 2
    got = row(table, "(H - L) x (KLD - MSE)")
    assert got["difference_points"] == pytest.approx(points.mean())
    assert got["p"] == pytest.approx(ttest_1samp(points, 0).pvalue, rel=1e-6)
    under_weak = mean_of(*set(KLD) & set(WEAK)) - mean_of(*set(MSE) & set(WEAK))
    under_strong = mean_of(*set(KLD) & set(STRONG)) - mean_of(*set(MSE) & set(STRONG))
    points = (under_weak - under_strong) / 2
    assert row(table, "(KLD - MSE) x (weak - strong)")["difference_points"] == pytest.approx(points.mean())


def test_holm_knows_two_families(table):
    for kind, size in (("main", 5), ("interaction", 7)):
        family = table[table["kind"] == kind].sort_values("p")
        by_hand = np.maximum.accumulate(family["p"].to_numpy() * np.arange(size, 0, -1)).clip(max=1)
        assert family["p_holm"].tolist() == pytest.approx(by_hand.tolist(), rel=1e-9, abs=0)


def test_two_images_by_hand():
    """One cell leads by 12 and 24 points: 1/6 of it per factor of six cells a side, 1/4 per path of four."""
    got = effects.numbers(two_images(H_KLD_WAug=(12, 24))).set_index("effect")["difference_points"]
    expected = {"H - L": 4.5, "HReg - L": 0, "HReg - H": -4.5, "KLD - MSE": 3, "weak - strong": 3}
    expected |= {"(KLD - MSE) x (weak - strong)": 3, "(H - L) x (KLD - MSE)": 4.5, "(HReg - H) x (weak - strong)": -4.5}
    for effect, points in expected.items():
        assert got[effect] == pytest.approx(points, abs=1e-9), effect


def additive(path, loss, aug):
    """Each factor adds to each image what depends on the image, no two of them together."""
    lead = np.random.default_rng(5).normal(0.02, 0.01, (4, 12))
    return 0.5 + {"L": 0 * lead[0], "H": lead[0], "HReg": lead[1]}[path] + (loss == "KLD") * lead[2] - aug * lead[3]


def test_additive_scores_have_no_interaction():
    sweep = sweep_of(paper.CELLS, splits=(0,))
    for path in ("L", "H", "HReg"):
        for loss in ("MSE", "KLD"):
            sweep = with_dice(sweep, f"{path}_{loss}", 0, additive(path, loss, aug=0))
            sweep = with_dice(sweep, f"{path}_{loss}_WAug", 0, additive(path, loss, aug=1))
    table = effects.numbers(sweep)
    interactions = table[table["kind"] == "interaction"]
    assert interactions["difference_points"].tolist() == pytest.approx([0] * 7, abs=1e-12)
    assert interactions["p"].tolist() == [1] * 7
    lead = 100 * np.random.default_rng(5).normal(0.02, 0.01, (4, 12))
    main = [lead[0], lead[1], lead[1] - lead[0], lead[2], -lead[3]]
    assert table["difference_points"].tolist()[:5] == pytest.approx([points.mean() for points in main])
    assert table["p"].tolist()[:5] == pytest.approx([ttest_1samp(points, 0).pvalue for points in main], rel=1e-6)
    assert not any("depends" in sentence for sentence in effects.sentences(table))


def test_order_of_the_records_changes_no_digit(sweep, table):
    shuffled = replace(sweep, runs=sweep.runs.sample(frac=1, random_state=1), scores=sweep.scores[::-1])
    pd.testing.assert_frame_equal(effects.numbers(shuffled), table, check_exact=True)


def test_other_cells_change_no_number_and_are_named(sweep, table):
    extra = [
        run_row("Student", split, fingerprint=f"own{split}", role="distilled", notation="Mine_KLD")
        for split in range(3)
    ]
    scores = [score_rows("Student", split).assign(fingerprint=f"own{split}", dice=0.1) for split in range(3)]
    more = FakeSweep(
        "study", pd.concat([sweep.runs, pd.DataFrame(extra)], ignore_index=True), pd.concat([sweep.scores, *scores])
    )
    pd.testing.assert_frame_equal(effects.numbers(more), table, check_exact=True)
    left_out = "Left out, not of the 12 cells: Mine_KLD, Student, Teacher, Teacher_WAug."
    assert left_out in effects.footnotes(more, table, test="ttest")
    bare = effects.footnotes(sweep_of(paper.CELLS), table, test="ttest")
    assert not any("Left out" in note for note in bare)


def test_an_image_that_several_splits_and_seeds_test_is_one_cluster():
    sweep = sweep_of(paper.CELLS, splits=(0, 1), seeds=(0, 7))
    sweep = replace(
        sweep, scores=sweep.scores.assign(image=sweep.scores["image"].str.replace(r"split\d ", "", regex=True))
    )
    got = row(effects.numbers(sweep), "H - L")
    places = [(split, seed) for split in (0, 1) for seed in (0, 7)]
    points = np.array(
        [
            mean_of(*H, dice=lambda c, p=p: dice_of(c, *p)) - mean_of(*L, dice=lambda c, p=p: dice_of(c, *p))
            for p in places
        ]
    )
    assert (got["n_images"], got["difference_points"]) == (12, pytest.approx(points.mean()))
    assert got["p"] == pytest.approx(ttest_1samp(points.mean(axis=0), 0).pvalue, rel=1e-6)


# ---- gaps and refusals ---------------------------------------------------------------------------------------------


def test_a_gap_leaves_only_what_does_not_need_the_cell(sweep, table):
    gappy = with_status(sweep, "HReg_KLD", 1, "FAILED")
    got = effects.numbers(gappy)
    complete = ["H - L", "(H - L) x (KLD - MSE)", "(H - L) x (weak - strong)"]
    assert got.loc[got["gap"] == "", "effect"].tolist() == complete
    numbers = COLUMNS[3:7]
    pd.testing.assert_frame_equal(
        got.set_index("effect").loc[complete, numbers],
        table.set_index("effect").loc[complete, numbers],
        check_exact=True,
    )
    rest = got[got["gap"] != ""]
    assert set(rest["gap"]) == {"needs HReg_KLD (failed: split 1)"}
    assert rest[[*numbers, "p_holm", "n_images"]].isna().all(axis=None)
    assert row(got, "H - L")["p_holm"] == row(got, "H - L")["p"]  # alone in its family
    notes = effects.footnotes(gappy, got, test="ttest")
    assert "over the 1 main effects and, apart from them, the 2 interactions" in " ".join(notes)
    assert "KLD - MSE (needs HReg_KLD (failed: split 1))" in notes[-1]
    sentences = effects.sentences(got)
    assert "HReg against L is unknown, it needs HReg_KLD (failed: split 1)" in sentences[0]
    assert sentences[0].startswith("Path, these networks: H scores")
    assert sentences[2] == "Loss, these networks: KLD against MSE is unknown, it needs HReg_KLD (failed: split 1)."


def test_several_gaps_are_named_by_reason(sweep):
    got = effects.numbers(without(without(with_status(sweep, "H_MSE", 0, "missing"), "L_MSE"), "L_KLD"))
    assert row(got, "H - L")["gap"] == "needs L_MSE, L_KLD (not run); H_MSE (missing: split 0)"
    assert row(got, "HReg - H")["gap"] == "needs H_MSE (missing: split 0)"


def test_nothing_finished_is_all_gaps():
    sweep = changed(sweep_of(), status="missing")
    got = effects.numbers(replace(sweep, scores=sweep.scores.iloc[:0]))
    assert (got["gap"] != "").all()
    text = shown(effects, got)
    assert set(text["networks: p (Holm)"]) == set(text["n images"]) == set(text["networks: 95 % interval"]) == {DASH}
    assert text["DSC points"].str.startswith(f"{DASH} (needs ").all()
    assert len(effects.sentences(got)) == 6


def test_different_images_are_refused(sweep):
    message = r"^L_KLD and HReg_KLD were scored on different images: the first is split1 image11 of split 1 seed 0; run"
    with pytest.raises(InputError, match=message):
        effects.numbers(with_dice(sweep, "L_KLD", 1, dice_of("L_KLD", 1)[:11]))


def test_a_lead_equal_in_all_images_has_no_p():
    table = effects.numbers(two_images(**dict.fromkeys(KLD, (1, 1))))
    assert np.isnan(row(table, "KLD - MSE")["p"])
    assert (
        effects.sentences(table)[2]
        == "Loss, these networks: KLD minus MSE is +1.00 points, but these scores allow no test."
    )
    assert effects.sentences(table)[4].endswith("is shown, their means are equal in each image.")


def test_a_single_image_has_no_p():
    sweep = sweep_of(paper.CELLS, splits=(0,))
    table = effects.numbers(replace(sweep, scores=sweep.scores[sweep.scores["image"] == "split0 image00"]))
    assert table["p"].isna().all()
    assert table["n_images"].tolist() == [1] * 12
    assert all("allow no test" in sentence for sentence in effects.sentences(table)[::2])


# ---- text ----------------------------------------------------------------------------------------------------------


def test_strings(table):
    text = shown(effects, table)
    assert text["Effect"].tolist() == table["effect"].tolist()
    difference = mean_of(*KLD) - mean_of(*MSE)
    got = text.set_index("Effect").loc["KLD - MSE"]
    assert got["DSC points"] == f"{difference.mean():+.2f}"
    assert got["networks: 95 % interval"] == "{:+.2f} to {:+.2f}".format(*interval_of(difference))
    assert got["networks: p"] == got["networks: p (Holm)"] == "<0.0001"
    assert got["n images"] == "36"
    assert text.map(lambda entry: isinstance(entry, str)).all(axis=None)


def test_a_sentence_names_the_better_level_first():
    assert said(row_of()) == (
        "Loss, these networks: KLD scores 1.20 points higher than MSE on average "
        "(95 % interval 0.30 to 2.10, p = 0.0120 after Holm)."
    )
    worse = row_of(difference_points=-1.2, low_points=-2.1, high_points=-0.3, p_holm=1e-5)
    assert said(worse) == (
        "Loss, these networks: MSE scores 1.20 points higher than KLD on average "
        "(95 % interval 0.30 to 2.10, p < 0.0001 after Holm)."
    )


def test_not_significant_is_not_told_as_no_effect():
    sentence = said(row_of(low_points=-0.8, high_points=1.1, p_holm=0.4))
    assert sentence == (
        "Loss, these networks: no difference between KLD and MSE is shown (p = 0.4000 after Holm); "
        "the 95 % interval of KLD minus MSE, -0.80 to +1.10 points, leaves room for either."
    )
    assert "no effect" not in sentence
    assert said(row_of(p_holm=0.05)).endswith("+0.30 to +2.10 points, is of this comparison alone and leaves out 0.")


def test_a_test_and_an_interval_that_disagree_leave_the_direction_open():
    assert said(row_of(low_points=-0.1)) == (
        "Loss, these networks: KLD and MSE differ by the test (p = 0.0120 after Holm), but the "
        "95 % interval of KLD minus MSE, -0.10 to +2.10 points, leaves open which is better."
    )


def test_a_significant_interaction_is_told_in_both_of_its_factors():
    both = row_of("(H - L) x (KLD - MSE)", "path x loss", p_holm=0.03)
    neither = row_of("(KLD - MSE) x (weak - strong)", "loss x teacher augmentation", p_holm=0.06)
    path, _, loss, _, augmentation, _ = effects.sentences(
        pd.DataFrame(
            [row_of("H - L", "path"), row_of(), row_of("weak - strong", "teacher augmentation"), both, neither]
        )
    )
    assert path.endswith("; the effect depends on the loss ((H - L) x (KLD - MSE) p = 0.0300 after Holm).")
    assert loss.endswith("; the effect depends on the path ((H - L) x (KLD - MSE) p = 0.0300 after Holm).")
    assert "depends" not in augmentation


def test_a_cross_over_has_no_main_effect_but_depends():
    """KLD leads under weak teachers by what it trails under strong ones."""
    lead = np.random.default_rng(3).normal(0.03, 0.01, 12)
    noise = np.random.default_rng(4).normal(0, 0.02, 12)
    sweep = sweep_of(paper.CELLS, splits=(0,))
    for cell in paper.CELLS:
        sign = 1 if (cell in KLD) == (cell in WEAK) else -1
        sweep = with_dice(sweep, cell, 0, 0.5 + sign * lead + (cell in KLD) * noise)
    table = effects.numbers(sweep)
    assert row(table, "(KLD - MSE) x (weak - strong)")["difference_points"] == pytest.approx(200 * lead.mean())
    _, _, loss, _, augmentation, _ = effects.sentences(table)
    assert loss.startswith("Loss, these networks: no difference between KLD and MSE is shown")
    assert (
        "the effect depends on the teacher augmentation ((KLD - MSE) x (weak - strong) p = 0.0004 after Holm)" in loss
    )
    assert "the effect depends on the loss" in augmentation


@pytest.mark.parametrize("test", sorted(stats.TESTS))
def test_notes(sweep, table, test):
    notes = effects.footnotes(sweep, table, test=test)
    assert notes[0].startswith("Networks: do these networks, as trained, differ on other images?")
    assert stats.TEST_NAMES[test] in notes[0]
    assert "an image that several splits test is one cluster" in notes[0]
    assert notes[1].startswith("Methods: whether newly trained networks would differ too is unknown")
    assert "over the 5 main effects and, apart from them, the 7 interactions" in " ".join(notes)
    assert any(note.startswith("Power: with 80 % this design shows differences from ") for note in notes)
    assert "half the difference of the two simple effects" in notes[-2]
    assert notes[-1] == "Left out, not of the 12 cells: Student, Teacher, Teacher_WAug."


def test_of_many_cells_that_are_not_there_the_first_are_named():
    table = effects.numbers(sweep_of(("Teacher", "Student", "L_MSE")))
    assert row(table, "H - L")["gap"] == "needs L_MSE_WAug, L_KLD, L_KLD_WAug and 4 more (not run)"
