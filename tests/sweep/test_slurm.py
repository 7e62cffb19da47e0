"""Groups as array jobs: what sbatch is given, what is refused, and what Hydra asks of every launcher."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import kdsweep
from hydra.test_utils.launcher_common_tests import LauncherTestSuite
from hydra_plugins.kdsweep_lockstep import SlurmConf
from omegaconf import OmegaConf
from test_launcher import plain_hydra  # noqa: F401
from test_writer import make_cell

from kdsweep.core.errors import InputError
from kdsweep.sweep.engines import remote
from kdsweep.sweep.engines.engine import SUBMITTED, Unit
from kdsweep.sweep.engines.slurm import ArrayJob, Slurm

DEFAULTS = {key: value for key, value in vars(SlurmConf()).items() if key not in ("_target_", "plan")}

# --- what sbatch is given, by a stand-in for it


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Puts stand-ins for SLURM's commands on the path: sbatch numbers what it is given, squeue prints ``queue``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "sbatch": f'echo "$1" >> {folder}/given; echo "Submitted batch job $(wc -l < {folder}/given)1"',
        "squeue": f"cat {folder}/queue",
        "srun": "exit 1",
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("kdsweep.sweep.engines.slurm.LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("kdsweep.sweep.engines.slurm.ASK_EVERY_S", 0.01)
    return folder


def make_unit(store: Path, *cells) -> Unit:
    return Unit(len, list, ["SLURM"], cells=list(cells))


def opened(**options) -> Slurm:
    engine = Slurm(**DEFAULTS | options)
    engine.open(OmegaConf.create({}))
    return engine


def given(folder: Path) -> list[dict[str, str]]:
    """The options of each submission, in order."""
    files = [Path(name) for name in (folder / "given").read_text().split()]
    texts = [next(file.parent.glob(f"{number}1_submission.sh")).read_text() for number, file in enumerate(files, 1)]
    return [dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE)) for text in texts]


@pytest.fixture
def some(tmp_path):
    store = tmp_path / "store"
    teacher = make_cell("Teacher", store=store)
    cells = [make_cell(store=store, lr=number) for number in range(3)]
    return SimpleNamespace(store=store, teacher=teacher, cells=cells)


def test_groups_are_one_array_that_depends_on_that_of_the_teachers(commands, some):
    engine = opened(
        partition="gpu", account="lab", qos="high", constraint="a100", gpus_per_node=1, cpus_per_task=4, mem_gb=16,
        timeout_min=90, array_parallelism=5, wait=False, additional_parameters={"reservation": "course"},
    )  # fmt: skip
    units = [make_unit(some.store, *some.cells[:2]), make_unit(some.store, some.cells[2])]
    outcomes = list(engine.run(units, before=[make_unit(some.store, some.teacher)]))
    assert outcomes == [(unit, SUBMITTED) for unit in units]
    teachers, groups = given(commands)
    wanted = {
        "partition": "gpu", "account": "lab", "qos": "high", "constraint": "a100", "gpus-per-node": "1",
        "cpus-per-task": "4", "mem": "16GB", "time": "90", "requeue": "", "reservation": "course",
        "open-mode": "append", "signal": "USR2@90",
    }  # fmt: skip
    assert wanted.items() <= groups.items()
    assert wanted.items() <= teachers.items()
    assert groups["array"] == "0-1%2"
    assert groups["dependency"] == "afterany:11"
    assert {"array", "dependency"}.isdisjoint(teachers)
    notes = {file.name for file in (some.store / "slurm").glob("*.json")}
    assert notes == {"11.json", "21.json"}


def test_srun_is_given_the_cpus_too_and_no_gpu_is_none_at_all(commands, some):
    list(opened(gpus_per_node=0, cpus_per_task=3, wait=False).run([make_unit(some.store, some.cells[0])]))
    (script,) = (some.store / "slurm").glob("11_*.sh")
    assert " --cpus-per-task=3 " in script.read_text().splitlines()[-1]
    assert "gpus" not in script.read_text()


def test_what_is_in_the_queue_is_not_submitted_again_but_waited_for(commands, some):
    list(opened(wait=False).run([make_unit(some.store, cell) for cell in some.cells]))
    (commands / "queue").write_text("11_0 RUNNING\n11_1 PENDING\n11_2 CANCELLED\n")
    again = opened()
    jobs = [SimpleNamespace(cell=cell) for cell in some.cells]
    assert again.queued(jobs) == {cell.folder for cell in some.cells[:2]}
    both, other = make_unit(some.store, *some.cells[:2]), make_unit(some.store, some.cells[2])
    (commands / "sbatch").write_text(f"#!/bin/sh\necho > {commands}/queue; echo 'Submitted batch job 99'\n")
    outcomes = dict(again.run([both, other]))
    assert [own["array"] for own in given(commands)] == ["0-2%3"]  # of the first command
    assert str(outcomes[both]) == "job 11_1, submitted before, has ended without it"
    assert str(outcomes[other]).startswith("job 99 has ended without a result (cancelled or killed?); log: ")


def test_nothing_is_submitted_while_the_queue_is_not_known(commands, some):
    list(opened(wait=False).run([make_unit(some.store, some.cells[0])]))
    (commands / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2; exit 1\n")
    with pytest.raises(InputError, match=r"^squeue: Unable to contact; what is in the queue is not known, so"):
        opened().queued([SimpleNamespace(cell=some.cells[0])])


def test_teachers_in_the_queue_are_depended_on(commands, some):
    list(opened(wait=False).run([make_unit(some.store, some.teacher)]))
    (commands / "queue").write_text("11 RUNNING\n")
    again = opened(wait=False)
    again.queued([SimpleNamespace(cell=some.cells[0])])
    list(again.run([make_unit(some.store, some.cells[0])], before=[make_unit(some.store, some.teacher)]))
    assert given(commands)[1]["dependency"] == "afterany:11"


def test_what_sbatch_says_is_told_in_one_line(commands, some):
    lines = ["sbatch: error: invalid partition: gpuu", "sbatch: error: Batch job submission failed"]
    prints = "".join(f"echo '{line}' >&2\n" for line in lines)
    (commands / "sbatch").write_text(f"#!/bin/sh\n{prints}exit 1\n")
    message = r"^the groups cannot be submitted, sbatch says: invalid partition: gpuu; Batch job submission failed$"
    with pytest.raises(InputError, match=message):
        list(opened().run([make_unit(some.store, some.cells[0])]))


def test_more_groups_than_an_array_takes_are_several(commands, some, monkeypatch):
    monkeypatch.setattr("kdsweep.sweep.engines.slurm.ARRAY", 2)
    list(opened(wait=False).run([make_unit(some.store, cell) for cell in some.cells]))
    assert [own.get("array") for own in given(commands)] == ["0-1%2", None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_min": 1}, r"hydra\.launcher\.timeout_min=1 is not allowed: it must be at least 5"),
        ({"gpus_per_node": -1}, r"hydra\.launcher\.gpus_per_node=-1 is not allowed"),
        ({"largest": 0}, r"hydra\.launcher\.largest=0 is not allowed"),
        ({"cluster": "pbs"}, r"hydra\.launcher\.cluster=pbs is not allowed: it must be slurm or local"),
        ({"additional_parameters": {"x\nrm": "1"}}, r"hydra\.launcher\.additional_parameters has x"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Slurm(**DEFAULTS | options)


def test_without_sbatch_or_a_server_nothing_is_submitted(commands, some, monkeypatch):
    tracking = SimpleNamespace(uri=None)
    job = SimpleNamespace(settings=SimpleNamespace(store=str(some.store), tracking=tracking))
    with pytest.raises(InputError, match=r"^tracking\.uri=None: workers on several machines cannot share the SQLite"):
        opened().check([job])
    tracking.uri = "sqlite:////shared/mlflow.db"
    with pytest.raises(InputError, match=r"SQLite file /shared/mlflow\.db; start an MLflow server"):
        opened().check([job])
    tracking.uri = "http://127.0.0.1:5000"
    opened().check([job])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match=r"sbatch is not on this machine"):
        opened().check([])


def test_without_m_nothing_is_submitted_and_nothing_is_trained(tmp_path):
    ended = kdsweep("hydra/launcher=lockstep_slurm", "profile=quick", cwd=tmp_path)
    message = "kdsweep: error: hydra/launcher=lockstep_slurm runs sweeps: add -m, or leave it out\n"
    assert (ended.returncode, ended.stderr) == (1, message)


def test_nothing_of_a_cluster_is_imported_unless_it_is_asked_for():
    imports = (
        "from kdsweep.sweep import launcher, plan, status; "
        "from kdsweep.sweep.engines import engine, local, ray, remote, slurm, worker; "
    )
    code = f"import sys; {imports}sys.exit(len({{'ray', 'submitit'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


# --- what travels


def test_another_machine_that_sees_another_folder_refuses(some):
    remote_task = remote.RemoteTask(make_unit(some.store, some.cells[0]), config=OmegaConf.create({}), threads=1)
    (some.store / remote.IDENTITY).unlink()
    with pytest.raises(
        InputError, match=r"store=.*: on \S+ it is not the folder of the machine that submits; put store"
    ):
        remote_task._check([])
    assert remote.identify(some.store) != remote_task.identities[some.store]
    with pytest.raises(InputError, match="it is not the folder"):
        remote_task._check([])


def test_another_machine_with_other_images_or_code_refuses(some, monkeypatch):
    remote_task = remote.RemoteTask(make_unit(some.store, some.cells[0]), config=OmegaConf.create({}), threads=1)
    monkeypatch.setattr("kdsweep.sweep.plan.read_jobs", lambda _: [SimpleNamespace(cell=some.cells[1])])
    with pytest.raises(InputError, match=r"L_MSE split 0 seed 0: on \S+ the images or the code are not those"):
        remote_task._check([])


def test_a_store_keeps_its_identity(tmp_path):
    assert remote.identify(tmp_path / "a") == remote.identify(tmp_path / "a") != remote.identify(tmp_path / "b")


def test_a_job_whose_time_is_over_saves_and_is_submitted_as_it_is(monkeypatch):
    stopped = []
    job = ArrayJob(SimpleNamespace(stop=stopped.append))
    delayed = job.checkpoint()
    assert stopped == [signal.SIGTERM]
    assert delayed.function is job


# --- what Hydra asks of every launcher, with submitit's jobs of this machine

OPTIONS = ["hydra.launcher.cluster=local", "hydra.launcher.gpus_per_node=0", "hydra.launcher.cpus_per_task=1"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("plain_hydra")
@pytest.mark.parametrize(("launcher_name", "overrides"), [("lockstep_slurm", OPTIONS)])
class TestLauncher(LauncherTestSuite):
    """Hydra's own tests of a launcher."""
