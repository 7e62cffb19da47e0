"""Tables 3 and 4 from scores made here: every printed number is computed a second time, by hand or by SciPy."""

import csv
import re
import sys
import types
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, ttest_1samp, ttest_rel, wilcoxon
from scipy.stats import t as student_t

from kdsweep import cli
from kdsweep.config import composition, decisions, identity
from kdsweep.core.errors import InputError
from kdsweep.results import notes as footnotes
from kdsweep.results import paper, stats
from kdsweep.results.formats import number, or_gap, p
from kdsweep.results.table import MODEL, SETTINGS, Column, Options, Table
from kdsweep.results.tables import command as tables
from kdsweep.results.tables import effects, table3
from kdsweep.results.tables import table4 as four

DASH = "\N{EN DASH}"
REMEDY = "add sweep_name=NAME to the command whose results belong in one table; finished cells are not run again"
IMAGES = 12
ALL = (*paper.BASELINES, *paper.CELLS)
FEW = (*paper.BASELINES, "L_MSE", "H_KLD", "HReg_KLD_WAug")
PAPER_DICE = [77.75, 77.52, 78.00, 80.00, 77.50, 77.85, 79.00, 78.50, 78.06, 77.63, 79.00, 79.31]
PAPER_STD = [22.55, 17.61, 22.05, 18.86, 21.49, 20.06, 20.45, 19.83, 19.25, 19.97, 20.37, 19.33]
PAPER_P_TEACHER = [0.1414, 0.1565, 0.0950, 0.2075, 0.0645, 0.0341, 0.1320, 0.1417, 0.0325, 0.0402, 0.2132, 0.1247]
PAPER_P_STUDENT = [0.0227, 0.0948, 0.0037, 0.0012, 0.0215, 0.0125, 0.0067, 0.0316, 0.0201, 0.0269, 0.0021, 0.0068]


@dataclass(frozen=True, eq=False)
class FakeSweep:
    name: str
    runs: pd.DataFrame
    scores: pd.DataFrame
    varied: tuple[str, ...] = ()
    tuned: tuple[str, ...] = field(default=(), kw_only=True)
    commands: tuple[str, ...] = ()
    external: pd.DataFrame = field(default_factory=pd.DataFrame)


def fingerprint(notation, split, seed=0):
    return f"{notation}-{split}-{seed}"


def dice_of(notation, split, seed=0):
    """The known scores, entry i is image i: its difficulty, noise, and a lead that grows down the table's rows."""
    difficulty = np.random.default_rng([split, seed]).uniform(0.3, 0.7, IMAGES)
    noise = np.random.default_rng([ALL.index(notation), split, seed]).uniform(0, 0.1, IMAGES)
    return difficulty + noise + 0.01 * ALL.index(notation)


def dice_all(notation, splits=(0, 1, 2)):
    return np.concatenate([dice_of(notation, split) for split in splits])


def interval_of(points):
    """SciPy's own 95 % BCa interval of a mean, with the tables' seed."""
    drawn = bootstrap((points,), np.mean, n_resamples=9999, random_state=np.random.default_rng(0))
    return list(drawn.confidence_interval)


def role_of(notation):
    return "baseline" if notation == "Student" else "teacher" if notation.startswith("Teacher") else "distilled"


def run_row(notation, split, seed=0, /, **changes):
    teacher = "Teacher_WAug" if notation.endswith("_WAug") else "Teacher"
    row = {
        "fingerprint": fingerprint(notation, split, seed),
        "role": role_of(notation),
        "notation": notation,
        "split": split,
        "seed": seed,
        "variant": {},
        "profile": "paper",
        "data": "busi",
        "weights": "imagenet",
        "data_digest": "d",
        "user_code": "",
        "results_version": "1",
        "split_protocol": "",
        "split_digest": "",
        "device": "cuda",
        "teacher": fingerprint(teacher, split, seed) if role_of(notation) == "distilled" else "",
        "status": "FINISHED",
        "run_id": "r",
        "params": {"train.lr": "0.0001", "split": str(split)},
        "tags": {},
        "started_ms": 0,
        "val_dice": 0.6,
        "kd_gradient_ratio": 2.0 if role_of(notation) == "distilled" else float("nan"),
        "kd_weight": float("nan"),
    }
    return row | changes


def score_rows(notation, split, seed=0, dice=None):
    dice = dice_of(notation, split, seed) if dice is None else np.asarray(dice)
    frame = pd.DataFrame({"image": [f"split{split} image{i:02d}" for i in range(len(dice))], "dice": dice})
    others = {"label": "benign", "iou": 0.5, "precision": 0.5, "sensitivity": 0.5, "hd95_px": 3.0, "nsd": 0.75}
    return frame.assign(fingerprint=fingerprint(notation, split, seed), **others)


def sweep_of(notations=ALL, splits=(0, 1, 2), seeds=(0,)):
    places = [(notation, split, seed) for notation in notations for split in splits for seed in seeds]
    runs = pd.DataFrame([run_row(*place) for place in places])
    return FakeSweep("study", runs, pd.concat([score_rows(*place) for place in places], ignore_index=True))


def with_status(sweep, notation, split, status):
    """The run did not finish, so it has no scores; one that is missing has no run and no params either."""
    chosen = sweep.runs["fingerprint"] == fingerprint(notation, split)
    runs = sweep.runs.assign(status=sweep.runs["status"].mask(chosen, status))
    if status == "missing":
        unknown = dict.fromkeys(
            [
                *("profile", "data", "data_digest", "weights", "results_version", "split_protocol", "split_digest"),
                *("device", "teacher", "run_id"),
            ],
            "",
        )
        runs.loc[chosen, list(unknown)] = list(unknown.values())
        runs["params"] = [{} if gone else params for gone, params in zip(chosen, runs["params"], strict=True)]
    return replace(sweep, runs=runs, scores=sweep.scores[sweep.scores["fingerprint"] != fingerprint(notation, split)])


def without(sweep, notation, split=None):
    """Never asked for."""
    gone = (sweep.runs["notation"] == notation) & (True if split is None else sweep.runs["split"] == split)
    names = sweep.runs.loc[gone, "fingerprint"]
    return replace(sweep, runs=sweep.runs[~gone], scores=sweep.scores[~sweep.scores["fingerprint"].isin(names)])


def only(sweep, *notations):
    """These rows of a sweep alone: a test of one row need not compare all of them."""
    runs = sweep.runs[sweep.runs["notation"].isin(notations)]
    return replace(sweep, runs=runs, scores=sweep.scores[sweep.scores["fingerprint"].isin(runs["fingerprint"])])


def with_dice(sweep, notation, split, dice):
    name = fingerprint(notation, split)
    rest = sweep.scores[sweep.scores["fingerprint"] != name]
    return replace(sweep, scores=pd.concat([rest, score_rows(notation, split, dice=dice)], ignore_index=True))


def changed(sweep, **columns):
    return replace(sweep, runs=sweep.runs.assign(**columns))


def shown(module, frame):
    """The strings of all columns of a table."""
    return Table("", frame, module.columns(frame) if hasattr(module, "columns") else module.COLUMNS).text()


def below(*, sweep, table):
    """The notes on runs, gaps and the paper's numbers, as Tables 3 and 4 have them."""
    return [*footnotes.provenance(sweep), *footnotes.gaps(table), footnotes.paper(sweep)]


def row(table, notation):
    return table.set_index("notation").loc[notation]


@pytest.fixture(scope="module")
def sweep():
    return sweep_of()


@pytest.fixture(scope="module")
def table4(sweep):
    return four.numbers(sweep)


# ---- the paper's numbers -------------------------------------------------------------------------------------------


def test_the_paper_has_twelve_cells_in_its_order():
    order = [f"{path}_{loss}{aug}" for path in ("L", "H", "HReg") for loss in ("MSE", "KLD") for aug in ("", "_WAug")]
    assert list(paper.CELLS) == order
    columns = [PAPER_DICE, PAPER_STD, PAPER_P_TEACHER, PAPER_P_STUDENT]
    assert [paper.PAPER[cell] for cell in order] == list(zip(*columns, strict=True))
    assert paper.PAPER["Teacher"][:2] == (81.50, 18.40)
    assert paper.PAPER["Student"][:2] == (73.16, 23.78)
    assert paper.PAPER["Teacher"][3] == paper.PAPER["Student"][2] == 0.0048


# ---- Table 4 -------------------------------------------------------------------------------------------------------


