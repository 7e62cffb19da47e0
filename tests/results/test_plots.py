"""The figures of a sweep: the artists hold the numbers of the frames, and every distinction has a shape."""

import io
from itertools import combinations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.text import Annotation, Text
from test_tables import dice_all, dice_of, interval_of, sweep_of, with_dice, with_status

from kdsweep.core.errors import InputError
from kdsweep.results import paper
from kdsweep.results.figures import curves, effects, pairs, style
from kdsweep.results.tables import table4

HEADINGS = ["Logits", "Hidden", "Hidden-Regressor"]
LONG = "; ".join(f"failed: split {split} seed 0, {split} seed 1" for split in range(6))
NUMBERS = ["mean_dice_percent", "student_low_points", "student_high_points"]


def table_of(means, *, splits=None, gaps=None):
    """A Table 4 with the columns that are drawn; each difference to Student is known to half a point."""
    difference = pd.Series(means) - means.get("Student", np.nan)
    table = pd.DataFrame({"notation": list(means), "gap": "", "mean_dice_percent": list(means.values())})
    table["student_low_points"] = (difference - 0.5).to_numpy()
    table["student_high_points"] = (difference + 0.5).to_numpy()
    table.loc[table["notation"] == "Student", NUMBERS[1:]] = np.nan
    table = table.assign(teacher_verdict=table["notation"].map({"H_MSE": "non-inferior"}), margin_points=2.0)
    table = table.assign(student_methods_low_points=np.nan, student_methods_high_points=np.nan)
    for split, shift in (splits or {}).items():
        table[f"mean_dice_percent_split{split}"] = table["mean_dice_percent"] + shift
    for notation, gap in (gaps or {}).items():
        table.loc[table["notation"] == notation, table.columns.drop(["notation", "gap"])] = np.nan
        table.loc[table["notation"] == notation, "gap"] = gap
    return table


def effects_of(**changes):
    """Five main effects and an interaction; a change is the reason of the gap of the row of that number."""
    names = ["H - L", "HReg - L", "HReg - H", "KLD - MSE", "weak - strong", "(H - L) x (KLD - MSE)"]
    table = pd.DataFrame({"effect": names, "kind": ["main"] * 5 + ["interaction"], "factor": "any", "gap": ""})
    numbers = {"difference_points": [0.1, -0.2, 0.3, 1.5, -2.5, 9.0], "p": 0.001, "n_images": 36}
    table = table.assign(**numbers, p_holm=[1.0, 0.5, 0.04321, 0.00001, 0.01, 0.2])
    table = table.assign(low_points=table["difference_points"] - 1, high_points=table["difference_points"] + 2)
    table = table.assign(methods_low_points=np.nan, methods_high_points=np.nan, p_methods_holm=np.nan)
    for row, gap in changes.items():
        numbers = ["difference_points", "low_points", "high_points", "p", "p_holm"]
        table.loc[int(row.removeprefix("row")), numbers] = np.nan
        table.loc[int(row.removeprefix("row")), "gap"] = gap
    return table


MEANS = {"Teacher": 80.0, "Teacher_WAug": 81.0, "Student": 70.0}
MEANS |= {cell: 72.0 + number for number, cell in enumerate(paper.CELLS)}
SHIFTS = {0: -1.0, 1: 0.25, 2: 1.5}


def drawn(*, scores=None, main=None):
    scores = table_of(MEANS, splits=SHIFTS) if scores is None else scores
    main = effects_of() if main is None else main
    return effects.figure(scores, main, title="A sweep")


