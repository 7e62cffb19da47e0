"""Wrong commands and wrong data, as a user meets them: one line with key, value and remedy, and nothing is trained."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import kdsweep
from PIL import Image

from kdsweep.__main__ import user_message
from kdsweep.config import composition, inputs
from kdsweep.data.pixels import read_gray_or_color
from kdsweep.store import checkpoint
from kdsweep.sweep import plan, rehearsal
from kdsweep.training import build

QUICK = ("profile=quick", "path=none", "device=cpu", "train.epochs=1")


def busi(root: Path) -> tuple[str, str]:
    return "data=busi", f"data.root={root}"


# --- in this process: everything that is checked before a cell is trained


def refusal(*overrides: str) -> str:
    """The line that a configuration is refused with, by the checks that a job goes through before its training."""
    with pytest.raises(Exception) as caught:
        jobs = plan.read_jobs([composition.compose_config(["profile=quick", "device=cpu", *overrides])])
        for job in jobs:
            build.devices(job.settings)
        rehearsal.check(jobs)
    message = user_message(caught.value)
    assert "\n" not in message
    assert not message.startswith(type(caught.value).__name__), "not an error that the user can mend"
    return message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("split=2", "split has: file, holdout, kfold, s0, s1, s2"),
        ("split=3", "split has: file, holdout, kfold, s0, s1, s2"),
        ("train.epochs=0", "greater than or equal to 1"),
        ("train.lr=-1", "greater than 0"),
        ("train.patience=0", "greater than or equal to 1"),
        ("train.batch_size=many", "valid integer"),
        ("kd.weight=1.5", "a number from 0 to 1"),
        ("image_size=100", "multiple of 32"),
        ("device=gpu", "auto, cpu, cuda"),
        ("device=cpu:1", "auto, cpu, cuda"),
        ("device=cuda:99", "device=cpu or auto"),
        ("data.count=3", "greater than or equal to 4"),
        ("data.count=1000000000000", "less than or equal to 100000"),
        ("student.weights=absent.pt", "no such file; use imagenet, none"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(tmp_path: Path, override: str, expected: str) -> None:
    message = refusal("data.count=4", f"store={tmp_path}", override)
    key, _, value = override.partition("=")
    assert f"{key.removeprefix('student.')}={value}" in message
    assert expected in message


@pytest.mark.parametrize("key", ["path", "loss", "tracking"])
def test_a_group_that_was_taken_away_is_asked_for(key: str) -> None:
    assert refusal(f"~{key}").startswith(f"{key} is missing: give it on the command line")


def test_a_key_that_nothing_reads_is_refused_with_those_that_there_are() -> None:
    assert refusal("+foo=1").startswith("foo is not a key of the configuration; it has: method, path, loss, ")


@pytest.mark.parametrize("value", ["a (1)", "it's", "a=b", "a,(b", 'say "x'])
def test_a_value_that_needs_quotes_is_shown_as_it_is_typed(value: str) -> None:
    message = refusal(f"data.root={value}")
    assert message.startswith(f"data.root={value} cannot be read: ")
    (typed,) = shlex.split(message.partition("quotes within quotes: ")[2])
    cfg = composition.compose(["data=busi", typed])
    assert cfg.data.root == value.strip("\"'")


def test_images_that_the_memory_cannot_hold_are_refused(small_busi: Path) -> None:
    message = refusal(*busi(small_busi), "data.load_size=700000")
    assert message.startswith("data.load_size=700000: 25 images of this size need ")
    assert "GiB are free; take a smaller one" in message


def test_a_folder_of_the_home_folder_is_found(
    small_busi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "busi").symlink_to(small_busi)
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = composition.compose(["profile=quick", "path=none", "data=busi", "data.root=~/busi"])
    assert len(inputs.images(cfg).ids) == 25


def test_an_unknown_option_is_named_with_the_choices() -> None:
    assert refusal("loss=foo").startswith("loss=foo is not an option; loss has: kld, mse")


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_a_network_that_cannot_be_built_is_refused_before_training(small_busi: Path, network: str) -> None:
    assert "encoder=resnet19 is not an encoder of" in refusal(*busi(small_busi), f"{network}.encoder=resnet19")


@pytest.mark.parametrize("name", ["udiat", "busi", "folder"])
def test_a_missing_absent_or_empty_folder_is_named(tmp_path: Path, name: str) -> None:
    assert refusal(f"data={name}").startswith("data.root is missing: give it on the command line, data.root=...")
    absent = f"data.root={tmp_path / 'absent'}"
    assert f"{absent}: no such folder" in refusal(f"data={name}", absent)
    assert f"data.root={tmp_path}" in refusal(f"data={name}", f"data.root={tmp_path}")


def test_a_batch_larger_than_the_training_set_is_refused_with_both_numbers(small_busi: Path) -> None:
    message = refusal(*busi(small_busi), "train.batch_size=17")
    assert message == "train.batch_size=17 is larger than the training set of 16 images"


def test_images_smaller_than_the_crop_are_enlarged_and_counted(
    small_busi: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = composition.compose(["profile=quick", "path=none", *busi(small_busi), "image_size=96"])
    sizes = {file.stem: read_gray_or_color(file).shape[:2] for file in small_busi.glob("*/*).png")}
    small = sorted(name for name, size in sizes.items() if min(size) < 96)
    assert len(inputs.images(cfg).ids) == 25
    (line,) = [record.getMessage() for record in caplog.records if record.name == "kdsweep.data.images"]
    names = f"{', '.join(small[:3])} and {len(small) - 3} more"
    assert line == f"data=busi: {len(small)} of 25 images are smaller than image_size=96 and are enlarged ({names})"


@pytest.fixture
def folder_of_eight(tmp_path: Path) -> Path:
    """Eight good pairs in the plain layout."""
    root = tmp_path / "mine"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (80, 80), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        Image.fromarray(pixels > 127).save(root / "masks" / f"{number}.png")
    return root


def masks(root: Path, value: int, name: str = "*") -> None:
    """Save masks of one value."""
    for file in (root / "masks").glob(f"{name}.png"):
        Image.new("L", (80, 80), value).save(file)


def cut_an_image_and_shrink_a_mask(root: Path) -> None:
    file = root / "images" / "5.png"
    file.write_bytes(file.read_bytes()[:500])
    Image.new("1", (79, 80)).save(root / "masks" / "6.png")


def one_class_too_many(root: Path) -> None:
    pixels = np.repeat(np.array([0, 85, 255], np.uint8), [20, 20, 40])[None].repeat(80, axis=0)
    Image.fromarray(pixels).save(root / "masks" / "5.png")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda root: shutil.rmtree(root / "masks"), ["{root}: no folder masks/"]),
        (lambda root: (root / "masks/5.png").unlink(), ["1 of 8 images", "{root}/images/5.png has no mask"]),
        (
            cut_an_image_and_shrink_a_mask,
            [
                "2 of 8 images",
                "{root}/images/5.png is not a readable image",
                "{root}/masks/6.png is 79 x 80 pixels, its image 80 x 80",
            ],
        ),
        (lambda root: masks(root, 0), ["8 of 8 images", "{root}/masks/5.png is empty, all of it is black"]),
        (
            lambda root: masks(root, 255),
            ["8 of 8 images are lesion everywhere", "(0, 1, 2 and 5 more); save the lesion as 255"],
        ),
        (
            lambda root: (root / "images/5.png").rename(root / "images/5.dcm"),
            ["1 of 8 images", "{root}/images/5.dcm is not a readable image (its content is not DICOM; save it again"],
        ),
        (one_class_too_many, ["1 of 8 images", "{root}/masks/5.png has areas of the values 0, 85, 255"]),
        (
            lambda root: masks(root, 0, "5"),
            ["1 of 8 images", "{root}/masks/5.png is empty", "data.allow_empty_masks=true"],
        ),
        (lambda root: None, ["train.batch_size=16 is larger than the training set of 5 images"]),
    ],
)
def test_faulty_files_are_named(folder_of_eight: Path, spoil: Callable[[Path], None], expected: list[str]) -> None:
    spoil(folder_of_eight)
    message = refusal("data=folder", f"data.root={folder_of_eight}")
    for text in expected:
        assert text.format(root=folder_of_eight) in message


def test_images_without_a_lesion_are_taken_on_request_but_not_alone(folder_of_eight: Path) -> None:
    request = ["data=folder", f"data.root={folder_of_eight}", "data.allow_empty_masks=true"]
    masks(folder_of_eight, 0, "5")
    assert "train.batch_size=16 is larger than" in refusal(*request)  # the data are fine
    inputs._images.cache_clear()  # a process reads a data set once
    masks(folder_of_eight, 0)
    assert "all 5 training masks are empty" in refusal(*request)


@pytest.fixture(scope="module")
def resnet_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the quick profile's Teacher, a ResNet18 U-Net."""
    file = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    checkpoint.save_network(file, build.teacher_network(composition.compose(["profile=quick"])))
    return file