def test_table4_rows_means_and_deviations(table4):
    assert table4["notation"].tolist() == list(ALL)
    assert (table4["gap"] == "").all()
    for notation in ALL:
        dice = 100 * dice_all(notation)
        got = row(table4, notation)
        assert got["mean_dice_percent"] == pytest.approx(sum(dice) / 36)
        assert got["std_dice_percent"] == pytest.approx(np.sqrt(sum((dice - sum(dice) / 36) ** 2) / 35))
        assert got["n_images"] == 36


def test_table4_shows_each_splits_mean_and_the_distance_to_the_paper(sweep, table4):
    text = shown(four, table4).set_index("Model")
    for notation in ALL:
        means = [100 * np.mean(dice_of(notation, split, 0)) for split in range(3)]
        got = row(table4, notation)
        assert [got[f"mean_dice_percent_split{split}"] for split in range(3)] == pytest.approx(means)
        assert text.loc[notation, "DSC % of split 0, 1, 2"] == " / ".join(f"{mean:.2f}" for mean in means)
    distance = 100 * dice_all("L_MSE").mean() - PAPER_DICE[0]
    assert row(table4, "L_MSE")["difference_to_paper_points"] == pytest.approx(distance)
    assert text.loc["L_MSE", "DSC points to paper"] == f"{distance:+.2f}"
    assert text.loc["Teacher_WAug", "DSC points to paper"] == DASH  # the paper does not tell of one
    failed = only(with_status(sweep, "L_MSE", 1, "FAILED"), *paper.BASELINES, "L_MSE")
    gap = shown(four, four.numbers(failed)).set_index("Model")
    assert gap.loc["L_MSE", "DSC % of split 0, 1, 2"] == gap.loc["L_MSE", "DSC points to paper"] == DASH


def test_table4_tells_how_long_each_row_was_trained(sweep):
    sweep = only(sweep, "Teacher", "Student", "L_MSE", "H_KLD")
    params = [params_of | {"train.epochs": "100"} for params_of in sweep.runs["params"]]
    is_student = sweep.runs["notation"] == "Student"
    epochs = np.where(is_student, 40.0 + sweep.runs["split"], 100.0)
    longer = changed(sweep, epochs=epochs, best_epoch=epochs - 31, params=params)
    table = four.numbers(with_status(longer, "L_MSE", 1, "FAILED"))
    assert row(table, "Student")[["mean_epochs", "mean_best_epoch"]].tolist() == [41, 11]
    text = shown(four, table).set_index("Model")["Best epoch"]
    assert (text["Student"], text["H_KLD"], text["L_MSE"]) == ("11 of 41", "70 of 100", DASH)
    ended = "8 of 11 runs were ended by train.epochs, not by early stopping: they might have got better."
    failed = with_status(longer, "L_MSE", 1, "FAILED")
    assert ended in four.footnotes(failed, table, test="ttest")
    early = changed(longer, epochs=99.0)
    assert not any("early stopping" in note for note in four.footnotes(early, table, test="ttest"))


@pytest.mark.parametrize(("test", "reference"), [("ttest", ttest_rel), ("wilcoxon", wilcoxon)])
def test_table4_p_values_are_those_of_hand_aligned_arrays(sweep, table4, test, reference):
    table = table4 if test == "ttest" else four.numbers(sweep, test=test)
    for cell in paper.CELLS:
        teacher = "Teacher_WAug" if cell.endswith("_WAug") else "Teacher"
        got = row(table, cell)
        assert got["teacher_p"] == pytest.approx(reference(dice_all(cell), dice_all(teacher)).pvalue, rel=1e-9)
        assert got["student_p"] == pytest.approx(reference(dice_all(cell), dice_all("Student")).pvalue, rel=1e-9)
    to_each_other = reference(dice_all("Student"), dice_all("Teacher")).pvalue
    assert row(table, "Student")["teacher_p"] == pytest.approx(to_each_other, rel=1e-9)
    assert row(table, "Teacher")["student_p"] == pytest.approx(to_each_other, rel=1e-9)
    weak = reference(dice_all("Teacher_WAug"), dice_all("Student")).pvalue
    assert row(table, "Teacher_WAug")["student_p"] == pytest.approx(weak, rel=1e-9)
    assert table.set_index("notation").loc[["Teacher", "Teacher_WAug"], "teacher_p"].isna().all()
    assert np.isnan(row(table, "Student")["student_p"])


def test_the_teacher_is_the_one_of_the_fingerprint_not_of_the_name(sweep):
    """Trained on strong views, distilled from weak ones: the notation says WAug, the Teacher is the strong one."""
    runs = sweep.runs.copy()
    crossed = runs["notation"] == "L_KLD_WAug"
    runs.loc[crossed, "teacher"] = [fingerprint("Teacher", split) for split in runs.loc[crossed, "split"]]
    crossed = only(replace(sweep, runs=runs), *paper.BASELINES, "L_KLD_WAug")
    got = row(four.numbers(crossed), "L_KLD_WAug")["teacher_p"]
    assert got == pytest.approx(ttest_rel(dice_all("L_KLD_WAug"), dice_all("Teacher")).pvalue)
    assert got != pytest.approx(ttest_rel(dice_all("L_KLD_WAug"), dice_all("Teacher_WAug")).pvalue)


def test_holm_family_is_the_cells_of_the_column(table4):
    for column in ("teacher_p", "student_p"):
        cells = table4.set_index("notation").loc[list(paper.CELLS)]
        smallest = cells[column].idxmin()
        assert 0 < cells.loc[smallest, f"{column}_holm"] < 1
        assert cells.loc[smallest, f"{column}_holm"] == pytest.approx(12 * cells.loc[smallest, column], rel=1e-9, abs=0)
        assert table4.set_index("notation").loc[list(paper.BASELINES), f"{column}_holm"].isna().all()


def test_difference_to_student_and_its_interval(table4):
    for notation in (*paper.CELLS, "Teacher"):
        got = row(table4, notation)
        difference = 100 * (dice_all(notation) - dice_all("Student"))
        assert got["student_difference_points"] == pytest.approx(difference.mean())
        assert [got["student_low_points"], got["student_high_points"]] == pytest.approx(interval_of(difference))
        assert got["student_low_points"] < difference.mean() < got["student_high_points"]
    assert np.isnan(row(table4, "Student")["student_low_points"])


def test_order_of_the_records_changes_no_digit(sweep, table4):
    shuffled = replace(
        sweep, runs=sweep.runs.sample(frac=1, random_state=1), scores=sweep.scores.sample(frac=1, random_state=2)
    )
    pd.testing.assert_frame_equal(four.numbers(shuffled), table4, check_exact=True)
    pd.testing.assert_frame_equal(table3.numbers(shuffled), table3.numbers(sweep), check_exact=True)
    assert below(sweep=shuffled, table=table4) == below(sweep=sweep, table=table4)


def test_same_image_in_two_splits_and_seeds_is_paired_within_each():
    sweep = sweep_of(("Student", "Teacher", "L_MSE"), splits=(0, 1), seeds=(0, 7))
    same_names = sweep.scores["image"].str.replace(r"split\d ", "", regex=True)
    sweep = replace(sweep, scores=sweep.scores.assign(image=same_names))
    places = [(split, seed) for split in (0, 1) for seed in (0, 7)]
    ours, student = (np.array([dice_of(name, *place) for place in places]) for name in ("L_MSE", "Student"))
    of_splits = (ours - student).reshape(2, 2, IMAGES).mean(axis=1)  # seeds averaged within split and image
    got = row(four.numbers(sweep), "L_MSE")
    assert got["student_difference_points"] == pytest.approx(100 * of_splits.mean())
    # As many rows per image: clusters are its means over the splits.
    assert got["student_p"] == pytest.approx(ttest_1samp(of_splits.mean(axis=0), 0).pvalue)
    assert got["n_images"] == 12
    assert "48 over all of them, 12 different" in below(sweep=sweep, table=four.numbers(sweep))[0]


def test_different_images_are_refused(sweep):
    sweep = only(sweep, "Teacher", "Student", "H_MSE")
    one_more = with_dice(sweep, "H_MSE", 1, [0.5] * (IMAGES + 1))
    with pytest.raises(
        InputError, match=r"H_MSE and Teacher were scored on different images.*split1 image12 of split 1"
    ):
        four.numbers(one_more)
    one_less = with_dice(sweep, "Student", 2, [0.5] * (IMAGES - 1))
    with pytest.raises(InputError, match=r"and Student were scored on different images: 1 without"):
        four.numbers(one_less)


def test_equal_to_student_is_p_one_and_no_difference(sweep):
    sweep = only(sweep, "Teacher", "Student", "H_KLD")
    for split in (0, 1, 2):
        sweep = with_dice(sweep, "H_KLD", split, dice_of("Student", split))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = row(four.numbers(sweep), "H_KLD")
    assert got["student_p"] == 1.0
    assert (got["student_low_points"], got["student_high_points"]) == (0.0, 0.0)


