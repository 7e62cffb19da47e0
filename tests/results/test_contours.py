"""Figure 2: which models and images it shows and says so, what is drawn, and that wrong images are refused."""

import json
import shutil
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.contour import ContourSet
from matplotlib.path import Path as Curve
from PIL import Image
from test_tables import FakeSweep, changed, fingerprint, run_row, sweep_of, with_status, without

from kdsweep.core.errors import InputError
from kdsweep.core.palette import class_colors
from kdsweep.data import sources
from kdsweep.data.images import load_images
from kdsweep.data.listing import list_images
from kdsweep.data.splits import random_split
from kdsweep.results.figures import contours, examples
from kdsweep.results.paper import BASELINES, CELLS
from kdsweep.store import checkpoint

S = 32
GREEN, RED = "#00e8a8", "#ff1f3d"
SOLID = None  # the pattern of a line without gaps
BLANK = np.zeros((S, S), np.uint8)
FEW = ("Teacher", "Teacher_WAug", "Student", *(cell for cell in CELLS if cell.startswith("HReg")))
ARGUMENTS = {"uri": None, "split": None, "seed": None, "models": None, "count": 1, "ids": ()}


def box(top, bottom, left, right):
    mask = BLANK.copy()
    mask[top:bottom, left:right] = 1
    return mask


def by_hand(prediction, mask):
    total = int(prediction.sum()) + int(mask.sum())
    return 2 * int((prediction & (mask == 1)).sum()) / total if total else 1.0


def figure_of(predictions, *, mask=None, missing=None, dice=None, caption="why", title="what"):
    mask = box(8, 20, 8, 20) if mask is None else mask
    predictions = {name: np.asarray(prediction, bool) for name, prediction in predictions.items()}
    dice = dice or {name: by_hand(prediction, mask) for name, prediction in predictions.items()}
    image = np.full((S, S, 3), 90, np.uint8)
    drawn = contours.figure(examples.Example(image, mask, predictions, missing or {}, dice, caption, title))
    FigureCanvasAgg(drawn).draw()
    return drawn


def full(names, **more):
    return figure_of(dict.fromkeys(names, box(8, 20, 9, 21)), **more)


def panels(figure):
    return {axes.get_label(): axes for axes in figure.axes}


def grid(figure):
    rows = {}
    for name, axes in panels(figure).items():
        rows.setdefault(round(axes.get_position().y0, 6), []).append((axes.get_position().x0, name))
    return [[name for _, name in sorted(rows[y])] for y in sorted(rows, reverse=True)]


def outlines(axes):
    """The contours by color: line pattern and curve."""
    returned = [child for child in axes.get_children() if isinstance(child, ContourSet)]
    return {to_hex(one.get_edgecolor()[0]): (one.get_linestyle()[0][1], one.get_paths()[0]) for one in returned}


def area(curve):
    """Of all loops by the shoelace formula; raises where a loop is open."""
    total = 0.0
    for loop in curve.to_polygons(closed_only=False):
        np.testing.assert_array_equal(loop[0], loop[-1])
        x, y = loop.T
        total += abs(float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())) / 2
    return total


def written(figure):
    return figure.legends[0].get_title().get_text().splitlines()


# ---- which images --------------------------------------------------------------------------------------------------

DICE = pd.DataFrame({"A": [0.9, 0.1, 0.5, 0.2, 0.8], "B": [0.7, 0.1, 0.7, 0.6, 0.6]}, index=list("vwxyz"))


def choose(dice, count, ids=()):
    return examples.choose(dice, count=count, ids=ids, where="split 0")


