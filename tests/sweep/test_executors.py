"""Executors: what follows a lost process, processes that die, logs of a group, devices of this machine."""

import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from kdsweep.config.grid import Cell
from kdsweep.core import logs, signals
from kdsweep.core.errors import CellError, DeviceError, InputError, LostError
from kdsweep.core.files import read_json, write_json
from kdsweep.store import cell_folder
from kdsweep.sweep.executors import executor, local, worker
from kdsweep.sweep.executors.executor import Executor, Work, run

LOST = DeviceError("the device failed (CUDA error: device-side assert triggered)")
KILLED = "its process ended early, killed by SIGKILL"


class Settings(BaseModel):
    """The settings of a stand-in for a job."""

    name: str
    device: str = "auto"


@dataclass(frozen=True)
class Job:
    """A stand-in for a job, whose name says what happens to it."""

    settings: Settings
    cell: Cell
    overrides: list[str]

    @property
    def name(self) -> str:
        return self.settings.name


@pytest.fixture
def make_work(tmp_path):
    def make(*names: str, call=len, devices=("cpu",)) -> Work:
        shared = {"role": "baseline", "split": 0, "seed": 0, "settings": {}, "store": tmp_path}
        cells = [Cell(notation=name, input_digests={"of": name}, **shared) for name in names]
        jobs = [Job(Settings(name=name), cell, [f"name={name}"]) for name, cell in zip(names, cells, strict=True)]
        return Work(call, jobs, list(devices), cells)

    return make


def results_of(computing: Executor, *works: Work, before=()) -> list[list[str]]:
    """The results of each work, in the order of the works."""
    results = {work: [str(result) for result in values] for work, values in run(computing, works, before=before)}
    computing.close(None)
    assert not any(work in results for work in before)
    return [results[work] for work in works]


# --- the rule for a lost process


class OneProcess(Executor):
    """An executor of which a process is lost with the cells named ``guilty``: it dies, or its device fails."""

    def __init__(self, *guilty: str, dies: bool = False, room: int = 9) -> None:
        self.guilty, self.dies, self.room, self.ran, self.waiting = set(guilty), dies, room, [], []

    def submit(self, work):
        if len(self.waiting) == self.room:
            return None
        self.ran.append("".join(job.name for job in work.jobs))
        self.waiting.append((work, Future()))
        return self.waiting[-1][1]

    def look(self):
        for work, future in self.waiting:
            try:
                future.set_result(self.compute(work, [job.name for job in work.jobs]))
            except Exception as error:
                future.set_exception(error)
        self.waiting = []

    def compute(self, work, names):
        if self.dies and self.guilty & set(names):
            raise LostError(KILLED)
        return [LOST if self.guilty & set(names) else f"{name} done" for name in names]


@pytest.mark.parametrize("room", [1, 9])
@pytest.mark.parametrize(("dies", "why"), [(False, str(LOST)), (True, KILLED)])
def test_a_lost_process_is_halved_until_the_guilty_cell_is_alone(make_work, caplog, dies, why, room):
    work, other, teacher = make_work("a", "b", "c", "d", "e"), make_work("x"), make_work("t")
    one = OneProcess("b", dies=dies, room=room)
    results = results_of(one, work, other, before=[teacher])
    assert results == [["a done", why, "c done", "d done", "e done"], ["x done"]]
    assert one.ran[0] == "t"
    assert sorted(one.ran) == sorted(["t", "abcde", "x", "abc", "de", "ab", "c", "a", "b"])
    assert cell_folder.read(work.cells[1].folder).error == why
    assert not (work.cells[0].folder / cell_folder.FAILED).exists()
    assert [line for line in caplog.messages if "resuming" in line] == [
        f"{count} cells: {why}; resuming in two halves" for count in (5, 3, 2)
    ]


def test_results_that_came_before_the_loss_are_kept(make_work):
    class Half(OneProcess):
        def compute(self, work, names):
            return [CellError("of a"), 0.5, LOST] if len(names) > 2 else super().compute(work, names)

    one = Half()
    assert results_of(one, make_work("a", "b", "c")) == [["of a", "0.5", "c done"]]
    assert one.ran == ["abc", "c"]