def test_a_single_image_has_a_mean_and_nothing_else():
    sweep = sweep_of(("Student", "Teacher", "L_MSE"), splits=(0,))
    for notation in ("Student", "Teacher", "L_MSE"):
        sweep = with_dice(sweep, notation, 0, [0.5])
    text = shown(four, four.numbers(sweep)).set_index("Model").loc["L_MSE"]
    assert text["DSC %"] == f"50.00 ± {DASH}"
    assert (
        text[["Teacher, networks: p", "networks: p", "networks: p (Holm)", "networks: 95 % interval"]] == DASH
    ).all()


def test_a_teacher_with_a_seed_of_its_own_serves_every_seed_of_the_cells():
    sweep = sweep_of(("Student", "L_MSE"), splits=(0, 1), seeds=(3, 7))
    teachers = [run_row("Teacher", split, 0) for split in (0, 1)]
    runs = pd.concat([sweep.runs, pd.DataFrame(teachers)], ignore_index=True)
    cells = runs["role"] == "distilled"
    runs.loc[cells, "teacher"] = [fingerprint("Teacher", split) for split in runs.loc[cells, "split"]]
    scores = pd.concat([sweep.scores, *(score_rows("Teacher", split) for split in (0, 1))], ignore_index=True)
    table = four.numbers(replace(sweep, runs=runs, scores=scores))
    ours, student = (
        np.concatenate([(dice_of(name, split, 3) + dice_of(name, split, 7)) / 2 for split in (0, 1)])
        for name in ("L_MSE", "Student")
    )
    teacher = dice_all("Teacher", (0, 1))
    assert row(table, "L_MSE")["teacher_p"] == pytest.approx(ttest_rel(ours, teacher).pvalue)
    assert row(table, "Teacher")["student_p"] == pytest.approx(ttest_rel(student, teacher).pvalue)
    assert row(table, "Student")["teacher_p"] == pytest.approx(ttest_rel(student, teacher).pvalue)
    assert row(table, "Teacher")["std_dice_percent"] == pytest.approx(100 * teacher.std(ddof=1))
    assert (row(table, "Teacher")["n_images"], row(table, "L_MSE")["n_images"]) == (24, 24)


# ---- gaps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "word"),
    [("missing", "missing"), ("FAILED", "failed"), ("RUNNING", "running"), ("KILLED", "killed")],
)
def test_an_unfinished_split_is_a_gap_in_both_tables(sweep, status, word):
    partial = with_status(sweep, "H_KLD_WAug", 1, status)
    first, second = table3.numbers(partial), four.numbers(partial)
    for table in (first, second):
        assert row(table, "H_KLD_WAug")["gap"] == f"{word}: split 1"
        assert np.isnan(row(table, "H_KLD_WAug")["mean_dice_percent"])
        assert (table["gap"] != "").sum() == 1
    numbers = row(second, "H_KLD_WAug").drop(["gap", "margin_points", *paper.PAPER_COLUMNS])
    assert numbers.isna().all()
    text = shown(table3, first).set_index("Notation").loc["H_KLD_WAug"]
    assert text["DSC % (ours)"] == f"{DASH} ({word}: split 1)"
    assert text["DSC % (paper)"] == "78.50"
    assert any(f"H_KLD_WAug ({word}: split 1)" in note for note in below(sweep=partial, table=second))


def test_the_holm_family_shrinks_with_a_gap(sweep):
    table = four.numbers(with_status(sweep, "H_KLD_WAug", 1, "FAILED")).set_index("notation").loc[list(paper.CELLS)]
    smallest = table["student_p"].idxmin()
    assert table["student_p"].notna().sum() == 11
    assert table.loc[smallest, "student_p_holm"] == pytest.approx(
        11 * table.loc[smallest, "student_p"], rel=1e-9, abs=0
    )


def test_each_gap_says_why(sweep):
    twice = with_status(with_status(sweep, "L_MSE", 1, "missing"), "L_MSE", 2, "missing")
    two_seeds = sweep_of(("Student", "Teacher", "L_MSE"), splits=(0,), seeds=(0, 7))
    later = pd.DataFrame([run_row("L_MSE", 1, status="missing", teacher="", params={})])  # its Teacher is not known yet
    begun = sweep_of(("Student", "Teacher", "L_MSE"), splits=(0,))
    cases = [
        ("L_MSE", twice, "missing: split 1, 2"),
        ("L_MSE", with_status(twice, "L_MSE", 0, "FAILED"), "failed: split 0; missing: split 1, 2"),
        ("L_MSE", without(without(sweep, "L_MSE", split=1), "L_MSE", split=2), "not requested: split 1, 2"),
        ("L_MSE", replace(two_seeds, runs=two_seeds.runs.iloc[:-1]), "not requested: split 0 seed 7"),
        ("L_MSE", without(sweep, "L_MSE"), "not run"),
        ("L_MSE", replace(sweep, scores=without(sweep, "L_MSE", split=0).scores), "no scores: split 0"),
        ("L_MSE", replace(sweep, runs=sweep.runs[sweep.runs["split"] == 2]), ""),  # nothing else was requested
        ("L_KLD", rival(sweep, "FAILED"), "failed: split 1"),  # a second run of the cell
        ("Teacher", replace(begun, runs=pd.concat([begun.runs, later])), "not trained: split 1"),
    ]
    for notation, gappy, gap in cases:
        got = row((four if notation == "Teacher" else table3).numbers(gappy), notation)
        assert got["gap"] == gap
        assert np.isnan(got["mean_dice_percent"]) == bool(gap), gap


def test_nothing_finished_is_all_gaps(sweep):
    runs = sweep.runs[sweep.runs["role"] != "teacher"].assign(
        status="missing", profile="", data="", weights="", device="", teacher=""
    )
    empty = replace(sweep, runs=runs, scores=sweep.scores.iloc[:0].astype(object))
    table = four.numbers(empty)
    assert set(table["gap"].iloc[2:]) == {"missing: split 0, 1, 2"}
    assert set(table["gap"].iloc[:2]) == {"not run"}
    text = shown(four, table)
    assert set(text["networks: p"]) == set(text["n images"]) == {DASH}
    assert below(sweep=empty, table=table)


def test_without_student_its_columns_are_gaps_and_a_note_names_the_command(sweep, table4):
    partial = with_status(only(sweep, *FEW), "Student", 2, "FAILED")
    table = four.numbers(partial)
    assert table[["student_p", "student_p_holm", "student_low_points"]].isna().all(axis=None)
    assert np.isnan(row(table, "Student")["teacher_p"])
    assert row(table, "L_MSE")["teacher_p"] == pytest.approx(ttest_rel(dice_all("L_MSE"), dice_all("Teacher")).pvalue)
    notes = four.footnotes(partial, table, test="ttest")
    assert notes[-1].endswith("before its baseline is finished: the command of the sweep resumes it.")
    never = only(sweep, "Teacher", "L_MSE")
    notes = four.footnotes(never, four.numbers(never), test="ttest")
    assert notes[-1].endswith("run it with `python -m kdsweep -m path=none sweep_name=study`.")
    notes = four.footnotes(sweep, table4, test="ttest")
    assert not any("path=none" in note for note in notes)


def test_the_command_for_student_is_that_of_the_sweep_with_another_path(sweep):
    words = "-m +experiment=table3 'data.root=/my images' split=s0,s1,s2"
    typed = replace(
        sweep, commands=("python -m kdsweep path=L", f"python -m kdsweep path=L,H {words} sweep_name=study")
    )
    assert four.student_command(typed) == f"python -m kdsweep {words} path=none sweep_name=study"
    assert four.student_command(sweep) == "python -m kdsweep -m path=none sweep_name=study"


def test_without_its_own_teacher_only_that_column_is_a_gap(sweep):
    table = four.numbers(with_status(sweep, "Teacher_WAug", 1, "FAILED"))
    for cell in paper.CELLS:
        assert np.isnan(row(table, cell)["teacher_p"]) == cell.endswith("_WAug")
        assert not np.isnan(row(table, cell)["student_p"])


def test_scores_of_a_failed_teacher_are_not_used(sweep):
    failed = replace(with_status(sweep, "Teacher", 1, "FAILED"), scores=sweep.scores)
    assert np.isnan(row(four.numbers(only(failed, "Student", "Teacher", "L_MSE")), "L_MSE")["teacher_p"])


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "both"),
    [("profile", "quick", "profile=paper and profile=quick"), ("data", "phantom", "data=busi and data=phantom")],
)
def test_mixing_is_refused(sweep, key, value, both):
    runs = sweep.runs.copy()
    runs.loc[runs["notation"] == "L_MSE", key] = value
    with pytest.raises(InputError) as caught:
        table3.numbers(replace(sweep, runs=runs))
    assert str(caught.value) == f"sweep study mixes {both}: {REMEDY}"


