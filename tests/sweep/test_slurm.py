"""Groups as array jobs: what sbatch gets, what is in the queue, what is refused, what travels."""

import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra_plugins.kdsweep_lockstep import SlurmConf
from servers import until
from test_mirror import make_cell

from kdsweep.core.errors import InputError
from kdsweep.core.files import read_json
from kdsweep.store import cell_folder
from kdsweep.sweep.executors import slurm, worker
from kdsweep.sweep.executors.executor import Work, run
from kdsweep.sweep.executors.slurm import ArrayJob, QueueError, Slurm

DEFAULTS = {key: value for key, value in vars(SlurmConf()).items() if key not in ("_target_", "executor", "plan")}

# --- what sbatch gets, by a stand-in for it


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Puts stand-ins for SLURM's commands on the path: sbatch numbers scripts, squeue prints the file ``queue``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "sbatch": f'echo "$1" >> {folder}/scripts; job=$(wc -l < {folder}/scripts)1; echo "Submitted batch job $job"\n'
        f"for of in '' _0 _1 _2; do echo $job$of PENDING >> {folder}/queue; done",
        "squeue": f"cat {folder}/queue",
        "srun": "exit 1",
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("kdsweep.sweep.executors.executor.LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("kdsweep.sweep.executors.slurm.ASK_EVERY_S", 0.01)
    return folder


def work_of(*cells) -> Work:
    return Work(len, [SimpleNamespace(cell=cell) for cell in cells], ["SLURM"], list(cells))


def submitted(computing: Slurm, *works: Work, before=()) -> list[list[str]]:
    """The results of each work, in the order of the works."""
    results = {work: [str(result) for result in values] for work, values in run(computing, works, before=before)}
    return [results[work] for work in works]


def executor(**options) -> Slurm:
    return Slurm(**DEFAULTS | options)


def submissions(folder: Path) -> list[dict[str, str]]:
    """The options of each submission, in order."""
    files = [Path(name) for name in (folder / "scripts").read_text().split()]
    texts = [next(file.parent.glob(f"{number}1_submission.sh")).read_text() for number, file in enumerate(files, 1)]
    return [dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE)) for text in texts]


@pytest.fixture
def some(tmp_path):
    store = tmp_path / "store"
    teacher = make_cell("Teacher", store=store)
    cells = [replace(make_cell(store=store, lr=number), teacher=teacher) for number in range(3)]
    return SimpleNamespace(store=store, teacher=teacher, cells=cells)


def test_groups_are_one_array_that_depends_on_that_of_the_teachers(commands, some):
    computing = executor(
        partition="gpu", account="lab", qos="high", constraint="a100", gpus_per_node=1, cpus_per_task=4, mem_gb=16,
        timeout_min=90, array_parallelism=5, wait=False, additional_parameters={"reservation": "course"},
    )  # fmt: skip
    works = [work_of(*some.cells[:2]), work_of(some.cells[2])]
    assert submitted(computing, *works, before=[work_of(some.teacher)]) == [["nan", "nan"], ["nan"]]
    teachers, groups = submissions(commands)
    shared = {
        "partition": "gpu", "account": "lab", "qos": "high", "constraint": "a100", "gpus-per-node": "1",
        "cpus-per-task": "4", "mem": "16GB", "time": "90", "requeue": "", "reservation": "course",
        "open-mode": "append", "signal": "USR2@90",
    }  # fmt: skip
    assert shared.items() <= groups.items()
    assert shared.items() <= teachers.items()
    assert groups["array"] == "0-1%2"
    assert groups["dependency"] == "afterany:11"
    assert {"array", "dependency"}.isdisjoint(teachers)
    notes = [read_json(cell.folder / slurm.NOTE)["job"] for cell in [some.teacher, *some.cells]]
    assert notes == ["11", "21_0", "21_0", "21_1"]


def test_srun_gets_the_cpus_too_and_no_gpu_is_none_at_all(commands, some):
    submitted(executor(gpus_per_node=0, cpus_per_task=3, wait=False), work_of(some.cells[0]))
    (script,) = (some.store / "slurm").glob("11_*.sh")
    assert " --cpus-per-task=3 " in script.read_text().splitlines()[-1]
    assert "gpus" not in script.read_text()


