"""Groups as an array job of SLURM, submitted through submitit: ``hydra/launcher=lockstep_slurm``.

A cell in the queue holds no lock yet, and must not be submitted again: its folder notes its job, for squeue.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdsweep.config.grid import Cell
from kdsweep.core import signals
from kdsweep.core.errors import CellError, InputError, LostError
from kdsweep.core.files import DamagedError, read_json, write_json
from kdsweep.store import cell_folder
from kdsweep.sweep.executors import worker
from kdsweep.sweep.executors.executor import Executor, Result, Results, Work, check_least, check_tracking

if TYPE_CHECKING:
    import submitit

    from kdsweep.config.identity import Job

log = logging.getLogger(__name__)

NOTE = "job.json"
LOCAL = "local"  # the job is a process of this machine: submitit's stand-in for SLURM
# States of squeue in which a job will not run again by itself; those that are requeued pass through PENDING.
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT",
}  # fmt: skip
ASK_EVERY_S = 30.0  # squeue is everybody's
MISSES = 2  # so often in a row a job is not in the queue before it has ended: a result may be late
ARRAY = 1000  # jobs of one array: the most that SLURM takes unless it is configured otherwise
KILL_WAIT_S = 900.0

Task = tuple[str, str]  # a job, such as 4711_3, and its state


class QueueError(InputError):
    """SLURM does not answer."""


class Slurm(Executor):
    """The executor that submits: each group is one job of an array, which depends on an array of Teachers.

    Jobs run on without the command that submitted them; one that is preempted or reaches its time limit saves its
    cells and is put into the queue again. The plugin's SlurmConf describes each option.
    """

    def __init__(self, **options: Any) -> None:
        self.cluster, self.largest, self.wait = options["cluster"], options["largest"], options["wait"]
        if self.cluster not in ("slurm", LOCAL):
            raise InputError(f"hydra.launcher.cluster={self.cluster} is not allowed: it must be slurm or local")
        least = dict.fromkeys(("cpus_per_task", "mem_gb", "array_parallelism", "largest"), 1)
        check_least(options, least | {"gpus_per_node": 0, "max_num_timeout": 0, "timeout_min": 5})
        gpus, self._cpus, partition = options["gpus_per_node"], options["cpus_per_task"], options["partition"]
        where = "SLURM" if self.cluster == "slurm" else "local jobs"
        where += f" partition {partition}" if partition else ""
        self.machines = f"{where}, {gpus} GPU and {self._cpus} CPUs per group"
        self.has_dependencies = self.cluster == "slurm"
        chosen = {name: options[name] for name in ("partition", "account", "qos", "constraint") if options[name]}
        self._timeouts = {f"{self.cluster}_max_num_timeout": options["max_num_timeout"]}
        self._parameters = {
            "name": "kdsweep",
            "tasks_per_node": 1,
            **{name: options[name] for name in ("timeout_min", "cpus_per_task", "mem_gb")},
            **({"gpus_per_node": gpus} if gpus else {}),
            **{f"slurm_{name}": value for name, value in chosen.items()},
            "slurm_srun_args": [f"--cpus-per-task={self._cpus}"],  # srun does not take it over from sbatch
            "slurm_array_parallelism": options["array_parallelism"],
            "slurm_additional_parameters": {"requeue": True, **options["additional_parameters"]},
        }
        self._fresh: dict[tuple[Path, bool], dict[Work, Results]] = {}  # by store, Teachers or groups: to submit
        self._arrays: list[str] = []  # that this command submitted
        self._jobs: dict[Results, submitit.Job[Any]] = {}
        self._ahead: dict[Path, Task] = {}  # by folder what an earlier command submitted
        self._misses: dict[str, int] = {}
        self._queried_s = -math.inf

    def check(self, jobs: Sequence[Job]) -> None:
        """See ``Executor``: MLflow must be a server, and SLURM and submitit must be here."""
        _submitit()
        if self.cluster == "slurm":
            if shutil.which("sbatch") is None:
                where = "sbatch is not on this machine; run it where jobs are submitted"
                raise InputError(f"hydra/launcher=lockstep_slurm: {where}")
            check_tracking(jobs)

    def queued(self, jobs: Sequence[Job]) -> set[Path]:
        """See ``Executor``: an earlier command may have submitted some of these, or their Teachers."""
        folders = {job.cell.folder for job in jobs}
        self._ahead |= queued(folders | _teachers(job.cell for job in jobs))
        ahead = folders & self._ahead.keys()
        if ahead:
            names = ", ".join(sorted({self._ahead[folder][0] for folder in ahead}))
            log.info("%d cells are in the queue already, as job %s: not submitted again", len(ahead), names)
        return ahead

    def submit(self, work: Work) -> Results | None:
        """See ``Executor``; what an earlier command has in the queue is left to that, what was cancelled has failed."""
        tasks = {self._ahead[cell.folder] for cell in work.cells if cell.folder in self._ahead}
        if self.wait and any(state not in ENDED for _, state in tasks):
            return None
        for cell in work.cells:
            self._ahead.pop(cell.folder, None)
        future: Results = Future()
        values = [cell_folder.read_finished(cell.folder) for cell in work.cells if work.is_requested and tasks]
        if tasks and not self.wait:
            future.set_result([math.nan] * len(work.jobs))
        elif any(state == "CANCELLED" for _, state in tasks):
            future.set_exception(CellError(f"job {', '.join(sorted(job_id for job_id, _ in tasks))} was cancelled"))
        elif values and None not in values:
            future.set_result([value["test/dice"] for value in values if value is not None])
        else:
            key = work.cells[0].store, work.cells[0].role == "teacher"
            self._fresh.setdefault(key, {})[work] = future
        return future

    def look(self) -> None:
        """See ``Executor``: results are in submitit's files; of a job without one, squeue says whether it has ended."""
        fresh, self._fresh = self._fresh, {}
        for (store, _), futures in fresh.items():
            for start in range(0, len(futures), ARRAY):
                self._submit_array(store, dict(list(futures.items())[start : start + ARRAY]))
        for future, job in list(self._jobs.items()):
            if job.paths.result_pickle.exists():
                del self._jobs[future]
                try:
                    future.set_result(job.result())
                except Exception as error:  # of submitit itself: out of time too often, a module that is missing
                    future.set_exception(CellError(f"job {job.job_id}: {_last_line(error)}; log: {job.paths.stderr}"))
        if time.monotonic() - self._queried_s >= (ASK_EVERY_S if self.cluster == "slurm" else 0.0):
            self._ask()

    def _ask(self) -> None:
        """Ask squeue which jobs have ended without a result."""
        self._queried_s = time.monotonic()
        job_ids = {*(job.job_id for job in self._jobs.values()), *(job_id for job_id, _ in self._ahead.values())}
        try:
            current = states(job_ids, cluster=self.cluster)
        except QueueError as error:
            log.warning("%s; asking again", error)
            return
        missed = {job_id for job_id in job_ids if current.get(job_id, "COMPLETED") in ENDED}
        self._misses = {job_id: self._misses.get(job_id, 0) + 1 for job_id in missed}
        ended = {job_id: current.get(job_id, "COMPLETED") for job_id, n in self._misses.items() if n >= MISSES}
        self._ahead = {folder: (task[0], ended.get(task[0], task[1])) for folder, task in self._ahead.items()}
        for future, job in [(future, job) for future, job in self._jobs.items() if job.job_id in ended]:
            del self._jobs[future]
            is_cancelled = ended[job.job_id] == "CANCELLED"
            why = "was cancelled" if is_cancelled else "has ended without a result (killed?)"
            kind = CellError if is_cancelled else LostError
            future.set_exception(kind(f"job {job.job_id} {why}; log: {job.paths.stderr}"))

    def _submit_array(self, store: Path, futures: dict[Work, Results]) -> None:
        """Submit works of cells or of Teachers as one array, which depends on the jobs of their Teachers."""
        works = list(futures)
        executor = _submitit().AutoExecutor(store / "slurm", cluster=self.cluster, **self._timeouts)
        executor.update_parameters(**self._parameters)
        teachers = queued(_teachers(cell for work in works for cell in work.cells))
        if arrays := sorted({job_id.partition("_")[0] for job_id, _ in teachers.values()}):
            executor.update_parameters(slurm_dependency=":".join(["afterany", *arrays]))
        try:
            jobs = executor.submit_array([ArrayJob(work, threads=self._cpus) for work in works])
        except Exception as error:  # of submitit or its command, with what sbatch printed
            lines = re.findall(r"sbatch: error: (.+)", str(error)) or [_last_line(error)]
            raise InputError(f"the groups cannot be submitted, sbatch says: {'; '.join(lines)}") from error
        for work, job in zip(works, jobs, strict=True):
            note([cell.folder for cell in work.cells], cluster=self.cluster, job_id=job.job_id)
        array = jobs[0].job_id.partition("_")[0]
        self._arrays.append(array)
        what = "Teachers" if works[0].cells[0].role == "teacher" else "groups"
        log.info("%d %s submitted as job %s; its logs: %s", len(works), what, array, executor.folder)
        if self.wait:
            self._jobs |= zip(futures.values(), jobs, strict=True)
            return
        log.info("not waiting: python -m kdsweep status shows how far it is")
        for work, future in futures.items():
            future.set_result([math.nan] * len(work.jobs))

    def close(self, error: BaseException | None) -> None:
        """See ``Executor``: what was submitted runs on."""
        if error is not None and self._arrays:
            line = "python -m kdsweep status shows how far it is, the same command waits for it again"
            arrays = ", ".join(self._arrays), " ".join(self._arrays)
            log.warning(f"job %s runs on without this command: {line}, scancel %s ends it", *arrays)


