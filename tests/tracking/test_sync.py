"""MLflow is kept equal to the cells' folders whatever happens to it, and no training waits for that."""

import contextlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import tempfile
import threading
import time
from pathlib import Path

import pytest
from commands import kdsweep, process
from servers import free_port, postgres, serving, until
from small import STUDENT, TEACHER
from test_mirror import begin, client_of, end, in_another_process, make_cell, steps_of

from kdsweep import cli
from kdsweep.config.grid import Cell
from kdsweep.core.errors import InputError
from kdsweep.store import cell_folder, sweep_file
from kdsweep.tracking import mirror, reader, sync


def mirrored(store: Path, sweeps: dict[str, list[Cell]], *, uri: str | None = None, trains: bool = True) -> sync.Sync:
    """What a command does for the sweeps that it requests."""
    for name, cells in sweeps.items():
        sweep_file.add(store, name, cells=cells, teachers=[])
    folders = {name: [cell.folder for cell in cells] for name, cells in sweeps.items()}
    return sync.Sync(store=store, uri=uri, experiment="kdsweep", sweeps=folders, trains=trains)


@pytest.fixture(autouse=True)
def quick_passes(monkeypatch):
    monkeypatch.setattr(sync, "PASS_EVERY_S", 0.2)
    monkeypatch.setattr(sync, "SELDOM_S", 1.0)  # on a busy machine a pass of 1.5 s would be followed by 30 s of rest
    yield
    sync.close_all()


@pytest.fixture
def store(empty_store, tmp_path) -> Path:
    return Path(shutil.copytree(empty_store, tmp_path / "store"))


def some_cells(store: Path, count: int = 2):
    return [make_cell(store=store, lr=number) for number in range(count)]


def runs_of(uri: str) -> dict[str, tuple[str, str, list[int]]]:
    """By fingerprint the id, status and logged epochs of each run; fails if a cell has two."""
    client = mirror.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("kdsweep")
    runs = client.search_runs([experiment.experiment_id], "tags.`kdsweep.role` = 'distilled'")
    logged = {}
    for run in runs:
        fingerprint, run_id = run.data.tags["kdsweep.fingerprint"], run.info.run_id
        assert fingerprint not in logged
        steps = sorted(point.step for point in client.get_metric_history(run_id, "val/loss"))
        logged[fingerprint] = run_id, run.info.status, steps
    return logged


def test_a_training_is_seen_while_it_runs_and_closed_as_its_folder_records(store):
    done, failed, killed = cells = some_cells(store, 3)
    opened = mirrored(store, {"sweep": cells})
    uri = mirror.store_uri(store, None)
    with contextlib.ExitStack() as held:
        for cell in cells:
            cell_folder.hold(held, cell.folder)
            begin(cell, 1)
        assert until(lambda: [run[1:] for run in runs_of(uri).values()] == [("RUNNING", [0])] * 3)
        begin(killed, 2)
        cell_folder.write_failed(failed.folder, "it broke")
        end(done, [0.5])
        assert until(lambda: {run[1] for run in runs_of(uri).values()} == {"RUNNING", "FAILED", "FINISHED"})
    opened.close()
    statuses = {fingerprint: run[1:] for fingerprint, run in runs_of(uri).items()}
    assert statuses == {
        done.fingerprint: ("FINISHED", [0, 1, 2]),
        failed.fingerprint: ("FAILED", [0]),
        killed.fingerprint: ("KILLED", [0, 1]),
    }
    assert sync.run_id(done.folder) == runs_of(uri)[done.fingerprint][0]


def test_a_command_that_trains_nothing_leaves_no_parent_run(store):
    """Its check of the data failed, as it were; the first cell that is begun makes the run."""
    cells = some_cells(store)
    mirrored(store, {"sweep": cells}).close()
    tracker = mirror.Tracker(store=store, uri=None)
    assert tracker.search("") == []
    assert reader.read_sweep(store=store, uri=None, name="sweep").runs["status"].tolist() == ["missing"] * 2
    opened = mirrored(store, {"sweep": cells, "other": cells[1:]})
    end(cells[0], [0.5])
    opened.close()
    assert sorted(run.info.run_name for run in tracker.search("")) == ["L_MSE/split0", "sweep"]


