"""Files appear whole or not at all, and come back as they were."""

import json

import numpy as np
import pytest
import torch

from kdsweep import checkpoint


def test_a_write_that_fails_leaves_the_old_file_and_no_scrap(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    checkpoint.write_json(file, {"old": 1})
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_json(file, {"new": 2})
    assert json.loads(file.read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_state_that_cannot_be_saved_leaves_the_old_checkpoint(tmp_path):
    file = tmp_path / "checkpoint.pt"
    checkpoint.save_state(file, {"epoch": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save_state(file, {"epoch": 2, "broken": lambda: None})
    assert checkpoint.load_state(file) == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_state_with_code_in_it_is_not_loaded(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    torch.save({"network": Attack()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoint.load_state(tmp_path / "evil.pt")
    assert not (tmp_path / "marker").exists()


def test_predictions_come_back_by_id(tmp_path):
    masks = np.random.default_rng(0).random((3, 5, 7)) > 0.5  # 105 bits: not a multiple of 8
    checkpoint.save_predictions(tmp_path / "p.npz", masks, ids=["b", "a", "c d"])
    back = checkpoint.load_predictions(tmp_path / "p.npz")
    assert list(back) == ["b", "a", "c d"]
    for mask, own in zip(masks, back.values(), strict=True):
        assert np.array_equal(mask, own)


def test_a_network_comes_back_bit_for_bit_whatever_its_memory_format(tmp_path):
    one, other = (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)) for _ in range(2))
    one.to(memory_format=torch.channels_last)
    checkpoint.save_network(tmp_path / "n.safetensors", one)
    checkpoint.load_network(tmp_path / "n.safetensors", other)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_folder_without_the_marker_is_not_finished(tmp_path):
    assert checkpoint.read_finished(tmp_path) is None
    checkpoint.write_json(tmp_path / checkpoint.FINISHED, {"run_id": "x", "test/dice": 0.5})
    assert checkpoint.read_finished(tmp_path) == {"run_id": "x", "test/dice": 0.5}
