"""A store of the version before: its tables, report and predictions come out, and its cells are computed anew.

tests/stores/version0.tar.xz was made by commit 2c16ace, the last one before results had a version:

    python -m kdsweep -m path=none,L loss=kld teacher_aug=weak profile=quick data.count=10 train.epochs=2 \\
      train.batch_size=4 student.encoder=tu-test_byobnet student.decoder_channels=[8,8,4,4,4] \\
      student.hidden_channels=256 teacher.encoder=tu-test_byobnet teacher.decoder_channels=[8,8,4,4,4] \\
      teacher.hidden_channels=256 store=old sweep_name=before

without checkpoints, phantoms, logs and the Teacher's weights.
"""

import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdsweep.config import composition
from kdsweep.deploy import predict
from kdsweep.results import report, tables
from kdsweep.sweep import plan, status

SIZES = ["data.count=10", "train.epochs=2", "train.batch_size=4", "path=L", "loss=kld", "teacher_aug=weak"]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    store = tmp_path_factory.mktemp("version0")
    with tarfile.open(Path(__file__).parent / "stores" / "version0.tar.xz") as archive:
        archive.extractall(store, filter="data")
    return store


def test_its_table_says_which_version_computed_it(old, capsys):
    assert tables.main(["table4", "--store", str(old)]) == 0
    told = capsys.readouterr().out
    assert "| Student" in told
    assert re.search(r"\| L_KLD_WAug +\| 5.20 ± 0.36 ", told)
    assert "Computed by an earlier kdsweep, results version 0 (this one: 1)." in told


def test_its_status_comes_out(old, capsys):
    assert status.main(["--store", str(old)]) == 0
    assert "2 cells: 2 done" in capsys.readouterr().out


def test_its_report_comes_out(old, tmp_path):
    page = tmp_path / "page.html"
    assert report.main(["--store", str(old), "--no-costs", "--out", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert "L_KLD_WAug" in html
    assert "results version 0" in html


def test_it_predicts(old, tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((80, 90), 100, np.uint8)).save(tmp_path / "images" / "scan.png")
    words = ["--run", "L_KLD_WAug/split0", "--store", str(old), "--images", str(tmp_path / "images")]
    assert predict.main([*words, "--out", str(tmp_path / "masks")]) == 0
    with Image.open(tmp_path / "masks" / "scan_mask.png") as mask:
        assert mask.size == (90, 80)


def test_its_cells_are_computed_anew_and_one_line_says_why(old, caplog):
    caplog.set_level("INFO")
    (job,) = plan.read_jobs([composition.compose_config(["profile=quick", f"store={old}", *SIZES])])
    assert job.finished is None
    plan.tell_changes([job])
    (line,) = caplog.messages
    assert "of results version 0, this is version 1; their tables, report and predictions can still be made" in line
