"""The folders of cells are the truth, MLflow is a copy: damage, odd names and other users' stores end in one line."""

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna
import pytest
from filelock import FileLock
from sqlalchemy.exc import DatabaseError
from test_mirror import begin, client_of, end, in_another_process, make_cell

from kdsweep import cli
from kdsweep.config import grid
from kdsweep.core import databases
from kdsweep.core.errors import InputError, one_line
from kdsweep.core.files import is_locked
from kdsweep.store import cell_folder, sweep_file
from kdsweep.tracking import artifacts, database, mirror, reader, sync
from kdsweep.tuning import study

NAMES = ["x%20y", "a%25b?c", "a#b", "a b", "it's", "größer 漢", '"q"', "%(here)s", "100%", "[x]"]
SCORES = [0.5, 0.75] * 3
GARBAGE = b"\x00\xffthis is not what was written\n" * 200


@pytest.fixture
def store(empty_store, tmp_path) -> Path:
    return Path(shutil.copytree(empty_store, tmp_path / "store"))


def log_sweep(store: Path) -> None:
    """A command's bookkeeping for a sweep of two cells and their Teacher, all finished; type it again to repair."""
    teacher = make_cell("Teacher", store=store)
    cells = [make_cell(name, store=store) for name in ("L_MSE", "H_MSE")]
    cells = [replace(cell, input_digests={"teacher": teacher.fingerprint}) for cell in cells]
    for cell in [teacher, *cells]:
        if not (cell.folder / cell_folder.FINISHED).exists():
            end(cell, [0.5, 0.75])
    sweep_file.add(store, "sweep", cells=cells, teachers=[teacher])
    folders = [cell.folder for cell in [teacher, *cells]]
    sync.Sync(store=store, uri=None, experiment="kdsweep", sweeps={"sweep": folders}, trains=True)
    sync.close_all()


def scores_of(store: Path) -> list[float]:
    return reader.read_sweep(store=store, uri=None, name="sweep").scores["dice"].tolist()


