"""Every subcommand with every wrong input: one line that names it, by the boundary in ``core.errors``."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdsweep.__main__ import WORDS, main
from kdsweep.core.errors import TRACEBACK

NOBODY = 65534

# Each subcommand with one path of the user, {}, that may be wrong.
COMMANDS = (
    "status --store {}",
    "tables table4 --store {}",
    "tables table5 --store {}",
    "tables table4 --published {}",
    "figures effects --store {}",
    "figures all --published {}",
    "report --no-costs --store {}",
    "predict --run best --store {} --images images --out out",
    "predict --run Student/split0 --store {} --images images --out out",
    "predict --run {} --images images --out out",
    "export --run {} --out out.onnx",
    "export --run 0123456789abcdef0123456789abcdef --store {} --out out.onnx",
    "quantize --store {} --out out",
    "score data=phantom --store {}",
    "publish --out out.json.gz --store {}",
    "audit data=busi data.root={}",
    "audit data=folder data.root={}",
    "models teacher={}",
)


def absent(path: Path) -> None:
    pass


def empty_folder(path: Path) -> None:
    path.mkdir()


def text(path: Path) -> None:
    path.write_text("these are notes\n")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def garbage_inside(path: Path) -> None:
    """What a store, a run and a data set consist of, all of it damaged."""
    for name in ("mlflow.db", "cell.json", "finished.json", "benign/benign (1).png", "images/1.png", "masks/1.png"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        garbage(path / name)


def unreadable(path: Path) -> None:
    garbage_inside(path)
    path.chmod(0)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Another user than root, whom nothing is forbidden."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["kdsweep", *words])
    try:
        return main()
    except SystemExit as end:  # argparse's
        return int(end.code)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which other users may enter, unlike those that pytest makes."""
    monkeypatch.delenv(TRACEBACK, raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", f"{name}/cache")
        monkeypatch.chdir(name)
        yield Path(name)


@pytest.mark.parametrize("spoil", [absent, empty_folder, text, garbage, garbage_inside, unreadable])
@pytest.mark.parametrize("line", COMMANDS)
def test_a_wrong_path_is_one_line(folder, monkeypatch, capsys, line, spoil) -> None:
    spoil(folder / "given")
    with unprivileged() if spoil is unreadable else contextlib.nullcontext():
        code = run(monkeypatch, *line.format(folder / "given").split())
    shown = capsys.readouterr().err
    assert code == 1, shown
    assert re.fullmatch(r"kdsweep: error: .+\n", shown), shown
    assert TRACEBACK not in shown, "an error that nobody has foreseen"
    assert "given" in shown


@pytest.mark.parametrize("spoil", [absent, empty_folder, text])
@pytest.mark.parametrize("data", ["busi", "folder", "udiat"])
@pytest.mark.parametrize("word", ["audit", "score"])
def test_a_data_set_that_is_not_there_is_one_line(folder, monkeypatch, capsys, word, data, spoil) -> None:
    spoil(folder / "given")
    assert run(monkeypatch, word, f"data={data}", f"data.root={folder / 'given'}") == 1
    assert re.fullmatch(rf"kdsweep: error: data.root={folder / 'given'}: .+\n", capsys.readouterr().err)


@pytest.mark.parametrize("word", ["audit", "score", "models"])
def test_a_data_set_without_its_folder_asks_for_it(word, monkeypatch, capsys) -> None:
    assert run(monkeypatch, word, "data=busi") == 1
    line = "kdsweep: error: data.root is missing: give it on the command line, data.root=...\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("word", WORDS)
def test_without_arguments_a_subcommand_says_what_it_needs(word, monkeypatch, capsys) -> None:
    code = run(monkeypatch, word)
    shown = capsys.readouterr().err
    if word == "models":
        assert (code, shown) == (0, "")
    elif code == 2:
        assert "the following arguments are required" in shown
    else:
        assert re.fullmatch(r"kdsweep: error: .*multirun.*\n", shown), shown
        assert code == 1
    assert TRACEBACK not in shown
