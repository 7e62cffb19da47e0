"""Files appear complete or not at all, and what is not a regular file stays what it is."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from kdsweep.core import files

OLD, NEW = b"old", b"new content"


def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    target, link, chain = tmp_path / "far" / "scores.json", tmp_path / "link", tmp_path / "chain"
    target.parent.mkdir()
    target.write_bytes(OLD)
    link.symlink_to("far/scores.json")
    chain.symlink_to(link)
    files.write_bytes(chain, NEW)
    assert target.read_bytes() == NEW
    assert chain.is_symlink()
    assert link.is_symlink()
    assert [file.name for file in target.parent.iterdir()] == ["scores.json"]


def test_a_link_to_a_file_that_is_not_there_yet_makes_that_file(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "later" / "scores.json")
    files.write_bytes(link, NEW)
    assert link.is_symlink()
    assert (tmp_path / "later" / "scores.json").read_bytes() == NEW


def test_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "first").symlink_to(tmp_path / "second")
    (tmp_path / "second").symlink_to(tmp_path / "first")
    with pytest.raises(OSError, match="symbolic links"):
        files.write_bytes(tmp_path / "first", NEW)
    assert (tmp_path / "first").is_symlink()


def test_a_pipe_stays_and_is_written(tmp_path: Path) -> None:
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    files.write_bytes(pipe, NEW)
    reader.join(timeout=60)
    assert received == [NEW]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_stays(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
        device.write_bytes(b"")
    except PermissionError:
        pytest.skip("a device can be made and opened by root alone, on a file system that allows it")
    files.write_bytes(device, NEW)
    assert stat.S_ISCHR(device.stat().st_mode)


def test_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        files.write_bytes(tmp_path, NEW)
    assert (caught.value.filename, caught.value.errno) == (str(tmp_path), errno.EISDIR)


def test_the_permissions_of_a_file_stay(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_bytes(OLD)
    file.chmod(0o640)
    files.write_bytes(file, NEW)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert file.read_bytes() == NEW


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "scores.json"
    file.write_bytes(OLD)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_bytes(file, NEW)
    assert caught.value.filename == str(file)
    assert file.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [file]


def test_records_name_files_without_their_folders():
    texts = {
        "/data/jane doe/clinic": "clinic",
        "~/scans": "scans",
        "as /home/jane/a.csv lists them, by group (/srv/b.csv)": "as a.csv lists them, by group (b.csv)",
        "sqlite:////home/jane/mlflow.db": "sqlite:mlflow.db",
        "[file:///home/jane/conf]": "[file:conf]",
        "51.08 / 43.19, n/a, L_MSE/split0": "51.08 / 43.19, n/a, L_MSE/split0",
        "http://127.0.0.1:5000/#/experiments/1": "http://127.0.0.1:5000/#/experiments/1",
    }
    assert files.without_folders({"values": list(texts)}) == {"values": list(texts.values())}
    assert files.without_folders({"count": 3, "weights": None}) == {"count": 3, "weights": None}