def test_a_new_sweep_of_finished_cells_has_its_parent_run(store):
    cells = finished_sweep(store)
    mirrored(store, {"later": cells}, trains=False).close()
    names = [run.info.run_name for run in mirror.Tracker(store=store, uri=None).search("")]
    assert sorted(names) == ["L_MSE/split0", "L_MSE/split0", "later", "sweep"]


def test_what_a_killed_command_left_unsaid_is_logged_at_the_next_start(store):
    cells = some_cells(store)
    end(cells[0], [0.25])  # killed between the scores and MLflow
    begin(cells[1], 2)
    opened = mirrored(store, {"sweep": cells})
    opened.close()
    sweep = reader.read_sweep(store=store, uri=None, name="sweep")
    assert sorted(sweep.runs["status"]) == ["FINISHED", "KILLED"]
    assert sweep.scores["dice"].tolist() == [0.25]


def test_two_mirrors_of_one_cell_open_one_run(store):
    (cell,) = some_cells(store, 1)
    both = [mirrored(store, {name: [cell]}) for name in ("one", "other")]
    for epochs in (1, 2):
        begin(cell, epochs)
        time.sleep(0.5)
    end(cell, [0.5])
    for opened in both:
        opened.close()
    (run,) = runs_of(mirror.store_uri(store, None)).values()
    assert run[1:] == ("FINISHED", [0, 1, 2])
    assert steps_of(store, run[0], "test/dice") == [0]
    for name in ("one", "other"):
        assert len(reader.read_sweep(store=store, uri=None, name=name).scores) == 1


# --- a database that others use too


