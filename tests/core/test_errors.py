"""Every error ends in one line: of a command in ``command``, of a file in ``reading``."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdsweep.core.errors import TRACEBACK, CellError, InputError, command, reading, some
from kdsweep.core.signals import Stopped

HINT = f"; {TRACEBACK}=1 before the command shows where"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACEBACK, raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def raising(error: BaseException) -> Callable[[], int]:
    @command
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("--out X: is a folder"), "--out X: is a folder"),
        (CellError("L_MSE: the loss is NaN"), "L_MSE: the loss is NaN"),
        (KeyError("params"), f"KeyError: 'params'{HINT}"),
        (AssertionError(), f"AssertionError{HINT}"),
        (RuntimeError("first\n  second"), f"RuntimeError: first second{HINT}"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "why"), "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: No space left on device; "),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk: No space left on device; "),
    ],
)
def test_an_error_is_one_line_and_code_one(capsys, error, line) -> None:
    assert raising(error)() == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"kdsweep: error: {line}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("name", [TRACEBACK, "HYDRA_FULL_ERROR"])
def test_the_traceback_is_shown_on_request_before_the_line(capsys, monkeypatch, name) -> None:
    monkeypatch.setenv(name, "1")
    assert raising(KeyError("params"))() == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.endswith("kdsweep: error: KeyError: 'params'\n")


@pytest.mark.parametrize(
    ("stop", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "kdsweep: stopped; what is written so far stays\n"),
        (Stopped(signal.SIGTERM), 143, "kdsweep: stopped by SIGTERM; all is saved"),
    ],
)
def test_a_stop_is_one_line_and_the_shells_code(capsys, stop, code, line) -> None:
    assert raising(stop)() == code
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_what_a_command_returns_is_its_code(returned, code) -> None:
    assert command(lambda: returned)() == code


PRINTING = "import sys; from kdsweep.core.errors import command; sys.exit(command(lambda: print({text}))())"


def printed(text: str, **streams: object) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = [sys.executable, "-c", PRINTING.format(text=text)]
    return subprocess.run(arguments, env=env, stderr=subprocess.PIPE, check=False, timeout=60, **streams)


def test_a_character_that_the_terminal_lacks_is_escaped() -> None:
    done = printed("'72.1 \\xb1 3.0', 'caf\\xe9', '\\udce9'", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"72.1 \\xb1 3.0 caf\\xe9 \\udce9\n"


@pytest.mark.parametrize("count", [1, 100_000])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_is_gone_is_not_an_error(monkeypatch, count, unbuffered) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    read, write = os.pipe()
    os.close(read)
    done = printed(f"'x' * {count}", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_closed_output_is_not_an_error() -> None:
    """The next file would have its number, and what is printed be written into it."""
    code = "import os, sys; from kdsweep.core.errors import command; work = command(lambda: print('x'))"
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -c \"{code}; sys.exit(work() or os.open('/', 0) == 1)\" >&-"],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_the_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = printed("'x'", stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith(b"kdsweep: error: the disk: No space left on device; ")
    assert done.stderr.count(b"\n") == 1


# ---- files ---------------------------------------------------------------------------------------------------------


def unreadable() -> None:
    raise PermissionError(errno.EACCES, "Permission denied", "f")


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (lambda: Path("absent").read_text(), "cannot be read (No such file or directory)"),
        (lambda: Path().read_bytes(), "cannot be read (Is a directory)"),
        (unreadable, "cannot be read (Permission denied)"),
        (lambda: json.loads("{"), "is not a splits file (JSONDecodeError: "),
        (lambda: json.loads("{}")["train"], "is not a splits file (KeyError: 'train')"),
        (lambda: json.loads("[]")["train"], "is not a splits file (TypeError: "),
        (lambda: b"caf\xe9".decode(), "is not a splits file (UnicodeDecodeError: "),
        (lambda: gzip.decompress(b"no gzip"), "cannot be read (not a splits file: BadGzipFile: "),
        (lambda: gzip.decompress(gzip.compress(b"abc")[:-4]), "is not a splits file (EOFError: "),
    ],
)
def test_reading_names_the_file_what_it_must_be_and_the_remedy(read, why) -> None:
    with pytest.raises(InputError) as caught, reading("split.file=f.json", what="a splits file", remedy="see docs"):
        read()
    message = str(caught.value)
    assert message.startswith(f"split.file=f.json: {why}")
    assert message.endswith("; see docs")
    assert "\n" not in message


@pytest.mark.parametrize("error", [InputError("train: is empty"), MemoryError()])
def test_reading_leaves_errors_that_are_written_for_the_user(error) -> None:
    with pytest.raises(type(error)) as caught, reading("f", what="x", remedy="y"):
        raise error
    assert caught.value is error


def test_names_beyond_the_most_are_counted() -> None:
    assert [some("abcd", most=most, separator="; ") for most in (2, 3, 4)] == [
        "a; b and 2 more",
        "a; b; c and 1 more",
        "a; b; c; d",
    ]
