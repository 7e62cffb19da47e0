"""Every subcommand with every wrong input: one line that names it, by the boundary in ``core.errors``."""

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small import STUDENT

import kdsweep
from kdsweep import cli
from kdsweep.__main__ import main
from kdsweep.config import inputs
from kdsweep.core.errors import TRACEBACK
from kdsweep.data import phantom

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
    "score data=phantom data.count=4 --store {}",
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
    return main()


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which other users may enter, unlike those that pytest makes."""
    monkeypatch.delenv(TRACEBACK, raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", f"{name}/cache")
        monkeypatch.chdir(name)
        for cached in (inputs._listing, inputs._split):  # of relative paths in another test's folder
            cached.cache_clear()
        yield Path(name)


@pytest.mark.parametrize("spoil", [absent, empty_folder, text, garbage, garbage_inside, unreadable])
@pytest.mark.parametrize("line", COMMANDS)
def test_a_wrong_path_is_one_line(folder, monkeypatch, capsys, line, spoil) -> None:
    spoil(folder / "wrong")
    with unprivileged() if spoil is unreadable else contextlib.nullcontext():
        code = run(monkeypatch, *line.format(folder / "wrong").split())
    shown = capsys.readouterr().err
    assert code == 1, shown
    assert re.fullmatch(r"kdsweep: error: .+\n", shown), shown
    assert TRACEBACK not in shown, "an unforeseen error"
    assert "wrong" in shown


@pytest.mark.parametrize("spoil", [absent, empty_folder, text])
@pytest.mark.parametrize("data", ["busi", "folder", "udiat"])
@pytest.mark.parametrize("word", ["audit", "score"])
def test_a_data_set_that_is_not_there_is_one_line(folder, monkeypatch, capsys, word, data, spoil) -> None:
    spoil(folder / "wrong")
    assert run(monkeypatch, word, f"data={data}", f"data.root={folder / 'wrong'}") == 1
    assert re.fullmatch(rf"kdsweep: error: data.root={folder / 'wrong'}: .+\n", capsys.readouterr().err)


@pytest.mark.parametrize("word", ["audit", "score", "models"])
def test_a_data_set_without_its_folder_asks_for_it(word, monkeypatch, capsys) -> None:
    assert run(monkeypatch, word, "data=busi") == 1
    line = "kdsweep: error: data.root is missing: give it on the command line, data.root=...\n"
    assert capsys.readouterr().err == line


def small_phantom(*, seed: int, index: int, label: str) -> phantom.Phantom:
    """In place of a synthetic image, which takes 0.1 s to make: noise with one bright square, the lesion."""
    rng = np.random.default_rng([seed, index])
    mask = np.zeros((80, 90), np.uint8)
    mask[20:50, 30:60] = 1
    image = rng.integers(20, 90, mask.shape, dtype=np.uint8) + 120 * mask
    return phantom.Phantom(f"{label} ({index + 1})", label, image, mask)


@pytest.mark.parametrize("word", cli.app.commands)
def test_without_arguments_a_subcommand_says_what_it_needs(word, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(phantom, "phantom", small_phantom)  # of which the default configuration has 163
    code = run(monkeypatch, word)
    shown = capsys.readouterr().err
    if word in ("models", "data"):  # of the default configuration
        assert (code, shown) == (0, "")
    elif code == 2:
        assert re.match("kdsweep: error: missing (option|argument) [^\n]*\n$", shown), shown
    else:
        assert re.fullmatch(r"kdsweep: error: .*multirun.*\n", shown), shown
        assert code == 1
    assert TRACEBACK not in shown


def test_a_working_directory_that_is_gone_is_one_line(monkeypatch, capsys) -> None:
    def gone() -> Path:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "cwd", gone)
    assert run(monkeypatch, "status") == 1
    line = "kdsweep: error: the working directory does not exist anymore; change to another folder\n"
    assert capsys.readouterr().err == line


# ---- in a process of its own -----------------------------------------------------------------------------------------

TRAINING = (
    *("profile=quick", "path=none", "data.count=12", "image_size=64", "train.batch_size=4", "train.epochs=1"),
    *("device=cpu", *STUDENT),
)

# What Python imports when it starts, in the workers too: connections to other machines are refused and recorded.
OFFLINE = """
import socket

def refusing(method):
    def call(self, address, *rest):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            refuse(address[0])
        return method(self, address, *rest)
    return call

