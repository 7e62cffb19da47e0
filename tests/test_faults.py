"""Faults for real: processes killed inside a write, damaged files, memory and disks that are full, users' errors.

Whatever happened, the same call again ends with the bytes of a run that nothing happened to.
"""

import functools
import itertools
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import kdsweep, process
from small import STUBS, STUDENT, TEACHER

from kdsweep.config import composition, identity
from kdsweep.core import signals
from kdsweep.data import views
from kdsweep.store import cell_folder, checkpoint
from kdsweep.store.cell_folder import FINISHED
from kdsweep.training import group, loop
from kdsweep.training.learner import Learner

RECIPE = [
    "profile=quick",
    "data=busi",
    "train.batch_size=8",
    "train.epochs=3",
    "device=cpu",
    "teacher_aug=weak",
]
QUICK = [*RECIPE, *STUBS, "teacher.lr=1e-3"]
GROUP = (["path=HR"], ["path=L", "loss=mse"], ["path=none"])
FILES = ("student.safetensors", "teacher.safetensors", "history.csv", "test_scores.csv", "test_predictions.npz")

composed = functools.cache(lambda *overrides: composition.compose(list(overrides)))


def jobs_of(small_busi: Path, store: Path, *each: list[str]):
    settings = [composed(*QUICK, f"data.root={small_busi}", *overrides) for overrides in each or GROUP]
    return [identity.job(each.model_copy(update={"store": str(store)})) for each in settings]


def contents(store: Path) -> dict[str, bytes]:
    """The files that hold results, by folder and name."""
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in store.glob("*/*/*") if file.name in FILES}


@pytest.fixture(scope="module")
def unbroken(small_busi, tmp_path_factory) -> Path:
    """A store after a group that nothing happened to."""
    store = tmp_path_factory.mktemp("unbroken") / "store"
    assert all(isinstance(result, float) for result in group.run_group(jobs_of(small_busi, store)))
    assert len(contents(store)) == 4 * 4
    return store


@pytest.fixture(scope="module")
def dices(small_busi, unbroken) -> list[float]:
    """The test Dice of each cell of that group."""
    return group.run_group(jobs_of(small_busi, unbroken))


@pytest.fixture
def often(monkeypatch):
    """A checkpoint of the first cell after every step."""
    monkeypatch.setattr(
        loop.CheckpointSchedule,
        "next",
        lambda _, learners: learners[0] if learners and learners[0].role != "teacher" else None,
    )


# --- killed inside a write


