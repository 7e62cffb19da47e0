"""The contour figure: which images it shows, what it draws, what it refuses."""

import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kdsweep import figures
from kdsweep.data import Images
from kdsweep.errors import InputError
from kdsweep.tracking import Sweep

mpl.use("Agg")


def test_images_are_picked_at_the_quartiles_of_the_dice():
    dice = pd.Series({"a": 0.9, "b": 0.1, "c": 0.5, "d": 0.3, "e": 0.7})
    assert figures.pick_images(dice, count=3) == ["d", "c", "e"]
    assert figures.pick_images(dice, count=1) == ["c"]


def test_the_figure_shows_truth_and_prediction_in_two_colours(tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 10:30] = 1
    file = tmp_path / "new" / "contours.png"
    figures.draw_contours(
        images={"x": np.full((64, 64, 3), 90, np.uint8)},
        masks={"x": mask},
        predictions={"Student": {"x": np.roll(mask, 20, axis=1).astype(bool)}},
        dice={"Student": pd.Series({"x": 0.0})},
        file=file,
    )
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    green = (pixels[..., 1] > 150) & (pixels[..., 0] < 80)
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 80)
    assert green.sum() > 100
    assert red.sum() > 100
    assert np.nonzero(red)[1].mean() > np.nonzero(green)[1].mean()  # the prediction was moved to the right
    assert not plt.get_fignums()


def test_an_empty_prediction_is_drawn_as_none(tmp_path):
    empty = np.zeros((32, 32), bool)
    figures.draw_contours(
        images={"x": np.zeros((32, 32, 3), np.uint8)},
        masks={"x": empty.astype(np.uint8)},
        predictions={"Student": {"x": empty}},
        dice={"Student": pd.Series({"x": 1.0})},
        file=tmp_path / "c.svg",
    )
    assert (tmp_path / "c.svg").stat().st_size > 0


def test_a_model_that_is_not_finished_is_named_with_those_that_are(tmp_path):
    runs = pd.DataFrame([{"notation": "Student", "split": 0, "status": "FINISHED", "run_id": "r", "fingerprint": "f"}])
    sweep = Sweep("demo", runs, pd.DataFrame(columns=["fingerprint", "image", "dice"]))
    images = Images("x", [], [], *(np.empty(0) for _ in range(4)), digest="")
    with pytest.raises(InputError, match=r"--models Teacher: not finished in sweep demo split 0; finished: Student"):
        figures.contours(
            sweep,
            store=tmp_path,
            uri=None,
            split=0,
            images=images,
            models=["Teacher"],
            count=1,
            file=tmp_path / "c.png",
        )


def test_the_command_tells_a_missing_store_in_one_line(tmp_path):
    command = [sys.executable, "-m", "kdsweep.figures", "profile=quick", f"store={tmp_path}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("kdsweep: error: --store")
    assert len(done.stderr.splitlines()) == 1