def test_images_are_at_even_quantiles_of_their_mean_dice():
    expected = {1: "x", 2: "yz", 3: "yxz", 4: "wyxz", 5: "wyxzv"}  # means 0.1, 0.4, 0.6, 0.7, 0.8: w y x z v
    for count, images in expected.items():
        assert list(choose(DICE, count)) == list(images), count
        assert list(choose(DICE[["B", "A"]].iloc[::-1], count)) == list(images), count
    assert list(choose(DICE.loc[list("wyxz")], 1)) == ["y"], "the lower median"
    many = pd.DataFrame({"A": np.arange(33) / 33}, index=[f"{place:02d}" for place in range(1, 34)])
    assert list(choose(many, 3)) == ["09", "17", "25"]
    equal = pd.DataFrame({"A": [0.1, 0.3, 0.2], "B": [0.2, 0.2, 0.3], "C": [0.3, 0.1, 0.1]}, index=["a", "c", "b"])
    assert equal.mean(axis=1).nunique() > 1, "by rounding alone"
    assert list(choose(equal, 3)) == ["a", "b", "c"]
    for count in (0, 6):
        with pytest.raises(InputError, match=rf"--count {count}: must be 1 to 5, the number of test images"):
            choose(DICE, count)


def test_the_rule_is_in_words():
    assert choose(DICE, 1) == {"x": "median of 5 test images by mean Dice over the 2 models shown"}
    places = ["quantile 1/4", "median", "quantile 3/4"]
    words = list(choose(DICE[["A"]], 3).values())
    assert words == [f"{place} of 5 test images by Dice of the one model shown" for place in places]


# ---- which models --------------------------------------------------------------------------------------------------


def test_a_teacher_is_in_the_split_and_seed_of_the_cells_that_learn_from_it():
    sweep = sweep_of(splits=(0, 1))
    sweep = changed(sweep, seed=sweep.runs["seed"].mask(sweep.runs["role"] != "teacher", 7))
    finished, missing = examples.models_of(sweep, split=1, seed=7)
    assert list(finished["notation"]) == [*BASELINES, *CELLS]
    assert list(finished["fingerprint"]) == [fingerprint(name, 1) for name in (*BASELINES, *CELLS)]
    assert missing == {}


def test_a_model_without_a_finished_run_says_why():
    reasons = {"FAILED": "failed", "RUNNING": "running", "KILLED": "interrupted", "missing": "not run"}
    for status, why in reasons.items():
        sweep = with_status(sweep_of(splits=(0, 1)), "H_KLD", 0, status)
        finished, missing = examples.models_of(sweep, split=0, seed=0)
        assert missing == {"H_KLD": why}
        assert "H_KLD" not in finished.index
        assert examples.models_of(sweep, split=1, seed=0)[1] == {}
    sweep = without(sweep_of(splits=(0,)), "Student")
    sweep = replace(sweep, scores=sweep.scores[sweep.scores["fingerprint"] != fingerprint("L_MSE", 0)])
    assert examples.models_of(sweep, split=0, seed=0)[1] == {"Student": "not run", "L_MSE": "no scores"}


def test_a_finished_run_hides_one_that_failed_under_other_options():
    sweep = sweep_of(["Student"], splits=(0,))
    failed = run_row("Student", 0, fingerprint="0-before", status="FAILED", params={})
    both = replace(sweep, runs=pd.concat([pd.DataFrame([failed]), sweep.runs], ignore_index=True))
    finished, missing = examples.models_of(both, split=0, seed=0)
    assert list(finished["fingerprint"]) == [fingerprint("Student", 0)]
    assert "Student" not in missing


def test_rows_that_the_sweep_does_not_request_are_left_out():
    few = ["Teacher_WAug", "Student", "L_KLD_WAug"]
    cases = [
        (sweep_of(splits=(0,)), [*BASELINES, *CELLS]),
        (without(sweep_of(splits=(0,)), "H_KLD"), [*BASELINES, *CELLS]),
        (without(sweep_of(FEW, splits=(0,)), "Student"), list(FEW)),
        (sweep_of(few, splits=(0,)), few),
    ]
    for sweep, expected in cases:
        assert examples.default_models(sweep) == expected


def test_cells_of_ones_own_follow_by_name():
    rows = [run_row(name, 0) for name in ("X_KLD_WAug", "X_Focal", "X_MSE", "L_Focal", "X_KLD")]
    sweep = sweep_of(splits=(0,))
    sweep = replace(sweep, runs=pd.concat([sweep.runs, pd.DataFrame(rows)], ignore_index=True))
    every = ["L_Focal", "X_Focal", "X_KLD", "X_KLD_WAug", "X_MSE"]
    assert examples.notations(sweep) == [*BASELINES, *CELLS, *every]