def test_what_is_in_the_queue_is_not_submitted_again_but_waited_for(commands, some):
    submitted(executor(wait=False), *map(work_of, some.cells))
    (commands / "queue").write_text("11_0 RUNNING\n11_1 PENDING\n11_2 CANCELLED\n")
    again = executor()
    jobs = [SimpleNamespace(cell=cell) for cell in some.cells]
    assert again.queued(jobs) == {cell.folder for cell in some.cells[:2]}
    (commands / "sbatch").write_text(
        f"#!/bin/sh\necho '11_0 CANCELLED\n11_1 CANCELLED\n99 CANCELLED' > {commands}/queue\n"
        "echo 'Submitted batch job 99'\n"
    )
    both, other = submitted(again, work_of(*some.cells[:2]), work_of(some.cells[2]))
    assert [options["array"] for options in submissions(commands)] == ["0-2%3"]  # of the first command
    assert both == ["job 11_0, 11_1 was cancelled"] * 2
    assert other[0].startswith("job 99 was cancelled; log: ")


def test_of_an_earlier_job_that_has_ended_only_what_is_not_finished_is_submitted(commands, some):
    submitted(executor(wait=False), work_of(*some.cells[:2]), work_of(some.cells[2]))
    again = executor()
    assert len(again.queued([SimpleNamespace(cell=cell) for cell in some.cells])) == 3
    for cell, dice in zip(some.cells[:2], (0.5, 0.25), strict=True):
        cell_folder.write_finished(cell.folder, values={"test/dice": dice}, files=[])
    (commands / "queue").write_text("")
    (commands / "sbatch").write_text("#!/bin/sh\necho 'Submitted batch job 99'\n")
    done, lost = submitted(again, work_of(*some.cells[:2]), work_of(some.cells[2]))
    assert done == ["0.5", "0.25"]
    assert lost[0].startswith("job 99 has ended without a result (killed?); log: ")


def test_a_job_that_dies_is_submitted_again_in_halves_and_fails_alone(commands, some):
    """SLURM forgets each job as soon as it is submitted."""
    (commands / "squeue").write_text("#!/bin/sh\necho 'Invalid job id specified' >&2; exit 1\n")
    (results,) = submitted(executor(), work_of(*some.cells[:2]))
    names = [result.partition("; log: ")[0] for result in results]
    assert [re.sub(r"\d+", "N", name) for name in names] == ["job N_N has ended without a result (killed?)"] * 2
    assert [options.get("array") for options in submissions(commands)] == [None, "0-1%2"]


def test_teachers_in_the_queue_are_depended_on(commands, some):
    submitted(executor(wait=False), work_of(some.teacher))
    (commands / "queue").write_text("11 RUNNING\n")
    again = executor(wait=False)
    assert again.queued([SimpleNamespace(cell=some.cells[0])]) == set()
    submitted(again, work_of(some.cells[0]), before=[work_of(some.teacher)])
    assert [options.get("dependency") for options in submissions(commands)] == [None, "afterany:11"]


def test_the_error_of_sbatch_is_one_line(commands, some):
    lines = ["sbatch: error: invalid partition: gpuu", "sbatch: error: Batch job submission failed"]
    prints = "".join(f"echo '{line}' >&2\n" for line in lines)
    (commands / "sbatch").write_text(f"#!/bin/sh\n{prints}exit 1\n")
    message = r"^the groups cannot be submitted, sbatch says: invalid partition: gpuu; Batch job submission failed$"
    with pytest.raises(InputError, match=message):
        submitted(executor(), work_of(some.cells[0]))


def test_more_groups_than_an_array_takes_are_several(commands, some, monkeypatch):
    monkeypatch.setattr("kdsweep.sweep.executors.slurm.ARRAY", 2)
    submitted(executor(wait=False), *map(work_of, some.cells))
    assert [options.get("array") for options in submissions(commands)] == ["0-1%2", None]


# --- what is in the queue


def test_cells_are_queued_until_their_job_has_ended_for_good(commands, tmp_path, monkeypatch):
    jobs = {"a": "7_0", "b": "7_0", "c": "7_1", "d": "7_2", "e": "7_3", "f": "9"}
    for name, job_id in jobs.items():
        slurm.note([tmp_path / name], cluster="slurm", job_id=job_id)
    folders = [tmp_path / name for name in jobs]
    (commands / "queue").write_text("7_0 RUNNING\n7_1 PENDING\n7_2 COMPLETED\n7_3 TIMEOUT\n9 REQUEUED\n")
    running = ("7_0", "RUNNING")
    expected = {"a": running, "b": running, "c": ("7_1", "PENDING"), "f": ("9", "REQUEUED")}
    assert slurm.queued(folders) == {tmp_path / name: task for name, task in expected.items()}

    (folders[0] / slurm.NOTE).write_text("{")
    squeue, says = commands / "squeue", "#!/bin/sh\necho 'slurm_load_jobs error: {}' >&2; exit 1\n"
    squeue.write_text(says.format("Invalid job id specified"))  # SLURM has forgotten them
    assert slurm.queued(folders) == {}
    squeue.write_text(says.format("Unable to contact (x)"))
    with pytest.raises(QueueError, match=r"^squeue: Unable to contact \(x\)$"):
        slurm.queued(folders)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(QueueError, match=r"squeue: .*No such file"):
        slurm.queued(folders)
    assert slurm.queued([tmp_path / "without a note"]) == {}  # squeue is not called