def files_of(folder: Path) -> dict[str, bytes]:
    kept = (file for file in folder.rglob("*") if file.is_file() and not file.name.endswith(".lock"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in kept}


def error_of(call: Callable[[], object]) -> str:
    """The one line of an error that the user can correct."""
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- addresses


@pytest.mark.parametrize("name", NAMES)
def test_a_store_may_have_any_name_and_nothing_is_written_elsewhere(tmp_path, empty_store, name):
    store = tmp_path / name
    store.mkdir()
    if "%2" not in name:  # those make their database themselves, which takes seconds
        shutil.copytree(empty_store, store, dirs_exist_ok=True)
    log_sweep(store)
    assert scores_of(store) == SCORES
    optuna.create_study(storage=study.default_storage(store), study_name="study")
    assert [folder.name for folder in tmp_path.iterdir()] == [name]
    assert {"mlflow.db", "optuna.db", "artifacts", "cells", "teachers"} <= {file.name for file in store.iterdir()}
    for run in client_of(store).search_runs(["1"], "tags.`kdsweep.role` = 'distilled'"):  # as MLflow itself finds it
        downloaded = client_of(store).download_artifacts(run.info.run_id, cell_folder.SCORES, str(store))
        assert Path(downloaded).read_text() == "image,label,dice\n000000,benign,0.5\n000001,benign,0.75\n"


def test_a_path_for_which_there_is_no_address_is_refused(monkeypatch):
    """As by SQLAlchemy 2.0, which quotes no database."""
    real = databases.make_url
    monkeypatch.setattr(databases, "make_url", lambda url: real(url.partition("%3F")[0].partition("?")[0]))
    assert "use a store without ?" in error_of(lambda: databases.sqlite_url(Path("/runs/a?b/mlflow.db")))


# --- damage


def garble(file: Path) -> None:
    file.write_bytes(GARBAGE)


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def shorten_by_a_row(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [Path.unlink, garble, shorten, shorten_by_a_row, empty])
def test_damaged_artifacts_cost_no_score_and_the_same_command_repairs_them(store, damage):
    log_sweep(store)
    before = files_of(store / "artifacts")
    for file in (store / "artifacts").rglob(cell_folder.SCORES):
        damage(file)
    shutil.rmtree(next((store / "artifacts").iterdir()))
    assert scores_of(store) == SCORES
    (run, *_) = reader.read_sweep(store=store, uri=None, name="sweep").runs.to_dict("records")
    assert artifacts.read(run, "test_predictions.npz", store=store, uri=None) == b"masks"
    log_sweep(store)
    assert files_of(store / "artifacts") == before


@pytest.mark.parametrize("damage", [Path.unlink, garble, shorten, shorten_by_a_row, empty])
def test_without_the_folders_a_damaged_artifact_is_named_with_the_remedy(store, damage):
    log_sweep(store)
    for name in ("cells", "teachers"):
        shutil.rmtree(store / name)
    assert scores_of(store) == SCORES
    file = next((store / "artifacts").rglob(cell_folder.SCORES))
    damage(file)
    message = error_of(lambda: scores_of(store))
    assert message.startswith(f"{file} of ")
    assert "run the command of its sweep again" in message


def test_a_teacher_is_read_by_the_row_of_a_cell_of_another_seed(store):
    log_sweep(store)
    runs = reader.read_sweep(store=store, uri=None, name="sweep").runs.to_dict("records")
    teacher = next(run for run in runs if run["role"] == "distilled") | {"role": "teacher", "notation": "Teacher"}
    cell = make_cell("Teacher", store=store)
    shutil.rmtree(store / "artifacts")
    read = artifacts.read(
        {**teacher, "seed": 7, "fingerprint": cell.fingerprint}, cell_folder.SCORES, store=store, uri=None
    )
    assert read == (cell.folder / cell_folder.SCORES).read_bytes()


def spoil_the_middle(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4096:] = GARBAGE * (len(content[4096:]) // len(GARBAGE)) + GARBAGE[: len(content[4096:]) % len(GARBAGE)]
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [garble, shorten, spoil_the_middle, empty, Path.unlink])
def test_a_damaged_database_names_the_remedy_and_is_not_overwritten(store, tmp_path, damage, capsys, caplog):
    log_sweep(store)
    spoiled = Path(shutil.copytree(store, tmp_path / "spoiled"))  # as another process opens it
    file = spoiled / "mlflow.db"
    damage(file)
    left = file.read_bytes() if file.exists() else b""
    assert cli.main(["tables", "table3", "--store", str(spoiled), "--sweep", "sweep"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("kdsweep: error: ")
    assert printed.count("\n") == 1
    assert "logged again from the folders of the cells" in printed
    if left:  # a command that trains says it before, or logs it where it shows later; it never overwrites the file
        assert f"{file} does not open or is damaged" in printed
        refused = ""
        try:
            log_sweep(spoiled)
        except InputError as error:
            refused = str(error)
        assert "move it away and run the command of its sweep again" in refused + caplog.text
        assert "Traceback" not in caplog.text
        assert file.read_bytes()[:4096] == left[:4096]


@pytest.mark.parametrize("call", ["publish", "sync"])
def test_damage_that_shows_while_cells_are_logged_is_one_line(store, monkeypatch, caplog, capsys, call):
    def fail(*_: object, **__: object) -> None:
        raise DatabaseError("UPDATE", {}, sqlite3.DatabaseError("database disk image is malformed"))

    monkeypatch.setattr(mirror.Tracker, call, fail)
    log_sweep(store)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("nothing more is logged to MLflow at sqlite:///")
    assert f"{store}/mlflow.db does not open or is damaged" in lines[0]
    assert "move it away and run the command of its sweep again" in lines[0]
    assert lines[1].startswith("3 cells are not in MLflow at ")
    assert capsys.readouterr().err == ""


def test_without_its_database_a_store_is_logged_again_by_the_same_command(store, tmp_path):
    log_sweep(store)
    (store / "mlflow.db").rename(tmp_path / "moved away")
    again = Path(shutil.copytree(store, tmp_path / "again"))  # as another process opens it
    log_sweep(again)
    assert reader.read_sweep(store=again, uri=None, name="sweep").runs["status"].tolist() == ["FINISHED"] * 3
    assert scores_of(again) == SCORES


def test_a_sweep_that_mlflow_lacks_is_another_error_than_one_that_was_never_begun(store):
    cell = make_cell(store=store)
    sweep_file.add(store, "sweep", cells=[cell], teachers=[])
    assert reader.read_sweep(store=store, uri=None, name="sweep").runs["status"].tolist() == ["missing"]
    begin(cell)
    assert "run the command of its sweep again" in error_of(lambda: scores_of(store))


def test_tables_of_an_earlier_results_version_come_out(store, monkeypatch, capsys):
    """The cells of the sweep are other ones now, and are computed again."""
    cells = [
        replace(make_cell(name, store=store), input_digests={"results_version": "0"}) for name in ("L_MSE", "Student")
    ]
    sweep_file.add(store, "sweep", cells=cells, teachers=[])
    for cell in cells:
        mirror.Tracker(store=store, uri=None).sync(end(cell, [0.5, 0.75]), sweep="sweep")
    assert cli.main(["tables", "table4", "--store", str(store)]) == 0
    printed = capsys.readouterr().out
    assert "62.5" in printed
    assert "Computed by an earlier kdsweep, results version 0 (this one: " in printed
    newer = [replace(cell, input_digests={"results_version": "1"}) for cell in cells]
    monkeypatch.setattr(grid, "RESULTS_VERSION", grid.RESULTS_VERSION + 1)
    sweep_file.add(store, "sweep", cells=newer, teachers=[])
    assert reader.read_sweep(store=store, uri=None, name="sweep").runs["status"].tolist() == ["missing"] * 2


@pytest.mark.parametrize("content", [GARBAGE, b"", b"[]", b"{}", b'{"requests": '])
def test_a_damaged_record_of_a_sweep_is_named_and_never_overwritten(store, content, capsys):
    cell = make_cell(store=store)
    sweep_file.add(store, "sweep", cells=[cell], teachers=[])
    file = store / "sweeps" / "sweep.json"
    file.write_bytes(content)
    assert cli.main(["status", "--store", str(store)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"kdsweep: error: {file} is damaged; ")
    assert "run the commands of this sweep again" in printed.err
    for storage in (None, ""):  # of the sweep, of its tuning
        write = partial(sweep_file.add, store, "sweep", cells=[cell], teachers=[], storage=storage)
        assert error_of(write).startswith(f"{file} is damaged")
    assert file.read_bytes() == content


# --- places: a copy, a moved store, another user


def test_a_copy_that_cannot_be_written_to_logs_nothing_and_says_so(store, tmp_path, monkeypatch):
    log_sweep(store)
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    before = files_of(store)
    monkeypatch.setattr(database, "is_writable", lambda _: False)  # root may write anywhere
    sweep = reader.read_sweep(store=copy, uri=None, name="sweep")
    assert sweep.scores["dice"].tolist() == SCORES
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"figure")
    sentence = reader.attach(sweep, [figure], folder="figures", store=copy, uri=None)
    assert sentence.startswith(f"not logged to MLflow: {copy} cannot be written to, ")
    run = {"run_id": sweep.runs["run_id"].iloc[0], "store": copy, "uri": None}
    assert error_of(lambda: reader.keep_external(figure, **run)).startswith(f"{copy} cannot be written to")
    assert files_of(store) == before
    monkeypatch.undo()
    in_another_process()
    sweep = reader.read_sweep(store=copy, uri=None, name="sweep")
    assert reader.attach(sweep, [figure], folder="figures", store=copy, uri=None).startswith("logged to MLflow")
    assert files_of(store) == before


def test_the_trials_of_a_moved_store_move_with_it(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    sweep_file.add(old, "sweep", cells=[], teachers=[], storage="")
    storage = study.open_storage(study.default_storage(old))
    trials = optuna.create_study(storage=storage, study_name="a study")
    for key, value in {"sweep": "sweep", "notation": "Student", "split": 0, "opened": 1.0}.items():
        trials.set_user_attr(key, value)
    old.rename(new)
    assert [each.study_name for each in study.read_studies(new, "sweep")] == ["a study"]


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Be a user without rights, as long as the context is open."""
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to become another user")
def test_another_users_store_can_be_read_and_what_cannot_be_written_names_its_owner(empty_store, capsys, tmp_path):
    with tempfile.TemporaryDirectory(prefix="kdsweep-shared-") as folder, contextlib.ExitStack() as held:
        store = Path(shutil.copytree(empty_store, Path(folder) / "store"))
        for each in (Path(folder), store):  # pytest's folders are closed to others
            each.chmod(0o755)
        log_sweep(store)
        running = make_cell("H_KLD", store=store)
        begin(running)
        cell_folder.hold(held, running.folder)
        sweep_file.add(store, "sweep", cells=[running], teachers=[])
        tuned = FileLock(sweep_file.tuning_lock(store, "sweep"))
        tuned.acquire()
        table = ["table3", "--store", str(store), "--sweep", "sweep"]
        assert (
            cli.main(["tables", *table, "--out", str(tmp_path)]) == 0
        )  # the other user may not import what this imports
        before = files_of(store)
        capsys.readouterr()
        with as_another_user():
            assert is_locked(sweep_file.tuning_lock(store, "sweep"))
            assert cli.main(["status", "--store", str(store)]) == 0
            assert "2 done, 1 running" in capsys.readouterr().out
            assert cli.main(["tables", *table]) == 0
            printed = capsys.readouterr()
            sweep = reader.read_sweep(store=store, uri=None, name="sweep")
            assert reader.attach(sweep, [Path(__file__)], folder="x", store=store, uri=None).startswith("not logged")
            with pytest.raises(PermissionError) as refused:
                sweep_file.add(store, "sweep", cells=[running], teachers=[])
            line = one_line(refused.value)
        tuned.release()
        assert "62.5" in printed.out
        assert printed.out.endswith(f"not written to {store}/tables (Permission denied); --out names another folder\n")
        assert printed.err == ""
        assert f"{store / 'sweeps'}" in line
        assert "belongs to root: to share it, root types chmod -R g+w, and umask 002 before" in line
        assert files_of(store) == before


# --- MLflow's and Optuna's databases


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("sqlite:///x.db", "sqlite:///{cwd}/x.db", True),
        ("sqlite:///x.db", "sqlite+pysqlite:///./sub/../x.db", True),
        ("sqlite:///link.db", "sqlite:///x.db", True),
        ("sqlite:///a%20b.db", "sqlite:///a b.db", True),
        ("sqlite:///x.db", "sqlite:///y.db", False),
        ("postgresql://u:p@host/db", "postgresql+psycopg2://other@HOST:5432/db", True),
        ("postgresql://localhost/db", "postgresql+psycopg://127.0.0.1/db", True),
        ("postgresql://host/db", "postgresql://host/db2", False),
        ("postgresql://host/db", "postgresql://host/db?options=-csearch_path%3Doptuna", False),
        ("mysql+pymysql://u@host/db", "mysql://host:3306/db", True),
        ("http://host:5000", "postgresql://host/db", False),
    ],
)
def test_one_database_is_recognized_however_it_is_spelled(tmp_path, monkeypatch, one, other, is_same):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "x.db").touch()
    (tmp_path / "link.db").symlink_to("x.db")
    assert (databases.database_of(one) == databases.database_of(other.format(cwd=tmp_path))) == is_same


def test_a_password_is_never_shown():
    assert databases.shown("postgresql://u:secret@host/db") == "postgresql://u:***@host/db"


def test_a_run_of_mlflow_cannot_lead_out_of_the_store(store):
    run = {"role": "distilled", "notation": "../../evil", "split": 0, "seed": 0, "fingerprint": "f" * 64, "run_id": "a"}
    assert "outside of the store" in error_of(lambda: artifacts.read(run, cell_folder.SCORES, store=store, uri=None))
    assert "outside of the store" in error_of(lambda: sweep_file.read(store, "../../evil"))
    assert database.artifact_file(store, "a", "b") == store / "artifacts" / "a" / "artifacts" / "b"