def resolving(function):
    def call(host, *rest, **options):
        if host not in (None, "", "127.0.0.1", "::1", "localhost", socket.gethostname()):
            refuse(host)
        return function(host, *rest, **options)
    return call

def refuse(host):
    with open({record!r}, "a") as file:
        file.write(f"{{host}}\\n")
    raise ConnectionRefusedError(host)

for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, refusing(getattr(socket.socket, name)))
socket.getaddrinfo = resolving(socket.getaddrinfo)
"""

# A user whom the system does not know, as in a container that runs under any number.
UNNAMED = """
import pwd

def getpwuid(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")

pwd.getpwuid = getpwuid
"""

SUBCOMMANDS = """
import sys
from kdsweep import __main__
for line in {lines!r}:
    sys.argv = ["kdsweep", *line.split()]
    assert __main__.main() == 0, line
"""


def python(
    *arguments: str, cwd: Path, site: str = "", without: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in this folder, after this code of a sitecustomize.py."""
    (cwd / "site").mkdir(exist_ok=True)
    (cwd / "site" / "sitecustomize.py").write_text(site)
    env = {key: value for key, value in os.environ.items() if key not in without}
    env |= {"PYTHONPATH": str(cwd / "site"), **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=570)


@pytest.mark.slow
def test_no_command_opens_a_connection_unasked_and_no_page_names_the_machine(folder) -> None:
    record = folder / "connections"
    site = OFFLINE.format(record=str(record))
    python("-c", "import urllib.request as u; u.urlopen('http://example.org')", cwd=folder, site=site)
    assert record.read_text() == "example.org\n", "the guard must see a connection"
    record.unlink()
    without = ("NO_ALBUMENTATIONS_UPDATE", "MLFLOW_DISABLE_TELEMETRY", "HF_HUB_OFFLINE")
    store = f"store={folder / 'multirun'}"
    words = ("-m", "kdsweep", "-m", "seed=0", store, *TRAINING)
    done = python(*words, cwd=folder, site=site, without=without, USER="jane-doe")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [
        "status",
        "tables table3",
        "figures curves",
        "report --no-costs",
        "publish --out scores.json.gz",
        "audit data=phantom data.count=6 --out audit",
        "export --run Student/split0 --out a.onnx",
        "quantize --models Student --calibrate 2 --out int8",
        "score data=phantom data.count=6 data.source.seed=9",
    ]
    code = SUBCOMMANDS.format(lines=lines)
    done = python("-c", code, cwd=folder, site=site, without=without, USER="jane-doe")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not record.exists(), record.read_text()
    (page,) = (folder / "multirun" / "reports").glob("*.html")
    shown = page.read_text(encoding="utf-8")
    pictures = [base64.b64decode(text).decode() for text in re.findall(r"svg\+xml;base64,([^\"]+)", shown)]
    records = [json.loads(file.read_text())["params"] for file in folder.glob("multirun/*/*/cell.json")]
    for text in (shown, *pictures, str(records)):
        for private in (str(folder), str(Path.home()) + "/", "jane-doe"):
            assert private not in text, private


NAMES = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")


def test_a_user_without_a_home_folder_is_one_line(folder) -> None:
    done = python("-m", "kdsweep", "status", cwd=folder, site=UNNAMED, without=NAMES)
    line = "kdsweep: error: this user has no home folder; put one before the command, such as HOME=/tmp\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_python_without_docstrings_is_one_line(folder) -> None:
    done = python("-OO", "-m", "kdsweep", "models", cwd=folder)
    line = "kdsweep: error: python -OO takes docstrings away, which segmentation-models-pytorch needs; -O may stay\n"
    assert (done.returncode, done.stderr) == (1, line)


@pytest.mark.slow
def test_a_container_without_assertions_names_and_letters_trains_to_the_end(folder) -> None:
    env = {"HOME": str(folder), "PYTHONIOENCODING": "ascii"}
    done = python("-O", "-m", "kdsweep", *TRAINING, cwd=folder, site=UNNAMED, without=NAMES, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert r"\xb1" in done.stdout, "the sign between mean and deviation"
    assert len(list(folder.glob("multirun/cells/*/finished.json"))) == 1


def test_no_assertion_is_relied_upon() -> None:
    """``python -O`` leaves assertions out, so the package has them for the type checker alone: not None."""
    package = Path(kdsweep.__file__).parent
    lines = [line.strip() for file in package.rglob("*.py") for line in file.read_text().splitlines()]
    assert [line for line in lines if line.startswith("assert ") and not line.endswith(" is not None")] == []
