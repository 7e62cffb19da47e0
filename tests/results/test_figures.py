"""The command that draws figures: which sweep, which files, what is logged, what it refuses."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_mirror import begin, make_cell
from test_tables import rates, sweep_of

from kdsweep import cli
from kdsweep.core.errors import InputError
from kdsweep.results.figures import command as figures
from kdsweep.results.figures import examples, style
from kdsweep.store import sweep_file
from kdsweep.tracking import mirror, reader


@dataclass
class Logged:
    """What was attached to the sweep's run, instead of MLflow."""

    files: list[str] = field(default_factory=list)

    def attach(self, sweep, files, *, folder, store, uri):
        self.files += [f"{folder}/{file.name}" for file in files]
        return "logged"


def curves_of(sweep, *, store, uri):
    runs = sweep.runs.loc[sweep.runs.index.repeat(2), ["notation", "split", "seed"]]
    return runs.assign(metric="val/dice", epoch=[0, 1] * len(sweep.runs), value=0.5)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs the command on a sweep made here."""
    logged = Logged()
    monkeypatch.setattr(reader, "attach", logged.attach)
    monkeypatch.setattr(reader, "read_curves", curves_of)

    def run(sweep, *words):
        monkeypatch.setattr(reader, "read_sweep", lambda **_: sweep)
        code = cli.main(["figures", *words, "--out", str(tmp_path / "out"), "--store", str(tmp_path)])
        return code, sorted(file.name for file in (tmp_path / "out").glob("*")), logged.files

    return run


def shown(number=1):
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 8:20] = 1
    predictions = {"Student": np.roll(mask, 2, axis=0).astype(bool)}
    image = np.full((32, 32, 3), 90, np.uint8)
    return examples.Example(image, mask, predictions, {}, {"Student": 0.8}, f"caption {number}", "Sweep study")


def test_each_figure_is_written_three_times_and_logged(call, monkeypatch, capsys):
    monkeypatch.setattr(examples, "load", lambda *_, **__: [shown()])
    code, files, logged = call(sweep_of(splits=(0,)), "all")
    assert code == 0
    names = [name for name in figures.FIGURES if name not in ("capacity", "tuning")]  # of other sweeps
    assert files == [f"{name}.{suffix}" for name in sorted(names) for suffix in ("pdf", "png", "svg")]
    assert sorted(logged) == [f"figures/{name}" for name in files]
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"out/(\w+)\.png, \.pdf, \.svg; logged$", line)[1] for line in lines] == names


def test_the_files_are_what_their_names_say(call, tmp_path):
    call(sweep_of(splits=(0,)), "effects")
    out = tmp_path / "out"
    with Image.open(out / "effects.png") as picture:
        assert picture.width == 7 * 200
    assert (out / "effects.pdf").read_bytes().startswith(b"%PDF")
    text = (out / "effects.svg").read_text()
    assert "<text" in text
    assert ">HReg_KLD_WAug<" in text  # to be searched and read aloud
    assert "data busi, profile paper" in text


def test_equal_figures_are_equal_files():
    def bars(height):
        figure = Figure()
        figure.subplots().bar([1, 2], [3, height])
        return figure

    for suffix in style.FORMATS:
        assert style.render(bars(4), suffix) == style.render(bars(4), suffix)
        assert style.render(bars(4), suffix) != style.render(bars(5), suffix)


def test_several_images_and_settings_have_files_of_their_own(call, monkeypatch):
    received = []

    def load(sweep, *_, count, **__):
        received.append((set(sweep.runs.loc[sweep.runs["role"] == "distilled", "notation"]), count))
        return [shown(1), shown(2)]

    monkeypatch.setattr(examples, "load", load)
    sweep = rates({"1": 0.0, "2": 0.0}, splits=(0,), notations=("Teacher", "Student", "L_MSE"))
    _, files, _ = call(sweep, "figure2", "--count", "2")
    names = [name for name in files if name.endswith(".png")]
    assert names == [f"figure2-train.lr={rate}-{number}.png" for rate in "12" for number in "12"]
    assert received == [({"L_MSE"}, 2)] * 2


def test_a_quick_check_says_so_in_the_figure():
    sweep = sweep_of(splits=(0,))
    assert figures.heading("pairs", sweep, label="") == (
        "Each test image against Student. Sweep study: data busi, profile paper"
    )
    quick = sweep.runs.assign(profile="quick")
    printed = figures.heading("curves", reader.Sweep("demo", quick, sweep.scores), label="train.lr=1")
    assert printed.endswith("Sweep demo, train.lr=1: data busi, profile quick (a check, not a result)")


def test_a_figure_that_cannot_be_drawn_leaves_the_others(call, monkeypatch, capsys):
    monkeypatch.setattr(examples, "load", lambda *_, **__: (_ for _ in ()).throw(InputError("images are gone")))
    code, files, _ = call(sweep_of(("Teacher", "L_MSE"), splits=(0,)), "all")  # no Student
    assert code == 1
    assert {name.split(".")[0] for name in files} == {"effects", "curves"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kdsweep: error: figure2: images are gone; pairs: nothing to compare")


def test_settings_that_cannot_be_drawn_leave_the_others(call, capsys):
    sweep = rates({"1": 0.0, "2": 0.0}, splits=(0,), notations=("Teacher", "Student", "L_MSE"))
    gone = (sweep.runs["notation"] == "Student") & sweep.runs["fingerprint"].str.endswith("-1")
    code, files, _ = call(replace(sweep, runs=sweep.runs[~gone]), "pairs")
    assert code == 1
    assert [name for name in files if name.endswith(".png")] == ["pairs-train.lr=2.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kdsweep: error: train.lr=1: nothing to compare")


def test_options_of_figure2_reach_it(call, monkeypatch):
    received = {}
    monkeypatch.setattr(examples, "load", lambda *_, **options: received.update(options) or [shown()])
    words = ("--models", "Student,L_MSE", "--split", "2", "--seed", "1", "--image", "a", "--image", "b")
    call(sweep_of(splits=(0,)), "figure2", *words, "--data-root", "moved")
    assert received["models"] == ["Student", "L_MSE"]
    assert (received["split"], received["seed"], received["ids"], received["root"]) == (2, 1, ("a", "b"), Path("moved"))


def test_overrides_say_which_sweep_is_meant():
    locate, multirun, uri = figures.locate, Path("multirun"), "http://127.0.0.1:9"
    assert locate([]) == (multirun, None, None, None, None)
    assert locate([], store=Path("s"), sweep="x", data_root=Path("d")) == (Path("s"), None, "x", Path("d"), None)
    assert locate(["store=elsewhere"]) == (Path("elsewhere"), None, None, None, None)
    busi = ["data=busi", "data.root=r", "profile=quick"]
    assert locate(busi) == (multirun, None, "busi-quick", Path("r"), None)
    assert locate(["profile=quick", f"tracking.uri={uri}"], sweep="tried") == (multirun, uri, "tried", None, None)
    with pytest.raises(InputError, match="profil"):
        locate(["profil=quick"])


def test_a_data_set_of_ones_own_is_taken_from_the_command(tmp_path, monkeypatch, call):
    """Never from the record of the run, which may come from elsewhere."""
    (tmp_path / "conf" / "data").mkdir(parents=True)
    node = "name: clinic\nroot: ???\nload_size: null\nsource: {_target_: own_scans.Clinic, root: '${data.root}'}\n"
    (tmp_path / "conf" / "data" / "clinic.yaml").write_text(node)
    (tmp_path / "own_scans.py").write_text("class Clinic:\n    def __init__(self, root):\n        self.root = root\n")
    monkeypatch.syspath_prepend(tmp_path)
    received = {}
    monkeypatch.setattr(examples, "load", lambda *_, **options: received.update(options) or [shown()])
    words = ("data=clinic", "data.root=here", f"hydra.searchpath=[file://{tmp_path / 'conf'}]")
    call(sweep_of(splits=(0,)), "figure2", *words)
    assert type(received["source"]).__name__ == "Clinic"
    assert (received["source"].root, received["root"]) == ("here", Path("here"))


def test_the_command_reports_a_missing_store_in_one_line(tmp_path):
    command = [sys.executable, "-m", "kdsweep", "figures", "effects", "profile=quick", f"store={tmp_path}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("kdsweep: error: --store")
    assert len(done.stderr.splitlines()) == 1


def test_what_is_drawn_from_and_where_it_goes_is_in_mlflow(empty_store, tmp_path):
    shutil.copytree(empty_store, tmp_path, dirs_exist_ok=True)
    tracker, cell = mirror.Tracker(store=tmp_path, uri=None), make_cell(store=tmp_path)
    sweep_file.add(tmp_path, "study", cells=[cell, make_cell("Student", store=tmp_path)], teachers=[])
    tracker.sync(begin(cell, 3), sweep="study")
    sweep = reader.read_sweep(store=tmp_path, uri=None, name="study")
    curves = reader.read_curves(sweep, store=tmp_path, uri=None, metric="train/loss")
    expected = pd.DataFrame({"notation": "L_MSE", "split": 0, "seed": 0, "metric": "train/loss", "epoch": [0, 1, 2]})
    pd.testing.assert_frame_equal(curves, expected.assign(value=[1.0, 0.5, 1 / 3]))

    file = tmp_path / "effects.png"
    file.write_bytes(b"picture")
    for _ in range(2):  # drawn again, it takes the place of the old one
        printed = reader.attach(sweep, [file], folder="figures", store=tmp_path, uri=None)
        assert printed == f"logged to MLflow, run {sweep.run_id}"
    kept = (tmp_path / "artifacts" / sweep.run_id / "artifacts" / "figures" / "effects.png").read_bytes()
    assert kept == b"picture"
    other = replace(sweep, run_id="0" * 32)
    printed = reader.attach(other, [file], folder="figures", store=tmp_path, uri="http://127.0.0.1:9")
    assert printed.startswith("not logged to MLflow: ")
    assert len(printed.splitlines()) == 1
