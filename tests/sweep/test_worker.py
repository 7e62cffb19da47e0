"""Processes that are sent work: results, errors, sudden deaths, and the Hydra jobs of a group."""

import io
import logging
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from hydra.types import HydraContext
from omegaconf import OmegaConf

from kdsweep.core import logs, signals
from kdsweep.core.errors import CellError, InputError
from kdsweep.sweep.engines import local, worker


@pytest.fixture
def process():
    started = worker.Worker()
    yield started
    worker.stop([started], signal.SIGINT)


def refuse() -> None:
    raise InputError("split=9 is not allowed")


def break_down() -> None:
    raise UnicodeDecodeError("ascii", b"x", 0, 1, "an error that cannot be rebuilt from its text")


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_process_gives_results_and_keeps_its_state(process):
    assert process.call(int.__add__, 2, 3) == 5
    assert process.call(os.getpid) == process.call(os.getpid) != os.getpid()


def test_what_is_not_importable_reaches_it_too(process):
    factor = 7
    assert process.call(lambda value: value * factor, 6) == 42


def test_its_errors_come_back_as_text_and_it_lives_on(process):
    with pytest.raises(InputError, match="split=9 is not allowed"):
        process.call(refuse)
    with pytest.raises(CellError, match=r"UnicodeDecodeError: .*cannot be rebuilt"):
        process.call(break_down)
    assert process.call(len, "abc") == 3


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, r"killed by SIGKILL \(was the memory full\?\)"), (signal.SIGSEGV, "SIGSEGV")]
)
def test_its_death_is_told_with_the_cause(process, number, words):
    with pytest.raises(CellError, match=words):
        process.call(die, number)
    with pytest.raises(CellError, match=words):
        process.call(len, "abc")


def test_its_exit_is_told_with_the_code(process):
    with pytest.raises(CellError, match="exit code 3"):
        process.call(os._exit, 3)


def sleep(begun: Path) -> None:
    begun.touch()
    time.sleep(600)


def test_an_interrupt_ends_what_it_does(process, tmp_path):
    process.send(sleep, tmp_path / "begun")
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    start = time.monotonic()
    assert worker.stop([process], signal.SIGINT) == 0
    assert time.monotonic() - start < 30
    assert not process.process.is_alive()


def hear_nothing(begun: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begun.touch()
    time.sleep(600)


def test_what_does_not_end_in_time_is_killed_and_not_called_saved(monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "STOP_WITHIN_S", 0.5)
    engine, stop = local.Devices(), signals.Stopped(signal.SIGTERM)
    end = "the same command goes on from here"
    assert stop.told() == f"stopped by SIGTERM; all is saved: {end}"
    engine._idle = process = worker.Worker()
    process.send(hear_nothing, tmp_path / "begun")
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    engine.close(stop)
    assert not process.process.is_alive()
    assert stop.told() == f"stopped by SIGTERM; there was no time to save all, the last checkpoints stay: {end}"


# --- the jobs of a group, in this process


@pytest.fixture
def open_jobs(job_config, hydra_restore_singletons):
    """Makes Hydra job configurations with a log file each, and runs them together."""
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def run(count, run_group):
        configs = [job_config(number, subdir=f"job{number}") for number in range(count)]
        return worker.run_jobs(configs, HydraContext(config_loader=None, callbacks=Callbacks()), run_group)

    yield run
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers, root.level = before[0], before[1]
    HydraConfig.instance().cfg = None


def test_each_job_has_its_return_its_folder_and_its_log(open_jobs, tmp_path):
    def run_group(configs):
        logging.info("for all")
        for cfg in configs:
            with logs.about(tmp_path / f"job{cfg.number}"):
                logging.info("for %s", cfg.number)
        with logs.about(tmp_path / "a Teacher"):
            logging.info("of the Teacher")
        return [cfg.number * 10 for cfg in configs]

    returns = open_jobs(3, run_group)
    assert [job.return_value for job in returns] == [0, 10, 20]
    assert [job.overrides for job in returns] == [["number=0"], ["number=1"], ["number=2"]]
    for number in range(3):
        folder = tmp_path / f"job{number}"
        assert (folder / "job.log").read_text().split("\n") == ["for all", f"for {number}", "of the Teacher", ""]
        assert OmegaConf.load(folder / ".hydra" / "config.yaml") == {"number": number}
        assert OmegaConf.load(folder / ".hydra" / "overrides.yaml") == [f"number={number}"]


def test_a_failing_job_fails_alone(open_jobs):
    returns = open_jobs(3, lambda configs: [1.0, ValueError("two\nlines"), InputError("split=9")])
    assert [job.status for job in returns] == [JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.FAILED]
    with pytest.raises(CellError, match=r"^ValueError: two lines$"):
        _ = returns[1].return_value
    with pytest.raises(InputError, match=r"^split=9$"):
        _ = returns[2].return_value


def test_what_breaks_the_group_fails_all_its_jobs(open_jobs, tmp_path):
    def run_group(_):
        raise OSError("the disk is full")

    returns = open_jobs(2, run_group)
    for number, job in enumerate(returns):
        with pytest.raises(CellError, match="OSError: the disk is full"):
            _ = job.return_value
        assert "in run_group" in (tmp_path / f"job{number}" / "job.log").read_text()


def test_tracebacks_and_lines_of_one_among_many_go_to_the_file_and_not_to_the_screen(tmp_path):
    root, screen, file = logging.Logger("own"), io.StringIO(), tmp_path / "job.log"
    handlers = [logging.StreamHandler(screen), logging.FileHandler(file)]
    before = logging.getLogger().handlers
    try:
        logging.getLogger().handlers = root.handlers = handlers
        assert logs.claim(tmp_path) == handlers[1:]
        try:
            refuse()
        except InputError as error:
            root.error("refused", exc_info=error)
        root.warning("one of many", extra=logs.FILE_ONLY)
        root.warning("many", extra=logs.SCREEN_ONLY)
    finally:
        logging.getLogger().handlers = before
        handlers[1].close()
    assert screen.getvalue() == "refused\nmany\n"
    assert "in refuse" in file.read_text()
    assert file.read_text().splitlines()[-1] == "one of many"


def test_jobs_that_are_not_cells_are_called_one_by_one():
    assert worker.one_by_one([1, 2], task_function=partial(int.__add__, 5)) == [6, 7]