def test_a_local_job_lives_as_long_as_its_process():
    waits = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", waits, "submitit"], stdin=subprocess.PIPE) as process:
        job_id = str(process.pid)
        assert until(lambda: slurm.states([job_id, str(os.getpid())], cluster="local") == {job_id: "RUNNING"}, 5)
        process.communicate()
    assert slurm.states([job_id], cluster="local") == {}


# --- what is refused


def test_options_out_of_range_are_refused():
    least = {"timeout_min": 5, "gpus_per_node": 0, "cpus_per_task": 1, "largest": 1}
    for name, lowest in least.items():
        line = rf"hydra\.launcher\.{name}={lowest - 1} is not allowed: it must be at least {lowest}"
        with pytest.raises(InputError, match=line):
            executor(**{name: lowest - 1})
    with pytest.raises(InputError, match=r"hydra\.launcher\.cluster=pbs is not allowed: it must be slurm or local"):
        executor(cluster="pbs")


def test_without_sbatch_or_a_server_nothing_is_submitted(commands, some, monkeypatch):
    tracking = SimpleNamespace(uri=None)
    job = SimpleNamespace(settings=SimpleNamespace(store=str(some.store), tracking=tracking))
    with pytest.raises(InputError, match=r"^tracking\.uri=None: workers on several machines cannot share the SQLite"):
        executor().check([job])
    tracking.uri = "sqlite:////shared/mlflow.db"
    with pytest.raises(InputError, match=r"SQLite file /shared/mlflow\.db; start an MLflow server"):
        executor().check([job])
    tracking.uri = "http://127.0.0.1:5000"
    executor().check([job])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match=r"sbatch is not on this machine"):
        executor().check([])


def test_nothing_of_a_cluster_is_imported_unless_it_is_used():
    imports = (
        "from kdsweep.sweep import launcher, plan, status; "
        "from kdsweep.sweep.executors import executor, local, ray, slurm, worker; "
    )
    code = f"import sys; {imports}sys.exit(len({{'ray', 'submitit'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


# --- what travels


@pytest.fixture
def travels(some, monkeypatch):
    """A work on another machine, and what that machine makes of its settings."""
    monkeypatch.setattr("os.chdir", lambda _: None)
    for name in ("OMP_NUM_THREADS", "MPLBACKEND"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # and back at the end
    there = {"cell": some.cells[0]}
    monkeypatch.setattr("kdsweep.config.identity.cell", lambda _: there["cell"])
    work = replace(work_of(some.cells[0]), jobs=[SimpleNamespace(settings=None)], is_requested=False)
    return worker.RemoteWork(work, threads=1), there


def test_another_machine_with_another_folder_or_other_images_or_code_refuses(some, travels):
    remote_work, there = travels
    remote_work._check()
    (some.store / worker.IDENTITY).unlink()
    message = r"store=.*: on \S+ it is not the folder of the machine that submits; put store"
    with pytest.raises(InputError, match=message):
        remote_work._check()
    assert [str(error).partition(":")[0] for error in remote_work()] == [f"store={some.store}"]
    assert worker.identify(some.store) == worker.identify(some.store) != remote_work.identities[some.store]
    remote_work.identities[some.store] = worker.identify(some.store)
    there["cell"] = some.cells[1]
    with pytest.raises(InputError, match=r"L_MSE split 0 seed 0: on \S+ the images or the code are not those"):
        remote_work._check()


def test_a_job_whose_time_is_over_saves_and_is_submitted_as_it_is(some, monkeypatch):
    stopped = []
    monkeypatch.setattr(worker.Processes, "stop", lambda _: stopped.append("stopped"))
    job = ArrayJob(replace(work_of(some.cells[0]), jobs=[]), threads=1)
    delayed = job.checkpoint()
    assert stopped == ["stopped"]
    assert delayed.function is job
    assert pickle.loads(pickle.dumps(job)).work.cells == [some.cells[0]]


OPTIONS = ["hydra.launcher.cluster=local", "hydra.launcher.gpus_per_node=0", "hydra.launcher.cpus_per_task=1"]