# ---- the grid ------------------------------------------------------------------------------------------------------


def test_the_whole_figure_has_the_image_the_baselines_and_a_row_per_path():
    rows = [["Image", *BASELINES], *(list(CELLS[start : start + 4]) for start in (0, 4, 8))]
    assert grid(full([*CELLS, *BASELINES])) == rows
    gone = dict.fromkeys(["Teacher", "H_KLD"], "not run")
    assert grid(full([name for name in (*BASELINES, *CELLS) if name not in gone], missing=gone)) == rows
    assert grid(full(FEW)) == [rows[0], rows[3]]


def test_cells_of_ones_own_get_rows_of_their_own():
    every = ["L_Focal", "X_MSE", "X_MSE_WAug", "X_KLD", "X_KLD_WAug", "X_Focal"]
    assert grid(full([*BASELINES, *CELLS, *every]))[4:] == [["L_Focal"], every[1:5], ["X_Focal"]]
    methods = ["AT_WAug", "CWD", "CWD_WAug", "EMKD_WAug", "SKD_WAug"]
    assert grid(full([*BASELINES, *CELLS, *methods]))[4:] == [methods[:4], methods[4:]]


def test_few_models_are_shown_in_a_compact_grid():
    for models, lengths in ((1, [2]), (3, [4]), (4, [3, 2]), (5, [3, 3]), (8, [3, 3, 3])):
        names = [*BASELINES[1:], *CELLS][:models]
        shown = grid(full(names))
        assert [len(row) for row in shown] == lengths, models
        assert [name for row in shown for name in row] == ["Image", *names]


@pytest.mark.parametrize("models", [1, 3, 4, 15])
def test_panels_are_square_and_nothing_overlaps_or_leaves_the_page(models):
    names = ["MyVeryLongPathWithName_FocalTversky_WAug", "MyVeryLongPathWithName_MSE", *BASELINES, *CELLS][-models:]
    figure = full(names, caption="word " * 60)
    assert figure.get_figwidth() == 7
    texts = [axes.title for axes in figure.axes] + list(figure.texts) + list(figure.legends)
    boxes = [one.get_window_extent() for one in texts] + [axes.bbox for axes in figure.axes]
    for one, other in combinations(boxes, 2):
        assert min(one.x1, other.x1) <= max(one.x0, other.x0) or min(one.y1, other.y1) <= max(one.y0, other.y0)
    for one in boxes:
        assert figure.bbox.x0 <= one.x0 < one.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= one.y0 < one.y1 <= figure.bbox.y1
    assert all(axes.bbox.width == pytest.approx(axes.bbox.height) for axes in figure.axes)
    assert max(axes.bbox.width for axes in figure.axes) / figure.dpi > 1.5


def test_letters_have_at_least_7_points():
    figure = full([*BASELINES, *CELLS[1:]], missing={"L_MSE": "failed"})
    texts = [text for axes in figure.axes for text in (axes.title, *axes.texts)]
    texts += [*figure.texts, *figure.legends[0].get_texts(), figure.legends[0].get_title()]
    assert min(text.get_fontsize() for text in texts) >= 7


# ---- what is drawn -------------------------------------------------------------------------------------------------


def test_ground_truth_is_green_and_solid_prediction_red_and_dashed():
    figure = figure_of({"Student": box(2, 12, 5, 11)}, mask=box(8, 20, 8, 20))
    drawn = outlines(panels(figure)["Student"])
    assert list(drawn) == [GREEN, RED]  # the dashes lie on top
    assert drawn[GREEN][0] is SOLID
    assert len(drawn[RED][0]) == 2  # on, off
    assert drawn[GREEN][1].get_extents().extents == pytest.approx([7.5, 7.5, 19.5, 19.5])
    assert drawn[RED][1].get_extents().extents == pytest.approx([4.5, 1.5, 10.5, 11.5])
    assert outlines(panels(figure)["Image"]) == {}
    lines = figure.legends[0].get_lines()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ground truth", "prediction"]
    assert [(to_hex(line.get_color()), line.get_linestyle()) for line in lines] == [(GREEN, "-"), (RED, "--")]


