"""How far a sweep is, read from folders as training leaves them; estimates are worked out by hand."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kdsweep import cli
from kdsweep.config.grid import Cell
from kdsweep.core.errors import InputError
from kdsweep.core.progress import epoch_s
from kdsweep.store import cell_folder, sweep_file
from kdsweep.sweep import status
from kdsweep.sweep.executors import slurm

PACE_S = 50.0
EPOCHS = 60
NOW_MS = 2_000_000_000_000


def make_cell(store: Path, notation="L_MSE", split=0, **settings) -> Cell:
    role = {"Student": "baseline", "Teacher": "teacher", "Teacher_WAug": "teacher"}.get(notation, "distilled")
    return Cell(role, notation, split, 0, settings or {"lr": 1}, {"data": "a"}, store)


def begin(cell: Cell, *, done=12, pace_s=PACE_S, ended_ms=NOW_MS - 120_000, dice=0.5124) -> None:
    """Its folder after so many epochs, the last of which ended two minutes ago."""
    cell_folder.describe(cell, split={}, params={}, tags={})
    times_ms = [ended_ms - int(1000 * pace_s) * ago for ago in reversed(range(done))]
    history = [{"epoch": epoch, "val/dice": dice if epoch == done - 1 else 0.1} for epoch in range(done)]
    cell_folder.write_progress(cell.folder, epochs=EPOCHS, history=history, times_ms=times_ms, seconds=[])


def finish(cell: Cell, dice=0.78125, files=()) -> None:
    begin(cell, done=EPOCHS)
    for name in files:
        (cell.folder / name).write_text("content")
    cell_folder.write_finished(cell.folder, values={"test/dice": dice}, files=list(files))


@pytest.fixture
def hold():
    """Computes a cell, as far as others can see, until the test ends."""
    with contextlib.ExitStack() as held:
        yield lambda cell: held.enter_context(cell_folder.lock(cell.folder))


def report(store: Path, *, cells=(), teachers=(), tasks=None) -> list[str]:
    """Lines of the report on a sweep of these cells."""
    sweep_file.add(store, "study", cells=list(cells), teachers=list(teachers))
    return status.report("study", status.read_rows(store, "study", tasks=tasks or {}), now_ms=NOW_MS).splitlines()


def row(lines: list[str], name: str) -> list[str]:
    """Columns of the only row of a cell, its name left out."""
    (line,) = [line for line in lines if line.startswith(f"{name} ")]
    return [column.strip() for column in line.removeprefix(name).split("  ") if column]


def test_a_cell_of_each_state_is_shown_and_counted(tmp_path, hold):
    waiting, running, interrupted, failed, finished = cells = [
        make_cell(tmp_path, name) for name in ("H_KLD", "L_KLD", "L_MSE", "H_MSE", "Student")
    ]
    begin(running)
    hold(running)
    begin(interrupted, done=1)
    begin(failed, done=3)
    cell_folder.write_failed(failed.folder, "train/loss is nan\nin epoch 4")
    (failed.folder / "kdsweep.log").touch()
    finish(finished)
    lines = report(tmp_path, cells=cells)
    counts = "1 done, 1 running, 1 failed, 1 interrupted, 1 waiting"
    # two at a time: 48 epochs of 50 s, then 59, next to 60 of the one that was not begun
    assert lines[0] == f"sweep study: 5 cells: {counts}; about 89 min left"
    assert lines[1] == ""
    assert lines[2].split("  ")[0] == "not finished"
    saved = [line for line in lines if " of 60 " in line]
    assert {line.index("epoch ") for line in saved} == {lines[2].index("saved")}
    assert {line.index("0.512") for line in saved} == {lines[2].index("val/dice")}
    assert not any(line.endswith(" ") for line in lines)
    assert row(lines, waiting.title) == ["waiting"]
    expected = ["running", "epoch 12 of 60", "0.512", "2 min ago", "at most 40 min"]
    assert row(lines, running.title) == expected
    assert row(lines, interrupted.title) == ["interrupted", "epoch 1 of 60", "0.512"]
    assert row(lines, failed.title) == ["failed", "epoch 3 of 60", "0.512"]
    below = lines[1 + next(number for number, line in enumerate(lines) if line.startswith(failed.title))]
    assert below == f"    train/loss is nan in epoch 4; log: {failed.folder}/kdsweep.log"
    assert lines[-3] == ""
    assert row(lines, "finished") == ["test Dice %"]
    assert row(lines, finished.title) == ["78.12"]


def test_what_slurm_has_is_queued_or_running_as_its_job(tmp_path, hold):
    cells = [make_cell(tmp_path, name) for name in ("H_KLD", "L_KLD", "L_MSE", "H_MSE")]
    _, preempted, running, _ = cells
    begin(preempted)
    begin(running)
    tasks = {cell.folder: (f"7_{number}", "PENDING") for number, cell in enumerate(cells[:2])}
    lines = report(tmp_path, cells=cells, tasks=tasks)
    assert lines[0] == (
        "sweep study: 4 cells: 0 done, 2 queued, 1 interrupted, 1 waiting; "
        "nothing is running yet, SLURM has what is queued"
    )
    assert lines[2].split()[-1] == "job"
    assert row(lines, "H_KLD split 0 seed 0") == ["queued", "7_0 PENDING"]
    assert row(lines, "L_KLD split 0 seed 0") == ["queued", "epoch 12 of 60", "0.512", "7_1 PENDING"]
    hold(running)
    lines = report(tmp_path, cells=cells, tasks=tasks | {running.folder: ("7_2", "RUNNING")})
    assert row(lines, "L_MSE split 0 seed 0")[-1] == "7_2 RUNNING"
    assert "2 queued, 1 waiting; about " in lines[0]
    assert row(lines, "H_MSE split 0 seed 0") == ["waiting"]


def test_a_queue_that_does_not_answer_is_said_below(tmp_path, monkeypatch):
    cell = make_cell(tmp_path)
    sweep_file.add(tmp_path, "study", cells=[cell], teachers=[])
    slurm.note([cell.folder], cluster="slurm", job_id="7")
    monkeypatch.setenv("PATH", "/nowhere")
    lines = status.make(store=tmp_path, sweep=None).splitlines()
    assert lines[0].startswith("sweep study: 1 cell: 0 done, 1 waiting;")
    assert lines[-1].startswith("SLURM's queue cannot be read: squeue: ")


def test_cells_that_a_swept_key_distinguishes_are_named_by_it(tmp_path):
    cells = [replace(make_cell(tmp_path, lr=lr), variant={"train.lr": str(lr)}) for lr in (1, 2)]
    finish(cells[0])
    sweep_file.add(tmp_path, "study", cells=cells, teachers=[], swept=["train.lr"])
    lines = status.make(store=tmp_path, sweep=None).splitlines()
    assert row(lines, "L_MSE split 0 seed 0 (train.lr=1)") == ["78.12"]
    assert row(lines, "L_MSE split 0 seed 0 (train.lr=2)") == ["waiting"]


def test_teachers_have_a_line_and_come_first(tmp_path, hold):
    done, running, cell = (make_cell(tmp_path, name) for name in ("Teacher", "Teacher_WAug", "H_KLD"))
    finish(done, dice=0.9)
    begin(running)
    hold(running)
    lines = report(tmp_path, cells=[cell], teachers=[done, running])
    assert lines[:2] == ["sweep study: 1 cell: 0 done, 1 waiting; at least 40 min left", "Teachers: 1 done, 1 running"]
    assert [line.split("  ")[0] for line in lines[4:6]] == [running.title, cell.title]
    assert row(lines, done.title) == ["90.00"]


def test_the_order_is_split_seed_notation_and_like_names_are_distinguished(tmp_path):
    cells = [make_cell(tmp_path, name, split) for split in (10, 2) for name in ("L_MSE", "H_MSE")]
    cells += [make_cell(tmp_path, "L_KLD", 2, lr=lr) for lr in (1, 2)]
    twins = sorted(f"L_KLD split 2 seed 0 ({cell.key[-8:]})" for cell in cells[-2:])
    rows = [line.split("  ")[0] for line in report(tmp_path, cells=cells)[3:]]
    names = ["L_MSE split 2 seed 0", "H_MSE split 10 seed 0", "L_MSE split 10 seed 0"]
    assert rows == ["H_MSE split 2 seed 0", *twins, *names]


def test_many_that_wait_are_one_row(tmp_path, hold):
    names = ("HReg_MSE", "H_MSE", "L_KLD", "L_MSE", "Student")
    cells = [make_cell(tmp_path, name, split) for split in (0, 1) for name in names]
    rows = [line.split("  ") for line in report(tmp_path, cells=cells)[3:]]
    assert [(name, words[-1]) for name, *words in rows] == [
        ("5 cells split 0 seed 0", "waiting"),
        ("5 cells split 1 seed 0", "waiting"),
    ]
    begin(cells[0])
    hold(cells[0])
    rows = [line.split("  ")[0] for line in report(tmp_path, cells=cells)[3:]]
    assert rows == [*(f"{name} split 0 seed 0" for name in names), "5 cells split 1 seed 0"]
    first, second = ("7_1", ""), ("7_2", "")
    tasks = {cell.folder: second if number < 8 else first for number, cell in enumerate(cells[5:], start=5)}
    queued = report(tmp_path, cells=cells, tasks=tasks)[-5:]
    assert [line.split()[-1] for line in queued] == ["7_2"] * 3 + ["7_1"] * 2  # of two jobs, so too few of each


def test_nothing_running_is_said_unless_all_is_done(tmp_path):
    cells = [make_cell(tmp_path, name) for name in ("H_KLD", "L_KLD")]
    finish(cells[0])
    first, *_ = report(tmp_path, cells=cells)
    assert first == "sweep study: 2 cells: 1 done, 1 waiting; nothing is running, the same command resumes"
    finish(cells[1])
    lines = report(tmp_path, cells=cells)
    assert lines[0] == "sweep study: 2 cells: 2 done"
    assert not any("not finished" in line for line in lines)


def test_a_failed_cell_without_a_log_names_none(tmp_path):
    teacher = make_cell(tmp_path, "Teacher")
    begin(teacher)
    cell_folder.write_failed(teacher.folder, "disk full")
    lines = report(tmp_path, cells=[make_cell(tmp_path)], teachers=[teacher])
    assert lines[1] == "Teachers: 0 done, 1 failed"
    assert "    disk full" in lines


# ---- time left -----------------------------------------------------------------------------------------------------

RUNS, ENDED, WAITS = "runs", "ended", "waits"
SLOW, FAST = ("H_KLD", 0, RUNS, 12, 80), ("L_KLD", 0, RUNS, 12, 10)  # 48 of 60 epochs left: 3840 s and 480 s
WAITING = [(name, 1, WAITS, 0, 0) for name in ("H_KLD", "L_KLD", "L_MSE")]


@pytest.mark.parametrize(
    ("rows", "left"),
    [
        ([SLOW, FAST], "about 64 min"),  # the slower one
        ([SLOW, FAST, *WAITING[:2]], "about 2.4 h"),  # one begins after 480 s, one after 3840 s, each takes 4800 s
        ([SLOW, FAST, *WAITING], "about 2.8 h"),  # the third after 5280 s
        ([SLOW, ("L_KLD", 0, RUNS, 0, 0)], "about 80 min"),  # nothing saved yet: 60 epochs of 80 s
        ([("H_KLD", 0, RUNS, 1, 50)], None),  # one epoch has no pace
        ([("H_KLD", 0, RUNS, 12, 50), ("L_KLD", 0, ENDED, 12, 50), *WAITING[:2]], "about 1.5 h"),  # two at a time
        ([("Teacher", 0, WAITS, 0, 0), ("H_KLD", 0, RUNS, 12, 50)], "at least 40 min"),
        # The cells may wait for a Teacher that runs: 48 epochs of 75 s, then 48 of 50 s.
        ([("Teacher", 0, RUNS, 12, 75), ("H_KLD", 0, RUNS, 12, 50)], "about 1.7 h"),
        (
            [  # of three splits the first is done, the second's Teachers have 48 epochs of 10 s left
                *((name, 0, ENDED, EPOCHS, 20) for name in ("Teacher", "Teacher_WAug")),
                *((name, 1, RUNS, 12, 10) for name in ("Teacher", "Teacher_WAug")),
                *((name, 2, WAITS, 0, 0) for name in ("Teacher", "Teacher_WAug")),
                *((name, 0, ENDED, EPOCHS, 60) for name in ("H_KLD", "L_KLD")),
                *((name, split, WAITS, 0, 0) for split in (1, 2) for name in ("H_KLD", "L_KLD")),
            ],
            "about 2.3 h",  # 480 s, 600 s for the third split's Teachers, two groups of 60 epochs of 60 s
        ),
    ],
)
def test_the_time_left(tmp_path, hold, rows, left):
    """Rows: name, split, what it does, epochs, seconds of an epoch."""
    cells = []
    for name, split, does, done, pace_s in rows:
        cells.append(make_cell(tmp_path, name, split))
        if does != WAITS:
            begin(cells[-1], done=done, pace_s=pace_s)
        if does == ENDED:
            cell_folder.write_finished(cells[-1].folder, values={"test/dice": 0.5}, files=[])
        if does == RUNS:
            hold(cells[-1])
    teachers = [cell for cell in cells if cell.role == "teacher"]
    line = report(tmp_path, cells=[cell for cell in cells if cell not in teachers], teachers=teachers)[0]
    assert line.endswith(f"; {left} left" if left else ": 0 done, 1 running")


def test_the_pace_is_the_median_of_the_last_ten_epochs(tmp_path):
    for times_s, pace_s in (
        ([0.0, 100.0, 200.0, 300.0, 400.0, 500.0], 100.0),
        # four differences of 100 s and five of 2 s
        ([0.0, 100.0, 200.0, 300.0, 400.0, 500.0, 502.0, 504.0, 506.0, 508.0, 510.0], 2.0),
        ([0.0, 10.0, 20.0, 36_020.0, 36_030.0, 36_040.0], 10.0),  # with a night between two
    ):
        assert epoch_s([int(1000 * time_s) for time_s in times_s]) == pace_s


# ---- the command ---------------------------------------------------------------------------------------------------


def request(store: Path, name: str, cell: Cell, *, time_s: int) -> None:
    sweep_file.add(store, name, cells=[cell], teachers=[])
    os.utime(store / "sweeps" / f"{name}.json", (time_s, time_s))


def test_the_latest_sweep_is_shown_unless_another_is_named(tmp_path, capsys):
    finished = make_cell(tmp_path, "H_KLD")
    finish(finished)
    request(tmp_path, "b-last", finished, time_s=200)
    request(tmp_path, "c-first", make_cell(tmp_path, "L_KLD"), time_s=100)
    assert cli.main(["status", "--store", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("sweep b-last: 1 cell: 1 done\n")
    assert cli.main(["status", "--store", str(tmp_path), "--sweep", "c-first"]) == 0
    assert capsys.readouterr().out.startswith("sweep c-first: 1 cell: 0 done, 1 waiting; nothing is running")


def test_an_unknown_sweep_and_an_empty_store_are_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(InputError, match="no sweep was started"):
        status.make(store=tmp_path / "nowhere", sweep="any")
    assert cli.main(["status", "--store", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    error = f"kdsweep: error: --store {tmp_path}: no sweep was started in it yet\n"
    assert (printed.out, printed.err) == ("", error)
    assert list(tmp_path.iterdir()) == []  # asking does not create one
    request(tmp_path, "b", make_cell(tmp_path), time_s=100)
    request(tmp_path, "a", make_cell(tmp_path), time_s=200)
    assert cli.main(["status", "--store", str(tmp_path), "--sweep", "X"]) == 1
    error = "kdsweep: error: --sweep X: not in this store; it holds: a, b\n"
    assert capsys.readouterr().err == error


def test_a_store_of_the_home_folder_is_read_where_the_shell_leaves_its_tilde(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    request(tmp_path / "runs", "study", make_cell(tmp_path / "runs"), time_s=100)
    assert cli.main(["status", "--store=~/runs"]) == 0
    assert capsys.readouterr().out.startswith("sweep study: 1 cell")


def test_a_damaged_cell_of_a_store_that_cannot_be_written_to_is_to_be_done_again(tmp_path, monkeypatch, capsys):
    cell = make_cell(tmp_path)
    finish(cell, files=["scores.csv"])
    sweep_file.add(tmp_path, "study", cells=[cell], teachers=[])
    with cell_folder.lock(cell.folder):
        pass  # leaves its file, as training does
    (cell.folder / "scores.csv").write_text("damaged")

    def refuse(*_, **__):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(cell_folder, "FileLock", refuse)
    assert cli.main(["status", "--store", str(tmp_path)]) == 0
    assert "1 cell: 0 done, 1 interrupted; nothing is running" in capsys.readouterr().out
    assert (cell.folder / "finished.json").exists()


def test_another_process_that_computes_a_cell_is_seen_and_nothing_slow_is_imported(tmp_path, hold):
    cell = make_cell(tmp_path)
    begin(cell, ended_ms=cell_folder.now_ms() - 120_000)
    sweep_file.add(tmp_path, "study", cells=[cell], teachers=[])
    hold(cell)
    slow = ("torch", "mlflow", "pandas", "omegaconf", "hydra")
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('kdsweep', run_name='__main__')\n"
        f"finally:\n    assert not sys.modules.keys() & set({slow}), sys.modules.keys() & set({slow})\n"
    )
    command = [sys.executable, "-c", code, "status", "--store", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("sweep study: 1 cell: 0 done, 1 running; about 40 min left\n")
    assert "2 min ago" in done.stdout