def with_params(sweep, chosen, changes):
    """Those runs were made with these params too, or instead."""
    params = [old | changes if there else old for old, there in zip(sweep.runs["params"], chosen, strict=True)]
    return changed(sweep, params=params)


def runs_of(sweep, notation, splits=(0, 1, 2)):
    return (sweep.runs["notation"] == notation) & sweep.runs["split"].isin(splits)


def test_a_student_of_other_epochs_is_refused(sweep):
    """The second command changed train.epochs, and both landed in DATA-PROFILE."""
    student = sweep.runs["role"] == "baseline"
    mixed = with_params(with_params(sweep, ~student, {"train.epochs": "12"}), student, {"train.epochs": "2"})
    for order in (mixed, replace(mixed, runs=mixed.runs.iloc[::-1])):
        with pytest.raises(InputError) as caught:
            table3.numbers(order)
        both = "train.epochs=12 (HReg_KLD split 0) and train.epochs=2 (Student split 0)"
        assert str(caught.value) == f"sweep study mixes {both}: {REMEDY}"


def test_one_cell_of_other_options_is_refused_and_three_keys_are_named(sweep):
    options = {"views.shift": "0.1", "train.lr": "0.5", "precision": "bf16", "image_size": "64"}
    mixed = with_params(sweep, runs_of(sweep, "H_MSE", [2]), options)
    with pytest.raises(InputError) as caught:
        four.numbers(mixed)
    message = str(caught.value)
    keys = {"image_size": ("unset", "64"), "precision": ("unset", "bf16"), "train.lr": ("0.0001", "0.5")}
    shown = [f"{key}={one} (HReg_KLD split 0) and {key}={other} (H_MSE split 2)" for key, (one, other) in keys.items()]
    assert message == f"sweep study mixes {', '.join(shown)}: {REMEDY}"


def test_what_determines_no_result_and_the_factors_may_differ(sweep):
    sweep = only(sweep, "Teacher", "Student", "H_MSE", "HReg_KLD")
    expected = table3.numbers(sweep)
    for key in (
        *("device", "store", "sweep_name", "tracking.uri", "train.workers", "weights"),
        *("data.root", "data.source.root", "data.source.cache_dir"),
        *("split", "seed", "teacher.seed", "path.kd_path.kernel_size", "loss.name", "teacher_aug.train_view"),
    ):
        mixed = with_params(sweep, runs_of(sweep, "Student"), {key: "a"})
        mixed = with_params(mixed, runs_of(sweep, "H_MSE"), {key: "b"})
        pd.testing.assert_frame_equal(table3.numbers(mixed), expected, obj=key)
    for key in ("data.roots", "path_length", "train.workers_seed", "weights_decay", "teacher_seed"):  # only begin so
        with pytest.raises(InputError, match=f"mixes {key}=unset .* and {key}=1|mixes {key}=1 .* and {key}=unset"):
            table3.numbers(with_params(sweep, runs_of(sweep, "H_MSE"), {key: "1"}))


def test_a_key_that_older_runs_have_not_had_its_default_there(sweep):
    sweep = only(sweep, "Teacher", "Student", "H_MSE", "HReg_KLD")
    expected, defaults = table3.numbers(sweep), identity.params(composition.compose(["profile=quick"]))
    for key in ("teacher.monitor", "teacher.epochs", "kd.lambda"):
        newer = with_params(sweep, runs_of(sweep, "H_MSE"), {key: str(defaults[key])})
        pd.testing.assert_frame_equal(table3.numbers(newer), expected, obj=key)
        with pytest.raises(InputError, match=f"mixes {key}="):
            table3.numbers(with_params(sweep, runs_of(sweep, "H_MSE"), {key: "another"}))


def test_a_teacher_option_concerns_the_cells_only(sweep):
    sweep = only(sweep, "Teacher", "Student", "H_MSE", "HReg_KLD")
    expected = table3.numbers(sweep)
    options = {"teacher.encoder": "resnet18", "kd.weight": "0.9"}
    for role in ("baseline", "teacher"):
        other = with_params(sweep, sweep.runs["role"] == role, options)
        pd.testing.assert_frame_equal(table3.numbers(other), expected)
    cells = with_params(sweep, sweep.runs["role"] == "distilled", options)
    pd.testing.assert_frame_equal(table3.numbers(cells), expected)
    for key, one, other in (("teacher.encoder", "resnet18", "resnet34"), ("kd.weight", "0.9", "0.1")):
        mixed = with_params(cells, runs_of(cells, "HReg_KLD", [0]), {key: other})
        with pytest.raises(InputError) as caught:
            table3.numbers(mixed)
        both = f"{key}={other} (HReg_KLD split 0) and {key}={one} (HReg_KLD split 1)"
        assert str(caught.value) == f"sweep study mixes {both}: {REMEDY}"


def test_a_run_that_never_started_has_no_options_to_mix(sweep):
    partial = with_params(sweep, sweep.runs["status"] == "FINISHED", {"train.epochs": "12"})
    assert row(table3.numbers(with_status(partial, "L_MSE", 1, "missing")), "L_MSE")["gap"] == "missing: split 1"


def test_the_configurations_of_table4_do_not_mix(sweep):
    """With the params that MLflow really holds; then with those of a command that changes one."""
    paths = {"L": "L", "H": "H", "HReg": "HR", "Student": "none"}

    def composed(notation, split, *overrides):
        path, _, rest = notation.removesuffix("_WAug").partition("_")
        view = "weak" if notation.endswith("_WAug") else "strong"
        factors = [f"path={paths[path]}", f"loss={rest.lower() or 'kld'}", f"teacher_aug={view}", f"split=s{split}"]
        flat = identity.params(composition.compose(["profile=quick", "train.epochs=12", *factors, *overrides]))
        return {key: str(value) for key, value in flat.items()}

    first = {name: composed(name, 0) for name in (*paper.CELLS, "Student")}
    of_split = [dict(composed("L_MSE", split).items() - first["L_MSE"].items()) for split in (0, 1, 2)]
    runs = sweep.runs[sweep.runs["role"] != "teacher"]
    real = [first[name] | of_split[split] for name, split in zip(runs["notation"], runs["split"], strict=True)]
    teachers = sweep.runs[sweep.runs["role"] == "teacher"].assign(params=[real[0]] * 6)
    runs = pd.concat([runs.assign(params=real), teachers])
    pd.testing.assert_frame_equal(table3.numbers(replace(sweep, runs=runs)), table3.numbers(sweep))
    student = composed("Student", 0, "train.epochs=2", "teacher=resnet34")
    is_student = runs["role"] == "baseline"
    other = [
        student | of_split[split] if chosen else old
        for chosen, split, old in zip(is_student, runs["split"], runs["params"], strict=True)
    ]
    with pytest.raises(InputError) as caught:
        table3.numbers(replace(sweep, runs=runs.assign(params=other)))
    both = "train.epochs=12 (HReg_KLD split 0) and train.epochs=2 (Student split 0)"
    assert str(caught.value) == f"sweep study mixes {both}: {REMEDY}"


def rival(sweep, status):
    same = {"train.lr": "0.0001", "split": "1", "device": "cpu"}
    params = same | {"loss.name": "kld2", "path.zoom": "2", "teacher.seed": "7", "teacher_aug.train_view": "strong"}
    extra = run_row("L_KLD", 1, fingerprint="zz", params=params, status=status)
    runs = pd.concat([sweep.runs, pd.DataFrame([extra])], ignore_index=True)
    scores = score_rows("L_KLD", 1).assign(fingerprint="zz")
    return replace(sweep, runs=runs, scores=pd.concat([sweep.scores, scores]) if status == "FINISHED" else sweep.scores)


def test_two_different_results_of_one_cell_are_refused(sweep):
    with pytest.raises(InputError) as caught:
        table3.numbers(rival(sweep, "FINISHED"))
    message = str(caught.value)
    assert "L_KLD split 1 seed 0" in message
    assert "(loss.name=unset and kld2, path.zoom=unset and 2, teacher.seed=unset and 7)" in message
    assert "train_view" not in message
    assert "device" not in message  # it decides nothing
    assert message.endswith(f"): {REMEDY}")


