"""Finished networks on another data set: scored once, kept, compared; the sweep's own images are refused."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scans import deep_phantom
from scipy.stats import ttest_ind
from test_predict import SIZE, finish

from kdsweep import cli
from kdsweep.config import composition, inputs
from kdsweep.core.errors import InputError
from kdsweep.data import sources
from kdsweep.evaluation import scoring
from kdsweep.export import model as models
from kdsweep.export import score
from kdsweep.results.tables import command as tables
from kdsweep.results.tables import external
from kdsweep.store import cell_folder, sweep_file
from kdsweep.tracking import mirror, reader
from kdsweep.training.outcome import PREDICTIONS, SCORES

WORDS = ["profile=quick", "data=busi", "device=cpu"]


@pytest.fixture(scope="module")
def finished(empty_store, tmp_path_factory):
    """A store with a Student of two splits, in MLflow, as a sweep leaves it."""
    store = tmp_path_factory.mktemp("external") / "store"
    shutil.copytree(empty_store, store)
    tracker = mirror.Tracker(store=store, uri=None)
    cells = [finish(store, f"split=s{split}") for split in (0, 1)]
    sweep_file.add(store, "study", cells=cells, teachers=[])
    for number, cell in enumerate(cells):
        images = [f"image{number}{i}" for i in range(4)]
        dice = np.random.default_rng(number).uniform(0.3, 0.9, len(images))
        pd.DataFrame({"image": images, "dice": dice}).to_csv(cell.folder / SCORES, index=False)
        (cell.folder / PREDICTIONS).touch()
        values = {"test/dice": float(dice.mean()), "epochs": 1.0}
        cell_folder.write_finished(cell.folder, values=values, files=["student.safetensors", SCORES, PREDICTIONS])
        tracker.sync(cell_folder.read(cell.folder), sweep="study")
    return store, cells


@pytest.fixture
def arguments(finished, small_busi):
    return [*WORDS, f"data.root={small_busi}", "--store", str(finished[0])]


def test_every_network_is_scored_once_and_the_table_comes_out(finished, small_busi, arguments, capsys, monkeypatch):
    store, cells = finished
    assert cli.main(["score", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "sweep study: 2 networks, 2 to score on data=busi with 25 images" in printed
    assert "scored 2 networks now" in printed

    source = inputs.source(composition.compose([*WORDS, f"data.root={small_busi}"]))
    (file,) = (cells[0].folder / "external").iterdir()
    kept = pd.read_csv(file)
    assert len(kept) == 25
    model = models.load_model(cells[0].folder)
    images = score.load_images(source, load_size=SIZE, image_size=SIZE)
    part = score.eval_part(images, list(range(25)))
    compute = score.Compute(device=score.find_device("cpu"), precision="fp32")
    expected = scoring.score(scoring.predict(model.network, part, compute=compute), part, nsd_tolerance_px=2.0)
    assert kept["dice"].tolist() == pytest.approx(expected["dice"].tolist(), abs=1e-9)

    monkeypatch.setattr(score, "load_model", lambda _: pytest.fail("nothing is computed twice"))
    assert cli.main(["score", *arguments]) == 0
    assert "2 networks, 0 to score" in capsys.readouterr().out

    assert cli.main(["tables", "external", "--store", str(store)]) == 0
    assert "External. Test DSC on other data sets" in capsys.readouterr().out
    assert "external" in tables.applicable(reader.read_sweep(store=store, uri=None, name=None), store=store), (
        "the report shows it"
    )
    row = pd.read_csv(store / "tables" / "external.csv").iloc[0]
    assert row["notation"] == "Student"
    assert row["n_external"] == 25
    assert row["external_dice_percent"] == pytest.approx(
        100 * np.mean([pd.read_csv(next((cell.folder / "external").iterdir()))["dice"].mean() for cell in cells])
    )
    assert row["drop_points"] == pytest.approx(row["external_dice_percent"] - row["internal_dice_percent"])


def test_a_network_that_cannot_be_read_leaves_the_others(finished, arguments, tmp_path, capsys):
    _, cells = finished
    for cell in cells:
        shutil.rmtree(cell.folder / "external", ignore_errors=True)
    file = cells[1].folder / "student.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    try:
        assert cli.main(["score", *arguments]) == 1
    finally:
        file.write_bytes(content)
    printed = capsys.readouterr()
    assert "missing or damaged" in printed.err
    assert (cells[0].folder / "external").is_dir()
    assert not (cells[1].folder / "external").exists()
    assert cli.main(["score", *arguments]) == 0  # the same command goes on
    assert "2 networks, 1 to score" in capsys.readouterr().out


def test_the_sweeps_own_images_are_refused(finished, capsys):
    store, _ = finished
    words = ["profile=quick", "data=phantom", "data.count=5", f"store={store}"]
    assert cli.main(["score", *words, "--store", str(store)]) == 1
    assert "5 of 5 images are also in the data that the sweep was trained on" in capsys.readouterr().err


def test_an_image_of_the_sweep_is_refused_through_another_window_too(finished, tmp_path):
    store, _ = finished
    sweep = reader.read_sweep(store=store, uri=None, name="study")
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        Image.fromarray(deep_phantom()).save(tmp_path / part / "0.png")
    params = {"data.source._target_": "kdsweep.data.Folder", "data.source.root": str(tmp_path), "data.window": "[0, 9]"}
    sweep = replace(sweep, runs=sweep.runs.assign(params=[params] * len(sweep.runs)))
    for window in (None, [0, 9], [0, 4095]):
        other = sources.read_as(sources.Folder(tmp_path), window)
        with pytest.raises(InputError, match="1 of 1 images are also in the data that the sweep was trained on"):
            score._refuse_shared_images(sweep, other, other.entries(), store=store)


def test_scores_through_a_window_are_kept_apart(small_busi):
    busi = sources.Busi(small_busi)
    names = {
        score.data_set_name("busi", sources.read_as(busi, window), "abcdef0123") for window in (None, [0, 1], [0, 2])
    }
    assert "busi-abcdef01" in names
    assert len(names) == 3


def test_a_data_set_is_called_as_its_user_calls_it(finished, small_busi, tmp_path, capsys):
    store, cells = finished
    root = tmp_path / "St. Anna 2"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for number, file in enumerate(sorted(small_busi.glob("benign/*_mask.png"))[:3]):
        shutil.copy(file, root / "masks" / f"{number}.png")
        shutil.copy(file.with_name(file.name.replace("_mask", "")), root / "images" / f"{number}.png")
    words = ["profile=quick", "device=cpu", "data=folder", f"data.root={root}", "--store", str(store)]
    assert cli.main(["score", *words]) == 0
    assert cli.main(["score", *words, "--name", "Anna"]) == 0
    kept = {file.stem.rpartition("-")[0] for file in (cells[0].folder / "external").iterdir()}
    assert {"St._Anna_2", "Anna"} <= kept
    capsys.readouterr()
    assert cli.main(["tables", "external", "--store", str(store)]) == 0
    assert {"St._Anna_2", "Anna"} <= set(pd.read_csv(store / "tables" / "external.csv")["data_set"])


def test_two_data_sets_of_one_name_are_told_apart_by_their_digests():
    table = external.named(pd.DataFrame({"data_set": ["clinic-1-ab", "clinic-1-cd", "other-ef"]}))
    assert table["data_set"].tolist() == ["clinic-1-ab", "clinic-1-cd", "other"]


def test_without_scores_the_table_says_how_to_make_them(finished):
    store, _ = finished
    sweep = replace(reader.read_sweep(store=store, uri=None, name=None), external=pd.DataFrame())
    with pytest.raises(InputError, match="python -m kdsweep score --sweep study"):
        external.numbers(sweep)
    assert "external" not in tables.applicable(sweep, store=store)


def test_each_data_set_is_compared_by_its_own_images(finished):
    store, cells = finished
    sweep, parts = reader.read_sweep(store=store, uri=None, name="study"), []
    for name, dice in (("clinic-1", [0.1, 0.2, 0.3]), ("other-2", [0.5, 0.6, 0.7, 0.8])):
        images = [f"{name} image {number}" for number in range(len(dice))]
        table = pd.DataFrame({"image": images, "dice": dice, "data_set": name})
        parts += [table.assign(fingerprint=cell.fingerprint) for cell in cells]
    table = external.numbers(replace(sweep, external=pd.concat(parts))).set_index("data_set")
    assert table["external_dice_percent"].to_dict() == pytest.approx({"clinic": 20, "other": 65})
    assert table["n_external"].to_dict() == {"clinic": 3, "other": 4}
    assert (table["drop_points"] + table["internal_dice_percent"]).tolist() == pytest.approx([20, 65])


def test_the_drops_interval_is_welchs():
    rng = np.random.default_rng(0)
    frames = [
        pd.DataFrame({"split": 0, "seed": 0, "image": [f"{name}{i}" for i in range(count)], "dice": values})
        for name, count, values in (("a", 30, rng.uniform(0.4, 0.9, 30)), ("b", 50, rng.uniform(0.2, 0.9, 50)))
    ]
    single, grouped = (frame.assign(group=frame["image"]) for frame in frames)
    returned = external._drop(single, grouped)
    expected = ttest_ind(100 * grouped["dice"], 100 * single["dice"], equal_var=False).confidence_interval()
    assert (returned["low_points"], returned["high_points"]) == pytest.approx(tuple(expected))


def test_the_published_folds_are_the_sweeps_splits_again(finished, tmp_path, capsys):
    store, cells = finished
    file = tmp_path / "splits_final.json"
    words = ["publish", "--sweep", "study", "--store", str(store), "--out", str(tmp_path / "scores.json.gz")]
    assert cli.main([*words, "--folds", str(file)]) == 0
    assert "0: split 0, 1: split 1" in capsys.readouterr().out
    for fold, cell in enumerate(cells):
        base = ["profile=quick", "data.count=5", f"store={store}", "split=file", f"split.file={file}"]
        split = inputs.split_ids(composition.compose([*base, f"split.fold={fold}"]))
        assert {part: set(ids) for part, ids in split.items()} == {
            part: set(ids) for part, ids in cell_folder.read_split(cell.folder).items()
        }
    (cells[1].folder / cell_folder.SPLIT).rename(tmp_path / "kept")
    try:
        assert cli.main([*words, "--folds", str(file)]) == 1
    finally:
        (tmp_path / "kept").rename(cells[1].folder / cell_folder.SPLIT)
    assert "split.json is missing or damaged" in capsys.readouterr().err
    assert cli.main([*words, "--folds", str(tmp_path / "scores.json.gz" / "x.json")]) == 1
    assert "--folds" in capsys.readouterr().err