def test_a_database_that_another_process_locks_is_written_to_later(store, caplog):
    cells = some_cells(store, 2)
    end(cells[0], [0.25])
    other = sqlite3.connect(store / "mlflow.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()
    opened = mirrored(store, {"sweep": cells})
    assert time.monotonic() - start < 11  # the start does not wait for the other one
    end(cells[1], [0.75])
    while not caplog.messages and time.monotonic() - start < 60:
        time.sleep(0.1)
    other.execute("ROLLBACK")
    other.close()
    opened.close()
    assert re.search(r"training continues, .* \(.*database is locked\)$", caplog.messages[0])
    sweep = reader.read_sweep(store=store, uri=None, name="sweep")
    assert sorted(sweep.scores["dice"]) == [0.25, 0.75]


def log_one(store: Path, number: int, errors: Path) -> None:
    """Log a finished cell; what is said of errors goes to a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    cell = make_cell(store=store, lr=number)
    end(cell, [0.5])
    mirrored(store, {"sweep": [cell]}).close()


@pytest.mark.slow
def test_a_fresh_store_is_opened_by_many_processes_at_once(tmp_path):
    openers = [process(log_one, tmp_path / "store", number, tmp_path / f"errors{number}") for number in range(5)]
    for opener in openers:
        opener.start()
    for number, opener in enumerate(openers):
        opener.join(300)
        assert (opener.exitcode, (tmp_path / f"errors{number}").read_text()) == (0, "")
    sweep = reader.read_sweep(store=tmp_path / "store", uri=None, name="sweep")
    assert sweep.runs["status"].tolist() == ["FINISHED"] * 5
    assert len(sweep.scores) == 5


def dying(store: Path, seconds: float) -> None:
    """Open a store, and be killed after so many seconds."""
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    mirror.Tracker(store=store, uri=None)


@pytest.mark.slow
def test_a_process_killed_while_it_makes_the_database_spoils_nothing(tmp_path):
    for moment in (0.3, 0.6, 0.9, 1.3):
        killed = process(dying, tmp_path, moment)
        killed.start()
        killed.join(60)
        assert killed.exitcode in (-9, 0)
    cells = some_cells(tmp_path)
    mirrored(tmp_path, {"sweep": cells}).close()
    assert len(reader.read_sweep(store=tmp_path, uri=None, name="sweep").runs) == 2
    left = {file.name for file in tmp_path.iterdir()} - {"mlflow.db", ".mlflow.lock", "sweeps"}
    assert left == set()


def test_a_database_that_cannot_be_opened_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is not a database, however long it may be" * 100)
    with pytest.raises(InputError, match=r"mlflow\.db does not open or is damaged \(.*not a database\); move it"):
        mirrored(tmp_path, {"sweep": some_cells(tmp_path)})


# --- a store that is moved


def finished_sweep(store: Path) -> list:
    cells = some_cells(store)
    for cell in cells:
        end(cell, [0.5, 0.75])
    mirrored(store, {"sweep": cells}).close()
    return cells


def test_a_moved_store_keeps_its_scores_and_takes_new_ones(store, tmp_path):
    finished_sweep(store)
    moved = tmp_path / "elsewhere" / "multirun"
    moved.parent.mkdir()
    store.rename(moved)
    in_another_process()
    assert reader.read_sweep(store=moved, uri=None, name="sweep").scores["dice"].tolist() == [0.5, 0.75] * 2
    cells = some_cells(moved, 3)
    end(cells[2], [1.0])
    mirrored(moved, {"sweep": cells}).close()
    assert len(reader.read_sweep(store=moved, uri=None, name="sweep").scores) == 5
    assert not store.exists()
    for run_id, *_ in runs_of(mirror.store_uri(moved, None)).values():  # MLflow's interface reads them too
        location = client_of(moved).get_run(run_id).info.artifact_uri
        assert location == (moved / "artifacts" / run_id / "artifacts").as_uri()
        assert Path(client_of(moved).download_artifacts(run_id, "test_scores.csv")).is_file()


def test_a_copy_and_its_original_are_logged_apart(store, tmp_path):
    finished_sweep(store)
    before = sorted((store / "artifacts").iterdir())
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    in_another_process()
    cells = some_cells(copy, 3)
    end(cells[2], [1.0])
    mirrored(copy, {"sweep": cells}).close()
    assert len(reader.read_sweep(store=copy, uri=None, name="sweep").runs) == 3
    assert len(reader.read_sweep(store=store, uri=None, name="sweep").runs) == 2
    assert sorted((store / "artifacts").iterdir()) == before


# --- a server


@pytest.fixture(scope="module")
def server_folder(empty_store, tmp_path_factory) -> Path:
    return Path(shutil.copytree(empty_store, tmp_path_factory.mktemp("server") / "server"))


@contextlib.contextmanager
def slow(port: int, seconds: float):
    """A port that passes everything on to another one, each answer late by so many seconds."""
    relay = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, wait_s: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(wait_s)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near = relay.accept()[0]
                far = socket.create_connection(("127.0.0.1", port))
                threading.Thread(target=pump, args=(near, far, 0.0), daemon=True).start()
                threading.Thread(target=pump, args=(far, near, seconds), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield relay.getsockname()[1]
    relay.close()


@pytest.mark.slow
def test_a_server_that_is_down_dies_comes_back_and_is_slow_gets_everything_and_no_training_waits(
    server_folder, tmp_path, tmp_path_factory, monkeypatch, caplog
):
    caplog.set_level("INFO")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    cells = some_cells(tmp_path, 3)
    waited = time.monotonic()
    opened = mirrored(tmp_path, {"sweep": cells}, uri=uri)  # down at the start
    waited = time.monotonic() - waited
    end(cells[0], [0.25])
    assert "does not answer: training continues" in caplog.text
    assert caplog.text.count("does not answer") == 1
    with serving(server_folder, port):
        assert until(lambda: "answers again" in caplog.text, 60)
        begin(cells[1], 1)
        assert until(lambda: len(runs_of(uri)) == 2)
    begin(cells[1], 2)  # it died midway
    end(cells[2], [0.75])
    start = time.monotonic()
    opened.close()
    waited += time.monotonic() - start
    assert waited < 10
    assert "cells are not in MLflow" in caplog.text
    with serving(server_folder, port), slow(port, 0.3) as late:
        # the next command, to a slow one
        again = mirrored(tmp_path, {"sweep": cells}, uri=f"http://127.0.0.1:{late}")
        start = time.monotonic()
        again.close()
        assert time.monotonic() - start < 5
        end(cells[1], [0.5])
        last = mirrored(tmp_path, {"sweep": cells}, uri=uri, trains=False)
        last.close()
        logged = runs_of(uri)
        assert [logged[cell.fingerprint][1:] for cell in cells] == [("FINISHED", [0, 1, 2])] * 3
        scratch = tmp_path_factory.mktemp("scratch")
        monkeypatch.setattr(tempfile, "tempdir", str(scratch))
        sweep = reader.read_sweep(store=tmp_path, uri=uri, name="sweep")
        assert sorted(sweep.scores["dice"]) == [0.25, 0.5, 0.75]
        assert list(scratch.iterdir()) == []


@pytest.mark.slow
def test_a_command_trains_while_the_server_is_down_and_the_next_one_logs_all_of_it_once(
    small_busi, empty_store, tmp_path
):
    server = shutil.copytree(empty_store, tmp_path / "server")
    port, store = free_port(), tmp_path / "multirun"
    uri = f"http://127.0.0.1:{port}"
    overrides = ["-m", "path=none,L", "loss=mse", "profile=quick", "data=busi", f"data.root={small_busi}", "device=cpu"]
    overrides += ["train.epochs=2", "train.batch_size=8", f"tracking.uri={uri}", *STUDENT, *TEACHER]
    first = kdsweep(*overrides, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    trained = {file: file.read_bytes() for file in store.glob("*/*/*.safetensors")}
    assert len(trained) == 3
    with serving(server, port):
        for _ in range(2):
            again = kdsweep(*overrides, cwd=tmp_path)
            assert again.returncode == 0, again.stderr
        client = mirror.MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name("kdsweep")
        cells = client.search_runs([experiment.experiment_id], "tags.`kdsweep.role` != 'sweep'")
        assert sorted(run.data.tags["kdsweep.role"] for run in cells) == ["baseline", "distilled", "teacher"]
        for run in cells:
            assert run.info.status == "FINISHED"
            for name in ("val/loss", "val/dice", "train/loss"):
                points = client.get_metric_history(run.info.run_id, name)
                assert [point.step for point in points] == [0, 1]
        assert cli.main(["tables", "table4", "--store", str(store), "--tracking-uri", uri]) == 0
    assert {file: file.read_bytes() for file in trained} == trained


def log_five(store: Path, uri: str, number: int) -> None:
    """Train five cells, as it were; the first worker trains the Teacher of all too."""
    cells = [make_cell(store=store, lr=10 * number + each) for each in range(5)]
    teacher = make_cell("Teacher", store=store)
    sync.PASS_EVERY_S = 0.1
    sync.SERVER_WAIT_S = 120  # all is to be logged here, however slow the machine; another test has the limit
    mirrored(store, {"sweep": [teacher, *cells]}, uri=uri)
    for epochs in (1, 2):
        for cell in cells:
            begin(cell, epochs)
        time.sleep(0.5)
    for cell in cells:
        end(cell, [0.25, 0.75])
    if number == 0:
        end(teacher, [0.5])
    time.sleep(1)
    sync.close_all()


@pytest.mark.slow
def test_many_workers_log_to_one_server_on_postgresql_and_nothing_is_lost(tmp_path):
    """Four processes with different cells and a Teacher that all share, on a database that is made by the first."""
    port = free_port()
    uri, store = f"http://127.0.0.1:{port}", tmp_path / "store"
    with postgres() as backend, serving(tmp_path, port, backend=backend):
        workers = [process(log_five, store, uri, number) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(300)
        assert [worker.exitcode for worker in workers] == [0] * 4
        logged = runs_of(uri)
        assert [run[1:] for run in logged.values()] == [("FINISHED", [0, 1, 2])] * 20
        sweep = reader.read_sweep(store=store, uri=uri, name="sweep")
        assert (sweep.runs["status"] == "FINISHED").all()
        assert len(sweep.scores) == 40
        assert sweep.scores["dice"].mean() == 0.5


def test_a_server_that_never_answers_costs_less_than_ten_seconds_in_all(tmp_path, caplog):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        cells = some_cells(tmp_path, 2)
        start = time.monotonic()
        opened = mirrored(tmp_path, {"sweep": cells}, uri=uri)
        end(cells[0], [0.25])
        opened.close()
        assert time.monotonic() - start < 10
    assert f"1 cells are not in MLflow at {uri} yet" in caplog.text
    assert cell_folder.read_finished(cells[0].folder)["test/dice"] == 0.25


def test_tables_say_so_when_the_server_does_not_answer(tmp_path, capsys):
    assert cli.main(["tables", "table3", "--store", str(tmp_path), "--tracking-uri", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("kdsweep: error: --tracking-uri http://127.0.0.1:9 does not answer: ")