def test_weights_of_another_network_are_refused(small_busi: Path, resnet_weights: Path) -> None:
    message = refusal(*busi(small_busi), f"student.weights={resnet_weights}")
    for text in (str(resnet_weights), "belongs to another network", "weights=none"):
        assert text in message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_holds_no_weights_is_refused(small_busi: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"notes{suffix}"
    file.write_text("these are not weights")
    assert f"weights={file}: is not" in refusal(*busi(small_busi), f"student.weights={file}")


# --- as its user starts it


@pytest.fixture
def database(empty_store: Path, tmp_path: Path) -> None:
    """The store has its database already, which takes a command seconds to make."""
    shutil.copytree(empty_store, tmp_path / "store")


@pytest.fixture(autouse=True)
def short_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are told as they are told by default."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


class Outcome:
    """What a command left: exit code, all that it printed, the store."""

    def __init__(self, *overrides: str, cwd: Path, sweep: bool = False, **environment: str) -> None:
        self.store = cwd / "store"
        words = [*(["-m"] if sweep else []), f"store={self.store}", *overrides]
        if environment:  # which the imports of a forked command would not have seen
            command = [sys.executable, "-m", "kdsweep", *words]
            env = {**os.environ, **environment}
            done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300)
        else:
            done = kdsweep(*words, cwd=cwd)
        self.code, self.output = done.returncode, done.stdout + done.stderr

    def refusal(self) -> str:
        """The one error line of a command that failed before it trained anything."""
        assert self.code not in (0, None), self.output
        assert "Traceback" not in self.output, self.output
        lines = [line for line in self.output.splitlines() if line.startswith("kdsweep: error: ")]
        assert len(lines) == 1, self.output
        assert not list(self.store.rglob("finished.json"))
        assert not list(self.store.rglob("checkpoint.pt"))
        return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss=foo", "loss=foo is not an option; loss has: kld, mse"),
        ("train.epoch=3", "train.epoch is not a key of the configuration; do you mean train.epochs? train has: "),
        ("train.epochs=0", "train.epochs=0 is not allowed: it must be greater than or equal to 1"),
        ("data=busi", "data.root is missing: give it on the command line"),
    ],
)
def test_a_wrong_word_on_the_command_line_ends_in_one_line(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in Outcome(override, cwd=tmp_path).refusal()


@pytest.mark.slow
@pytest.mark.usefixtures("database")
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=1e-3,-1", "train.lr=-1 is not allowed: it must be greater than 0"),
        ("student.weights=none,{weights}", "the file {weights} belongs to another network"),
    ],
)
def test_one_bad_value_of_a_sweep_ends_it_before_the_first_job(
    small_busi: Path, resnet_weights: Path, tmp_path: Path, override: str, expected: str
) -> None:
    word = override.format(weights=resnet_weights)
    outcome = Outcome(*QUICK, *busi(small_busi), word, cwd=tmp_path, sweep=True)
    assert expected.format(weights=resnet_weights) in outcome.refusal()
    assert not (outcome.store / "cells").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("database")