@pytest.mark.parametrize(
    "mask", [box(0, 10, 0, 6), box(20, 32, 27, 32), box(0, 32, 10, 14), box(0, 32, 0, 32), box(31, 32, 4, 9)]
)
def test_outlines_are_closed_also_along_the_border_of_the_image(mask):
    figure = figure_of({"Student": mask}, mask=mask)
    axes = panels(figure)["Student"]
    for _, curve in outlines(axes).values():
        assert area(curve) == pytest.approx(mask.sum() - 0.5)  # each corner cut by 1/8 pixel
        assert (curve.codes == Curve.CLOSEPOLY).sum() == (curve.codes == Curve.MOVETO).sum() == 1
    assert axes.axis() == (-0.5, S - 0.5, S - 0.5, -0.5)  # as the image alone
    assert panels(figure)["Image"].axis() == axes.axis()


def test_two_lesions_and_a_hole_are_outlined_each():
    mask = box(2, 12, 2, 12) + box(20, 30, 20, 30) - box(5, 8, 5, 8)
    _, curve = outlines(panels(figure_of({"Student": mask}, mask=mask))["Student"])[GREEN]
    assert len(curve.to_polygons(closed_only=False)) == 3
    assert area(curve) == pytest.approx(100 - 0.5 + 100 - 0.5 + 9 - 0.5)


def test_an_empty_prediction_says_that_no_lesion_was_found():
    figure = figure_of({"Student": BLANK, "L_MSE": box(8, 20, 8, 20)})
    student, cell = panels(figure)["Student"], panels(figure)["L_MSE"]
    assert list(outlines(student)) == [GREEN]
    assert [text.get_text() for text in student.texts] == ["no lesion predicted"]
    assert not cell.texts


def test_an_image_without_a_lesion_is_reported():
    figure = figure_of({"Student": BLANK}, mask=BLANK)
    assert outlines(panels(figure)["Student"]) == {}
    assert "The ground truth holds no lesion. Number: Dice on this image." in written(figure)
    assert panels(figure)["Student"].get_title() == "Student 1.00"
    assert not any("no lesion" in text for text in written(full(["Student"])))


@pytest.mark.parametrize("why", ["not run", "failed"])
def test_a_missing_model_is_gray_and_says_why(why):
    figure = full(["Teacher"], missing={"Student": why})
    axes = panels(figure)["Student"]
    assert axes.get_title() == "Student"
    assert [text.get_text() for text in axes.texts] == [why]
    for color in (axes.title.get_color(), axes.texts[0].get_color()):
        assert to_hex(color) == "#666666"
    assert not axes.images
    assert outlines(axes) == {}


def weights(dice):
    figure = full(list(dice), dice=dice)
    return {name: axes.title.get_fontweight() for name, axes in panels(figure).items()}, figure


def test_names_carry_their_dice_and_the_best_cell_is_bold():
    dice = {"Teacher": 0.912, "Student": 0.95, "L_MSE": 0.8312, "H_MSE": 0.8349}
    bold, figure = weights(dice)
    titles = [axes.get_title() for axes in panels(figure).values()]
    assert titles == ["Image", "Teacher 0.91", "Student 0.95", "L_MSE 0.83", "H_MSE 0.83"]
    assert [name for name, weight in bold.items() if weight == "bold"] == ["H_MSE"]
    assert "Number: Dice on this image, bold: the best cell." in written(figure)


def test_equal_cells_are_both_best_and_a_single_one_is_not():
    bold, _ = weights({"L_MSE": 0.8, "H_MSE": 0.8, "H_KLD": 0.7})
    assert [name for name, weight in bold.items() if weight == "bold"] == ["L_MSE", "H_MSE"]
    bold, figure = weights({"Student": 0.5, "H_MSE": 0.8})
    assert "bold" not in bold.values()
    assert "Number: Dice on this image." in written(figure)


