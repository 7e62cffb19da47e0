"""What is written to MLflow comes back: sweeps, gaps, and runs that a killed process left open."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from mlflow.tracking._tracking_service import utils
from mlflow.utils.validation import _validate_batch_log_limits

from kdsweep.config.grid import Cell
from kdsweep.core.errors import InputError
from kdsweep.store import cell_folder, sweep_file
from kdsweep.tracking import mirror, reader

PARAMS = {"data.name": "busi", "weights": "none", "train.lr": 0.001}
TAGS = {"kdsweep.profile": "quick", "kdsweep.device": "cpu"}


@pytest.fixture(scope="module")
def store(empty_store, tmp_path_factory) -> Path:
    """One database for all tests of the module."""
    return Path(shutil.copytree(empty_store, tmp_path_factory.mktemp("tracking") / "store"))


def make_cell(notation="L_MSE", split=0, input_digests="a", store=Path("store"), **settings) -> Cell:
    role = {"Student": "baseline", "Teacher": "teacher"}.get(notation, "distilled")
    return Cell(role, notation, split, 0, settings or {"lr": 1}, {"data": input_digests}, store)


def in_another_process() -> None:
    """Have MLflow look again where the artifacts of a run are: it keeps that as long as a process lives."""
    utils._artifact_repos_cache.clear()


def ask(store: Path, sweep: str, cells: list[Cell], **more) -> None:
    sweep_file.add(store, sweep, cells=cells, teachers=[], **more)


def begin(cell: Cell, epochs: int = 3, params=PARAMS) -> cell_folder.Record:
    """The record of a cell in training."""
    cell_folder.describe(cell, split={}, params=params, tags=TAGS)
    history = [{"epoch": epoch, "train/loss": 1.0 / (epoch + 1), "val/loss": 0.5} for epoch in range(epochs)]
    times_ms = [1_000_000 + 1000 * epoch for epoch in range(epochs)]
    cell_folder.write_progress(cell.folder, epochs=9, history=history, times_ms=times_ms, seconds=[1.0] * len(history))
    return replace(cell_folder.read(cell.folder), status="RUNNING")


def end(cell: Cell, dice: list[float]) -> cell_folder.Record:
    """The record of a finished cell."""
    begin(cell)
    images = [f"{i:06d}" for i in range(len(dice))]
    frame = pd.DataFrame({"image": images, "label": "benign", "dice": dice})
    frame.to_csv(cell.folder / "test_scores.csv", index=False)
    (cell.folder / "test_predictions.npz").write_bytes(b"masks")
    files = ["test_scores.csv", "test_predictions.npz", "split.json"]
    values = {"test/dice": sum(dice) / len(dice), "epochs": 2.0, "best_epoch": 1.0}
    cell_folder.write_finished(cell.folder, values=values, files=files)
    return cell_folder.read(cell.folder)


def finish(tracker: mirror.Tracker, cell: Cell, sweep: str, folder: Path, dice: list[float]) -> str:
    """Id of the run of a cell that was computed in a folder."""
    return tracker.sync(end(replace(cell, store=folder), dice), sweep=sweep)


def test_scores_come_back_per_image_with_their_ids_as_text(store, tmp_path):
    tracker, cell = mirror.Tracker(store=store, uri=None), replace(make_cell(), variant={"kd.weight": "1"})
    ask(store, "round-trip", [cell], varied=["kd.weight"], command="typed")
    record, ids = end(replace(cell, store=tmp_path), [0.25, 0.75, 0.5]), ["000000", "nan", "NA"]
    scores = record.folder / "test_scores.csv"
    pd.DataFrame({"image": ids, "label": "", "dice": [0.25, 0.75, 0.5]}).to_csv(scores, index=False)
    run_id = tracker.sync(record, sweep="round-trip")
    sweep = reader.read_sweep(store=store, uri=None, name="round-trip")
    (row,) = sweep.runs.to_dict("records")
    assert (row["fingerprint"], row["run_id"], row["status"]) == (cell.fingerprint, run_id, "FINISHED")
    assert (row["notation"], row["split"], row["seed"], row["profile"], row["data"]) == ("L_MSE", 0, 0, "quick", "busi")
    assert row["params"]["train.lr"] == "0.001"
    assert (row["epochs"], row["best_epoch"], row["variant"]) == (2, 1, {"kd.weight": "1"})
    assert sweep.scores["image"].tolist() == ids
    assert sweep.scores["dice"].tolist() == [0.25, 0.75, 0.5]
    assert set(sweep.scores["fingerprint"]) == {cell.fingerprint}
    assert (sweep.varied, sweep.commands) == (("kd.weight",), ("typed",))


def test_the_last_sweep_is_the_last_one_with_a_finished_cell(tmp_path):
    store = tmp_path / "store"
    tracker, cell = mirror.Tracker(store=store, uri=None), make_cell()
    ask(store, "empty", [make_cell("H_MSE")])
    assert reader.read_sweep(store=store, uri=None, name=None).name == "empty"  # nothing is finished in any
    ask(store, "done", [cell])
    finish(tracker, cell, "done", tmp_path / "cells", [0.5])
    ask(store, "failed on its data", [make_cell("H_KLD")])
    ask(store, "empty", [make_cell("H_MSE")])
    assert reader.read_sweep(store=store, uri=None, name=None).name == "done"
    assert reader.read_sweep(store=store, uri=None, name="failed on its data").name == "failed on its data"


def test_what_a_network_began_with_is_named_by_file_and_digest(store, tmp_path):
    input_digests = {"student_weights": "0123456789abcdef"}
    cell = replace(make_cell(), input_digests=input_digests, store=tmp_path)
    tracker = mirror.Tracker(store=store, uri=None)
    ask(store, "weights", [cell])
    begin(cell)
    described = json.loads((cell.folder / cell_folder.CELL).read_text())
    described["params"] |= {"weights": "none", "student.weights": "start.pt"}
    (cell.folder / cell_folder.CELL).write_text(json.dumps(described))
    tracker.sync(cell_folder.read(cell.folder), sweep="weights")
    (row,) = reader.read_sweep(store=store, uri=None, name="weights").runs.to_dict("records")
    assert row["weights"] == "start.pt (SHA-256 0123456789)"


def test_the_parent_run_says_what_the_sweep_is(store, tmp_path):
    tracker = mirror.Tracker(store=store, uri=None)
    ask(store, "described", [make_cell("L_MSE", split=0), make_cell("Student", split=1)])
    first = tracker.publish("described")
    ask(store, "described", [make_cell("H_KLD", split=0)], command="again", storage="postgresql://user:secret@host/db")
    assert mirror.Tracker(store=store, uri=None).publish("described") == first
    run = client_of(store).get_run(first)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.note.content"].startswith(
        "**3 cells** of sweep `described`: H_KLD, L_MSE, Student; split0, split1; seed0."
    )
    sweep = reader.read_sweep(store=store, uri=None, name="described")
    assert (sweep.run_id, sweep.experiment_id) == (first, run.info.experiment_id)
    artifact = client_of(store).download_artifacts(first, mirror.SWEEP_FILE, str(tmp_path))
    public = replace(sweep_file.read(store, "described"), storage=None)  # the address may have a password
    assert sweep_file.parse(json.loads(Path(artifact).read_text())) == public


def test_a_server_without_the_store_gives_the_same_sweep(tmp_path, empty_store):
    store = Path(shutil.copytree(empty_store, tmp_path / "store"))
    tracker, teacher = mirror.Tracker(store=store, uri=None), make_cell("Teacher", store=store)
    learned = replace(
        make_cell(store=store), input_digests={"teacher": teacher.fingerprint}, variant={"kd.weight": "1"}
    )
    sweeps = {"older": [make_cell("H_MSE", store=store)], "sweep": [learned, make_cell("Student", store=store)]}
    for name, cells in sweeps.items():
        sweep_file.add(
            store, name, cells=cells, teachers=[teacher], varied=["kd.weight"], tuned=["lr"], command="typed"
        )
        tracker.publish(name)
    for cell in (teacher, learned):
        tracker.sync(end(cell, [0.25, 0.75]), sweep="sweep")
    server = {"uri": mirror.store_uri(store, None), "store": tmp_path / "elsewhere"}
    for name in (None, "sweep", "older"):
        there, here = reader.read_sweep(**server, name=name), reader.read_sweep(store=store, uri=None, name=name)
        pd.testing.assert_frame_equal(there.runs, here.runs)
        pd.testing.assert_frame_equal(there.scores, here.scores)
        for field in ("name", "varied", "tuned", "commands", "run_id"):
            assert getattr(there, field) == getattr(here, field)
    with pytest.raises(InputError, match=r"sweep=nonsense is not in this store; it holds: older, sweep$"):
        reader.read_sweep(**server, name="nonsense")


def client_of(store: Path) -> mirror.MlflowClient:
    return mirror.MlflowClient(tracking_uri=mirror.store_uri(store, None))


def runs_of(store: Path, cell: Cell) -> dict[str, str]:
    """Statuses of a cell's runs, by their ids."""
    runs = mirror.Tracker(store=store, uri=None).search(f"tags.`kdsweep.fingerprint` = '{cell.fingerprint}'")
    return {run.info.run_id: run.info.status for run in runs}