def said(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


def legend(owner):
    return [text.get_text().replace("\n", " ") for text in owner.get_legend().get_texts()]


def lines(axes, label):
    return [line for line in axes.lines if label in str(line.get_label())]


def points(axes, label):
    """x by the notation whose row the mark stands in; a mark of a split stands a third of a row below."""
    (line,) = lines(axes, label)
    rows = [text.get_text() for text in axes.get_yticklabels()]
    existing = [(x, y) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if not np.isnan(x)]
    return {rows[int(y)]: x for x, y in existing}


def spans(axes, which=0, of=1):
    returned = [artist for artist in axes.collections if isinstance(artist, LineCollection)]
    assert len(returned) == of
    returned = returned[which]
    return [(x0, x1, y) for (x0, y), (x1, _) in filter(len, returned.get_segments())]  # NaN makes an empty one


def curves_of(notations=("Student", "L_MSE", "L_KLD"), splits=(0, 1), seeds=(0,), epochs=4):
    rows = [
        {"notation": notation, "split": split, "seed": seed, "metric": "val/dice", "epoch": epoch, "value": 0.0}
        for notation in notations
        for split in splits
        for seed in seeds
        for epoch in range(1, epochs + 1)
    ]
    frame = pd.DataFrame(rows)
    number = frame["notation"].map(list(notations).index)
    return frame.assign(value=0.1 * number + 0.01 * frame["split"] + 0.001 * frame["seed"] + 0.0001 * frame["epoch"])


def pairs_of(*differences, notation="L_MSE", split=0):
    """Student scores one half in each image."""
    frame = pd.DataFrame({"notation": notation, "split": split, "seed": 0, "dice_baseline": 0.5}, index=differences)
    images = [f"image{number}" for number in range(len(differences))]
    return frame.assign(image=images, dice_ours=0.5 + np.array(differences)).reset_index(drop=True)


def panels(figure):
    return {axes.get_title(loc="left").split("\n")[0]: axes for axes in figure.axes if axes.axison}


def overlaps(figure):
    """Pairs of texts that meet, and texts that leave the page, among those that drawing the figure really draws."""
    texts, draw = [], Text.draw

    def record(text, renderer):
        if text.get_visible() and text.get_text().strip():
            texts.append(text)
        draw(text, renderer)

    canvas = FigureCanvasAgg(figure)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", record)
        canvas.draw()
    assert min(text.get_fontsize() for text in texts) >= 7
    page = figure.bbox
    boxes = [(text.get_text(), Text.get_window_extent(text, canvas.get_renderer()).padded(-0.5)) for text in texts]
    met = {(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)}
    outside = {t for t, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > page.x1 or box.y1 > page.y1}
    return met, outside


# ---- scores and main effects ---------------------------------------------------------------------------------------


def test_a_row_per_cell_in_the_papers_order_below_its_paths_heading():
    left = drawn().axes[0]
    rows = [text.get_text() for text in left.get_yticklabels()]
    groups = [[heading, *paper.CELLS[4 * i : 4 * i + 4]] for i, heading in enumerate(HEADINGS)]
    assert rows == [row for group in groups for row in group]
    bold = [text.get_text() for text in left.get_yticklabels() if text.get_fontweight() == "bold"]
    assert bold == HEADINGS
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first row is the top one
    single = drawn(scores=table_of(MEANS | {"AT_MAE_WAug": 75.0, "AT_MAE": 74.0})).axes[0]
    assert [text.get_text() for text in single.get_yticklabels()][-3:] == ["Own cells", "AT_MAE", "AT_MAE_WAug"]
    assert points(single, "weak Teacher augmentation")["AT_MAE_WAug"] == 75.0
    methods = drawn(scores=table_of(MEANS | {"CWD_WAug": 75.0})).axes[0]
    assert [text.get_text() for text in methods.get_yticklabels()][-2:] == ["Methods", "CWD_WAug"]


def test_means_are_reported_by_augmentation_in_shape_and_color():
    left = drawn().axes[0]
    weak = {cell: mean for cell, mean in MEANS.items() if cell in paper.CELLS and cell.endswith("_WAug")}
    strong = {cell: mean for cell, mean in MEANS.items() if cell in paper.CELLS and not cell.endswith("_WAug")}
    assert points(left, "weak Teacher augmentation") == weak
    assert points(left, "strong Teacher augmentation") == strong
    (one,), (other,) = lines(left, "weak"), lines(left, "strong")
    assert one.get_marker() != other.get_marker()
    assert one.get_color() != other.get_color()


def test_the_paired_interval_is_laid_off_from_the_students_mean():
    scores = table_of(MEANS)
    scores.loc[scores["notation"] == "H_MSE", NUMBERS[1:]] = [-3.0, 11.0]
    left = drawn(scores=scores).axes[0]
    rows = [text.get_text() for text in left.get_yticklabels()]
    returned = {rows[int(y)]: (low, high) for low, high, y in spans(left)}
    expected = {cell: (MEANS[cell] - 0.5, MEANS[cell] + 0.5) for cell in paper.CELLS} | {"H_MSE": (67.0, 81.0)}
    assert returned == {cell: pytest.approx(span) for cell, span in expected.items()}


def test_each_split_has_a_hollow_mark_of_its_own_shape():
    left = drawn().axes[0]
    for split, shift in SHIFTS.items():
        assert points(left, f"split {split}") == {cell: MEANS[cell] + shift for cell in paper.CELLS}
        assert lines(left, f"split {split}")[0].get_markerfacecolor() == "white"
    assert len({lines(left, f"split {split}")[0].get_marker() for split in SHIFTS}) == 3
    assert not lines(drawn(scores=table_of(MEANS, splits={0: 0.0})).axes[0], "split")


def test_the_baselines_are_lines_of_different_styles_each_labelled_at_its_top():
    left = drawn().axes[0]
    upright = [line for line in left.lines if list(line.get_ydata()) == [0, 1]]
    assert sorted(line.get_xdata()[0] for line in upright) == [70.0, 80.0, 81.0]
    assert len({line.get_linestyle() for line in upright}) == 3
    labels = {text.get_text(): text.xy[0] for text in left.texts if isinstance(text, Annotation) and text.get_text()}
    assert labels == {"Student 70.0": 70.0, "Teacher 80.0": 80.0, "Teacher_WAug 81.0": 81.0}


def test_the_legend_names_what_is_drawn_and_no_more():
    complete = legend(drawn().axes[2])
    assert complete == [
        "mean of all test images, strong Teacher augmentation",
        "mean of all test images, weak Teacher augmentation",
        "95 % interval of the paired difference to Student (these networks), laid off from its mean",
        "at most 2 points worse than its Teacher (Holm)",
        *(f"mean of split {split}" for split in SHIFTS),
    ]
    alone = table_of({"L_MSE": 71.0, "Teacher": 80.0})
    assert legend(drawn(scores=alone).axes[2]) == ["mean of all test images, strong Teacher augmentation"]


@pytest.mark.parametrize("missing", ["gap", "row"])
def test_without_student_there_are_no_paired_intervals(missing):
    scores = table_of({name: mean for name, mean in MEANS.items() if name != "Student"}, splits=SHIFTS)
    if missing == "gap":
        scores = pd.concat([scores, table_of({"Student": 70.0}, gaps={"Student": "failed: split 1"})])
    figure = drawn(scores=scores)
    left = figure.axes[0]
    assert not [artist for artist in left.collections if isinstance(artist, LineCollection)]
    assert not any("interval" in text for text in legend(figure.axes[2]))
    assert not any(text.startswith("Student") for text in said(left))
    assert len(points(left, "strong")) == len(points(left, "split 1")) / 2 == 6


def test_a_row_with_a_gap_reports_its_reason_in_place_of_marks():
    left = drawn(scores=table_of(MEANS, splits=SHIFTS, gaps={"H_KLD": "failed: split 1", "L_MSE": LONG})).axes[0]
    printed = {text.get_text(): text.get_position()[1] for text in left.texts if text.get_color() == style.GRAY}
    rows = [text.get_text() for text in left.get_yticklabels()]
    assert printed["failed: split 1"] == rows.index("H_KLD")
    (short,) = set(printed) - {"failed: split 1"}
    assert printed[short] == rows.index("L_MSE")
    assert LONG.startswith(short.removesuffix(" ..."))
    assert short.endswith(" ...")
    assert not {"H_KLD", "L_MSE"} & {*points(left, "strong"), *points(left, "split 0")}
    assert len(spans(left)) == 10


def test_nothing_but_gaps_is_a_figure_of_reasons():
    names = [*paper.BASELINES, *paper.CELLS]
    scores = table_of(dict.fromkeys(names, 50.0), gaps=dict.fromkeys(names, "not run"))
    figure = drawn(scores=scores, main=effects_of(**{f"row{row}": "needs L_MSE (not run)" for row in range(6)}))
    assert said(figure.axes[0]) == ["not run"] * 12
    assert [" ".join(text.split()) for text in said(figure.axes[1])] == ["needs L_MSE (not run)"] * 5
    assert figure.axes[0].get_xlim() == (0, 100)
    assert figure.axes[2].get_legend() is None
    assert overlaps(figure) == (set(), set())


def test_main_effects_with_interval_and_p_after_holm():
    right = drawn(main=effects_of(row1="needs H_MSE (not run)")).axes[1]
    assert [text.get_text() for text in right.get_yticklabels()] == effects_of()["effect"].tolist()[:5]
    (line,) = [line for line in right.lines if line.get_marker() == "o"]
    np.testing.assert_array_equal(line.get_xdata(), [0.1, np.nan, 0.3, 1.5, -2.5])
    assert spans(right) == [
        pytest.approx(span) for span in [(-0.9, 2.1, 0), (-0.7, 2.3, 2), (0.5, 3.5, 3), (-3.5, -0.5, 4)]
    ]
    at = {text.get_position()[1]: text.get_text() for text in right.texts if not isinstance(text, Annotation)}
    assert at == {0: "1.0000", 1: "needs H_MSE (not run)", 2: "0.0432", 3: "<0.0001", 4: "0.0100"}
    assert "p (Holm)" in said(right)


def test_several_seeds_give_intervals_of_methods_too_thin_beside_those_of_the_networks():
    scores, main = table_of(MEANS), effects_of()
    scores["student_methods_low_points"] = scores["student_low_points"] - 1.5
    scores["student_methods_high_points"] = scores["student_high_points"] + 2
    main = main.assign(methods_low_points=main["low_points"] - 1, methods_high_points=main["high_points"] + 1)
    main = main.assign(p_methods_holm=[1.0, 0.7, 0.09, 0.04, 0.5, 0.5])
    figure = drawn(scores=scores, main=main)
    left, right, beside = figure.axes
    single, wide = spans(left, 0, of=2), spans(left, 1, of=2)
    assert wide == [pytest.approx((low - 1.5, high + 2, y)) for low, high, y in single]
    widths = [artist.get_linewidth()[0] for artist in left.collections if isinstance(artist, LineCollection)]
    assert widths[0] > widths[1]
    ends = [line for line in left.lines if line.get_marker() == "|"]
    assert sorted(ends[0].get_xdata()) == pytest.approx(sorted(x for low, high, _ in wide for x in (low, high)))
    assert "the same of methods (other trainings)" in legend(beside)
    assert spans(right, 1, of=2)[0] == pytest.approx((-1.9, 3.1, 0))
    at = {text.get_position()[1]: text.get_text() for text in right.texts if not isinstance(text, Annotation)}
    assert at == {0: "1.0000", 1: "0.7000", 2: "0.0900", 3: "0.0400", 4: "0.5000"}
    assert "methods:\np (Holm)" in said(right)
    assert "of methods" in right.get_xlabel()
    assert overlaps(figure) == (set(), set())


def test_the_numbers_of_a_whole_sweep_reach_the_figure():
    sweep = sweep_of()
    left = drawn(scores=table4.numbers(sweep)).axes[0]
    mean = 100 * dice_all("H_KLD_WAug").mean()
    assert points(left, "weak")["H_KLD_WAug"] == pytest.approx(mean)
    assert points(left, "split 2")["H_KLD_WAug"] == pytest.approx(100 * dice_of("H_KLD_WAug", 2).mean())
    low, high = interval_of(100 * (dice_all("L_MSE") - dice_all("Student")))
    student = 100 * dice_all("Student").mean()
    assert spans(left)[0] == pytest.approx((student + low, student + high, 1))


def test_scores_without_a_cell_are_refused():
    with pytest.raises(InputError, match=r"^scores: no row is a cell's; give the complete table"):
        drawn(scores=table_of({"Student": 70.0, "Teacher": 80.0}))


# ---- validation curves ---------------------------------------------------------------------------------------------


def test_a_panel_per_notation_holds_a_line_per_split_and_seed():
    frame = curves_of(splits=(0, 1), seeds=(3, 7)).sample(frac=1, random_state=1)  # in no order
    frame = pd.concat([frame, frame.assign(metric="val/loss", value=7.0)])
    figure = curves.figure(frame, title="A sweep")
    axes = panels(figure)["L_KLD"]
    single = [line for line in axes.lines if line.get_color() != style.LIGHT]
    assert [line.get_xdata().tolist() for line in single] == [[1, 2, 3, 4]] * 4
    starts = [line.get_ydata()[0] for line in single]
    assert starts == pytest.approx([0.2031, 0.2071, 0.2131, 0.2171])
    styles = [line.get_linestyle() for line in single]
    assert styles[0] == styles[1] != styles[2] == styles[3]
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["split 0", "split 1"]
    assert (axes.get_ylabel(), panels(figure)["L_MSE"].get_ylabel()) == ("", "validation Dice")


def test_the_students_curves_lie_in_gray_behind_the_cells_only():
    names = ("Student", "Teacher", "L_MSE", "AT_MAE")
    figure = curves.figure(curves_of(names), title="A sweep")
    behind = {
        name: [line for line in axes.lines if line.get_color() == style.LIGHT] for name, axes in panels(figure).items()
    }
    assert {name: len(drawn) for name, drawn in behind.items()} == {
        "L_MSE": 2,
        "Student": 0,
        "Teacher": 0,
        "AT_MAE": 2,
    }
    assert behind["L_MSE"][1].get_ydata().tolist() == pytest.approx([0.0101, 0.0102, 0.0103, 0.0104])
    assert behind["L_MSE"][0].get_zorder() < panels(figure)["L_MSE"].lines[-1].get_zorder()
    assert figure.legends[0].get_texts()[-1].get_text().startswith("Student")
    without = curves.figure(curves_of(("L_MSE", "Teacher")), title="A sweep")
    assert [text.get_text() for text in without.legends[0].get_texts()] == ["split 0", "split 1"]


def test_the_papers_cells_keep_their_places_and_the_others_follow():
    names = ("Teacher_WAug", "HReg_KLD_WAug", "Student", "L_KLD", "Teacher", "AT_MAE_WAug")
    figure = curves.figure(curves_of(names), title="A sweep")
    shown = panels(figure)
    assert len(shown) == len(figure.axes)
    assert list(shown) == [*paper.CELLS, "Student", "Teacher", "Teacher_WAug", "AT_MAE_WAug"]
    empty = {name for name, axes in shown.items() if said(axes) == ["no curve"]}
    assert empty == set(paper.CELLS) - {"HReg_KLD_WAug", "L_KLD"}
    one = panels(curves.figure(curves_of(("L_KLD", "Student")), title="A sweep"))
    assert list(one) == ["L_KLD", "Student"]


def test_nan_leaves_a_hole_and_a_point_alone_is_marked():
    frame = curves_of(("L_MSE",), splits=(0,), epochs=6)
    frame.loc[[1, 3], "value"] = np.nan
    (line,) = panels(curves.figure(frame, title="A sweep"))["L_MSE"].lines
    assert np.isnan(line.get_ydata()).tolist() == [False, True, False, True, False, False]
    assert list(line.get_markevery()) == [True, False, True, False, False, False]


def test_a_metric_that_no_run_has_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"^metric=val/x: no run has a value of it; other metrics: val/dice$"):
        curves.figure(curves_of(), title="A sweep", metric="val/x")
    for nothing in (curves_of().iloc[:0], curves_of().assign(value=np.nan)):
        with pytest.raises(InputError, match=r"^metric=val/dice: no run has a value of it; other metrics: none$"):
            curves.figure(nothing, title="A sweep")
    other = curves.figure(curves_of().assign(metric="val/loss"), title="A sweep", metric="val/loss")
    assert other.axes[0].get_ylabel() == "val/loss"