def test_caption_and_title_are_text_whatever_signs_they_hold(tmp_path):
    figure = full(["Student"], caption="image $a_1$ of {b}", title="sweep $x^$")
    assert written(figure)[0] == "image $a_1$ of {b}"
    assert figure.get_suptitle() == "sweep $x^$"
    figure.savefig(tmp_path / "figure.png", dpi=100)
    with Image.open(tmp_path / "figure.png") as picture:
        width, height = picture.size
    assert width == 700
    assert height == pytest.approx(100 * figure.get_figheight(), abs=1)


def test_each_class_has_its_color_in_ground_truth_and_prediction():
    mask, prediction = box(8, 20, 8, 20), box(8, 20, 9, 21) * 2
    mask[24:28, 24:28] = 2
    image = np.full((S, S, 3), 90, np.uint8)
    shown = examples.Example(image, mask, {"Student": prediction}, {}, {"Student": 0.0}, "why", "what", ("a", "b"))
    drawn = contours.figure(shown)
    lines = [child for child in panels(drawn)["Student"].get_children() if isinstance(child, ContourSet)]
    first, second = (to_hex(np.divide(color, 255)) for color in class_colors(2))
    assert [to_hex(line.get_edgecolor()[0]) for line in lines] == [first, second, second]
    assert [line.get_linestyle()[0][1] is SOLID for line in lines] == [True, True, False]
    assert [area(line.get_paths()[0]) for line in lines] == pytest.approx([12 * 12, 4 * 4, 12 * 12], rel=0.05)
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "ground truth", "prediction"]
    assert [to_hex(line.get_color()) for line in legend.get_lines()][:2] == [first, second]
    assert "Number: Dice on this image, the mean over its classes." in written(drawn)


# ---- reading and checking ------------------------------------------------------------------------------------------


def shifted(mask, notation):
    return np.roll(mask, (*BASELINES, *CELLS).index(notation), axis=1).astype(bool)


@pytest.fixture(scope="module")
def scored(small_busi):
    """Ids of the test images of two splits, and all images, as a sweep sees them."""
    images = load_images(sources.Busi(small_busi), load_size=37, image_size=S)
    tests = [[images.ids[place] for place in random_split(len(images.ids), index=split).test] for split in (0, 1)]
    return tests, {one: (images.eval_images[k], images.eval_masks[k]) for k, one in enumerate(images.ids)}


@pytest.fixture
def study(scored, small_busi, tmp_path, monkeypatch):
    """Makes a sweep of predictions that are known: each mask, shifted by the model's place in the table."""
    tests, images = scored
    source = {"_target_": "kdsweep.data.Busi", "root": str(small_busi), "include_normal": "False", "name": "busi"}
    tags = {"kdsweep.data": list_images(sources.Busi(small_busi)).digest}
    params = {"image_size": str(S)} | {f"data.source.{key}": value for key, value in source.items()}

    def make(notations=FEW, splits=(0, 1), seeds=(0,)):
        runs, scores = [], []
        for notation, split, seed in [(n, s, e) for n in notations for s in splits for e in seeds]:
            name = fingerprint(notation, split, seed)
            runs.append(run_row(notation, split, seed, run_id=name, params=params, tags=tags))
            masks = {image: shifted(images[image][1], notation) for image in tests[split]}
            checkpoint.save_predictions(tmp_path / f"{name}.npz", np.stack(list(masks.values())), ids=list(masks))
            rows = {"image": list(masks), "dice": [by_hand(every, images[one][1]) for one, every in masks.items()]}
            scores.append(pd.DataFrame(rows).assign(fingerprint=name))
        return FakeSweep("study", pd.DataFrame(runs), pd.concat(scores, ignore_index=True))

    def read(run, name, **_):
        assert name == "test_predictions.npz"
        return (tmp_path / f"{run['run_id']}.npz").read_bytes()

    monkeypatch.setattr(examples.artifacts, "read", read)
    return make