def steps_of(store: Path, run_id: str, key: str = "train/loss") -> list[int]:
    return sorted(point.step for point in client_of(store).get_metric_history(run_id, key))


def test_every_epoch_is_kept_once_however_often_it_is_logged(store, tmp_path):
    cell = replace(make_cell(lr=7), store=tmp_path)
    first = mirror.Tracker(store=store, uri=None)
    for epochs in (1, 2, 2):
        run_id = first.sync(begin(cell, epochs), sweep="epochs")
    assert steps_of(store, run_id) == [0, 1]
    later = mirror.Tracker(store=store, uri=None)  # of the next command
    assert later.sync(begin(cell, 3), sweep="epochs") == run_id
    assert later.sync(end(cell, [0.5]), sweep="epochs") == run_id
    assert mirror.Tracker(store=store, uri=None).sync(end(cell, [0.5]), sweep="epochs") == run_id
    history = client_of(store).get_metric_history(run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert steps_of(store, run_id, "test/dice") == [0]
    assert client_of(store).get_run(run_id).info.status == "FINISHED"


class KilledError(Exception):
    """The end of a process, as its next one sees it: what was in memory is lost."""


CALLS = ("create_run", "log_inputs", "log_batch", "log_dict", "log_artifact", "set_tag", "set_terminated", "delete_run")


def kill(patch: pytest.MonkeyPatch, number: int) -> None:
    """Have the n-th change of MLflow or of the note in the folder be the last; the caller does not get its answer."""
    calls = itertools.count(1)

    def dying(change):
        def call(*args, **kwargs):
            result = change(*args, **kwargs)
            if next(calls) == number:
                raise KilledError
            return result

        return call

    for name in CALLS:
        patch.setattr(mirror.MlflowClient, name, dying(getattr(mirror.MlflowClient, name)))
    patch.setattr(mirror, "write_json", dying(mirror.write_json))


@pytest.mark.parametrize(
    ("lives", "first", "each"),  # a third of the changes each, and all of them
    [(False, 1, 3), (True, 2, 3), *(pytest.param(lives, 1, 1, marks=pytest.mark.slow) for lives in (False, True))],
)
def test_killed_after_any_change_or_without_its_answer_a_cell_gets_one_run_with_each_value_once(
    store, tmp_path, monkeypatch, lives, first, each
):
    """A cell is begun, loses its checkpoint, is trained again and finished; at some change the process is killed."""
    sweep = f"killed {lives} {each}"
    for number in itertools.count(first, each):
        cell = replace(make_cell(lr=number, killed=sweep), store=tmp_path)
        states = [
            lambda cell=cell: begin(cell, 1),
            lambda cell=cell: begin(cell, 2),
            lambda cell=cell: replace(begin(cell, 1), times_ms=[5_000_000]),
            lambda cell=cell: replace(end(cell, [0.5]), times_ms=[5_000_000, 6_000_000, 7_000_000]),
        ]
        with monkeypatch.context() as patch:
            kill(patch, number)
            killed, tracker = False, mirror.Tracker(store=store, uri=None)
            for state in states:
                record = state()
                try:
                    tracker.sync(record, sweep=sweep)
                except KilledError:
                    killed, tracker = True, tracker if lives else mirror.Tracker(store=store, uri=None)
        run_id = tracker.sync(record, sweep=sweep)
        assert runs_of(store, cell) == {run_id: "FINISHED"}, number
        history = client_of(store).get_metric_history(run_id, "train/loss")
        assert [(point.step, point.timestamp) for point in history] == list(enumerate(record.times_ms)), number
        assert steps_of(store, run_id, "test/dice") == [0], number
        assert client_of(store).get_run(run_id).data.params["train.lr"] == "0.001", number
        if not killed:
            break
    assert number > 20
    parents = tracker.search(f"tags.`kdsweep.role` = 'sweep' and tags.`kdsweep.sweep` = '{sweep}'")
    assert len(parents) == 1


def test_two_commands_that_looked_before_a_cell_was_begun_open_one_run(store, tmp_path):
    earlier, fresh = (replace(make_cell(lr=lr), store=tmp_path) for lr in (25, 26))
    both = [mirror.Tracker(store=store, uri=None) for _ in range(2)]
    for tracker in both:
        tracker.sync(end(earlier, [0.5]), sweep="both")
    assert len({tracker.sync(end(fresh, [0.25]), sweep="both") for tracker in both}) == 1
    runs = both[0].search(f"tags.`kdsweep.fingerprint` = '{fresh.fingerprint}'")
    assert len(runs) == 1


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("{"), lambda file: file.write_text("[]")])
@pytest.mark.parametrize("epochs", [0, 2, None])
def test_without_its_note_in_the_folder_a_cell_has_one_run_with_each_value_once(empty_store, tmp_path, damage, epochs):
    """Killed between MLflow's answer and the note, or the note is damaged."""
    store = Path(shutil.copytree(empty_store, tmp_path / "store"))
    cell = make_cell(store=store)
    record = end(cell, [0.5]) if epochs is None else begin(cell, epochs)
    first = mirror.Tracker(store=store, uri=None).sync(record, sweep="sweep")
    damage(cell.folder / mirror.MIRROR)
    run_id = mirror.Tracker(store=store, uri=None).sync(end(cell, [0.5]), sweep="sweep")
    assert (run_id == first) == (epochs is None)
    assert runs_of(store, cell) == {run_id: "FINISHED"}
    assert steps_of(store, run_id) == [0, 1, 2]
    assert steps_of(store, run_id, "test/dice") == [0]