def test_a_dead_process_counts_with_all_that_it_has_written_and_an_earlier_failure_does_not(make_work):
    class Dying(OneProcess):
        def compute(self, work, names):
            if len(names) == 4:
                cell_folder.write_finished(work.cells[0].folder, values={"test/dice": 0.0}, files=[])
                cell_folder.write_failed(work.cells[1].folder, "of b")
            return super().compute(work, names)

    work = make_work("a", "b", "c", "d")
    for cell in work.cells:
        cell.folder.mkdir(parents=True)
    earlier = work.cells[2].folder / cell_folder.FAILED
    cell_folder.write_failed(earlier.parent, "of last week")
    write_json(earlier, read_json(earlier) | {"time_ms": 1})
    one = Dying("d", dies=True)
    assert results_of(one, work) == [["0.0", "of b", "c done", KILLED]]
    assert one.ran == ["abcd", "c", "d"]


def test_an_error_that_a_fresh_process_cannot_cure_is_final(make_work):
    class Refusing(OneProcess):
        def compute(self, work, names):
            raise InputError("store=x: not that of this machine")

    one = Refusing()
    assert results_of(one, make_work("a", "b")) == [["store=x: not that of this machine"] * 2]
    assert one.ran == ["ab"]
    two = OneProcess("a", "c")
    ((_, results),) = run(two, [make_work("a", "b", "c")])
    assert [str(result) for result in results] == [str(LOST), "b done", str(LOST)]
    assert not any(isinstance(result, LostError) for result in results)


# --- processes


def refuse() -> None:
    raise InputError("split=9 is not allowed")


def break_down() -> None:
    raise UnicodeDecodeError("ascii", b"x", 0, 1, "an error that cannot be rebuilt from its text")


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def begin(function, *args) -> tuple[worker.Processes, Future]:
    """A process that a thread waits for, and its result."""
    processes, future = worker.Processes(), Future()

    def call() -> None:
        try:
            future.set_result(processes.call(function, *args))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return processes, future


def test_a_process_gives_its_result_or_its_error_as_text():
    (_, total), (_, refused), (_, broken) = begin(int.__add__, 2, 3), begin(refuse), begin(break_down)
    assert total.result() == 5
    with pytest.raises(InputError, match="split=9 is not allowed"):
        refused.result()
    with pytest.raises(CellError, match=r"UnicodeDecodeError: .*cannot be rebuilt") as error:
        broken.result()
    assert not isinstance(error.value, LostError)


def test_its_death_is_named_with_the_cause():
    deaths = {
        r"killed by SIGKILL \(was the memory full\?\)": begin(die, signal.SIGKILL),
        "killed by SIGSEGV": begin(die, signal.SIGSEGV),
        "exit code 3": begin(os._exit, 3),
        "exit code 143": begin(die, signal.SIGTERM),  # it saves and ends
    }
    for words, (_, future) in deaths.items():
        with pytest.raises(LostError, match=f"its process ended early, {words}"):
            future.result()


def sleep(begun: Path, ignored: int = signal.SIGUSR1) -> None:
    signal.signal(ignored, signal.SIG_IGN)
    begun.touch()
    time.sleep(600)


def until_exists(file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)


def test_a_stop_ends_a_process_which_the_signals_of_a_job_do_not_reach(tmp_path):
    processes, future = begin(sleep, tmp_path / "begun", signal.SIGHUP)
    until_exists(tmp_path / "begun")
    (process,) = processes._running
    for number in signals.JOB_SIGNALS:
        os.kill(process.pid, number)
    time.sleep(0.5)
    assert not future.done()
    start = time.monotonic()
    assert processes.stop() == 0
    assert time.monotonic() - start < 8
    with pytest.raises(LostError, match="exit code 143"):
        future.result()


def test_a_process_that_does_not_end_in_time_is_killed_and_not_called_saved(monkeypatch, tmp_path, make_work):
    monkeypatch.setattr(worker, "STOP_WITHIN_S", 0.5)
    machine, stop = local.Local(), signals.Stopped(signal.SIGTERM)
    end = "run the same command to resume"
    assert stop.message() == f"stopped by SIGTERM; all is saved: {end}"
    future = machine.submit(make_work("a", call=sleep_long))
    until_exists(tmp_path / "begun")
    machine.close(stop)
    with pytest.raises(LostError, match="killed by SIGKILL"):
        future.result(5)
    assert stop.message() == f"stopped by SIGTERM; there was no time to save all, the last checkpoints stay: {end}"
    with pytest.raises(CellError, match="the command has ended"):
        machine.submit(make_work("a")).result(5)


