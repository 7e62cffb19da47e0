"""Whole sweeps on several machines: commands, jobs and machines that die change no score."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import free_port, postgres, serving, slurm, until
from small import STUDENT, TEACHER
from test_slurm import OPTIONS
from test_sync import runs_of

from kdsweep import cli
from kdsweep.core.files import file_digest, read_json
from kdsweep.store import cell_folder
from kdsweep.sweep.executors.slurm import NOTE, Task, queued
from kdsweep.tracking import mirror

SMALL = ["profile=quick", "data=busi", "train.batch_size=8", "train.patience=40", "device=cpu", *TEACHER, *STUDENT]
SWEEP = ["path=none,L", "loss=kld", "split=s0,s1"]


def start(*words: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kdsweep", "-m", *SWEEP, *SMALL, *words]
    with (cwd / "printed").open("wb") as output:  # a pipe would stay open as long as the jobs
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=output, stderr=output, start_new_session=True)


def done(process: subprocess.Popen[bytes], cwd: Path) -> str:
    process.wait(timeout=500)
    printed = (cwd / "printed").read_text()
    assert process.returncode == 0, printed
    return printed


def scores(store: Path) -> dict[str, str]:
    """By folder what a sweep has come to: its images' scores and its weights."""
    files = [*store.glob("*/*/test_scores.csv"), *store.glob("*/*/*.safetensors")]
    return {str(file.relative_to(store)): file_digest(file) for file in files}


def epochs(store: Path) -> dict[str, int]:
    """By folder how many epochs of each cell are saved."""
    files = store.glob("cells/*/progress.json")
    return {file.parent.name: len(cell_folder.read(file.parent).history) for file in files}


@pytest.fixture(scope="module")
def undisturbed(small_busi, tmp_path_factory) -> Path:
    """The store of a sweep on this machine, one thread."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    words = [f"data.root={small_busi}", "train.epochs=12"]
    done(start(*words, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}), cwd)
    return cwd / "multirun"


@pytest.mark.slow
def test_a_sweep_whose_command_is_killed_and_whose_job_is_preempted_ends_as_if_nothing_had_been(
    undisturbed, small_busi, tmp_path
):
    words = ["hydra/launcher=lockstep_slurm", *OPTIONS, f"data.root={small_busi}", "train.epochs=12"]
    store = tmp_path / "multirun"
    first = start(*words, cwd=tmp_path)
    assert until(lambda: any(epochs(store).values()), 300), (tmp_path / "printed").read_text()
    first.kill()
    first.wait()
    running = next(name for name, number in epochs(store).items() if number)
    controller = int(read_json(store / "cells" / running / NOTE)["job"])
    (job,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(job), signal.SIGUSR2)
    again = done(start(*words, cwd=tmp_path), tmp_path)
    assert "cells are in the queue already, as job " in again
    assert "submitted as job" not in again
    assert re.search(r"Requeued job \d+", "".join(file.read_text() for file in store.glob("slurm/*.out")))
    assert scores(store) == scores(undisturbed)
    assert cli.main(["tables", "table4", "--store", str(store)]) == 0


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_slurm_itself_with_mlflow_on_postgresql(undisturbed, small_busi, tmp_path, tmp_path_factory):
    """The command is killed, a job's time is over, another one is preempted: the scores are those of one machine."""
    with contextlib.ExitStack() as held:
        environment = held.enter_context(slurm(tmp_path_factory.mktemp("slurm")))
        port = free_port()
        held.enter_context(serving(tmp_path, port, backend=held.enter_context(postgres())))
        uri = f"http://127.0.0.1:{port}"
        words = ["hydra/launcher=lockstep_slurm", "hydra.launcher.gpus_per_node=0", "hydra.launcher.cpus_per_task=1"]
        words += ["hydra.launcher.mem_gb=1", f"tracking.uri={uri}", f"data.root={small_busi}", "train.epochs=12"]
        store = tmp_path / "multirun"
        first = start(*words, cwd=tmp_path, env=environment)
        assert until(lambda: len([n for n in epochs(store).values() if n]) == 4, 300)
        first.kill()
        first.wait()
        status = [sys.executable, "-m", "kdsweep", "status"]
        printed = subprocess.run(
            status, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert re.search(r"Student split 0 seed 0 +running .* \d+_\d RUNNING", printed), printed
        jobs = sorted(job_id for job_id, _ in _queued(store, environment).values())
        subprocess.run(["scancel", "--signal=USR2", jobs[0]], env=environment, check=True)
        subprocess.run(["scontrol", "requeue", jobs[-1]], env=environment, check=True)
        again = done(start(*words, cwd=tmp_path, env=environment), tmp_path)
        assert "cells are in the queue already" in again
        assert scores(store) == scores(undisturbed)
        runs = runs_of(uri)
        assert {status for _, status, _ in runs.values()} == {"FINISHED"}
        assert all(steps == list(range(len(steps))) for _, _, steps in runs.values())
        assert cli.main(["tables", "table4", "--store", str(store), "--tracking-uri", uri]) == 0


def _queued(store: Path, environment: dict[str, str]) -> dict[Path, Task]:
    before = os.environ.copy()
    os.environ |= environment
    try:
        return queued(store.glob("cells/*"))
    finally:
        os.environ.clear()
        os.environ |= before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_machine_that_dies_in_the_midst_changes_no_score(undisturbed, small_busi, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else its processes wait for those of other tests
    from ray.cluster_utils import Cluster

    store = tmp_path / "multirun"
    # Loopback, but not 127.0.0.1: Ray replaces that in an address by the network's.
    options = {"node_ip_address": "127.0.0.2", "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **options})
    try:
        doomed = cluster.add_node(num_cpus=1, **options)
        words = ["hydra/launcher=lockstep_ray", f"hydra.launcher.address={cluster.address}", "hydra.launcher.gpus=0"]
        process = start(*words, f"data.root={small_busi}", "train.epochs=12", cwd=tmp_path)
        assert until(lambda: any(epochs(store).values()) or process.poll(), 200), (tmp_path / "printed").read_text()
        cluster.add_node(num_cpus=1, **options)
        cluster.remove_node(doomed, allow_graceful=False)
        printed = done(process, tmp_path)
    finally:
        cluster.shutdown()
    assert any("resumes after epoch" in file.read_text() for file in store.glob("cells/*/kdsweep.log"))
    assert scores(store) == scores(undisturbed)
    assert "4 of 4 cells done" in printed
    assert [run[1:] for run in runs_of(mirror.store_uri(store, None)).values()] == [("FINISHED", list(range(12)))] * 2
    for where in (store, undisturbed):
        assert cli.main(["tables", "table4", "--store", str(where)]) == 0
    assert (store / "tables" / "table4.csv").read_text() == (undisturbed / "tables" / "table4.csv").read_text()