def test_an_empty_run_that_a_lost_answer_has_left_is_deleted(store, tmp_path):
    cell = replace(make_cell(lr=27), store=tmp_path)
    mirror.Tracker(store=store, uri=None).sync(begin(cell, 0), sweep="lost")
    (cell.folder / mirror.MIRROR).unlink()
    run_id = mirror.Tracker(store=store, uri=None).sync(begin(cell, 1), sweep="lost")
    assert runs_of(store, cell) == {run_id: "RUNNING"}


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_that_was_deleted_by_hand_is_logged_again(store, tmp_path, is_finished):
    cell = replace(make_cell(lr=28 + is_finished), store=tmp_path)
    record = end(cell, [0.5]) if is_finished else begin(cell, 2)
    first = mirror.Tracker(store=store, uri=None).sync(record, sweep="by hand")
    client_of(store).delete_run(first)
    second = mirror.Tracker(store=store, uri=None).sync(record, sweep="by hand")
    assert runs_of(store, cell) == {second: record.status}
    assert steps_of(store, second) == list(range(len(record.times_ms)))


def test_an_older_copy_of_the_database_is_brought_up_to_date(empty_store, tmp_path):
    store = Path(shutil.copytree(empty_store, tmp_path / "store"))
    cell = make_cell(store=store)
    run_id = mirror.Tracker(store=store, uri=None).sync(begin(cell, 1), sweep="sweep")
    older = Path(shutil.copytree(store, tmp_path / "older"))  # opened as another one: this process has the first open
    record = end(cell, [0.5])
    assert mirror.Tracker(store=store, uri=None).sync(record, sweep="sweep") == run_id
    for name in (mirror.MIRROR, cell_folder.PROGRESS, cell_folder.FINISHED, *mirror.ARTIFACTS):
        shutil.copy(cell.folder / name, replace(cell, store=older).folder)
    again = cell_folder.read(replace(cell, store=older).folder)
    new = mirror.Tracker(store=older, uri=None).sync(again, sweep="sweep")
    assert runs_of(older, cell) == {new: "FINISHED"}
    assert (steps_of(older, new), steps_of(older, new, "test/dice")) == ([0, 1, 2], [0])