def load(sweep, tmp_path, root=None, **changes):
    return examples.load(sweep, store=tmp_path, root=root, **(ARGUMENTS | changes))


def test_what_is_shown_is_the_image_its_mask_and_each_models_prediction(study, scored, tmp_path):
    sweep = with_status(study(), "HReg_MSE", 0, "FAILED")
    (shown,) = load(sweep, tmp_path, split=0)
    tests, images = scored
    finished = [name for name in FEW if name != "HReg_MSE"]
    means = {i: np.mean([by_hand(shifted(images[i][1], n), images[i][1]) for n in finished]) for i in tests[0]}
    median = sorted(means, key=lambda image: (round(means[image], 12), image))[2]
    image, mask = images[median]
    np.testing.assert_array_equal(shown.image, image)
    np.testing.assert_array_equal(shown.mask, mask)
    assert list(shown.predictions) == list(shown.dice) == finished
    for name in finished:
        np.testing.assert_array_equal(shown.predictions[name], shifted(mask, name))
        assert shown.dice[name] == pytest.approx(by_hand(shifted(mask, name), mask), abs=1e-12)
    assert shown.missing == {"HReg_MSE": "failed"}
    rule = "median of 5 test images by mean Dice over the 6 models shown"
    assert shown.caption == f"Split 0, image {median}: {rule}"
    assert shown.title == "Sweep study (data busi, profile paper)"
    assert grid(contours.figure(shown)) == [["Image", *FEW[:3]], list(FEW[3:])]


def test_masks_of_several_classes_are_read_as_the_run_read_them(study, scored, tmp_path, small_busi):
    sweep = study(["Student"], splits=(0,))
    classes = {"malignant": "malignant", "benign": "benign"}
    runs = sweep.runs.assign(params=[one | {"data.classes": json.dumps(classes)} for one in sweep.runs["params"]])
    for source in (None, sources.Busi(small_busi)):
        for shown in load(replace(sweep, runs=runs), tmp_path, count=5, source=source):
            assert shown.class_names == ("malignant", "benign")
            index = 1 if "image malignant" in shown.caption else 2
            assert set(np.unique(shown.mask)) == {0, index}


def test_other_images_than_those_scored_are_refused(study, small_busi, tmp_path):
    moved = shutil.copytree(small_busi, tmp_path / "busi")
    assert load(study(), tmp_path, root=moved)[0].caption == load(study(), tmp_path)[0].caption
    files = sorted(moved.rglob("*.png"))
    for file in (
        next(one for one in files if "_mask" in one.name),
        next(one for one in files if "_mask" not in one.name),
    ):
        content = file.read_bytes()
        with Image.open(file) as image:
            changed_image = image.point(lambda gray: 255 - gray)
        changed_image.save(file)
        message = (
            r"busi are not those that sweep study was trained and scored on: other files or other bytes; .*--data-root"
        )
        with pytest.raises(InputError, match=message):
            load(study(), tmp_path, root=moved)
        file.write_bytes(content)


def test_several_images_come_from_the_worst_to_the_best(study, tmp_path):
    shown = load(study(), tmp_path, count=3)
    means = [np.mean(list(one.dice.values())) for one in shown]
    assert means == sorted(means)
    assert ["quantile 1/4" in shown[0].caption, "median" in shown[1].caption, "quantile 3/4" in shown[2].caption]
    assert len({one.caption for one in shown}) == 3


def test_images_chosen_by_hand_are_called_so_with_their_place(study, scored, tmp_path):
    expected_of = sorted(scored[0][0])[:2][::-1]
    shown = load(study(), tmp_path, split=0, ids=expected_of)
    for image, one in zip(expected_of, shown, strict=True):
        assert one.caption.startswith(f"Split 0, image {image}: chosen by hand, place ")
        assert one.caption.endswith(" of 5 test images by mean Dice over the 7 models shown")
    worst = load(study(), tmp_path, split=0, count=5)[0].caption.split(":")[0].removeprefix("Split 0, image ")
    assert ", place 1 of 5 " in load(study(), tmp_path, split=0, ids=[worst])[0].caption