def doomed(jobs: list[identity.Job], point: str, number: int) -> None:
    """Train the group; this process kills itself when it comes to a point for the n-th time."""
    calls = itertools.count(1)

    def spoil(inner):
        def call(*args, **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **kwargs)

        return call

    turns = itertools.count()

    def next_turn(_, learners):
        turn = next(turns)
        rests = not learners or (learners[0].role == "teacher" and turn % 3)  # whose checkpoint is large
        return None if rests else learners[turn % len(learners)]

    loop.CheckpointSchedule.next = next_turn
    owner, name = {
        "digest": (checkpoint.hashlib, "sha256"),  # between the bytes and their checksum, and at markers
        "flush": (os, "fsync"),
        "rename": (Path, "replace"),
        "marker": (cell_folder, "write_finished"),
        "link": (os, "link"),
        "progress": (cell_folder, "write_progress"),
    }[point]
    setattr(owner, name, spoil(getattr(owner, name)))
    group.run_group(jobs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_killed_inside_its_writes_again_and_again_it_ends_as_if_nothing_had_happened(
    small_busi, unbroken, tmp_path, seed
):
    rng = random.Random(seed)
    store, kills = tmp_path / "store", []
    jobs = jobs_of(small_busi, store)
    for _ in range(60):
        point = rng.choice(["digest", "flush", "rename", "marker", "link", "progress"])
        number = rng.randint(1, {"digest": 40, "marker": 1, "link": 3}.get(point, 7))
        training = process(doomed, jobs, point, number)
        training.start()
        training.join(120)
        if training.exitcode == 0:
            break
        assert training.exitcode == -signal.SIGKILL
        kills.append((point, number))
    assert training.exitcode == 0
    assert len(kills) > 5
    assert contents(store) == contents(unbroken), kills
    left = [file.name for file in store.rglob("*") if file.name.endswith(".part") or file.name == checkpoint.PREVIOUS]
    assert left == []


# --- stopped and gone on


def interrupted(small_busi: Path, store: Path, steps: int, monkeypatch) -> None:
    """Train the group until SIGTERM comes after so many steps of learners, which is saved at the next good moment."""
    taken, step = itertools.count(1), loop._step

    def stepping(*args):
        step(*args)
        if next(taken) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    signals.install()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", stepping)
        with pytest.raises(signals.Stopped, match="stopped by SIGTERM"):
            group.run_group(jobs_of(small_busi, store))
    signals.install()


@pytest.fixture(autouse=True)
def usual_signals():
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# The Teacher takes the first 6 steps (2 of each epoch), the three cells 18 (3 for each batch).
@pytest.mark.parametrize("steps", [1, 4, 7, 8, 12, 17, 23])
def test_a_signal_after_any_step_changes_nothing(small_busi, unbroken, tmp_path, monkeypatch, steps):
    store = tmp_path / "store"
    interrupted(small_busi, store, steps, monkeypatch)
    group.run_group(jobs_of(small_busi, store))
    assert contents(store) == contents(unbroken)


def test_a_signal_saves_every_step_that_was_taken(small_busi, tmp_path, monkeypatch):
    interrupted(small_busi, tmp_path, 6 + 8, monkeypatch)
    states = [checkpoint.load_state(file) for file in tmp_path.glob("cells/*/checkpoint.pt")]
    taken = [2 * (state["epoch"] + 1) + len(state["training"]["means"]["counts"]) for state in states]
    assert sorted(taken) == [2, 3, 3]  # 8 steps of 3 learners: two have taken their third
    assert {cell_folder.read(folder).status for folder in tmp_path.glob("cells/*")} == {"KILLED"}


def test_a_step_that_takes_too_long_is_given_up_and_taken_again(small_busi, unbroken, tmp_path, monkeypatch, often):
    """As inside a backward pass of minutes: what is half done is not saved, the last checkpoint stands."""
    monkeypatch.setattr(signals, "GRACE_S", 0.3)
    steps, backward, ended = itertools.count(1), torch.Tensor.backward, []

    def slow(tensor, **options):
        backward(tensor, **options)
        if next(steps) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(300):
                signal.sigtimedwait([], 0.05)  # lets the alarm in
            ended.append("the slow step")

    signals.install()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", slow)
        with pytest.raises(signals.Stopped):
            group.run_group(jobs_of(small_busi, tmp_path / "store"))
    assert ended == []
    signals.install()
    group.run_group(jobs_of(small_busi, tmp_path / "store"))
    assert contents(tmp_path / "store") == contents(unbroken)


@pytest.mark.parametrize("moment", ["between", "inside", "long inside"])
def test_a_signal_while_checkpoints_are_read_leaves_them_as_they_are(
    small_busi, unbroken, tmp_path, monkeypatch, moment
):
    """What is not read yet, or half, must not be saved: it would take the place of what it should go on from."""
    store = tmp_path / "store"
    interrupted(small_busi, store, 6 + 10, monkeypatch)
    before = {file: file.read_bytes() for file in store.glob("cells/*/checkpoint.pt")}
    loads, load = itertools.count(1), Learner._load

    def signalled(learner, state):
        if next(loads) == 2 and moment != "between":
            learner.epoch, learner.history = state["epoch"], state["history"]
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(20 if moment == "long inside" else 0):
                signal.sigtimedwait([], 0.05)
        load(learner, state)
        if moment == "between":
            os.kill(os.getpid(), signal.SIGTERM)

    signals.install()
    with monkeypatch.context() as patch:
        patch.setattr(signals, "GRACE_S", 0.2)
        patch.setattr(Learner, "_load", signalled)
        with pytest.raises(signals.Stopped):
            group.run_group(jobs_of(small_busi, store))
    signals.install()
    for file, content in before.items():
        now = checkpoint.load_state(file)
        (tmp_path / "before.pt").write_bytes(content)
        then = checkpoint.load_state(tmp_path / "before.pt")
        assert now["epoch"] == then["epoch"]
        assert now["training"]["means"]["counts"] == then["training"]["means"]["counts"]
    group.run_group(jobs_of(small_busi, store))
    assert contents(store) == contents(unbroken)


# --- damaged files


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("spoil", [cut, empty, flip])
@pytest.mark.parametrize("names", [["checkpoint.pt"], ["checkpoint.pt", "checkpoint.previous.pt"]], ids=["one", "both"])
def test_a_damaged_checkpoint_is_named_and_an_earlier_one_used(
    small_busi, unbroken, tmp_path, monkeypatch, caplog, often, spoil, names
):
    caplog.set_level(logging.INFO)
    interrupted(small_busi, tmp_path / "store", 6 + 14, monkeypatch)
    (folder,) = (tmp_path / "store" / "cells").glob("HReg*")
    for name in names:
        spoil(folder / name)
    caplog.clear()
    group.run_group(jobs_of(small_busi, tmp_path / "store"))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(names)
    for name, line in zip(names, warnings, strict=True):
        assert line.startswith(f"{folder / name}: damaged, its checksum does not fit")
    resumed = [record.getMessage() for record in caplog.records if "HReg" in record.getMessage()]
    assert any("resumes after epoch" in line for line in resumed) == (len(names) == 1)
    assert contents(tmp_path / "store") == contents(unbroken)


@pytest.mark.parametrize("spoil", [cut, empty, flip, Path.unlink])
@pytest.mark.parametrize(
    "name", ["test_scores.csv", "test_predictions.npz", "student.safetensors", FINISHED, "history.csv"]
)
def test_a_damaged_score_file_is_named_and_made_again_without_training(
    small_busi, unbroken, dices, tmp_path, monkeypatch, caplog, spoil, name
):
    store = Path(shutil.copytree(unbroken, tmp_path / "store"))
    (folder,) = (store / "cells").glob("HReg*")
    if name == FINISHED and spoil is flip:  # the value that a table would show
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"test/dice": 0.', '"test/dice": 1.'))
        assert (folder / name).read_text() != text
    else:
        spoil(folder / name)
    monkeypatch.setattr(loop, "train_epoch", lambda *_, **__: pytest.fail("trained again"))
    results = group.run_group(jobs_of(small_busi, store))
    assert contents(store) == contents(unbroken)
    assert results == dices
    gone = name == FINISHED and spoil is Path.unlink  # a cell without its marker is simply not finished
    lines = [f"{folder / name}: damaged, its checksum differs; what it held is computed again"]
    assert caplog.messages[: len(lines)] == ([] if gone else lines)


def test_a_damaged_teacher_is_noticed_before_it_teaches(small_busi, unbroken, tmp_path, caplog):
    store = Path(shutil.copytree(unbroken, tmp_path / "store"))
    (folder,) = (store / "teachers").iterdir()
    flip(folder / "teacher.safetensors")
    shutil.rmtree(next((store / "cells").glob("HReg*")))
    group.run_group(jobs_of(small_busi, store))
    assert f"{folder / 'teacher.safetensors'}: damaged" in caplog.text
    assert contents(store) == contents(unbroken)


def test_a_checkpoint_of_another_cell_is_refused(small_busi, unbroken, tmp_path, often, monkeypatch):
    store = tmp_path / "store"
    interrupted(small_busi, store, 6 + 12, monkeypatch)
    folders = {folder.name.split("_")[0].split("-")[0]: folder for folder in (store / "cells").iterdir()}
    shutil.copy(folders["HReg"] / "checkpoint.pt", folders["Student"] / "checkpoint.pt")
    results = group.run_group(jobs_of(small_busi, store))
    assert [isinstance(result, float) for result in results] == [True, True, False]
    file = folders["Student"] / "checkpoint.pt"
    assert str(results[2]).startswith(f"{file}: not a checkpoint of Student split 0 seed 0 (")
    assert str(results[2]).endswith("delete it to start again")


# --- memory


class Limit:
    """Memory for so many learners: a step of a larger group fails, now before a learner's step and now inside it."""

    def __init__(self, learners: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = itertools.count(1)
        step, epoch = loop._step, loop.train_epoch
        self.size = 0

        def training(learners: list[Learner], *args, **kwargs):
            self.size = len(learners)
            return epoch(learners, *args, **kwargs)

        def stepping(learner, *args):
            if self.size <= learners:
                return step(learner, *args)
            if learners == 0 or next(self.calls) % 5 == 4:
                learner.can_save = False  # as the middle of a step leaves it
                next(learner.trained.parameters()).data.add_(1.0)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return step(learner, *args)

        monkeypatch.setattr(loop, "train_epoch", training)
        monkeypatch.setattr(loop, "_step", stepping)


def test_too_little_memory_divides_the_group_and_changes_no_score(small_busi, unbroken, tmp_path, monkeypatch, caplog):
    Limit(1, monkeypatch)
    results = group.run_group(jobs_of(small_busi, tmp_path / "store"))
    assert all(isinstance(result, float) for result in results)
    assert "out of memory with 3 learners on cpu: divided in two" in caplog.text
    assert contents(tmp_path / "store") == contents(unbroken)


def test_too_little_memory_for_one_cell_fails_that_cell(small_busi, tmp_path, monkeypatch):
    Limit(0, monkeypatch)
    results = group.run_group(jobs_of(small_busi, tmp_path, ["path=none"], ["path=none", "train.lr=1e-3"]))
    expected = "Student split 0 seed 0: out of memory on cpu; a smaller train.batch_size helps"
    assert [str(result) for result in results] == [expected] * 2
    assert {cell_folder.read(folder).status for folder in tmp_path.glob("cells/*")} == {"FAILED"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_too_little_memory_on_cuda_divides_the_group(small_busi, tmp_path, caplog):
    jobs = [
        identity.job(
            composed(
                *(*RECIPE, *TEACHER, *STUDENT, f"data.root={small_busi}", f"store={tmp_path}", "device=cuda"), *each
            )
        )
        for each in GROUP
    ]
    group.obtain_teachers(jobs)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 120 * 2**20) / total)
    try:
        results = group.run_group(jobs)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "divided in two" in caplog.text
    assert all(isinstance(result, float) for result in results)


# --- errors of the user's code


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_data_names_epoch_and_step_and_the_rest_goes_on(small_busi, tmp_path, monkeypatch, workers):
    render = views.Views.render

    def broken(self, *, image, mask, seed):
        if seed[2] == 1:
            raise ValueError("the image is upside down")
        return render(self, image=image, mask=mask, seed=seed)

    jobs = jobs_of(small_busi, tmp_path, ["path=none", f"train.workers={workers}"])
    with monkeypatch.context() as patch:
        patch.setattr(views.Views, "render", broken)
        (result,) = group.run_group(jobs)
    assert str(result) == "epoch 2, step 1, data: ValueError: the image is upside down"
    assert not multiprocessing.active_children(), "its workers have ended"
    record = cell_folder.read(jobs[0].cell.folder)
    assert (record.status, record.error) == ("FAILED", str(result))
    (result,) = group.run_group(jobs)  # mended: it resumes
    assert isinstance(result, float)
    assert not multiprocessing.active_children()


def test_an_error_in_a_teachers_forward_fails_those_that_share_it_with_epoch_and_step(
    small_busi, unbroken, tmp_path, monkeypatch
):
    store = Path(shutil.copytree(unbroken, tmp_path / "store"))
    shutil.rmtree(store / "cells")
    teach, calls = loop.FrozenTeachers.teach, itertools.count(1)

    def broken(*args):
        if next(calls) == 5:  # once for validation, 2 steps an epoch
            raise ValueError("no lesson today")
        return teach(*args)

    monkeypatch.setattr(loop.FrozenTeachers, "teach", broken)
    results = group.run_group(jobs_of(small_busi, store))
    assert {str(result) for result in results} == {"epoch 2, step 2, Teacher's forward: ValueError: no lesson today"}
    monkeypatch.undo()
    group.run_group(jobs_of(small_busi, store))
    assert contents(store) == contents(unbroken)


def test_an_error_in_validation_says_so(small_busi, tmp_path, monkeypatch):
    validation_values, calls = loop.validation_values, itertools.count(1)

    def broken(learner, *args):
        if next(calls) == 2:
            learner.network.forward = lambda *_: (_ for _ in ()).throw(ValueError("no"))
        return validation_values(learner, *args)

    monkeypatch.setattr(loop, "validation_values", broken)
    (result,) = group.run_group(jobs_of(small_busi, tmp_path, ["path=none"]))
    assert str(result) == "Student split 0 seed 0: epoch 2, validation, forward: ValueError: no"


# --- disks


SCRIPT = """
set -eu
mount -t tmpfs -o size=60m tmpfs "$1"  # two checkpoints of 13 MB, which a slow machine writes, and the rest
cd "$1"
run() { "$2" -m kdsweep -m path=none train.lr="$1" profile=quick data=busi data.root="$3" train.batch_size=8 \
    train.epochs=2 device=cpu > "out$4" 2> "err$4" && echo "exit 0" || echo "exit $?"; }
cp -a "$4/multirun" .
sha256sum multirun/cells/*/* > before
used=$(df -k --output=used . | tail -1)
mount -o remount,size=$((used + 3000))k "$1"
run 1e-3,1e-4 "$2" "$3" 2
cat err2
mount -o remount,size=60m "$1"
sha256sum --quiet -c before && echo intact
for _ in 1 2 3 4 5 6 7 8 9 10; do  # a helper process of the command may still be closing its files
    mount -o remount,ro "$1" 2> /dev/null && break || sleep 1
done
"$2" -m kdsweep -m path=none train.lr=1e-3,1e-4 profile=quick data=busi data.root="$3" train.batch_size=8 \
    train.epochs=2 device=cpu 2>&1 | tail -1
"$2" -m kdsweep status 2>&1 | head -1
mount -o remount,rw "$1"
run 1e-3,1e-4 "$2" "$3" 3
grep -c "test Dice" out3
sha256sum --quiet -c before && echo intact
"$2" -m kdsweep status | head -1
"""


def can_mount() -> bool:
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small disk (user namespaces)")
def test_a_full_or_read_only_disk_fails_the_cell_and_the_same_command_goes_on(small_busi, empty_store, tmp_path):
    disk, before = tmp_path / "disk", tmp_path / "before"
    disk.mkdir()
    shutil.copytree(empty_store, before / "multirun")
    first = ["-m", "path=none", "train.lr=1e-3", "profile=quick", "data=busi", f"data.root={small_busi}"]
    finished = kdsweep(*first, "train.batch_size=8", "train.epochs=2", "device=cpu", cwd=before)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", SCRIPT, "sh", str(disk), sys.executable]
    words = [*command, str(small_busi), str(before)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    full, *errors, intact, read_only, status, again, trained, last_intact, last_status = done.stdout.splitlines()
    assert (full, again) == ("exit 1", "exit 0")
    assert re.fullmatch(r"kdsweep: error: \S+multirun/\S+: No space left on device; .* resumes", errors[-1]), errors
    assert not any("Traceback" in line for line in errors)
    assert re.fullmatch(r"kdsweep: error: \S+: Read-only file system; when that is fixed .* resumes", read_only)
    assert status.startswith("sweep busi-quick: 2 cells: 1 done, 1 failed")
    assert (intact, last_intact, trained) == ("intact", "intact", "1")  # the finished cell is as it was
    assert last_status == "sweep busi-quick: 2 cells: 2 done"
