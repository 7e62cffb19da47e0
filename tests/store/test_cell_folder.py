"""The record in a cell's folder: a finished cell counts only as long as it is what was written."""

import itertools
import json
import os

import pytest

from kdsweep.config.grid import Cell
from kdsweep.core.errors import InputError
from kdsweep.store import cell_folder


@pytest.fixture
def finished(tmp_path):
    (tmp_path / "scores.csv").write_text("dice\n0.5\n")
    cell_folder.write_finished(tmp_path, values={"test/dice": 0.5}, files=["scores.csv"])
    return tmp_path


def test_a_finished_cell_gives_its_values(finished):
    assert cell_folder.read_finished(finished) == {"test/dice": 0.5}
    assert cell_folder.check_file(finished, "scores.csv")


def test_a_marker_with_another_value_no_longer_counts(finished, caplog):
    file = finished / cell_folder.FINISHED
    content = json.loads(file.read_text())
    content["values"]["test/dice"] = 0.9
    file.write_text(json.dumps(content))
    assert cell_folder.read_finished(finished) is None
    assert not file.exists()
    assert f"{file}: damaged, its checksum differs" in caplog.text


def test_a_file_with_another_byte_no_longer_counts(finished, caplog):
    (finished / "scores.csv").write_text("dice\n0.6\n")
    assert not cell_folder.check_file(finished, "scores.csv")
    assert cell_folder.read_finished(finished) is None
    assert "scores.csv: damaged" in caplog.text


def test_a_failure_is_forgotten_once_the_cell_is_trained_again_or_finished(tmp_path):
    cell = make_cell(tmp_path)
    begin(cell)
    cell_folder.write_failed(cell.folder, "it\nbroke")
    assert (cell_folder.read(cell.folder).status, cell_folder.read(cell.folder).error) == ("FAILED", "it broke")
    begin(cell)
    assert (cell_folder.read(cell.folder).status, cell_folder.read(cell.folder).error) == ("KILLED", "")
    cell_folder.write_failed(cell.folder, "it broke again")
    cell_folder.write_finished(cell.folder, values={"test/dice": 0.5}, files=[])
    assert not (cell.folder / cell_folder.FAILED).exists()
    cell_folder.write_failed(cell.folder, "left by a kill between the two files")
    assert (cell_folder.read(cell.folder).status, cell_folder.read(cell.folder).error) == ("FINISHED", "")


# --- damaged records: (file, status then, what is logged)


def make_cell(store, notation="L_MSE", input_digests="a") -> Cell:
    return Cell("distilled", notation, 0, 0, {"lr": 1}, {"data": input_digests}, store)


def begin(cell: Cell) -> None:
    cell_folder.describe(cell, split={"train": [], "validation": [], "test": []}, params={"a": 1}, tags={"b": "c"})
    history = [{"epoch": 0, "val/dice": 0.5}]
    cell_folder.write_progress(cell.folder, epochs=9, history=history, times_ms=[1], seconds=[1.0])


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", "garbage"])
@pytest.mark.parametrize("name", [cell_folder.CELL, cell_folder.PROGRESS])
def test_a_damaged_record_of_a_begun_cell_is_named_and_written_again(tmp_path, caplog, name, content):
    cell = make_cell(tmp_path)
    begin(cell)
    (cell.folder / name).write_text(content)
    assert cell_folder.read(cell.folder).status == "KILLED"  # begun all the same: its checkpoint is there
    assert f"{cell.folder / name} is damaged; the same command writes it again" in caplog.text
    begin(cell)
    record = cell_folder.read(cell.folder)
    assert (record.params, record.epochs, len(record.history)) == ({"a": 1}, 9, 1)


