"""MLflow as the place to compare: what a person sees in a real browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from urllib.parse import quote

import pytest
from servers import free_port, serving
from test_mirror import PARAMS, begin, end, make_cell

from kdsweep.store import sweep_file
from kdsweep.tracking import mirror

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, str, dict[str, str]]:
    """Two finished cells and one that was begun, in the database that a server opens: folder, experiment, run ids."""
    store = tmp_path_factory.mktemp("ui")
    student, cell = (make_cell(name, store=store) for name in ("Student", "L_MSE"))
    tracker = mirror.Tracker(store=store, uri=None)
    sweep_file.add(store, "study", cells=[student, cell, make_cell("H_KLD", store=store)], teachers=[])
    for each, dice, path in ((student, 0.25, "none"), (cell, 0.75, "L")):
        record = end(each, [dice])
        tracker.sync(replace(record, params={**PARAMS, "cell.path": path}), sweep="study")
    tracker.sync(begin(make_cell("H_KLD", store=store), 2), sweep="study")
    (store / "mlflow.db").rename(store / "server.db")
    client = mirror.MlflowClient(tracking_uri=f"sqlite:///{store / 'server.db'}")
    listed = client.search_runs([tracker.experiment_id])
    runs = {run.info.run_name: run.info.run_id for run in listed}
    return store, tracker.experiment_id, runs


def seen(url: str, profile: Path) -> str:
    """The text of a page once its scripts have run."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
    command += ["--window-size=1600,1200", "--virtual-time-budget=30000", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", done.stdout, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split())


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome on the PATH")
def test_runs_are_listed_and_compared_in_a_browser(study, tmp_path):
    store, experiment, runs = study
    port = free_port()
    training = "workflowType=machine_learning"
    with serving(store, port):
        pages = f"http://127.0.0.1:{port}/#"
        best_first = "orderByKey=" + quote("metrics.`test/dice`", safe="") + "&orderByAsc=false"
        filtered = "searchFilter=" + quote('tags.`kdsweep.split` = "0"')
        listed = seen(f"{pages}/experiments/{experiment}/runs?{filtered}&{best_first}&{training}", tmp_path / "browser")
        assert "Student/split0" in listed
        assert listed.index("L_MSE/split0") < listed.index("Student/split0")
        two = quote(json.dumps([runs["Student/split0"], runs["L_MSE/split0"]]))
        compared = seen(
            f"{pages}/compare-runs?runs={two}&experiments={quote(json.dumps([experiment]))}&{training}",
            tmp_path / "browser",
        )
        assert "Comparing 2 Runs from 1 Experiment" in compared
        assert "Parameters: cell.path Metrics:" in compared  # what it plots without a click
        assert "cell.path none L data.name" in compared
        assert "best_epoch epochs test/dice train/loss val/loss 1 1 2 2 0.25 0.75" in compared
        parent = seen(f"{pages}/experiments/{experiment}/runs/{runs['study']}?{training}", tmp_path / "browser")
        assert "3 cells of sweep study : H_KLD, L_MSE, Student; split0; seed0." in parent