def sleep_long(jobs: list[Job]) -> None:
    sleep(jobs[0].cell.store / "begun", signal.SIGTERM)


def sleep_until_stopped(jobs: list[Job]) -> None:
    sleep(jobs[0].cell.store / "begun")


@pytest.fixture
def usual_signals():
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("number", signals.SIGNALS)
def test_each_signal_stops_once_with_its_exit_code(number):
    signals.install()
    with pytest.raises(signals.Stopped) as stopped:
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # ignored
    assert stopped.value.exit_code == 128 + number
    signals.install()


def press_again(begun: Path, pause_s: float) -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except signals.Stopped:
        time.sleep(pause_s)
        os.kill(os.getpid(), signal.SIGINT)
        begun.touch()
        raise


def test_a_second_ctrl_c_ends_at_once_but_not_one_that_was_sent_twice(tmp_path):
    (_, twice), (_, again) = (begin(press_again, tmp_path / name, pause) for name, pause in (("a", 0), ("b", 0.7)))
    for future in (twice, again):
        with pytest.raises(LostError, match="exit code 130"):
            future.result()
    assert ((tmp_path / "a").exists(), (tmp_path / "b").exists()) == (True, False)


# --- the log and the settings of each cell


def log_lines(jobs: list[Job]) -> list[int]:
    logging.info("for all")
    for job in jobs:
        with logs.about(job.cell.folder):
            logging.info("for %s", job.name)
    with logs.about(jobs[0].cell.store / "a Teacher"):
        logging.info("of the Teacher")
    return list(range(len(jobs)))


@pytest.fixture(autouse=True)
def all_levels(caplog):
    caplog.set_level(logging.INFO)


def test_each_cell_has_its_log_and_its_settings(make_work):
    work = make_work("a", "b", "c", call=log_lines)
    assert worker.compute(work) == [0, 1, 2]
    for job in work.jobs:
        lines = (job.cell.folder / "kdsweep.log").read_text().splitlines()
        assert [line.partition(" - ")[2] for line in lines] == ["for all", f"for {job.name}", "of the Teacher"]
        assert yaml.safe_load((job.cell.folder / "config.yaml").read_text()) == {"name": job.name, "device": "auto"}
        assert yaml.safe_load((job.cell.folder / "overrides.yaml").read_text()) == [f"name={job.name}"]


def test_errors_are_those_of_their_cells_and_survive_pickling(make_work):
    errors = [1.0, ValueError("two\nlines"), InputError("split=9"), LOST]
    results = worker.compute(make_work("a", "b", "c", "d", call=lambda _: errors))
    assert results[0] == 1.0
    assert [(type(error), str(error)) for error in results[1:]] == [
        (CellError, "ValueError: two lines"),
        (InputError, "split=9"),
        (DeviceError, str(LOST)),
    ]


def test_what_breaks_the_group_fails_all_its_cells_and_is_in_their_logs(make_work):
    def break_group(_):
        raise OSError("the disk is full")

    work = make_work("a", "b", call=break_group)
    assert [str(error) for error in worker.compute(work)] == ["OSError: the disk is full"] * 2
    assert all("in break_group" in (cell.folder / "kdsweep.log").read_text() for cell in work.cells)


def test_a_folder_that_cannot_be_written_to_fails_its_cell_alone(make_work):
    work = make_work("a", "b", "c", call=log_lines)
    work.cells[0].folder.parent.mkdir(parents=True)
    work.cells[0].folder.write_text("a file")
    (work.cells[1].folder / "config.yaml").mkdir(parents=True)
    failed, also, done = worker.compute(work)
    assert "File exists" in str(failed)
    assert "Is a directory" in str(also)
    assert done == 0


def test_tracebacks_and_lines_of_one_among_many_go_to_the_file_and_not_to_the_screen(tmp_path):
    root, screen = logging.getLogger(), io.StringIO()
    handler = logging.StreamHandler(screen)
    root.addHandler(handler)
    try:
        with logs.to_files([tmp_path]):
            try:
                refuse()
            except InputError as error:
                root.error("refused", exc_info=error)
            root.warning("one of many", extra=logs.FILE_ONLY)
            root.warning("many", extra=logs.SCREEN_ONLY)
        root.warning("after", extra=logs.FILE_ONLY)
    finally:
        root.removeHandler(handler)
    assert screen.getvalue() == "refused\nmany\nafter\n"
    written = (tmp_path / "kdsweep.log").read_text()
    assert "in refuse" in written
    assert written.splitlines()[-1].endswith(" - one of many")