# ---- each image against Student ------------------------------------------------------------------------------------


def test_paired_holds_each_image_beside_students_of_the_same_place():
    sweep = with_status(sweep_of(splits=(0, 1), seeds=(0,)), "L_KLD", 1, "FAILED")
    returned = pairs.paired(sweep)
    assert list(returned) == ["notation", "split", "seed", "image", "dice_ours", "dice_baseline"]
    assert list(dict.fromkeys(returned["notation"])) == [cell for cell in paper.CELLS if cell != "L_KLD"]
    single = returned[returned["notation"] == "H_MSE"]
    np.testing.assert_array_equal(single["dice_ours"], dice_all("H_MSE", (0, 1)))
    np.testing.assert_array_equal(single["dice_baseline"], dice_all("Student", (0, 1)))
    assert single["split"].tolist() == [0] * 12 + [1] * 12
    for lacking in (
        with_status(sweep, "Student", 0, "RUNNING"),
        sweep_of(("Teacher", "L_MSE")),
        sweep_of(("Student",)),
    ):
        none = pairs.paired(lacking)
        assert none.empty
        assert list(none) == list(returned)


def test_paired_refuses_different_images():
    with pytest.raises(InputError, match=r"H_MSE and Student were scored on different images"):
        pairs.paired(with_dice(sweep_of(splits=(0,)), "H_MSE", 0, [0.5] * 13))


