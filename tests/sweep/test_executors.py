"""Executors: what follows a lost process, processes that die, logs of a group, devices of this machine."""

import io
import logging
import os
import signal
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
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
from kdsweep.sweep.executors.executor import Work, run

LOST = DeviceError("the device failed (CUDA error: device-side assert triggered)")


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
        cells = [Cell(notation=name, evidence={"of": name}, **shared) for name in names]
        jobs = [Job(Settings(name=name), cell, [f"name={name}"]) for name, cell in zip(names, cells, strict=True)]
        return Work(call, jobs, list(devices), cells)

    return make


# --- the rule for a lost process


class OneProcess:
    """An executor whose works each have a process, which is lost with the cells named ``guilty``."""

    def __init__(self, *guilty: str, dies: bool = False, is_queue: bool = True) -> None:
        self.guilty, self.dies, self.is_queue, self.ran = set(guilty), dies, is_queue, []

    def submit(self, works, *, after=()):
        return [self._computed(work) for work in works]

    def _computed(self, work):
        names, future = [job.name for job in work.jobs], Future()
        self.ran.append("".join(names))
        if self.dies and self.guilty & set(names):
            future.set_exception(LostError("its process ended early, killed by SIGKILL"))
        else:
            future.set_result([LOST if self.guilty & set(names) else f"{name} done" for name in names])
        return future


@pytest.mark.parametrize("is_queue", [True, False])
@pytest.mark.parametrize(("dies", "why"), [(False, str(LOST)), (True, "its process ended early, killed by SIGKILL")])
def test_a_lost_process_is_halved_until_the_guilty_cell_is_alone(make_work, caplog, dies, why, is_queue):
    work, other, teacher = make_work("a", "b", "c", "d", "e"), make_work("x"), make_work("t")
    one = OneProcess("b", dies=dies, is_queue=is_queue)
    results = {id(own): [str(result) for result in found] for own, found in run(one, [work, other], before=[teacher])}
    assert results == {id(other): ["x done"], id(work): ["a done", why, "c done", "d done", "e done"]}
    assert sorted(one.ran) == sorted(["t", "abcde", "x", "abc", "de", "ab", "c", "a", "b"])
    assert cell_folder.read(work.cells[1].folder).error == why
    assert not (work.cells[0].folder / cell_folder.FAILED).exists()
    assert [line for line in caplog.messages if "resuming" in line] == [
        f"{count} cells: {why}; resuming in two halves" for count in (5, 3, 2)
    ]


def test_results_that_came_before_the_loss_are_kept(make_work):
    class Half(OneProcess):
        def _computed(self, work):
            future = super()._computed(work)
            if len(work.jobs) > 2:
                future = Future()
                future.set_result([CellError("its own"), 0.5, LOST])
            return future

    one = Half()
    ((_, results),) = run(one, [make_work("a", "b", "c")])
    assert [str(result) for result in results] == ["its own", "0.5", "c done"]
    assert one.ran == ["abc", "c"]


def test_what_a_dead_process_has_written_counts(make_work):
    work = make_work("a", "b", "c")

    class Dying(OneProcess):
        def _computed(self, part):
            if len(part.jobs) == 3:
                for cell in work.cells:
                    cell.folder.mkdir(parents=True)
                cell_folder.write_finished(work.cells[0].folder, values={"test/dice": 0.0}, files=[])
                cell_folder.write_failed(work.cells[1].folder, "its own")
            return super()._computed(part)

    one = Dying("c", dies=True)
    ((_, results),) = run(one, [work])
    assert [str(result) for result in results] == ["0.0", "its own", "its process ended early, killed by SIGKILL"]
    assert one.ran == ["abc", "c"]


def test_an_earlier_failure_is_not_that_of_a_lost_process(make_work):
    work = make_work("a", "b")
    for cell in work.cells:
        cell.folder.mkdir(parents=True)
        cell_folder.write_failed(cell.folder, "of last week")
        file = cell.folder / cell_folder.FAILED
        write_json(file, read_json(file) | {"time_ms": 1})
    ((_, results),) = run(OneProcess("b", dies=True), [work])
    assert [str(result) for result in results] == ["a done", "its process ended early, killed by SIGKILL"]


def test_what_an_earlier_command_left_goes_on_together(make_work):
    class Left(OneProcess):
        def _computed(self, work):
            future = super()._computed(work)
            if len(self.ran) == 1:
                future = Future()
                future.set_exception(executor.LeftError("job 7 has ended"))
            return future

    for names in (("a", "b", "c"), ("a",)):
        one = Left()
        ((_, results),) = run(one, [make_work(*names)])
        assert [str(result) for result in results] == [f"{name} done" for name in names]
        assert one.ran == ["".join(names)] * 2


def test_two_that_are_guilty_fail_and_no_other(make_work):
    ((_, results),) = run(OneProcess("a", "c"), [make_work("a", "b", "c")])
    assert [str(result) for result in results] == [str(LOST), "b done", str(LOST)]
    assert not any(isinstance(result, LostError) for result in results)


def test_an_error_that_a_fresh_process_cannot_mend_is_not_tried_again(make_work):
    class Refusing(OneProcess):
        def _computed(self, work):
            super()._computed(work)
            future = Future()
            future.set_exception(InputError("store=x: not this machine's"))
            return future

    one = Refusing()
    ((_, results),) = run(one, [make_work("a", "b")])
    assert [str(result) for result in results] == ["store=x: not this machine's"] * 2
    assert one.ran == ["ab"]


# --- processes


def refuse() -> None:
    raise InputError("split=9 is not allowed")