@pytest.mark.parametrize("name", [cell_folder.CELL, cell_folder.PROGRESS, cell_folder.FINISHED, "split.json"])
def test_a_finished_cell_with_a_damaged_record_is_tested_again_from_its_checkpoint(tmp_path, caplog, name):
    """MLflow could not be made from it."""
    cell = make_cell(tmp_path)
    begin(cell)
    cell_folder.write_finished(cell.folder, values={"test/dice": 0.5}, files=["split.json"])
    assert cell_folder.read(cell.folder).status == "FINISHED"
    (cell.folder / name).write_text("{")
    assert cell_folder.read_finished(cell.folder) is None
    assert f"{cell.folder / name}: damaged" in caplog.text
    assert not (cell.folder / cell_folder.FINISHED).exists()


def test_a_damaged_failure_is_still_a_failure(tmp_path):
    cell = make_cell(tmp_path)
    begin(cell)
    (cell.folder / cell_folder.FAILED).write_text("{")
    record = cell_folder.read(cell.folder)
    assert record.status == "FAILED"
    assert record.error == f"{cell.folder / cell_folder.FAILED} is damaged; the same command tries the cell again"


def test_a_damaged_split_is_named_with_the_remedy(tmp_path):
    (tmp_path / "split.json").write_text("{")
    with pytest.raises(
        InputError, match=r"split\.json is missing or damaged; the command of its sweep writes it again"
    ):
        cell_folder.read_split(tmp_path)


def test_an_error_is_recorded_without_the_path_of_this_machine(tmp_path):
    cell = make_cell(tmp_path / "multirun")
    cell_folder.write_failed(cell.folder, f"{cell.folder}/checkpoint.pt: not a checkpoint of it; delete it")
    error = cell_folder.read(cell.folder).error
    assert error == f"multirun/cells/{cell.folder.name}/checkpoint.pt: not a checkpoint of it; delete it"


@pytest.mark.parametrize("other", ["L_MSE-split0-seed0-deep", "L_MSE-split0-seed01", "xL_MSE-split0-seed0", "L_MSE"])
def test_a_predecessor_has_the_same_name_and_not_a_similar_one(tmp_path, other):
    cell, before = make_cell(tmp_path), make_cell(tmp_path, input_digests="b")
    begin(before)
    similar = before.folder.with_name(f"{other}-{before.fingerprint[:10]}")
    before.folder.rename(similar)
    assert cell_folder.read_predecessor(cell, excluded=set()) is None
    similar.rename(before.folder)
    assert cell_folder.read_predecessor(cell, excluded=set())["params"] == {"a": 1}


def test_a_cell_that_is_resumed_began_when_it_first_did_and_ends_when_it_is_finished(tmp_path, monkeypatch):
    cell, clock = make_cell(tmp_path), itertools.count(1000, 1000)
    monkeypatch.setattr(cell_folder, "now_ms", lambda: next(clock))
    begin(cell)
    first = cell_folder.read(cell.folder).started_ms
    cell_folder.write_failed(cell.folder, "it broke")
    failed = cell_folder.read(cell.folder)
    begin(cell)
    cell_folder.write_finished(cell.folder, values={"test/dice": 0.5}, files=[])
    finished = cell_folder.read(cell.folder)
    assert first == failed.started_ms == finished.started_ms
    assert first < failed.ended_ms < finished.ended_ms


def test_of_several_predecessors_the_latest_is_compared_with(tmp_path):
    for number, input_digests in enumerate("bcd"):
        before = make_cell(tmp_path, input_digests=input_digests)
        begin(before)
        moment = [30, 10, 20][number]  # the names of their folders are in another order than they were written in
        os.utime(before.folder / cell_folder.CELL, (moment, moment))
    cell = make_cell(tmp_path)
    assert cell_folder.read_predecessor(cell, excluded=set())["input_digests"] == {"data": "b"}
    others = {make_cell(tmp_path, input_digests="b").folder}
    assert cell_folder.read_predecessor(cell, excluded=others)["input_digests"] == {"data": "d"}


def test_one_process_at_a_time_computes_a_cell(tmp_path):
    assert not cell_folder.is_held(tmp_path)
    with cell_folder.contextlib.ExitStack() as stack:
        assert cell_folder.hold(stack, tmp_path)
        assert cell_folder.is_held(tmp_path)
    assert not cell_folder.is_held(tmp_path)