def test_a_cell_that_is_computed_again_gets_a_new_run_in_place_of_the_old_one(store, tmp_path):
    """Its checkpoint was lost: the epochs are others, and must not be mixed with the old ones in one run."""
    cell = replace(make_cell(lr=21), store=tmp_path)
    old = mirror.Tracker(store=store, uri=None).sync(begin(cell, 3), sweep="again")
    record = replace(begin(cell, 1), times_ms=[5_000_000])
    tracker = mirror.Tracker(store=store, uri=None)
    new = tracker.sync(record, sweep="again")
    assert new != old
    assert runs_of(store, cell) == {new: "RUNNING"}
    assert steps_of(store, new) == [0]
    record = replace(end(cell, [0.5]), times_ms=[5_000_000, 6_000_000, 7_000_000])
    assert tracker.sync(record, sweep="again") == new
    assert runs_of(store, cell) == {new: "FINISHED"}
    assert steps_of(store, new) == [0, 1, 2]


def test_a_finished_cell_has_one_finished_run_also_after_it_was_computed_again(store, tmp_path):
    cell = replace(make_cell(lr=22), store=tmp_path)
    first = mirror.Tracker(store=store, uri=None).sync(end(cell, [0.5]), sweep="twice")
    tracker = mirror.Tracker(store=store, uri=None)
    assert tracker.sync(begin(cell, 1), sweep="twice") == first  # until it is finished the old scores count
    assert tracker.sync(end(cell, [0.5]), sweep="twice") == first  # the same scores: nothing to add
    second = tracker.sync(end(cell, [0.75]), sweep="twice")
    assert second != first
    assert runs_of(store, cell) == {second: "FINISHED"}