def test_imagenet_weights_without_a_network_are_refused_with_the_ways_out(small_busi: Path, tmp_path: Path) -> None:
    outcome = Outcome(
        *("profile=paper", "image_size=64", "train.batch_size=4", "train.epochs=1", "device=cpu"),
        *busi(small_busi),
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "empty-cache"),
    )
    message = outcome.refusal()
    for text in ("weights=imagenet", "could not be fetched", "student.weights=FILE", "weights=none"):
        assert text in message


@pytest.mark.slow
@pytest.mark.usefixtures("database")
def test_a_bad_command_leaves_finished_results_as_they_are(small_busi: Path, tmp_path: Path) -> None:
    good = Outcome(*QUICK, *busi(small_busi), cwd=tmp_path)
    assert good.code == 0, good.output
    files = sorted(good.store.rglob("finished.json")) + sorted(good.store.rglob("test_scores.csv"))
    before = {file: file.read_bytes() for file in files if file.parent.parent.name == "cells"}
    assert {file.name for file in before} == {"finished.json", "test_scores.csv"}

    bad = Outcome(*QUICK, *busi(small_busi), "train.batch_size=17", cwd=tmp_path)
    assert bad.code != 0
    assert "kdsweep: error: train.batch_size=17 is larger than the training set of 16 images" in bad.output
    assert {file: file.read_bytes() for file in before} == before
    assert len(list(good.store.rglob("finished.json"))) == 1