def test_different_images_under_one_name_are_refused(sweep):
    """Student on one site, a cell on another: equal ids, other images."""
    other = sweep.runs["notation"] == "L_KLD"
    params = [
        values | {"data.root": "siteB" if is_other else "siteA"}
        for values, is_other in zip(sweep.runs["params"], other, strict=True)
    ]
    mixed = changed(sweep, data_digest=np.where(other, "b" * 64, "a" * 64), params=params)
    with pytest.raises(InputError) as caught:
        table3.numbers(mixed)
    assert str(caught.value) == (
        "sweep study mixes different images of one name: digests aaaaaaaa (HReg_KLD split 0, data.root=siteA) and "
        f"bbbbbbbb (L_KLD split 0, data.root=siteB): {REMEDY}"
    )


def test_two_states_of_a_users_code_are_refused_within_a_cell_and_not_between_cells(sweep):
    sweep = only(sweep, "Teacher", "Student", "L_KLD", "H_KLD")
    is_user = sweep.runs["notation"] == "L_KLD"
    four.numbers(changed(sweep, user_code=np.where(is_user, "c" * 64, "")))
    first = is_user & (sweep.runs["split"] == 0)
    with pytest.raises(
        InputError, match=r"mixes two states of your code in L_KLD: digests cccccccc .L_KLD split 0. and dddddddd"
    ):
        four.numbers(changed(sweep, user_code=np.where(first, "c" * 64, np.where(is_user, "d" * 64, ""))))


def test_two_teachers_of_one_place_are_refused(sweep):
    """Half of the cells were computed again after a change of the code, and learnt from a new Teacher."""
    runs = sweep.runs.copy()
    runs.loc[(runs["notation"] == "L_MSE") & (runs["split"] == 0), "teacher"] = "zz"
    # its params are those of another cell, which is not why it is another Teacher
    params = {"train.lr": "0.01", "split": "0", "path.name": "L", "loss.name": "mse", "kd.weight": "0.9", "store": "b"}
    runs = pd.concat([runs, pd.DataFrame([run_row("Teacher", 0, fingerprint="zz", params=params)])], ignore_index=True)
    with pytest.raises(InputError, match=r"runs of Teacher split 0 seed 0 \(equal options, so the code"):
        four.numbers(replace(sweep, runs=runs))


@pytest.mark.parametrize("dice", [[0.5] * (IMAGES - 1) + [np.nan], None])
def test_a_score_that_is_no_number_or_comes_twice_is_refused(sweep, dice):
    double = replace(sweep, scores=pd.concat([sweep.scores, score_rows("H_MSE", 0)]))
    broken = double if dice is None else with_dice(sweep, "H_MSE", 0, dice)
    with pytest.raises(InputError, match="H_MSE split 0"):
        table3.numbers(broken)


def test_an_empty_sweep_is_refused(sweep):
    with pytest.raises(InputError, match="sweep study has no runs"):
        table3.numbers(replace(sweep, runs=sweep.runs.iloc[:0]))


# ---- Table 3, a user's own cells, text -----------------------------------------------------------------------------


def test_table3_factors_and_means(sweep):
    table = table3.numbers(sweep)
    assert table["notation"].tolist() == list(paper.CELLS)
    assert table["representation"].tolist() == ["Logits"] * 4 + ["Hidden"] * 4 + ["Hidden-Regressor"] * 4
    assert table["loss"].tolist() == (["mean squared error"] * 2 + ["Kullback-Leibler divergence"] * 2) * 3
    assert table["teacher_augmentation"].tolist() == ["strong", "weak"] * 6
    assert table["mean_dice_percent"].tolist() == pytest.approx([100 * dice_all(cell).mean() for cell in paper.CELLS])
    assert table["paper_mean_dice_percent"].tolist() == PAPER_DICE


def test_a_cell_of_ones_own_loss_comes_after_the_papers(sweep):
    users = [run_row("L_MSE", split, notation="L_COS_WAug", fingerprint=f"own{split}") for split in (0, 1, 2)]
    scores = [score_rows("L_MSE", split).assign(fingerprint=f"own{split}") for split in (0, 1, 2)]
    sweep = replace(sweep, runs=pd.concat([sweep.runs, pd.DataFrame(users)]), scores=pd.concat([sweep.scores, *scores]))
    last = table3.numbers(sweep).iloc[-1]
    assert last[["representation", "loss", "teacher_augmentation"]].tolist() == ["Logits", "COS", "weak"]
    assert last["mean_dice_percent"] == pytest.approx(100 * dice_all("L_MSE").mean())
    assert np.isnan(last["paper_mean_dice_percent"])
    cells = four.numbers(sweep).iloc[3:]
    assert len(cells) == 13
    assert cells["student_p_holm"].min() == pytest.approx(13 * cells["student_p"].min(), rel=1e-9, abs=0)


def test_methods_alone_leave_the_papers_cells_out_and_beside_one_of_them_all_are_shown():
    def made(*others):
        sweep = sweep_of([*paper.BASELINES, "H_KLD_WAug", "L_KLD_WAug", *others])
        return replace(
            sweep, runs=sweep.runs.replace({"notation": {"H_KLD_WAug": "AT_WAug", "L_KLD_WAug": "CWD_WAug"}})
        )

    alone = four.numbers(made())
    assert alone["notation"].tolist() == [*paper.BASELINES, "AT_WAug", "CWD_WAug"]
    assert (alone["gap"] == "").all()
    assert four.numbers(made("L_MSE"))["notation"].tolist() == [
        *paper.BASELINES,
        *paper.CELLS,
        "AT_WAug",
        "CWD_WAug",
    ]
    text = shown(table3, table3.numbers(made()))
    assert text["KD representation"].tolist() == ["AT", "CWD"]
    assert text["KD loss"].tolist() == [DASH] * 2


def test_the_printed_numbers():
    sweep = sweep_of(("Student", "Teacher", "L_MSE"), splits=(0,))
    for notation, dice in {"Student": [0.1, 0.2, 0.3], "Teacher": [0.8, 0.9, 1.0], "L_MSE": [0.6, 0.8, 1.0]}.items():
        sweep = with_dice(sweep, notation, 0, dice)
    text = shown(four, four.numbers(sweep)).set_index("Model")
    assert text.loc["Teacher", "DSC %"] == "90.00 ± 10.00"
    assert text.loc["L_MSE", "DSC %"] == "80.00 ± 20.00"
    # differences to Student 0.5, 0.6, 0.7: t = 0.6 sqrt(3) / 0.1 with 2 degrees of freedom, p = 1 - sqrt(108 / 110)
    assert text.loc["L_MSE", "networks: p"] == text.loc["L_MSE", "networks: p (Holm)"] == "0.0091"
    # differences to Teacher -0.2, -0.1, 0: t = -sqrt(3), p = 1 - sqrt(3 / 5)
    assert text.loc["L_MSE", "Teacher, networks: p"] == "0.2254"
    assert text.loc["L_MSE", "DSC % (paper)"] == "77.75 ± 22.55"
    assert text.loc["L_MSE", "p Student (paper)"] == "0.0227"
    assert text.loc["L_MSE", "n images"] == "3"
    low, high = text.loc["L_MSE", "networks: 95 % interval"].split(" to ")
    assert 50 <= float(low) < 60 < float(high) <= 70
    assert text.loc["H_MSE", "DSC %"] == f"{DASH} (not run)"


def test_non_inferiority_to_its_own_teacher(sweep):
    """H_MSE loses 1 point to its Teacher, HReg_MSE 4: the margin of 2 lies between."""
    sweep = only(sweep, "Student", "Teacher", "H_MSE", "HReg_MSE", "L_KLD")
    for split in (0, 1, 2):
        noise = 0.004 * np.sin(np.arange(IMAGES) + split)
        sweep = with_dice(sweep, "H_MSE", split, dice_of("Teacher", split) - 0.01 + noise)
        sweep = with_dice(sweep, "HReg_MSE", split, dice_of("Teacher", split) - 0.04 + noise)
    table = four.numbers(sweep)
    assert (row(table, "H_MSE")["teacher_verdict"], row(table, "HReg_MSE")["teacher_verdict"]) == (
        "non-inferior",
        "inferior",
    )
    cells = table[table["notation"].isin(["H_MSE", "HReg_MSE", "L_KLD"])]
    family, adjusted = cells["teacher_p_non_inferior"], cells["teacher_p_non_inferior_holm"]
    assert family.notna().all()
    assert adjusted.tolist() == pytest.approx(stats.holm(family).tolist())
    few = only(sweep, "Student", "Teacher", "H_MSE", "HReg_MSE")
    assert row(four.numbers(few, margin_points=5.0), "HReg_MSE")["teacher_verdict"] == "non-inferior"
    wide = four.numbers(with_dice(few, "H_MSE", 0, dice_of("Teacher", 0) + np.linspace(-0.4, 0.4, IMAGES)))
    assert row(wide, "H_MSE")["teacher_verdict"] == "open"
    assert row(table, "Teacher")["teacher_verdict"] is None


