"""Published scores: the tables of the file are those of the store, parts make one sweep, no folder leaks."""

import gzip
import json
from dataclasses import replace

import pandas as pd
import pytest
from test_tables import dice_all, sweep_of, with_status

from kdsweep import cli
from kdsweep.core.errors import InputError
from kdsweep.results import frame, published
from kdsweep.results.tables import table4

NAMES = ("Teacher", "Student", "L_MSE", "H_MSE")
COMMAND = "python -m kdsweep -m path=none,L data.root=/home/someone/busi 'split.group=\"/tmp/a b/groups.csv\"'"


@pytest.fixture(scope="module")
def sweep():
    params = {
        "train.lr": "0.0001",
        "stats.margin_points": "3.0",
        "data.root": "/home/someone/busi",
        "student.weights": "/home/someone/net.pt",
    }
    complete = sweep_of(NAMES, seeds=(0, 1))
    tags = {"kdsweep.split_images": "104/26/33", "mlflow.user": "someone"}
    runs = complete.runs.assign(params=[params] * len(complete.runs), tags=[tags] * len(complete.runs))
    return replace(complete, runs=runs, commands=(COMMAND,))


@pytest.fixture
def file(sweep, tmp_path):
    (tmp_path / "scores.json.gz").write_bytes(published.write(sweep))
    return tmp_path / "scores.json.gz"


def part(sweep, keep, file):
    runs = sweep.runs[keep]
    scores = sweep.scores[sweep.scores["fingerprint"].isin(runs["fingerprint"])]
    file.write_bytes(published.write(replace(sweep, runs=runs, scores=scores)))
    return file


def test_the_tables_of_a_published_sweep_are_its_own(sweep, file):
    remade = published.read([file])
    pd.testing.assert_frame_equal(table4.numbers(remade), table4.numbers(sweep))
    ours = table4.numbers(remade).set_index("notation").loc["L_MSE", "mean_dice_percent"]
    by_hand = [
        100 * sweep.scores.loc[sweep.scores["fingerprint"] == f"L_MSE-{k}-{s}", "dice"].mean()
        for k in range(3)
        for s in (0, 1)
    ]
    assert ours == pytest.approx(sum(by_hand) / 6, abs=1e-9)
    assert len(dice_all("L_MSE")) == table4.numbers(remade).set_index("notation").loc["L_MSE", "n_images"]


def test_no_folder_and_no_name_of_a_user_is_in_the_file(file):
    text = gzip.decompress(file.read_bytes()).decode()
    assert "someone" not in text
    assert "/tmp" not in text
    content = json.loads(text)
    assert content["commands"][0].startswith("python -m kdsweep -m path=none,L data.root=busi ")
    assert content["runs"][0]["params"] == {
        "train.lr": "0.0001",
        "stats.margin_points": "3.0",
        "student.weights": "net.pt",
    }
    assert content["runs"][0]["tags"] == {"kdsweep.split_images": "104/26/33"}


def test_equal_sweeps_give_equal_files(sweep):
    shuffled = replace(
        sweep, runs=sweep.runs.sample(frac=1, random_state=0), scores=sweep.scores.sample(frac=1, random_state=1)
    )
    assert published.write(shuffled) == published.write(sweep)


def test_parts_from_several_machines_are_one_sweep(sweep, tmp_path):
    first = part(sweep, sweep.runs["seed"] == 0, tmp_path / "0.json.gz")
    rest = part(with_status(sweep, "L_MSE", 0, "FAILED"), sweep.runs["seed"] >= 0, tmp_path / "1.json.gz")
    alone = table4.numbers(published.read([rest])).set_index("notation")
    assert alone.loc["L_MSE", "gap"] == "failed: split 0 seed 0"
    both = published.read([rest, first])
    assert len(both.runs) == len(sweep.runs)
    pd.testing.assert_frame_equal(table4.numbers(both), table4.numbers(sweep))


def test_files_of_two_sweeps_and_other_files_are_refused(sweep, file, tmp_path):
    other = tmp_path / "other.json.gz"
    other.write_bytes(published.write(replace(sweep, name="other")))
    with pytest.raises(
        InputError, match=r"--published: .* of sweep study and .* of sweep other; give files of one sweep"
    ):
        published.read([file, other])
    with pytest.raises(InputError, match=r"absent.json.gz: cannot be read \(No such file"):
        published.read([tmp_path / "absent.json.gz"])