# --- the devices of this machine

GONE = "cuda:99"  # no machine has it


def report(jobs: list[Job]) -> list[str]:
    import torch

    return [f"{job.name} on {job.settings.device} with {torch.get_num_threads()}" for job in jobs]


def suffer(jobs: list[Job]) -> list[str]:
    """Die as the names of the jobs say."""
    for job in jobs:
        if job.name.startswith("SIG"):
            die(getattr(signal, job.name))
    return [f"{job.name} done" for job in jobs]


@pytest.mark.slow
def test_a_crash_and_a_kill_cost_the_cells_that_cause_them_alone(make_work):
    (results,) = results_of(local.Local(), make_work("SIGSEGV", "a", "SIGKILL", call=suffer))
    died = "its process ended early, killed by"
    assert results == [f"{died} SIGSEGV", "a done", f"{died} SIGKILL (was the memory full?)"]


@pytest.mark.slow
def test_a_group_whose_device_is_lost_moves_to_another_and_fails_if_there_is_none(make_work, caplog):
    both = [make_work(*names, call=report, devices=[GONE, "cpu"]) for names in ("ab", "c")]
    results = results_of(local.Local(), *both, make_work("d", call=report, devices=[GONE]))
    assert [line.partition(" with")[0] for line in results[0] + results[1]] == ["a on cpu", "b on cpu", "c on cpu"]
    assert results[2] == [f"{GONE} does not compute any more"]
    assert caplog.text.count(f"{GONE} does not compute any more: its group moves to another device") == 1


@pytest.mark.slow
def test_processes_share_the_threads_of_the_cpu(make_work, monkeypatch):
    forkserver._forkserver._stop()  # its processes have its environment
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(worker, "PRELOAD", [])
    assert results_of(local.Local(), make_work("a", call=report)) == [["a on auto with 2"]]
    works = [make_work(name, call=report, devices=["cpu", "cpu"]) for name in "ab"]
    assert results_of(local.Local(processes=2), *works) == [["a on cpu with 1"], ["b on cpu with 1"]]
    forkserver._forkserver._stop()
    with pytest.raises(InputError, match=r"hydra\.launcher\.processes=0 is not allowed"):
        local.Local(processes=0)


def test_a_device_has_one_process_at_a_time(make_work, tmp_path):
    machine = local.Local()
    first = machine.submit(make_work("a", call=sleep_until_stopped))
    until_exists(tmp_path / "begun")
    assert machine.submit(make_work("b", call=suffer)) is None
    machine.close(signals.Stopped(signal.SIGTERM))
    with pytest.raises(LostError, match="exit code 143"):
        first.result(5)


def test_a_work_waits_as_long_as_another_command_computes_its_cells(make_work, monkeypatch, caplog):
    monkeypatch.setattr(executor, "LOOK_EVERY_S", 0.01)
    answers = iter([True, True, True, False])
    monkeypatch.setattr(cell_folder, "is_held", lambda _: next(answers))
    assert results_of(local.Local(), make_work("a", "b", call=suffer)) == [["a done", "b done"]]
    assert caplog.messages.count("all that is left is computed by another command: waiting for it") == 1


def test_one_by_one_is_in_this_process(make_work):
    works = [make_work(name, call=lambda _: [os.getpid()]) for name in "ab"]
    assert results_of(local.InProcess(), *works) == [[str(os.getpid())]] * 2


IMPORTS_OF_THE_SERVER = """
import importlib, sys

def note(frame, event, _):
    if event == "call" and frame.f_code.co_filename.endswith("torch/cuda/__init__.py"):
        assert frame.f_code.co_name not in ("is_available", "device_count", "_lazy_init"), "CUDA was asked for devices"

sys.setprofile(note)
from kdsweep.sweep.executors import worker
for name in worker.PRELOAD:
    importlib.import_module(name)
import torch
if "check" in sys.argv:
    torch.cuda.is_available()
"""


@pytest.mark.slow
def test_the_server_imports_torch_and_leaves_cuda_alone():
    """CUDA does not survive a fork: nothing that the server imports may ask for devices."""
    for words, code in (([], 0), (["check"], 1)):
        done = subprocess.run([sys.executable, "-c", IMPORTS_OF_THE_SERVER, *words], capture_output=True, check=False)
        assert done.returncode == code, done.stderr.decode()