def test_two_stores_on_one_server_share_the_run_of_a_cell_with_equal_scores(store, tmp_path):
    uri, cell = mirror.store_uri(store, None), make_cell(lr=23)
    cells = [replace(cell, store=tmp_path / name) for name in ("one", "other")]
    trackers = [mirror.Tracker(store=each.store, uri=uri) for each in cells]
    first = trackers[0].sync(end(cells[0], [0.5]), sweep="shared")
    trackers[1].sync(begin(cells[1], 1), sweep="shared")  # in training it has another run
    assert len(runs_of(store, cell)) == 2
    assert trackers[1].sync(end(cells[1], [0.5]), sweep="shared") == first
    for each in cells:  # of later commands
        assert mirror.Tracker(store=each.store, uri=uri).sync(cell_folder.read(each.folder), sweep="shared") == first
    assert runs_of(store, cell) == {first: "FINISHED"}


def test_a_failed_cell_has_its_error_with_its_status_and_may_be_resumed(store, tmp_path):
    cell = replace(make_cell(lr=23), store=tmp_path)
    tracker = mirror.Tracker(store=store, uri=None)
    begin(cell, 1)
    cell_folder.write_failed(cell.folder, "my loss\nbroke")
    run_id = tracker.sync(cell_folder.read(cell.folder), sweep="failed")
    run = client_of(store).get_run(run_id)
    assert (run.info.status, run.data.tags["kdsweep.error"]) == ("FAILED", "my loss broke")
    assert tracker.sync(begin(cell, 2), sweep="failed") == run_id
    run = client_of(store).get_run(run_id)
    assert run.info.status == "RUNNING"
    assert "kdsweep.error" not in run.data.tags
    assert steps_of(store, run_id) == [0, 1]