class ArrayJob(worker.RemoteWork):
    """A remote work as submitit calls it in a job: it saves what it does when the job has to end."""

    def __call__(self) -> list[Result]:
        """Compute the group."""
        signals.install((signal.SIGINT, signal.SIGTERM))  # after submitit, which would let SIGTERM pass
        try:
            return super().__call__()
        except signals.Stopped as stop:
            log.warning("%s: all is saved", stop)
            if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
                # Preempted or cancelled, which is not said. SLURM requeues a job that it preempts only if that has
                # not ended by itself, so the end is SLURM's.
                time.sleep(KILL_WAIT_S)
            raise

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit when the time is nearly over: save, and resume in the queue's next turn."""
        self.stop()
        return _submitit().helpers.DelayedSubmission(self)


def note(folders: Iterable[Path], *, cluster: str, job_id: str) -> None:
    """Note in the folders of cells which job was submitted for them."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / NOTE, {"cluster": cluster, "job": job_id})


def queued(folders: Iterable[Path]) -> dict[Path, Task]:
    """Return the job of each of these cells that is in the queue or runs from it, and its state.

    Raises:
        QueueError: squeue does not answer.
    """
    notes: dict[tuple[str, str], list[Path]] = {}
    for folder in folders:
        with contextlib.suppress(DamagedError):  # the cell is submitted again, and its lock sees to the rest
            if content := read_json(folder / NOTE, "cluster", "job"):
                notes.setdefault((content["cluster"], content["job"]), []).append(folder)
    tasks: dict[Path, Task] = {}
    for cluster in {cluster for cluster, _ in notes}:
        for job_id, state in states([each for where, each in notes if where == cluster], cluster=cluster).items():
            if state not in ENDED:
                tasks |= dict.fromkeys(notes[cluster, job_id], (job_id, state))
    return tasks


def states(job_ids: Iterable[str], *, cluster: str) -> dict[str, str]:
    """Return the states of those of these jobs that the queue still knows.

    Raises:
        QueueError: squeue does not answer.
    """
    current: dict[str, str] = {}
    if cluster == LOCAL:
        for job_id in job_ids:
            with contextlib.suppress(OSError):  # the process has ended
                if b"submitit" in Path(f"/proc/{job_id}/cmdline").read_bytes():
                    current[job_id] = "RUNNING"
        return current
    for array in {job_id.partition("_")[0] for job_id in job_ids}:
        command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={array}", "--format=%i %T"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise QueueError(f"squeue: {error}") from error
        if done.returncode == 0:
            current |= dict(row.split(maxsplit=1) for row in done.stdout.splitlines() if row.strip())
        elif "Invalid job id" not in done.stderr:  # which SLURM has forgotten
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise QueueError(f"squeue: {lines[-1].rpartition(': ')[2]}")
    return {job_id: current[job_id] for job_id in job_ids if job_id in current}


def _teachers(cells: Iterable[Cell]) -> set[Path]:
    return {cell.teacher.folder for cell in cells if cell.teacher is not None}


def _last_line(error: Exception) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise InputError("hydra/launcher=lockstep_slurm needs submitit: pip install 'kdsweep[slurm]'") from error
    return submitit