def break_down() -> None:
    raise UnicodeDecodeError("ascii", b"x", 0, 1, "an error that cannot be rebuilt from its text")


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_process_gives_its_result_or_its_error_as_text():
    processes = [worker.Process(int.__add__, 2, 3), worker.Process(refuse), worker.Process(break_down)]
    assert processes[0].result() == 5
    with pytest.raises(InputError, match="split=9 is not allowed"):
        processes[1].result()
    with pytest.raises(CellError, match=r"UnicodeDecodeError: .*cannot be rebuilt") as error:
        processes[2].result()
    assert not isinstance(error.value, LostError)


def test_its_death_is_told_with_the_cause():
    deaths = {
        r"killed by SIGKILL \(was the memory full\?\)": worker.Process(die, signal.SIGKILL),
        "killed by SIGSEGV": worker.Process(die, signal.SIGSEGV),
        "exit code 3": worker.Process(os._exit, 3),
        "exit code 143": worker.Process(die, signal.SIGTERM),  # it saves and ends
    }
    for words, process in deaths.items():
        with pytest.raises(LostError, match=f"its process ended early, {words}"):
            process.result()


def sleep(begun: Path, ignored: int = signal.SIGUSR1) -> None:
    signal.signal(ignored, signal.SIG_IGN)
    begun.touch()
    time.sleep(600)


def until_exists(file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)


def test_a_stop_ends_what_it_does(tmp_path):
    process = worker.Process(sleep, tmp_path / "begun")
    until_exists(tmp_path / "begun")
    start = time.monotonic()
    assert worker.stop([process]) == 0
    assert time.monotonic() - start < 8


def test_signals_of_a_whole_job_do_not_reach_it(tmp_path):
    process = worker.Process(sleep, tmp_path / "begun", signal.SIGHUP)
    until_exists(tmp_path / "begun")
    for number in signals.JOB_SIGNALS:
        os.kill(process._process.pid, number)
    assert process._process.join(0.5) is None
    assert process._process.is_alive()
    worker.stop([process])


def test_what_does_not_end_in_time_is_killed_and_not_called_saved(monkeypatch, tmp_path, make_work):
    monkeypatch.setattr(worker, "STOP_WITHIN_S", 0.5)
    machine, stop = local.Local(), signals.Stopped(signal.SIGTERM)
    end = "the same command goes on from here"
    assert stop.message() == f"stopped by SIGTERM; all is saved: {end}"

    def be_killed():
        with pytest.raises(LostError, match="killed by SIGKILL"):
            machine._call(sleep, tmp_path / "begun", signal.SIGTERM)

    thread = threading.Thread(target=be_killed)
    thread.start()
    until_exists(tmp_path / "begun")
    machine.close(stop)
    thread.join(5)
    assert not thread.is_alive()
    assert stop.message() == f"stopped by SIGTERM; there was no time to save all, the last checkpoints stay: {end}"
    with pytest.raises(CellError, match="the command has ended"):
        machine._call(len, "abc")


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
    twice, again = (worker.Process(press_again, tmp_path / name, pause) for name, pause in (("a", 0), ("b", 0.7)))
    for process in (twice, again):
        with pytest.raises(LostError, match="exit code 130"):
            process.result()
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
def all_levels():
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.INFO)
    yield
    root.setLevel(before)


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
    work = make_work("a", "b", call=log_lines)
    work.cells[0].folder.parent.mkdir(parents=True)
    work.cells[0].folder.write_text("a file")
    failed, done = worker.compute(work)
    assert "File exists" in str(failed)
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


def results_of(machine: local.Local, *works: Work) -> list[list[str]]:
    results = {id(work): list(map(str, found)) for work, found in run(machine, works)}
    machine.close(None)
    return [results[id(work)] for work in works]


@pytest.mark.slow
def test_a_crash_and_a_kill_cost_the_cells_that_cause_them_alone(make_work):
    (results,) = results_of(local.Local(), make_work("SIGSEGV", "a", "SIGKILL", call=suffer))
    died = "its process ended early, killed by"
    assert results == [f"{died} SIGSEGV", "a done", f"{died} SIGKILL (was the memory full?)"]


@pytest.mark.slow
def test_a_group_whose_device_is_lost_moves_to_another_and_fails_if_there_is_none(make_work, caplog):
    both = [make_work("a", "b", call=report, devices=[GONE, "cpu"]), make_work("c", call=report, devices=[GONE, "cpu"])]
    results = results_of(local.Local(), *both, make_work("d", call=report, devices=[GONE]))
    assert [line.partition(" with")[0] for line in results[0] + results[1]] == ["a on cpu", "b on cpu", "c on cpu"]
    assert results[2] == [f"{GONE} does not compute any more"]
    assert caplog.text.count(f"{GONE} does not compute any more: its group moves to another device") <= 1


@pytest.mark.slow
def test_processes_on_the_cpu_share_its_threads(make_work, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert results_of(local.Local(), make_work("a", call=report)) == [["a on auto with 2"]]
    two = results_of(local.Local(processes=2), make_work("a", call=report), make_work("b", call=report))
    assert two == [["a on cpu with 1"], ["b on cpu with 1"]]
    with pytest.raises(InputError, match=r"hydra\.launcher\.processes=0 is not allowed"):
        local.Local(processes=0)


def test_a_work_waits_as_long_as_another_command_computes_its_cells(make_work, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(local, "LOOK_EVERY_S", 0.01)
    answers = iter([True, True, False])
    waiting = replace(make_work("a", call=suffer), waits=lambda: next(answers))
    assert results_of(local.Local(), waiting) == [["a done"]]
    assert caplog.messages.count("all that is left is computed by another command: waiting for it") == 1


def test_one_by_one_is_in_this_process(make_work):
    work = make_work("a", call=lambda jobs: [os.getpid()])
    assert [found for _, found in run(local.InProcess(), [work, work.part([0])])] == [[os.getpid()]] * 2