def test_a_mark_per_image_with_a_shape_per_split():
    frame = pd.concat([pairs_of(0.1, -0.2), pairs_of(0.3, split=1), pairs_of(0.0, notation="AT_MAE")])
    figure = pairs.figure(frame.assign(dice_baseline=[0.5, 0.4, 0.3, 0.2]), title="A sweep")
    shown = panels(figure)
    assert list(shown) == ["L_MSE", "AT_MAE"]
    first, second = [artist for artist in shown["L_MSE"].collections if isinstance(artist, PathCollection)]
    np.testing.assert_allclose(first.get_offsets(), [[0.5, 0.6], [0.4, 0.3]])
    np.testing.assert_allclose(second.get_offsets(), [[0.3, 0.8]])
    assert len(first.get_paths()[0].vertices) != len(second.get_paths()[0].vertices)
    assert first.get_edgecolor().tolist() != second.get_edgecolor().tolist()
    assert shown["L_MSE"].get_aspect() == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["split 0", "split 1"]


@pytest.mark.parametrize(
    ("differences", "printed"),
    [
        ((0.1, 0.2, -0.06), "better 2, worse 1\nmean +8.00 points"),
        ((0.1, -0.2, -0.2, 0.0, 5e-13), "better 1, worse 2\nequal 2, mean -6.00 points"),
        ((2e-12, -2e-12, 0.03), "better 2, worse 1\nmean +1.00 points"),
    ],
)
def test_better_worse_equal_and_the_mean_are_counted(differences, printed):
    (axes,) = pairs.figure(pairs_of(*differences), title="A sweep").axes
    assert axes.get_title(loc="left") == f"L_MSE\n{printed}"


