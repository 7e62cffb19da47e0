"""The grid as its user runs it: one command, then the tables."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import kdsweep, running
from PIL import Image
from small import STUDENT, TEACHER

from kdsweep import cli
from kdsweep.evaluation import latency
from kdsweep.results.tables import table4
from kdsweep.store import cell_folder
from kdsweep.tracking import mirror, reader

QUICK = ["profile=quick", "data=busi", "train.batch_size=8", "train.epochs=2", *TEACHER, *STUDENT]
GRID = ["-m", "path=none,L,H,HR", "loss=mse,kld", "teacher_aug=weak,strong"]


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A fresh process, which shares no imports with others."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=570, check=False)


@pytest.fixture
def database(empty_store, tmp_path):
    """The store has its database already, which takes a command seconds to make."""
    shutil.copytree(empty_store, tmp_path / "multirun")


@pytest.fixture(scope="module")
def swept(small_busi, tmp_path_factory):
    """A store after the 12 cells and the Student of one split, with what the command printed."""
    cwd = tmp_path_factory.mktemp("swept")
    done = kdsweep(*GRID, *QUICK, f"data.root={small_busi}", cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd, done


def test_the_first_line_says_what_will_run(swept):
    _, done = swept
    first = done.stdout.splitlines()[0]
    assert "13 cells (3 repeated jobs are the same cell): 13 to run, 0 finished; 1 lockstep group, " in first
    for part in ("2 shared Teachers, 2 Teachers to train", "25 images", "device", "at most about"):
        assert part in first


def test_the_command_is_kept_with_the_sweep(swept):
    cwd, done = swept
    sweep = reader.read_sweep(store=cwd / "multirun", uri=None, name=None)
    *options, root = done.args[3:]
    assert sweep.commands == (shlex.join(["python", "-m", "kdsweep", *options, f"data.root={Path(root).name}"]),)


def test_the_screen_has_one_line_for_a_group_and_each_log_too(swept):
    cwd, done = swept
    lines = [line for line in done.stdout.splitlines() if " training images" in line]
    assert len(lines) == 2  # of the two Teachers, and of the 13 that share their batches
    assert "2 Teachers of split 0 seed 0: at most " in lines[0]
    assert "13 Students of split 0 seed 0: at most " in lines[1]
    for log in (cwd / "multirun" / "cells").glob("*/kdsweep.log"):
        cell = [line for line in log.read_text().splitlines() if " M parameters" in line and "Teacher" not in line]
        assert len(cell) == 1


def test_every_cell_has_its_folder_with_its_files(swept):
    cwd, _ = swept
    folders = sorted((cwd / "multirun" / "cells").iterdir())
    assert len(folders) == 13
    for folder in folders:
        marker = cell_folder.read_finished(folder)
        assert marker is not None
        table = pd.read_csv(folder / "test_scores.csv")
        of_masks = ["dice", "iou", "precision", "sensitivity", "hd95_px", "nsd"]
        assert list(table) == ["image", "label", "lesion_px", "predicted_px", *of_masks]
        assert marker["test/dice"] == pytest.approx(table["dice"].mean())
        expected = {"config.yaml", "overrides.yaml", "kdsweep.log", "checkpoint.pt", "student.safetensors"}
        assert expected <= {path.name for path in folder.iterdir()}
        parts = json.loads((folder / "split.json").read_text())
        assert sorted(parts["test"]) == sorted(table["image"])
    teachers = sorted(folder.name.split("-")[0] for folder in (cwd / "multirun" / "teachers").iterdir())
    assert teachers == ["Teacher", "Teacher_WAug"]


def test_mlflow_holds_one_finished_run_per_cell_with_all_names(swept):
    cwd, _ = swept
    sweep = reader.read_sweep(store=cwd / "multirun", uri=None, name=None)
    assert sweep.name == "busi-quick"
    assert len(sweep.runs) == 15
    assert set(sweep.runs["status"]) == {"FINISHED"}
    assert sweep.runs["notation"].is_unique
    client = mirror.MlflowClient(tracking_uri=mirror.store_uri(cwd / "multirun", None))
    experiment = client.get_experiment_by_name("kdsweep")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    parents = {run.info.run_id: run for run in runs if run.data.tags["kdsweep.role"] == "sweep"}
    children = [run for run in runs if run.data.tags["kdsweep.role"] != "sweep"]
    assert len(parents) == 1
    assert len(children) == 15
    for run in children:
        tags, role = run.data.tags, run.data.tags["kdsweep.role"]
        assert tags["mlflow.parentRunId"] in parents
        assert run.info.run_name == f"{tags['kdsweep.notation']}/split0"
        expected = {"notation", "role", "split", "sweep", "profile", "fingerprint"}
        assert {f"kdsweep.{name}" for name in expected} | {"mlflow.source.git.commit"} <= tags.keys()
        names = {"train/loss", "train/supervised", "val/loss", "val/dice"} | (
            {"train/kd"} if role == "distilled" else set()
        )
        final = {"dice", "dice_std", "iou", "precision", "sensitivity", "hd95_px"}
        assert names | {f"test/{name}" for name in final} <= run.data.metrics.keys()
        assert run.data.params["train.epochs"] == "2"
        artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert {"test_scores.csv", "split.json", "test_predictions.npz"} <= artifacts


def test_scores_in_mlflow_equal_those_in_the_folders(swept):
    cwd, _ = swept
    sweep = reader.read_sweep(store=cwd / "multirun", uri=None, name="busi-quick")
    means = sweep.scores.groupby("fingerprint")["dice"].mean()
    for row in sweep.runs.itertuples():
        parent = "teachers" if row.role == "teacher" else "cells"
        (folder,) = (cwd / "multirun" / parent).glob(f"{row.notation}-split0-seed0-{row.fingerprint[:10]}")
        assert means[row.fingerprint] == pytest.approx(pd.read_csv(folder / "test_scores.csv")["dice"].mean())


def test_tables_come_out_with_every_row(swept, capsys, monkeypatch):
    cwd, _ = swept
    store, time_ms = cwd / "multirun", latency.time_ms
    monkeypatch.setattr(latency, "time_ms", lambda *args, **options: time_ms(*args, **{**options, "repeats": 2}))
    for which, rows in (("table3", 12), ("table4", 15), ("effects", 12), ("table5", 9)):
        assert cli.main(["tables", which, "--store", str(store)]) == 0
        printed = capsys.readouterr().out
        assert "not a result" in printed
        table = pd.read_csv(store / "tables" / f"{which}.csv")
        assert len(table) == rows
        numbers = table["difference_points" if which == "effects" else "mean_dice_percent"]
        assert numbers.notna().sum() == (3 if which == "table5" else rows)  # others have published ones
        assert (store / "tables" / f"{which}.tex").stat().st_size > 500


@pytest.mark.slow
def test_the_same_command_finds_everything_finished_and_needs_no_torch(swept, small_busi):
    """The import of torch alone would take longer than the answer may."""
    cwd, _ = swept
    files = sorted(p for p in (cwd / "multirun").rglob("*") if p.name in ("finished.json", "test_scores.csv"))
    before = [(p, p.read_bytes()) for p in files]
    code = "import sys; from kdsweep.__main__ import main; main(); print('torch' in sys.modules)"
    again = python("-c", code, *GRID, *QUICK, f"data.root={small_busi}", cwd=cwd)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "False"
    assert "13 cells" in again.stdout.splitlines()[0]
    assert "0 to run, 13 finished" in again.stdout.splitlines()[0]
    assert again.stdout.count("finished already, run ") == 13
    assert "at most" not in again.stdout
    assert before == [(p, p.read_bytes()) for p in files]


def test_another_sweep_counts_the_finished_cells_without_running_them(swept, small_busi):
    cwd, _ = swept
    again = kdsweep(
        "-m", "path=L,H", "teacher_aug=weak", "sweep_name=second", *QUICK, f"data.root={small_busi}", cwd=cwd
    )
    assert "0 to run, 2 finished" in again.stdout.splitlines()[0]
    sweep = reader.read_sweep(store=cwd / "multirun", uri=None, name="second")
    assert sorted(sweep.runs["notation"]) == ["H_KLD_WAug", "L_KLD_WAug", "Teacher_WAug"]
    assert len(sweep.scores) == 3 * 5


@pytest.mark.usefixtures("database")
def test_a_failing_cell_leaves_the_others_and_says_where_its_traceback_is(small_busi, tmp_path):
    (tmp_path / "user_loss.py").write_text(
        "def broken(*, student, teacher, valid):\n"
        "    if len(student) > 2:  # the check before the training passes\n"
        "        raise RuntimeError('my loss broke')\n"
        "    return (student - teacher).square().mean()\n"
    )
    overrides = [*QUICK, f"data.root={small_busi}", "teacher_aug=weak", "++loss.hidden._target_=user_loss.broken"]
    overrides += ["~loss.hidden.temperature", "path=H,L"]
    done = kdsweep("-m", *overrides, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = "H_KLD_WAug split 0 seed 0: epoch 1, step 1, kd term: RuntimeError: my loss broke"
    assert done.stderr.splitlines()[-1] == f"kdsweep: error: {message}"
    (failed,) = [line for line in done.stdout.splitlines() if "failed: " in line]
    assert f"failed: {message}; log: {tmp_path}/multirun/cells/H_KLD_WAug-split0-seed0-" in failed
    assert failed.endswith("/kdsweep.log")
    sweep = reader.read_sweep(store=tmp_path / "multirun", uri=None, name=None)
    states = dict(zip(sweep.runs["notation"], sweep.runs["status"], strict=True))
    assert states == {"H_KLD_WAug": "FAILED", "L_KLD_WAug": "FINISHED", "Teacher_WAug": "FINISHED"}
    assert "Traceback" not in done.stdout
    logs = {path.parent.name[0]: path.read_text() for path in (tmp_path / "multirun" / "cells").glob("*/kdsweep.log")}
    assert "in broken" in logs["H"]
    assert "Traceback" not in logs["L"]
    assert "my loss" not in logs["L"]
    (printed,) = [kdsweep("tables", "table3", cwd=tmp_path).stdout]
    assert "failed: split 0" in printed


def files_of(store: Path, *names: str) -> dict[str, bytes]:
    """Contents of the files of these names in a store, by folder and name."""
    return {f"{f.parent.name}/{f.name}": f.read_bytes() for f in store.glob("*/*/*") if f.name in names}


@pytest.mark.parametrize(
    ("how", "why"),
    [
        pytest.param(
            *("fail()", "epoch 1, step 1, kd term: AcceleratorError: CUDA error: device-side assert triggered"),
            marks=pytest.mark.slow,
            id="device error",
        ),
        pytest.param(
            "nn.functional.binary_cross_entropy_with_logits = fail",
            "the device failed (H_MSE_WAug split 0 seed 0: epoch 1, step ",
            id="late device error",
        ),
        pytest.param(
            *("os.kill(os.getpid(), 9)", "its process ended early, killed by SIGKILL (was the memory full?)"),
            id="killed",
        ),
        pytest.param(
            *("os.kill(os.getpid(), 11)", "its process ended early, killed by SIGSEGV"),
            marks=pytest.mark.slow,  # as tests/sweep/test_executors.py checks in seconds: this is its whole way
            id="segmentation fault",
        ),
    ],
)
def test_a_lost_process_costs_the_cell_that_is_to_blame_and_no_bit_of_the_others(
    swept, small_busi, empty_store, tmp_path, how, why
):
    """A loss breaks its process in its first step: with the device, everything fails after that with one message."""
    cwd, _ = swept
    (tmp_path / "breaking.py").write_text(
        "import os, torch\n"
        "from torch import nn\n"
        "def fail(*args, **kwargs):\n"
        "    raise torch.AcceleratorError('CUDA error: device-side assert triggered')\n"
        "def loss(*, student, teacher, valid):\n"
        "    if len(student) > 2:  # the check before the training passes\n"
        f"        {how}\n"
        "    return (student - teacher).square().mean()\n"
    )
    shutil.copytree(empty_store, tmp_path / "multirun")
    overrides = [*QUICK, f"data.root={small_busi}", "teacher_aug=weak", "path=H,L,none", "loss=mse"]
    done = kdsweep("-m", *overrides, "++loss.hidden._target_=breaking.loss", cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    lines = [line for line in done.stdout.splitlines() if "; resuming in " in line]
    assert [line.rpartition("; resuming in ")[2] for line in lines] == ["two halves", "two halves"]
    (failed,) = [line for line in done.stdout.splitlines() if "failed: H_MSE_WAug" in line]
    assert why in failed
    assert "; log: " in failed
    together, apart = files_of(cwd / "multirun", *RESULTS), files_of(tmp_path / "multirun", *RESULTS)
    assert {name.partition("-")[0] for name in apart} == {"Teacher_WAug", "L_MSE_WAug", "Student"}
    assert apart == {name: together[name] for name in apart}
    sweep = reader.read_sweep(store=tmp_path / "multirun", uri=None, name=None)
    states = dict(zip(sweep.runs["notation"], sweep.runs["status"], strict=True))
    assert states == dict.fromkeys(("Teacher_WAug", "L_MSE_WAug", "Student"), "FINISHED") | {"H_MSE_WAug": "FAILED"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("database")
def test_an_assert_on_the_device_costs_the_cell_that_is_to_blame_alone(small_busi, tmp_path):
    (tmp_path / "user_loss.py").write_text(
        "import torch\n"
        "def loss(*, student, teacher, valid):\n"
        "    far = 9 if len(student) > 2 and student.is_cuda else 0\n"
        "    one = student.new_ones(3)[torch.tensor(far, device=student.device)]\n"
        "    return (student - teacher).square().mean() * one\n"
    )
    overrides = [*QUICK, f"data.root={small_busi}", "teacher_aug=weak", "path=H,L,none", "loss=mse", "device=cuda"]
    done = python("-m", "kdsweep", "-m", *overrides, "++loss.hidden._target_=user_loss.loss", cwd=tmp_path)
    assert done.returncode == 1
    assert "device-side assert triggered" in done.stdout
    sweep = reader.read_sweep(store=tmp_path / "multirun", uri=None, name=None)
    states = dict(zip(sweep.runs["notation"], sweep.runs["status"], strict=True))
    assert states == dict.fromkeys(("Teacher_WAug", "L_MSE_WAug", "Student"), "FINISHED") | {"H_MSE_WAug": "FAILED"}


RESULTS = ("student.safetensors", "teacher.safetensors", "history.csv", "test_scores.csv", "test_predictions.npz")


@pytest.mark.parametrize(
    ("grid", "groups"),
    [
        (["-m", "path=none,H", "loss=kld"], 2),
        pytest.param(GRID[:-1], 7, marks=pytest.mark.slow),  # tests/training/test_loop.py has five of them in seconds
    ],
)
def test_one_by_one_gives_the_same_bits(swept, small_busi, empty_store, grid, groups):
    cwd, _ = swept
    store = f"alone-{groups}"
    shutil.copytree(empty_store, cwd / store)
    words = ["teacher_aug=weak", *QUICK, f"data.root={small_busi}"]  # the next test has strong ones
    alone = kdsweep(*grid, *words, "hydra/launcher=basic", f"store={store}", cwd=cwd)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert f"{groups} lockstep groups" in alone.stdout.splitlines()[0]
    together, solo = files_of(cwd / "multirun", *RESULTS), files_of(cwd / store, *RESULTS)
    assert len(together) == 15 * 4
    assert len(solo) == (groups + 1) * 4
    assert solo == {name: together[name] for name in solo}
    assert len({content for name, content in together.items() if name.endswith("student.safetensors")}) == 13


def test_two_processes_at_once_give_the_same_bits(swept, small_busi, empty_store):
    cwd, _ = swept
    shutil.copytree(empty_store, cwd / "divided")
    part = ["-m", "path=HR,L", "teacher_aug=strong,weak", *QUICK, f"data.root={small_busi}", "store=divided"]
    divided = kdsweep(*part, "hydra.launcher.processes=2", cwd=cwd)
    assert divided.returncode == 0, divided.stdout + divided.stderr
    assert "4 to run, 0 finished; 2 lockstep groups, 2 shared Teachers, 2 Teachers" in divided.stdout.splitlines()[0]
    together, apart = files_of(cwd / "multirun", *RESULTS), files_of(cwd / "divided", *RESULTS)
    assert len(apart) == 6 * 4
    assert apart == {name: together[name] for name in apart}
    sweep = reader.read_sweep(store=cwd / "divided", uri=None, name=None)
    assert len(sweep.runs) == 6
    assert set(sweep.runs["status"]) == {"FINISHED"}


@pytest.mark.usefixtures("database")
def test_a_learning_rate_sweep_is_one_group(small_busi, tmp_path):
    done = kdsweep("-m", "path=none", "train.lr=1e-3,3e-4", *QUICK, f"data.root={small_busi}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 cells: 2 to run, 0 finished; 1 lockstep group" in done.stdout.splitlines()[0]
    assert "Student split 0 seed 0 (train.lr=0.001): test Dice" in done.stdout  # by the process that trained it
    sweep = reader.read_sweep(store=tmp_path / "multirun", uri=None, name=None)
    table = table4.numbers(sweep)
    assert list(table["settings"]) == ["train.lr=0.0003", "train.lr=0.001"]
    assert set(table["notation"]) == {"Student"}
    logs = [file.read_text() for file in tmp_path.glob("multirun/cells/*/kdsweep.log")]
    assert [log.count("test Dice") for log in logs] == [1, 1]
    assert len(set(logs)) == 2


@pytest.mark.parametrize("words", [["-m", "path=none,L"], ["path=L"]])
def test_a_plan_is_shown_and_nothing_else_happens(small_busi, tmp_path, words):
    done = kdsweep(*words, "--plan", *QUICK, f"data.root={small_busi}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert " to run, 0 finished; 1 lockstep group, 1 shared Teacher, 1 Teacher to train" in first
    assert rest[0].startswith("group 1: ")
    assert rest[-1].endswith("device hours from one timed step on cpu; nothing was started")
    assert not list((tmp_path / "multirun").glob("*/*"))


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [pid for child in children for pid in descendants(child)]


def all_gone(pids: list[int]) -> bool:
    """Whether these processes end within a minute."""
    deadline = time.monotonic() + 60
    while (alive := any(Path(f"/proc/{pid}").exists() for pid in pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive


ENDLESS = ["-m", "path=none", "train.lr=1e-3,3e-4", *(word for word in QUICK if word != "train.epochs=2")]
ENDLESS += ["train.epochs=5000", "train.patience=5000"]


def until_epochs(store: Path, number: int) -> None:
    """Wait until both cells of the endless sweep have so many epochs in their history."""
    deadline, epochs = time.monotonic() + 120, []
    while len(epochs) < 2 or min(epochs) < number:
        assert time.monotonic() < deadline, f"epochs after two minutes: {epochs}"
        time.sleep(0.2)
        epochs = [len(cell_folder.read(file.parent).history) for file in store.glob("cells/*/checkpoint.pt")]


@pytest.fixture
def endless(small_busi, database, tmp_path):
    """A sweep that has trained its first epochs and continues."""
    command = [sys.executable, "-m", "kdsweep", *ENDLESS, f"data.root={small_busi}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes) as process:
        until_epochs(tmp_path / "multirun", 0)
        yield process
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_saves_the_cells_closes_their_runs_and_ends_all_processes(endless, tmp_path, number, code):
    processes = descendants(endless.pid)
    start = time.monotonic()
    if number == signal.SIGUSR1:
        endless.send_signal(number)
    else:  # a terminal and SLURM send these to all processes
        os.killpg(endless.pid, number)
    _, errors = endless.communicate(timeout=60)
    assert time.monotonic() - start < 20  # 10 s for the checkpoints, on a machine that does other things too
    assert endless.returncode == code, errors
    name = signal.Signals(number).name
    assert errors.splitlines() == [f"kdsweep: stopped by {name}; all is saved: run the same command to resume"]
    saved = [cell_folder.read(folder) for folder in (tmp_path / "multirun" / "cells").iterdir()]
    assert [record.status for record in saved] == ["KILLED", "KILLED"]
    logs = [(record.folder / "kdsweep.log").read_text().splitlines()[-1] for record in saved]
    for record, line in zip(saved, logs, strict=True):
        assert f"saved in epoch {len(record.history) + 1} after" in line
    sweep = reader.read_sweep(store=tmp_path / "multirun", uri=None, name=None)
    assert sweep.runs["status"].tolist() == ["KILLED", "KILLED"]
    assert len(processes) >= 3
    assert all_gone(processes)


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process_behind(endless, tmp_path):
    processes = descendants(endless.pid)
    assert len(processes) >= 3  # the server, a group, Python's tracker of resources
    endless.kill()
    assert all_gone(processes)


@pytest.mark.usefixtures("database")
def test_a_sweep_in_training_has_a_status_and_a_killed_group_resumes_in_halves(small_busi, tmp_path):
    with running(*ENDLESS, f"data.root={small_busi}", cwd=tmp_path) as command:
        # Before a cell's first epochs are in its history its pace is unknown, and the text says "at least".
        until_epochs(tmp_path / "multirun", 3)
        printed = kdsweep("status", cwd=tmp_path).stdout
        for count in (2, 3, 4):  # the check of the networks, the group, its halves
            deadline = time.monotonic() + 60
            while len(command.workers()) < count and time.monotonic() < deadline:
                time.sleep(0.05)
            os.kill(command.workers()[count - 1], signal.SIGKILL)
        done = command.result(60)
    assert printed.startswith("sweep busi-quick: 2 cells: 0 done, 2 running; about ")
    assert "epoch" in printed
    assert done.returncode == 1
    assert "its process ended early, killed by SIGKILL" in done.stderr
    assert (
        "2 cells: its process ended early, killed by SIGKILL (was the memory full?); resuming in two halves"
        in done.stdout
    )
    assert done.stdout.count("failed: ") == 2
    sweep = reader.read_sweep(store=tmp_path / "multirun", uri=None, name=None)
    assert sweep.runs["status"].tolist() == ["FAILED", "FAILED"]


@pytest.mark.usefixtures("database")
def test_an_interrupt_closes_the_run_as_killed_and_says_how_to_resume(small_busi, tmp_path):
    with running(
        "path=none", *QUICK, "train.epochs=500", "train.patience=500", f"data.root={small_busi}", cwd=tmp_path
    ) as command:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("multirun/cells/*/checkpoint.pt")) and time.monotonic() < deadline:
            time.sleep(0.2)
        os.kill(command.process.pid, signal.SIGINT)
        done = command.result(60)
    assert done.returncode == 130, done.stderr
    assert "the same command" in done.stderr
    assert "Traceback" not in done.stderr
    sweep = reader.read_sweep(store=tmp_path / "multirun", uri=None, name=None)
    assert sweep.runs["status"].tolist() == ["KILLED"]


def test_two_sweeps_at_once_compute_each_cell_and_each_teacher_once(swept, small_busi):
    cwd, _ = swept
    common = [*QUICK, f"data.root={small_busi}", "teacher_aug=weak", "store=shared"]
    with (
        running("-m", "path=none,H", *common, "sweep_name=one", cwd=cwd) as one,
        running("-m", "path=H,L", *common, "sweep_name=other", cwd=cwd) as other,
    ):
        both = [one.result(300), other.result(300)]
    outputs = [done.stdout + done.stderr for done in both]
    assert [done.returncode for done in both] == [0, 0], outputs
    lines = "".join(outputs)
    for name in ("Student", "L_KLD_WAug", "H_KLD_WAug", "Teacher_WAug"):
        assert lines.count(f"{name} split 0 seed 0: test Dice") == 1, outputs
    alone, shared = files_of(cwd / "multirun", *RESULTS), files_of(cwd / "shared", *RESULTS)
    assert len(shared) == 4 * 4
    assert shared == {name: alone[name] for name in shared}
    for name in ("one", "other"):
        sweep = reader.read_sweep(store=cwd / "shared", uri=None, name=name)
        assert set(sweep.runs["status"]) == {"FINISHED"}
        assert len(sweep.runs) == 3


@pytest.mark.usefixtures("database")
def test_what_fails_is_tried_once_or_with_retry_failed_twice(small_busi, tmp_path):
    """The loss fails at its first call of each process but the third."""
    (tmp_path / "user_loss.py").write_text(
        "from pathlib import Path\n"
        "def flaky(*, student, teacher, valid):\n"
        "    file = Path('tries')\n"
        "    if len(student) > 2 and not flaky.called:\n"
        "        flaky.called = True\n"
        "        file.write_text((file.read_text() if file.exists() else '') + 'x')\n"
        "        if len(file.read_text()) < 3:\n"
        "            raise RuntimeError('not yet')\n"
        "    return (student - teacher).square().mean()\n"
        "flaky.called = False\n"
    )
    overrides = ["-m", *QUICK, f"data.root={small_busi}", "path=H,none", "teacher_aug=weak"]
    overrides += ["++loss.hidden._target_=user_loss.flaky", "~loss.hidden.temperature"]
    once = kdsweep(*overrides, cwd=tmp_path)
    assert once.returncode == 1
    assert (tmp_path / "tries").read_text() == "x"
    twice = kdsweep(*overrides, "retry_failed=true", cwd=tmp_path)
    assert (tmp_path / "tries").read_text() == "xxx"
    assert twice.returncode == 0, twice.stderr
    assert "trying the cells that failed a second time, each alone: 1" in twice.stdout
    assert "failed: " not in twice.stdout
    sweep = reader.read_sweep(store=tmp_path / "multirun", uri=None, name=None)
    assert set(sweep.runs["status"]) == {"FINISHED"}
    assert len(sweep.runs) == 3


@pytest.mark.usefixtures("database")
def test_two_data_folders_of_one_command_are_two_rows(small_busi, database, tmp_path):
    """Neither the status nor a table loses one of two cells that only the images distinguish."""
    other = shutil.copytree(small_busi, tmp_path / "site-b")
    for mask in other.rglob("*_mask.png"):
        Image.fromarray(~np.array(Image.open(mask))).save(mask)
    small = [*QUICK, "train.epochs=1", "path=none", f"data.root={small_busi},{other}"]
    done = kdsweep("-m", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 cells done" in done.stdout
    printed = kdsweep("status", cwd=tmp_path).stdout
    assert "2 cells: 2 done" in printed
    assert "Student split 0 seed 0 (data.root=site-b)" in printed
    sweep = reader.read_sweep(store=tmp_path / "multirun", uri=None, name=None)
    table = table4.numbers(sweep)
    students = table[table["notation"] == "Student"]
    assert sorted(students["settings"]) == sorted([f"data.root={small_busi.name}", "data.root=site-b"])
    assert students["mean_dice_percent"].nunique() == 2


@pytest.mark.usefixtures("database")
def test_changed_images_make_new_cells_and_the_line_says_so(small_busi, tmp_path):
    root = Path(shutil.copytree(small_busi, tmp_path / "images"))
    arguments = ["path=none", *QUICK, f"data.root={root}", "train.epochs=1"]
    assert kdsweep(*arguments, cwd=tmp_path).returncode == 0
    image = next((root / "benign").glob("*).png"))
    Image.fromarray(np.asarray(Image.open(image)) ^ 1).save(image)
    again = kdsweep(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    (line,) = [line for line in again.stdout.splitlines() if "1 cell is new (Student split 0 seed 0): " in line]
    assert line.endswith("this has changed: the images")
    folders = list((tmp_path / "multirun" / "cells").iterdir())
    assert len(folders) == 2
    assert all(cell_folder.read_finished(folder) is not None for folder in folders)
    sweep = reader.read_sweep(store=tmp_path / "multirun", uri=None, name=None)
    assert len(sweep.runs) == 1  # the old result does not count any more
