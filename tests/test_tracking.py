"""What is written to MLflow comes back: sweeps, gaps, and runs that a killed process left open."""

import signal
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from mlflow.utils.validation import _validate_batch_log_limits

from kdsweep import tracking
from kdsweep.errors import InputError
from kdsweep.grid import Cell

PARAMS = {"data.name": "busi", "weights": "none", "train.lr": 0.001}
TAGS = {"kdsweep.profile": "quick", "kdsweep.device": "cpu"}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """One database for all tests of the module: creating it takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    tracking.Tracker(store=folder, uri=None)
    return folder


def make_cell(notation="L_MSE", split=0, evidence="a", store=Path("store"), **settings) -> Cell:
    role = {"Student": "student", "Teacher": "teacher"}.get(notation, "cell")
    return Cell(role, notation, split, 0, settings or {"lr": 1}, {"data": evidence}, store)


def finish(tracker: tracking.Tracker, cell: Cell, sweep: str, folder: Path, dice: list[float]) -> tracking.CellRun:
    run = tracker.start(cell, sweep=sweep, params=PARAMS, tags=TAGS)
    for epoch in range(3):
        run.log_epoch({"train/loss": 1.0 / (epoch + 1), "val/loss": 0.5}, epoch)
    file = folder / "test_scores.csv"
    images = [f"{i:06d}" for i in range(len(dice))]
    pd.DataFrame({"image": images, "label": "benign", "dice": dice}).to_csv(file, index=False)
    run.finish({"test/dice": sum(dice) / len(dice)}, [file])
    return run


def test_scores_come_back_per_image_with_their_ids_as_text(store, tmp_path):
    tracker, cell = tracking.Tracker(store=store, uri=None), make_cell()
    tracker.ask("round-trip", [cell])
    run = finish(tracker, cell, "round-trip", tmp_path, [0.25, 0.75])
    sweep = tracking.read_sweep(store=store, uri=None, name="round-trip")
    (row,) = sweep.runs.to_dict("records")
    assert (row["fingerprint"], row["run_id"], row["status"]) == (cell.fingerprint, run.run_id, "FINISHED")
    assert (row["notation"], row["split"], row["seed"], row["profile"], row["data"]) == ("L_MSE", 0, 0, "quick", "busi")
    assert row["params"]["train.lr"] == "0.001"
    assert sweep.scores["image"].tolist() == ["000000", "000001"]
    assert sweep.scores["dice"].tolist() == [0.25, 0.75]
    assert set(sweep.scores["fingerprint"]) == {cell.fingerprint}


def test_every_epoch_is_kept_once(store, tmp_path):
    tracker, cell = tracking.Tracker(store=store, uri=None), make_cell(lr=7)
    run = finish(tracker, cell, "epochs", tmp_path, [0.5])
    client = tracking.MlflowClient(tracking_uri=tracking.store_uri(store, None))
    history = client.get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]


def test_what_was_asked_for_and_is_not_there_is_missing(store):
    tracker = tracking.Tracker(store=store, uri=None)
    tracker.ask("gaps", [make_cell(split=2, lr=5), make_cell("Student", split=1, lr=5)])
    runs = tracking.read_sweep(store=store, uri=None, name="gaps").runs.set_index("notation")
    assert runs["status"].tolist() == ["missing", "missing"]
    assert runs.loc["L_MSE", ["split", "role"]].tolist() == [2, "cell"]
    assert runs.loc["Student", ["split", "role"]].tolist() == [1, "student"]


def test_a_cell_asked_again_with_new_data_takes_the_old_ones_place(store, tmp_path):
    tracker = tracking.Tracker(store=store, uri=None)
    old, new = make_cell(lr=11, evidence="old"), make_cell(lr=11, evidence="new")
    assert old.place == new.place
    tracker.ask("again", [old])
    finish(tracker, old, "again", tmp_path, [0.1])
    tracker.ask("again", [new])
    (row,) = tracking.read_sweep(store=store, uri=None, name="again").runs.to_dict("records")
    assert (row["fingerprint"], row["status"]) == (new.fingerprint, "missing")


def test_a_teacher_comes_with_the_cells_that_it_taught(store, tmp_path):
    tracker, teacher = tracking.Tracker(store=store, uri=None), make_cell("Teacher", lr=12)
    finish(tracker, teacher, "first", tmp_path, [0.9])
    cell = replace(make_cell(lr=12), evidence={"teacher": teacher.fingerprint})
    tracker.ask("second", [cell])
    finish(tracker, cell, "second", tmp_path, [0.8])
    sweep = tracking.read_sweep(store=store, uri=None, name="second")
    assert sorted(sweep.runs["notation"]) == ["L_MSE", "Teacher"]
    assert sorted(sweep.scores["dice"]) == [0.8, 0.9]


def test_a_run_left_open_by_a_killed_process_is_closed_and_the_new_one_counts(store, tmp_path):
    tracker, cell = tracking.Tracker(store=store, uri=None), make_cell(lr=13)
    tracker.ask("killed", [cell])
    left = tracker.start(cell, sweep="killed", params=PARAMS, tags=TAGS)
    client = tracking.MlflowClient(tracking_uri=tracking.store_uri(store, None))
    assert client.get_run(left.run_id).info.status == "RUNNING"
    run = finish(tracker, cell, "killed", tmp_path, [0.4])
    assert client.get_run(left.run_id).info.status == "KILLED"
    (row,) = tracking.read_sweep(store=store, uri=None, name="killed").runs.to_dict("records")
    assert (row["run_id"], row["status"]) == (run.run_id, "FINISHED")


def test_an_interrupt_inside_a_call_is_held_back_until_it_is_done():
    done = []
    with pytest.raises(KeyboardInterrupt), tracking.uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the call")
    assert done == ["the rest of the call"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_more_params_than_one_call_takes_are_all_kept(store):
    tracker, cell = tracking.Tracker(store=store, uri=None), make_cell(lr=14)
    params = {**PARAMS, **{f"key{i}": i for i in range(250)}}
    run = tracker.start(cell, sweep="many", params=params, tags=TAGS)
    client = tracking.MlflowClient(tracking_uri=tracking.store_uri(store, None))
    assert client.get_run(run.run_id).data.params == {key: str(value) for key, value in params.items()}
    run.abort(status="KILLED")


def test_no_call_holds_more_than_an_mlflow_server_takes(store, monkeypatch):
    """The SQLite store takes any number; a server applies MLflow's own limits, so they are applied here."""
    send = tracking.MlflowClient.log_batch

    def limited(client, run_id, metrics=(), params=(), tags=()):
        _validate_batch_log_limits(metrics, params, tags)
        return send(client, run_id, metrics, params, tags)

    monkeypatch.setattr(tracking.MlflowClient, "log_batch", limited)
    tracker, cells = tracking.Tracker(store=store, uri=None), [make_cell(lr=17, cell=number) for number in range(250)]
    tracker.ask("large", cells)
    tracker.start(cells[0], sweep="large", params={f"key{i}": i for i in range(250)}, tags=TAGS).abort(status="KILLED")
    monkeypatch.undo()
    client = tracking.MlflowClient(tracking_uri=tracking.store_uri(store, None))
    (parent,) = client.search_runs(
        [tracker.experiment_id], "tags.`kdsweep.role` = 'sweep' and tags.`kdsweep.sweep` = 'large'"
    )
    asked = {value for key, value in parent.data.tags.items() if key.startswith(tracking.ASKED)}
    assert asked == {cell.fingerprint for cell in cells}


def test_without_a_name_the_sweep_last_asked_for_is_read(store):
    tracker = tracking.Tracker(store=store, uri=None)
    for name in ("one", "other", "one"):
        tracker.ask(name, [make_cell(lr=15)])
    assert tracking.read_sweep(store=store, uri=None, name=None).name == "one"


def test_an_unknown_sweep_and_a_missing_store_are_told_in_one_line(store, tmp_path):
    tracking.Tracker(store=store, uri=None).ask("known", [make_cell(lr=16)])
    with pytest.raises(InputError, match=r"sweep=nonsense is not in this store; it holds: .*known"):
        tracking.read_sweep(store=store, uri=None, name="nonsense")
    with pytest.raises(InputError, match=r"no mlflow\.db in it"):
        tracking.read_sweep(store=tmp_path, uri=None, name=None)
    assert list(tmp_path.iterdir()) == []  # asking does not create one


def test_the_database_lies_in_the_store_whatever_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.store_uri(Path("multirun"), None) == f"sqlite:///{tmp_path}/multirun/mlflow.db"
    assert tracking.store_uri(Path("multirun"), "http://127.0.0.1:5000") == "http://127.0.0.1:5000"
