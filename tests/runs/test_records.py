"""What a run's folder tells: a finished cell counts only as long as it is what was written."""

import json

import pytest

from kdsweep.runs import records


@pytest.fixture
def finished(tmp_path):
    (tmp_path / "scores.csv").write_text("dice\n0.5\n")
    records.write_finished(tmp_path, values={"test/dice": 0.5}, files=["scores.csv"])
    return tmp_path


def test_a_finished_cell_gives_its_values(finished):
    assert records.read_finished(finished) == {"test/dice": 0.5}
    assert records.check_file(finished, "scores.csv")


def test_a_marker_with_another_value_no_longer_counts(finished, caplog):
    file = finished / records.FINISHED
    content = json.loads(file.read_text())
    content["values"]["test/dice"] = 0.9
    file.write_text(json.dumps(content))
    assert records.read_finished(finished) is None
    assert not file.exists()
    assert f"{file}: damaged, its checksum differs" in caplog.text


def test_a_file_with_another_byte_no_longer_counts(finished, caplog):
    (finished / "scores.csv").write_text("dice\n0.6\n")
    assert not records.check_file(finished, "scores.csv")
    assert records.read_finished(finished) is None
    assert "scores.csv: damaged" in caplog.text


def test_a_failure_is_forgotten_once_the_cell_is_finished(tmp_path):
    records.write_failed(tmp_path, "a line\nand another")
    assert json.loads((tmp_path / records.FAILED).read_text())["error"] == "a line and another"
    records.write_finished(tmp_path, values={}, files=[])
    assert not (tmp_path / records.FAILED).exists()


def test_one_process_at_a_time_computes_a_cell(tmp_path):
    assert not records.is_held(tmp_path)
    with records.contextlib.ExitStack() as stack:
        assert records.hold(stack, tmp_path)
        assert records.is_held(tmp_path)
    assert not records.is_held(tmp_path)