FOREIGN = {
    "text": b"no gzip",
    "image": b"\x89PNG\r\n\x1a\n\x00\xff",
    "list": b"[1, 2]",
    "GeoJSON": b'{"type": "FeatureCollection", "features": []}',
    "format": gzip.compress(b'{"format": 7}'),
    "without runs": b'{"format": 1, "name": "s"}',
    "runs of others": b'{"format": 1, "name": "s", "columns": ["a"], "runs": [[1, 2]], "scores": "", "external": ""}',
    "cut": gzip.compress(b'{"format": 1, "name": "s"}')[:-9],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused_by_name(tmp_path, capsys, kind):
    file = tmp_path / "scores.json.gz"
    file.write_bytes(FOREIGN[kind])
    assert cli.main(["tables", "table4", "--published", str(file)]) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"kdsweep: error: --published {file}: is not a file of format 1 that publish has written (")
    assert line.endswith("; publish writes such files\n")
    assert line.count("\n") == 1


def test_a_file_whose_compression_a_browser_has_undone_is_read(sweep, file, tmp_path):
    plain = tmp_path / "scores.json"
    plain.write_bytes(gzip.decompress(file.read_bytes()))
    pd.testing.assert_frame_equal(published.read([plain]).scores, published.read([file]).scores)
    with pytest.raises(InputError, match="cannot be read"):
        published.read([tmp_path / "none.json.gz"])


def test_the_command_makes_a_table_of_published_files(file, tmp_path, capsys):
    assert cli.main(["tables", "table4", "--published", str(file), "--out", str(tmp_path / "out")]) == 0
    assert "L_MSE" in capsys.readouterr().out
    assert (tmp_path / "out" / "table4.csv").is_file()
    assert cli.main(["tables", "table5", "--published", str(file)]) == 1
    assert "--published: table5 needs the store" in capsys.readouterr().err


def test_the_command_draws_figures_of_published_files(file, tmp_path, capsys):
    assert cli.main(["figures", "all", "--published", str(file), "--out", str(tmp_path / "out")]) == 0
    assert {drawn.name for drawn in (tmp_path / "out").glob("*.png")} == {"effects.png", "pairs.png"}
    assert "MLflow" not in capsys.readouterr().out, "there is no run to log them to"
    for which in ("figure2", "curves", "tuning"):
        assert cli.main(["figures", which, "--published", str(file)]) == 1
        assert f"--published: {which} needs the store" in capsys.readouterr().err


def test_unfinished_runs_of_another_state_are_kept(sweep, tmp_path):
    file = part(with_status(sweep, "H_MSE", 1, "RUNNING"), sweep.runs["seed"] == 0, tmp_path / "a.json.gz")
    runs = published.read([file]).runs
    assert set(runs.loc[runs["notation"] == "H_MSE", "status"]) == {"FINISHED", "RUNNING"}


def test_the_seeds_that_are_done_can_be_seen_before_the_others(sweep, file, tmp_path, capsys):
    file.write_bytes(published.write(with_status(sweep, "L_MSE", 2, "RUNNING")))
    call = ["table4", "--published", str(file), "--out", str(tmp_path)]
    assert cli.main(["tables", *call]) == 0
    assert "L_MSE (running: split 2 seed 0)" in capsys.readouterr().out
    assert cli.main(["tables", *call, "--seeds", "1"]) == 0
    assert "seeds: 1 (1), " in capsys.readouterr().out
    written = pd.read_csv(tmp_path / "table4.csv")["mean_dice_percent"]
    alone = table4.numbers(sweep_of(NAMES, seeds=(1,)))["mean_dice_percent"]
    pd.testing.assert_series_equal(written, alone)
    assert cli.main(["tables", *call, "--seeds", "1,5"]) == 1
    assert capsys.readouterr().err == "kdsweep: error: --seeds 5: not in sweep study; it has 0, 1\n"


def test_seeds_keep_the_teachers_they_learn_from_whatever_seed_these_have(sweep):
    of_seed_0 = sweep.runs["teacher"].str.replace("-1$", "-0", regex=True)
    gone = (sweep.runs["role"] == "teacher") & (sweep.runs["seed"] == 1)
    shared = replace(sweep, runs=sweep.runs.assign(teacher=of_seed_0)[~gone])
    part = frame.of_seeds(shared, [1])
    assert set(part.runs.loc[part.runs["role"] == "teacher", "seed"]) == {0}
    assert set(part.runs.loc[part.runs["role"] != "teacher", "seed"]) == {1}
    assert set(part.scores["fingerprint"]) == set(part.runs["fingerprint"])
    assert frame.of_seeds(shared, None) is shared