def test_no_pairs_are_refused():
    with pytest.raises(InputError, match=r"^nothing to compare: no cell and Student are both finished"):
        pairs.figure(pairs_of().iloc[:0], title="A sweep")


# ---- all of them ---------------------------------------------------------------------------------------------------

USERS = [f"Own{number}_MAE{'_WAug' if number % 2 else ''}" for number in range(8)]
SIX = dict.fromkeys(range(6), 0.3)
CLOSE = {"Student": 74.9, "Teacher": 74.91, "Teacher_WAug": 74.92}
CASES = {
    "whole": lambda: drawn(),
    "own cells, six splits": lambda: drawn(scores=table_of(MEANS | dict.fromkeys(USERS, 75.5), splits=SIX)),
    "one cell": lambda: drawn(scores=table_of({"Student": 70.0, "L_KLD": 71.0})),
    "long gaps": lambda: drawn(
        scores=table_of(MEANS, gaps={"L_MSE": LONG, "H_KLD": LONG}), main=effects_of(row0=LONG, row1=LONG)
    ),
    "close baselines": lambda: drawn(scores=table_of(MEANS | CLOSE)),
    "far baselines": lambda: drawn(scores=table_of(MEANS | {"Student": 1.0})),
    "curves": lambda: curves.figure(
        curves_of(("Student", *paper.CELLS, *USERS), splits=range(6), seeds=(0, 1)), title="long title " * 20
    ),
    "one curve": lambda: curves.figure(curves_of(("AT_MAE_WAug",), splits=(0,)), title="A sweep"),
    "pairs": lambda: pairs.figure(
        pd.concat([pairs_of(*[0.1] * 120, *[0.0] * 120, notation=name) for name in (*paper.CELLS, *USERS)]),
        title="A sweep",
    ),
    "one pair": lambda: pairs.figure(pairs_of(0.1), title="A sweep"),
}