def test_the_margin_is_the_sweeps_own_unless_the_table_is_given_one():
    sweep = sweep_of(("Student", "Teacher", "L_MSE"))
    margins = ["1.5", "3.5", *["2.5"] * (len(sweep.runs) - 2)]  # that of the run begun last counts
    params = [
        values | {"stats.margin_points": each} for values, each in zip(sweep.runs["params"], margins, strict=True)
    ]
    varied = changed(sweep, params=params, started_ms=[5, 9, *[7] * (len(sweep.runs) - 2)])
    table = four.numbers(varied)
    assert set(table["margin_points"]) == {3.5}
    assert "at most 3.5 points worse than Teacher" in shown(four, table)
    chosen = four.numbers(varied, margin_points=1.0)
    notes = " ".join(four.footnotes(varied, chosen, test="ttest"))
    assert "at most 1 points worse than its Teacher, chosen for this table" in notes
    assert "chosen for this table" not in " ".join(four.footnotes(varied, table, test="ttest"))


def test_several_seeds_answer_on_the_methods_too():
    table = four.numbers(sweep_of(("Student", "Teacher", "L_MSE"), seeds=(0, 1, 2)))
    text = shown(four, table).set_index("Model").loc["L_MSE"]
    for heading in ("methods: p", "methods: p (Holm)", "methods: p (Nadeau-Bengio)", "methods: 95 % interval"):
        assert text[heading] != DASH
    assert "Teacher, methods: p" in text
    one = shown(four, four.numbers(sweep_of(("Student", "Teacher", "L_MSE"))))
    assert [name for name in one if "methods: p" in name and "Nadeau" not in name] == []


def test_a_tiny_p_is_not_printed_as_zero(table4):
    text = shown(four, table4.assign(student_p=1e-7))
    assert set(text["networks: p"]) == {"<0.0001"}


def test_footnotes_say_what_made_the_numbers(sweep, table4):
    notes = below(sweep=sweep, table=table4)
    assert notes[0] == (
        "profile paper, data busi, weights imagenet, device cuda; splits: 3, seeds: 1 (0), "
        "test images: 36 over all of them, 36 different."
    )
    computed = {"precision": "tf32", "kd.teacher_precision": "tf32"}
    for teachers, words in (("tf32", ", precision tf32; "), ("bf16", ", precision tf32 (Teacher's forward bf16); ")):
        changed_keys = computed | {"kd.teacher_precision": teachers}
        params = [params | changed_keys for params in sweep.runs["params"]]
        (first, *_) = below(sweep=replace(sweep, runs=sweep.runs.assign(params=params)), table=table4)
        assert f"device cuda{words}splits: 3" in first
    assert "Behboodi, Brooks, Rivaz 2025" in notes[-1]
    assert "10.36922/aih.3509" in notes[-1]
    assert "UDIAT, not busi" in notes[-1]
    assert not any("Gaps" in note or "machinery" in note for note in notes)
    assert "UDIAT" not in below(sweep=changed(sweep, data="udiat"), table=table4)[-1]
    assert "A check of the machinery, not a result." in below(sweep=changed(sweep, profile="quick"), table=table4)
    assert (
        "weights imagenet and none (Student) and imagenet (Teacher)"
        in below(sweep=mixed_weights(sweep), table=table4)[0]
    )


def mixed_weights(sweep):
    return changed(sweep, weights=sweep.runs["weights"].mask(sweep.runs["role"] == "baseline", "none"))


# ---- renderers -----------------------------------------------------------------------------------------------------

MEAN = Column(("mean", "gap"), "DSC % of the test images", or_gap(number), narrow=True)
SMALL = Table(
    "Table 9. A_B",
    pd.DataFrame(
        {"notation": ["L_MSE", "<H>"], "mean": [81.5, float("nan")], "p": [1e-5, 0.5], "gap": ["", "not run"]}
    ),
    [SETTINGS, MODEL, MEAN, Column("p", "p (Holm)", p), Column("p", "p", p, narrow=True, full=False, needs="p")],
    lead=["L_MSE is 100 % of `x_y`."],
    notes=["Holm, of each kind: all rows.", "Paper: none."],
    best=0,
)


def test_markdown_and_csv_have_the_full_view_and_the_screen_the_narrow_one():
    assert list(SMALL.text()) == ["Model", "DSC % of the test images", "p (Holm)"]  # the frame has no settings
    assert list(SMALL.text(narrow=True)) == ["Model", "DSC % of the test images", "p"]
    lines = SMALL.markdown("T").splitlines()
    assert lines[0] == "T"
    assert lines[4].split("|")[1:4] == [" L_MSE   ", " 81.50                      ", " <0.0001    "]
    assert f"{DASH} (not run)" in lines[5]
    assert lines[7:] == ["- L_MSE is 100 % of `x_y`.", "- Holm, of each kind: all rows.", "- Paper: none."]
    alone = replace(SMALL, frame=SMALL.frame.assign(p=float("nan")))
    assert "p" not in alone.text(narrow=True)


@pytest.mark.parametrize("width", [100, 60, 28])
def test_the_screen_keeps_to_its_width_and_marks_the_best(width):
    text = SMALL.screen("T", width=width, last=["notes in t.md: Holm, Paper", "wrote t.md"])
    assert max(map(len, text.splitlines())) <= width
    assert re.search(r"^L_MSE \* +81\.50 +<0\.0001$", text, re.M)
    assert text.endswith("wrote t.md\n")
    assert "p (Holm)" not in text
    assert "(Holm)" in SMALL.screen("T", width=width, wide=True)
    assert SMALL.subjects() == "Holm, Paper"


def test_latex_escapes_what_latex_would_read():
    latex = replace(SMALL, frame=SMALL.frame.assign(mean=["81.50 ± 18.40", ""]).astype({"mean": object}))
    latex = replace(latex, columns=[MODEL, replace(MEAN, format=or_gap(str)), *SMALL.columns[3:]]).latex("A_B")
    assert r"L\_MSE & 81.50 $\pm$ 18.40 & $<$0.0001 \\" in latex
    assert r"$<$H> & -- (not run) & 0.5000 \\" in latex
    assert r"\caption{A\_B}" in latex
    assert r"100 \% of x\_y" in latex
    assert latex.count("{table}") == 2
    assert latex.isascii()


def test_html_is_escaped_aligned_and_names_the_rows():
    lines = SMALL.html().splitlines()
    assert "data-value" not in lines[2]
    assert lines[1] == '<caption class="unseen">Table 9. A_B</caption>'
    assert lines[2].count('<th scope="col" class="number">') == 2
    values = '<td class="number" data-value="81.5">81.50</td><td class="number" data-value="1e-05">&lt;0.0001</td>'
    assert lines[4] == f'<tr class="best"><th scope="row">L_MSE</th>{values}</tr>'
    unknown = f'<td class="number">{DASH} (not run)</td>'
    assert lines[5].startswith(f'<tr><th scope="row">&lt;H&gt;</th>{unknown}')


def test_a_module_in_the_folder_is_a_table_without_a_list_to_edit(requests, monkeypatch, tmp_path, capsys):
    new = types.ModuleType("kdsweep.results.tables.new")
    new.make = lambda *_: SMALL
    monkeypatch.setitem(sys.modules, new.__name__, new)
    monkeypatch.setattr(tables, "TABLES", (*tables.TABLES, "new"))
    files = {file.stem for file in Path(tables.__file__).parent.glob("*.py")} - {"__init__", "command"}
    assert set(tables.TABLES) == files | {"new"}
    tables.show(["new"], store=tmp_path)
    assert "L_MSE is 100 %" in capsys.readouterr().out