def test_of_several_runs_of_a_cell_the_finished_one_counts(store, tmp_path):
    """Another command began the cell later and was killed: its run is newer, the scores are those of the finished."""
    tracker, cell = mirror.Tracker(store=store, uri=None), make_cell(lr=25)
    ask(store, "counts", [cell])
    run_id = finish(tracker, cell, "counts", tmp_path, [0.25, 0.75])
    client = client_of(store)
    logged = client.get_run(run_id)
    for moved_ms in (-1, 1):
        begun = logged.info.start_time + 1_000_000 * moved_ms
        other = client.create_run(logged.info.experiment_id, start_time=begun, tags=logged.data.tags)
        client.set_terminated(other.info.run_id, "KILLED")
    (row,) = reader.read_sweep(store=store, uri=None, name="counts").runs.to_dict("records")
    assert (row["run_id"], row["status"]) == (run_id, "FINISHED")


def test_a_requested_cell_without_a_run_is_missing(store):
    ask(store, "gaps", [make_cell(split=2, lr=5), make_cell("Student", split=1, lr=5)])
    runs = reader.read_sweep(store=store, uri=None, name="gaps").runs.set_index("notation")
    assert runs["status"].tolist() == ["missing", "missing"]
    assert runs.loc["L_MSE", ["split", "role"]].tolist() == [2, "distilled"]
    assert runs.loc["Student", ["split", "role"]].tolist() == [1, "baseline"]


def test_a_teacher_comes_with_the_cells_that_learned_from_it(store, tmp_path):
    tracker, teacher = mirror.Tracker(store=store, uri=None), make_cell("Teacher", lr=12)
    finish(tracker, teacher, "first", tmp_path, [0.9])
    cell = replace(make_cell(lr=12), input_digests={"teacher": teacher.fingerprint})
    ask(store, "second", [cell])
    finish(tracker, cell, "second", tmp_path, [0.8])
    sweep = reader.read_sweep(store=store, uri=None, name="second")
    assert sorted(sweep.runs["notation"]) == ["L_MSE", "Teacher"]
    assert sorted(sweep.scores["dice"]) == [0.8, 0.9]


def test_no_call_holds_more_than_an_mlflow_server_takes(store, tmp_path, monkeypatch):
    """The SQLite store takes any number; a server applies MLflow's limits, so they are applied here."""
    send = mirror.MlflowClient.log_batch

    def limited(client, run_id, metrics=(), params=(), tags=()):
        _validate_batch_log_limits(metrics, params, tags)
        return send(client, run_id, metrics, params, tags)

    monkeypatch.setattr(mirror.MlflowClient, "log_batch", limited)
    tracker, cells = mirror.Tracker(store=store, uri=None), [make_cell(lr=17, cell=number) for number in range(250)]
    ask(store, "large", cells)
    many = begin(replace(cells[0], store=tmp_path), 1000, params={f"key{i}": i for i in range(250)})
    run_id = tracker.sync(many, sweep="large")
    monkeypatch.undo()
    assert steps_of(store, run_id) == list(range(1000))
    assert client_of(store).get_run(run_id).data.params == {f"key{i}": str(i) for i in range(250)}
    parent = client_of(store).get_run(run_id).data.tags["mlflow.parentRunId"]
    artifact = client_of(store).download_artifacts(parent, mirror.SWEEP_FILE, str(tmp_path))
    requested = json.loads(Path(artifact).read_text())["requests"].values()
    assert {row["fingerprint"] for row in requested} == {cell.fingerprint for cell in cells}


def test_an_unknown_sweep_and_a_missing_store_are_one_line(store, tmp_path):
    ask(store, "earlier", [make_cell(lr=16)])
    with pytest.raises(InputError, match=r"sweep=nonsense is not in this store; it holds: .*earlier"):
        reader.read_sweep(store=store, uri=None, name="nonsense")
    with pytest.raises(InputError, match=r"no mlflow\.db in it"):
        reader.read_sweep(store=tmp_path, uri=None, name=None)
    assert list(tmp_path.iterdir()) == []  # asking does not create one


def test_the_database_lies_in_the_store_whatever_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mirror.store_uri(Path("multirun"), None) == f"sqlite:///{tmp_path}/multirun/mlflow.db"
    assert mirror.store_uri(Path("multirun"), "http://127.0.0.1:5000") == "http://127.0.0.1:5000"