@pytest.mark.parametrize("case", CASES)
def test_no_text_meets_another_or_leaves_the_page(case):
    figure = CASES[case]()
    assert figure.get_size_inches()[0] == 7
    assert overlaps(figure) == (set(), set())


def test_texts_that_meet_would_be_seen():
    figure = drawn()
    figure.axes[0].text(0.5, 0.5, "one", transform=figure.axes[0].transAxes, fontsize=9)
    figure.axes[0].text(0.5, 0.5, "other", transform=figure.axes[0].transAxes, fontsize=9)
    figure.text(0.99, 0.01, "beyond the edge", fontsize=9)
    met, outside = overlaps(figure)
    assert ("one", "other") in met
    assert outside == {"beyond the edge"}


def test_global_settings_neither_change_nor_count():
    before = dict(mpl.rcParams)
    figures = [
        drawn(),
        curves.figure(curves_of(), title="A"),
        pairs.figure(pairs_of(0.1), title="A"),
    ]
    assert dict(mpl.rcParams) == before
    assert not plt.get_fignums()
    assert all(figure.get_suptitle() in ("A", "A sweep") for figure in figures)
    with mpl.rc_context({"font.size": 20, "xtick.labelsize": 20, "ytick.labelsize": 20}):
        assert overlaps(drawn()) == (set(), set())
        figures[1].savefig(io.BytesIO(), format="svg")
        sizes = {text.get_fontsize() for axes in panels(figures[1]).values() for text in axes.get_xticklabels()}
    assert sizes == {style.FONT}