def test_models_asked_for_are_shown_and_alone_decide_the_ranking(study, tmp_path):
    (shown,) = load(study(), tmp_path, models=["HReg_KLD", "Student", "L_MSE", "Student"])
    assert list(shown.predictions) == ["Student", "HReg_KLD"]
    assert shown.missing == {"L_MSE": "not run"}
    assert shown.caption.endswith("by mean Dice over the 2 models shown")


def test_without_a_word_the_split_is_the_first_in_which_most_models_are_finished(study, tmp_path):
    sweep = study()
    assert load(sweep, tmp_path)[0].caption.startswith("Split 0, ")
    behind = with_status(sweep, "Student", 0, "FAILED")
    assert load(behind, tmp_path)[0].caption.startswith("Split 1, ")
    assert load(behind, tmp_path, models=["Teacher"])[0].caption.startswith("Split 0, ")
    assert load(behind, tmp_path, split=0)[0].missing == {"Student": "failed"}


def test_with_several_seeds_the_caption_names_the_seed(study, tmp_path):
    sweep = study(seeds=(3, 4))
    gone = (sweep.runs["notation"] == "Student") & (sweep.runs["seed"] == 3) & (sweep.runs["split"] == 1)
    sweep = changed(sweep, status=sweep.runs["status"].mask(gone, "FAILED"))
    assert load(sweep, tmp_path)[0].caption.startswith("Split 0, seed 3, ")
    assert load(sweep, tmp_path, split=1)[0].caption.startswith("Split 1, seed 4, ")
    assert load(sweep, tmp_path, seed=4)[0].caption.startswith("Split 0, seed 4, ")


@pytest.mark.parametrize(
    ("changes", "printed"),
    [
        ({"models": ["Student", "Foo", "Bar"]}, r"--models Foo,Bar: not in sweep study; choose of Teacher, .*HReg_KLD"),
        ({"models": []}, r"--models : not in sweep study; choose of Teacher"),
        ({"models": ["L_MSE"]}, r"--models L_MSE: no finished run in sweep study, split 0; finished there: Teacher, T"),
        ({"split": 7}, r"--split 7: not in sweep study; it has 0, 1"),
        ({"split": 1, "seed": 5}, r"--seed 5: not in sweep study split 1; it has 0"),
        ({"split": 0, "ids": ["x"]}, r"--image x: not a test image of split 0; there are (\w+ \(\d+\),? ?){5}$"),
        ({"count": 6}, r"--count 6: must be 1 to 5"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(study, tmp_path, changes, printed):
    with pytest.raises(InputError, match=printed) as error:
        load(study(), tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_a_split_in_which_nothing_is_finished_is_refused(study, tmp_path):
    sweep = study(["Student"])
    sweep = with_status(sweep, "Student", 1, "RUNNING")
    with pytest.raises(InputError, match=r"--split 1: no finished run in sweep study, split 1; finished there: none"):
        load(sweep, tmp_path, split=1)


def test_models_scored_on_different_images_are_not_ranked_together(study, tmp_path):
    sweep = study(["Teacher", "Student"], splits=(0,))
    fewer = sweep.scores.drop(sweep.scores.index[-1])
    with pytest.raises(InputError, match=r"Student and Teacher were scored on different images: the first is .* split"):
        load(replace(sweep, scores=fewer), tmp_path)


def test_images_that_are_gone_are_refused_with_the_remedy(study, tmp_path):
    with pytest.raises(InputError, match=r"data\.root=.*gone: no such folder.*; name the folder .* with --data-root"):
        load(study(), tmp_path, root=tmp_path / "gone")


@pytest.mark.parametrize("damage", ["absent", "other"])
def test_predictions_that_cannot_be_read_are_named(study, tmp_path, damage):
    sweep, file = study(), tmp_path / f"{fingerprint('Student', 0)}.npz"
    file.unlink()
    if damage == "other":
        np.savez(file, masks=BLANK)
    with pytest.raises(InputError, match=r"Student split 0 seed 0: test_predictions\.npz of run Student-0-0 cannot be"):
        load(sweep, tmp_path)