def test_a_terminal_gets_the_answer(requests, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["tables", "table4", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert {"Model", "DSC", "%", "points", "to", "Student", "verdict"} <= set(lines[2].split())
    assert sum(" * " in line for line in lines) == 1
    text = " ".join(lines)
    assert " has the highest validation Dice: test DSC" in text
    assert "It differs from Student by +" in text
    assert "--wide shows all columns; notes in table4.md: " in text
    assert cli.main(["tables", "table4", "--out", str(tmp_path), "--wide"]) == 0
    wide = capsys.readouterr().out
    (header,) = [line for line in (tmp_path / "table4.md").read_text().splitlines() if line.startswith("| Model")]
    headings = [heading.strip() for heading in header.strip("|").split("|")]
    (rule,) = [line for line in wide.splitlines() if re.fullmatch("[- ]+", line)]
    assert len(rule.split()) == len(headings)  # a column each
    assert set(" ".join(headings).split()) <= set(wide.split())  # headings are wrapped
    assert "p Student (paper)" in headings


def written(name, sweep, out):
    """Write a table's files; return the Markdown."""
    return tables.write(tables.make(name, sweep, Options(out)), name=name, sweep=sweep, out=out)


# ---- files and the command -----------------------------------------------------------------------------------------


@pytest.fixture
def requests(sweep, monkeypatch):
    """A tracking module that holds this sweep; the list records what it was asked for."""
    calls = []

    def read_sweep(*, store, uri, name):
        calls.append((store, uri, name))
        if name == "nowhere":
            raise InputError("no sweep nowhere in this store")
        return sweep

    fake = types.ModuleType("kdsweep.tracking.reader")
    fake.read_sweep = read_sweep
    monkeypatch.setitem(sys.modules, "kdsweep.tracking.reader", fake)
    return calls


def test_the_command_prints_and_writes_each_table_of_one_reading(requests, sweep, tmp_path, capsys):
    store, names = tmp_path / "store", ("table3", "table4")
    assert cli.main(["tables", *names, "--store", str(store)]) == 0
    assert requests == [(store, None, None)]
    written = store / "tables"
    assert {file.name for file in written.iterdir()} == {
        f"{n}.{suffix}" for n in names for suffix in ("csv", "md", "tex")
    }
    texts = [(written / f"{name}.md").read_text(encoding="utf-8") for name in names]
    lines = [f"{text}\nwrote {written / name}.md, .csv, .tex\n" for name, text in zip(names, texts, strict=True)]
    assert capsys.readouterr().out == "".join(lines)
    for name, markdown in zip(names, texts, strict=True):
        assert markdown.startswith(f"Table {name[-1]}. ")
        assert "| L_KLD_WAug " in markdown
        assert "doi 10.36922/aih.3509" in markdown
        latex = (written / f"{name}.tex").read_text(encoding="utf-8")
        assert "doi 10.36922/aih.3509" in latex
        assert r"\caption{Table" not in latex  # LaTeX counts tables itself


def test_the_csv_reads_back_unrounded(requests, sweep, table4, tmp_path):
    assert cli.main(["tables", "table4", "--out", str(tmp_path)]) == 0
    with (tmp_path / "table4.csv").open(encoding="utf-8", newline="") as file:
        back = list(csv.DictReader(file))  # pandas' own reader may differ in the last digit
    numbers = table4.select_dtypes("float").columns
    assert len(numbers) >= 12
    for column in numbers:
        np.testing.assert_array_equal([float(line[column] or "nan") for line in back], table4[column])
    assert {(line["profile"], line["data"], line["sweep"], line["test"]) for line in back} == {
        ("paper", "busi", "study", "ttest")
    }


def test_options_reach_their_place(requests, tmp_path, capsys):
    uri, out = "http://localhost:5000", tmp_path / "a" / "b"
    command = ["table4", "--tracking-uri", uri, "--sweep", "study", "--out", str(out), "--test", "wilcoxon"]
    assert cli.main(["tables", *command]) == 0
    assert requests == [(Path("multirun"), uri, "study")]
    back = pd.read_csv(out / "table4.csv").set_index("notation")
    expected = wilcoxon(dice_all("L_MSE"), dice_all("Student")).pvalue
    assert back.loc["L_MSE", "student_p"] == pytest.approx(expected)
    assert set(back["test"]) == {"wilcoxon"}
    assert "Wilcoxon signed-rank test" in capsys.readouterr().out


def test_an_input_error_is_one_line_and_code_one(requests, tmp_path, capsys):
    assert cli.main(["tables", "table3", "--sweep", "nowhere", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "kdsweep: error: no sweep nowhere in this store\n")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(requests, tmp_path, capsys):
    blocked = Path(tmp_path / "file")
    blocked.write_text("")
    assert cli.main(["tables", "table3", "--out", str(blocked)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"kdsweep: error: --out {blocked}: ")
    assert error.count("\n") == 1


def test_no_table_and_an_unknown_one_name_the_choices(requests, capsys):
    assert cli.main(["tables"]) == 2
    assert capsys.readouterr().err.startswith(
        "kdsweep: error: missing argument TABLES; choose from: capacity, effects, "
    )
    assert cli.main(["tables", "table9"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kdsweep: error: TABLES: table9 is not one of capacity, effects, ")
    assert error.endswith("; python -m kdsweep tables --help shows its options\n")
    assert "table4" in error


def test_what_departs_from_the_papers_protocol_is_said():
    sweep = sweep_of()
    assert not any("protocol" in note for note in footnotes.provenance(sweep))
    params = [
        values | {"image_size": "128", "weights": "none", "train.epochs": "500"} for values in sweep.runs["params"]
    ]
    lines = [note for note in footnotes.provenance(changed(sweep, params=params)) if "protocol" in note]
    what = "weights none instead of imagenet, image_size 128 instead of 224"
    assert lines == [f"Not the protocol of the paper: {what}."]
    rated = [note for note in footnotes.provenance(rates({"0.0001": 0.0, "0.01": 0.0})) if "protocol" in note]
    assert rated == ["Not the protocol of the paper: train.lr 0.0001 and 0.01 instead of 0.0001."]


def test_the_protocol_is_that_of_the_default_profile():
    params = identity.params(composition.compose([]))
    assert {key: str(params[key]) for key in paper.PROTOCOL} == paper.PROTOCOL


# ---- further keys that a sweep varies --------------------------------------------------------------------------------


def rates(changes, key="train.lr", **options):
    """The sweep of each value below each other; scores move by the number given with it."""
    runs, scores = [], []
    for value, shift in changes.items():
        one = sweep_of(**options)
        name = one.runs["fingerprint"] + f"-{value}"
        teacher = one.runs["role"] == "teacher"
        of_value = one.runs.assign(
            fingerprint=one.runs["fingerprint"].where(teacher, name),
            params=[{**params, key: value} for params in one.runs["params"]],
            variant=[decisions.used_by(role, {key: value}, {}) for role in one.runs["role"]],
        )
        runs.append(of_value)
        named = dict(zip(one.runs["fingerprint"], of_value["fingerprint"], strict=True))
        scores.append(
            one.scores.assign(fingerprint=one.scores["fingerprint"].map(named), dice=one.scores["dice"] + shift)
        )
    runs = pd.concat(runs, ignore_index=True)
    runs.loc[runs["role"] == "teacher", "variant"] = [{}] * (runs["role"] == "teacher").sum()
    scores = pd.concat(scores, ignore_index=True).drop_duplicates(["fingerprint", "image"])
    unique = runs.drop_duplicates("fingerprint").reset_index(drop=True)
    return FakeSweep("rates", unique, scores, varied=(key,))


def test_a_swept_key_gives_each_of_its_values_rows_of_its_own():
    sweep = rates({"0.001": 0.0, "0.0001": -0.1}, notations=FEW)
    table = four.numbers(sweep)
    assert list(dict.fromkeys(table["settings"])) == ["train.lr=0.0001", "train.lr=0.001"]
    for label, shift in {"train.lr=0.001": 0, "train.lr=0.0001": -10}.items():
        part = table[table["settings"] == label].set_index("notation")
        assert list(part.index) == list(FEW)
        for name in ("Student", "L_MSE", "HReg_KLD_WAug"):
            assert part.loc[name, "mean_dice_percent"] == pytest.approx(100 * dice_all(name).mean() + shift)
        ours, student = dice_all("H_KLD"), dice_all("Student")
        assert part.loc["H_KLD", "student_p"] == pytest.approx(ttest_rel(ours, student).pvalue)
        teacher = dice_all("Teacher")  # is not trained with train.lr: the same for both
        assert part.loc["H_KLD", "teacher_p"] == pytest.approx(ttest_rel(ours + shift / 100, teacher).pvalue)


def test_holm_counts_the_cells_of_all_settings():
    sweep = rates({"1": 0.0, "2": -0.01}, notations=FEW)
    table = four.numbers(sweep)
    cells = table[~table["notation"].isin(paper.BASELINES)]
    assert cells["student_p"].notna().sum() == 6
    pd.testing.assert_series_equal(cells["student_p_holm"], stats.holm(cells["student_p"]), check_names=False)


def test_a_key_that_the_student_does_not_use_leaves_one_student_for_all():
    sweep = rates({"0.5": 0.0, "0.9": 0.05}, key="kd.weight", notations=("Teacher", "Student", "L_MSE"))
    students = sweep.runs[sweep.runs["notation"] == "Student"]
    keep = students["fingerprint"].str.endswith("0.5")  # the same cell, computed once
    sweep = replace(sweep, runs=sweep.runs.drop(students[~keep].index))
    sweep = replace(sweep, scores=sweep.scores[sweep.scores["fingerprint"].isin(sweep.runs["fingerprint"])])
    table = four.numbers(sweep).set_index(["settings", "notation"])
    for label, shift in {"kd.weight=0.5": 0.0, "kd.weight=0.9": 5.0}.items():
        student = 100 * dice_all("Student").mean()
        assert table.loc[(label, "Student"), "mean_dice_percent"] == pytest.approx(student)
        difference = 100 * dice_all("L_MSE").mean() + shift - student
        assert table.loc[(label, "L_MSE"), "student_difference_points"] == pytest.approx(difference)


def test_gaps_of_a_setting_are_told_with_it_and_rows_that_none_asked_for_are_left_out():
    sweep = rates({"1": 0.0, "2": 0.0}, notations=("Teacher", "Student", "L_MSE", "H_KLD"))
    gone = (sweep.runs["notation"] == "H_KLD") & sweep.runs["fingerprint"].str.endswith("-2")
    sweep = replace(sweep, runs=sweep.runs[~gone])
    table = table3.numbers(sweep)
    assert list(zip(table["settings"], table["notation"], table["gap"], strict=True)) == [
        ("train.lr=1", "L_MSE", ""),
        ("train.lr=1", "H_KLD", ""),
        ("train.lr=2", "L_MSE", ""),
        ("train.lr=2", "H_KLD", "not run"),
    ]
    notes = " ".join(below(sweep=sweep, table=table))
    assert "H_KLD with train.lr=2 (not run)" in notes
    assert "Settings: train.lr=1; train.lr=2. Each has its rows" in notes
    assert shown(table3, table).columns[0] == "Settings"


def test_what_differs_within_a_setting_or_was_not_swept_is_mixing():
    sweep = rates({"1": 0.0, "2": 0.0})
    with pytest.raises(InputError, match=r"mixes train\.lr=1 .* and train\.lr=2"):
        four.numbers(replace(sweep, varied=()))
    params = [params | {"train.epochs": str(i % 2)} for i, params in enumerate(sweep.runs["params"])]
    with pytest.raises(InputError, match=r"mixes train\.epochs=\d .* and train\.epochs="):
        four.numbers(changed(sweep, params=params))
    both = replace(sweep, varied=("train.lr", "train.epochs"))
    with pytest.raises(InputError, match=r"mixes train\.epochs=\d .* and train\.epochs="):
        four.numbers(changed(both, params=params))


def test_a_value_that_was_asked_for_alone_is_a_row_too():
    """Typed after the sweep, it has no variant of its own: its params tell it."""
    sweep = rates({"1": 0.0, "2": 0.0, "10": 0.0}, notations=("Teacher", "Student", "L_MSE"))
    alone = [params["train.lr"] == "10" for params in sweep.runs["params"]]
    sweep = changed(sweep, variant=sweep.runs["variant"].mask(alone, {}))
    labels = table3.numbers(sweep)["settings"]
    assert list(dict.fromkeys(labels)) == ["train.lr=1", "train.lr=2", "train.lr=10"]


def test_effects_and_sentences_stand_for_each_setting():
    sweep = rates({"1": 0.0, "2": 0.0})
    table = effects.numbers(sweep)
    one = effects.numbers(sweep_of())
    for _, part in table.groupby("settings"):
        pd.testing.assert_frame_equal(part.drop(columns="settings").reset_index(drop=True), one)
    lines = effects.sentences(table)
    assert [line.partition(": ")[0] for line in lines] == ["With train.lr=1"] * 6 + ["With train.lr=2"] * 6
    assert lines[0].removeprefix("With train.lr=1: ") == effects.sentences(one)[0]
    assert "over the 5 main effects" in " ".join(effects.footnotes(sweep, table, test="ttest"))


def test_table5_is_of_the_settings_with_the_best_cell():
    """By its validation Dice: the other one is the better on the test images."""
    sweep = rates({"1": 0.1, "2": 0.0}, notations=FEW)
    sweep = changed(sweep, val_dice=[float(params["train.lr"]) / 10 for params in sweep.runs["params"]])
    part, table = four.best_variant(sweep, four.numbers(sweep))
    assert set(table["notation"]) == set(FEW)
    assert set(part.runs.loc[part.runs["role"] != "teacher", "params"].map(lambda params: params["train.lr"])) == {"2"}


def test_a_single_split_has_no_column_for_it_and_a_note():
    for splits, is_single in (((1,), True), ((0, 1), False)):
        sweep = sweep_of(("Teacher", "Student", "L_MSE"), splits=splits)
        table = four.numbers(sweep)
        assert any(column.startswith("DSC % of split") for column in shown(four, table)) != is_single
        notes = four.footnotes(sweep, table, test="ttest")
        assert ("One split: how much the scores spread between splits is unknown." in notes) == is_single


# ---- splits ----------------------------------------------------------------------------------------------------------


def divided(sweep, protocol, *, where=slice(None)):
    runs = sweep.runs.copy()
    runs.loc[where, "split_protocol"] = protocol
    runs.loc[where, "split_digest"] = [f"digest{split}" * 3 for split in runs.loc[where, "split"]]
    return replace(sweep, runs=runs)


def test_a_footnote_says_how_the_images_are_divided():
    sweep = divided(sweep_of(["Teacher", "Student", "L_MSE"]), "5 folds, by group (patients.csv)")
    shown = footnotes.provenance(sweep)
    digests = ", ".join(f"{split} (digest digest{split}d)" for split in range(3))
    assert f"Splits: 5 folds, by group (patients.csv): {digests}." in shown


def test_two_protocols_in_one_sweep_are_refused_unless_it_varies_them():
    sweep = divided(sweep_of(["Teacher", "Student", "L_MSE"]), "the paper's random splits, by image")
    mixed = divided(sweep, "held out at random, by image", where=sweep.runs["notation"] == "L_MSE")
    with pytest.raises(InputError, match=r"mixes splits \(held out at random, by image and the paper's random splits"):
        four.numbers(mixed)
    by_image = sweep.runs.assign(variant=[{"split.group": "None"}] * len(sweep.runs))
    varied = replace(sweep, runs=by_image, varied=("split.group",))
    assert "L_MSE" in set(four.numbers(varied)["notation"])


@pytest.mark.parametrize(("recorded", "ratio"), [({}, 0.20 / 0.64), ({"kdsweep.split_images": "60/10/30"}, 0.5)])
def test_the_corrected_test_knows_how_many_images_a_split_trains_on(recorded, ratio):
    sweep = sweep_of(["Student", "L_MSE"])
    is_student = sweep.runs["notation"] == "Student"  # of an earlier version, which recorded nothing
    runs = sweep.runs.assign(tags=[{} if without else recorded for without in is_student])
    row = four.numbers(replace(sweep, runs=runs)).set_index("notation").loc["L_MSE"]
    means = [np.mean(dice_of("L_MSE", split)) - np.mean(dice_of("Student", split)) for split in range(3)]
    t = np.mean(means) / np.sqrt((1 / 3 + ratio) * np.var(means, ddof=1))
    assert row["student_p_runs"] == pytest.approx(2 * student_t.sf(abs(t), 2))


def test_images_of_one_group_are_one_cluster_of_table4():
    """Three copies of each patient's scores say no more than one."""
    sweep = sweep_of(["Teacher", "Student", "L_MSE"], splits=(0,))
    copies = [
        sweep.scores.assign(image=sweep.scores["image"] + f" view {k}", group=sweep.scores["image"]) for k in range(3)
    ]
    grouped = four.numbers(replace(sweep, scores=pd.concat(copies, ignore_index=True))).set_index("notation")
    single = four.numbers(sweep).set_index("notation")
    for column in ("student_p", "student_difference_points", "teacher_bound_points"):
        assert grouped.loc["L_MSE", column] == pytest.approx(single.loc["L_MSE", column])
    assert grouped.loc["L_MSE", "n_images"] == 3 * single.loc["L_MSE", "n_images"]


def test_a_sentence_that_is_in_lead_and_notes_is_written_once():
    table = Table("Numbers", pd.DataFrame({"a": [1]}), [Column("a", "A")], lead=["A check."], notes=["A check.", "B."])
    for text in (table.markdown("Numbers"), table.latex("Numbers")):
        assert (text.count("A check."), text.count("B.")) == (1, 1)
