"""Files appear complete or not at all, and come back as they were."""

import hashlib
import json

import numpy as np
import pytest
import torch

from kdsweep.core import files
from kdsweep.store import checkpoint


def test_a_write_that_fails_leaves_the_old_file_and_no_scrap(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    files.write_json(file, {"old": 1})
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match=r"disk full: '.*a\.json'"):
        files.write_json(file, {"new": 2})
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
    """Neither as a plain file nor with the checksum that would make it pass for one of ours."""

    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    torch.save({"network": Attack()}, tmp_path / "evil.pt")
    with pytest.raises(files.DamagedError, match=r"evil\.pt: damaged, its checksum does not fit"):
        checkpoint.load_state(tmp_path / "evil.pt")
    content = (tmp_path / "evil.pt").read_bytes()
    (tmp_path / "sealed.pt").write_bytes(content + hashlib.sha256(content).digest())
    with pytest.raises(files.DamagedError, match=r"sealed\.pt: not a checkpoint: Weights only load failed"):
        checkpoint.load_state(tmp_path / "sealed.pt")
    assert not (tmp_path / "marker").exists()


def test_a_state_that_was_cut_short_or_has_another_bit_is_seen(tmp_path):
    file = tmp_path / "checkpoint.pt"
    checkpoint.save_state(file, {"weights": torch.arange(50.0)})
    content = file.read_bytes()
    flipped = [content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] for at in range(0, len(content), 41)]
    for spoiled in (content[:-1], b"", content[:20], content[:100], *flipped):
        file.write_bytes(spoiled)
        with pytest.raises(files.DamagedError, match=r"checkpoint\.pt: damaged, its checksum does not fit its \d+"):
            checkpoint.load_state(file)


def test_the_state_before_stays_beside_the_new_one_and_torch_alone_reads_both(tmp_path):
    file = tmp_path / "checkpoint.pt"
    for epoch in range(3):
        checkpoint.save_state(file, {"epoch": epoch})
    assert checkpoint.load_state(file) == torch.load(file, weights_only=True) == {"epoch": 2}
    assert checkpoint.load_state(tmp_path / checkpoint.PREVIOUS) == {"epoch": 1}
    assert len(list(tmp_path.iterdir())) == 2


def test_predictions_come_back_by_id(tmp_path):
    masks = np.random.default_rng(0).random((3, 5, 7)) > 0.5  # 105 bits: not a multiple of 8
    checkpoint.save_predictions(tmp_path / "p.npz", masks, ids=["b", "a", "c d"])
    back = checkpoint.load_predictions(tmp_path / "p.npz")
    assert list(back) == ["b", "a", "c d"]
    for mask, restored in zip(masks, back.values(), strict=True):
        assert np.array_equal(mask, restored)


def test_predictions_of_several_classes_come_back_as_indices(tmp_path):
    masks = np.random.default_rng(0).integers(0, 4, (2, 5, 7), dtype=np.uint8)
    checkpoint.save_predictions(tmp_path / "p.npz", masks, ids=["b", "a"])
    back = checkpoint.load_predictions(tmp_path / "p.npz")
    assert list(back) == ["b", "a"]
    restored = np.stack(list(back.values()))
    assert restored.dtype == np.uint8
    assert np.array_equal(restored, masks)


def test_a_network_comes_back_bit_for_bit_whatever_its_memory_format(tmp_path):
    one, other = (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)) for _ in range(2))
    one.to(memory_format=torch.channels_last)
    checkpoint.save_network(tmp_path / "n.safetensors", one)
    checkpoint.load_network(tmp_path / "n.safetensors", other)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
