"""A store's jobs in SLURM's queue: recorded when groups are submitted, compared with ``squeue`` when read.

A cell that waits in the queue holds no lock yet, and must not be submitted a second time.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from kdsweep.core.errors import InputError
from kdsweep.core.files import DamagedError, read_json, write_json

FOLDER = "slurm"
LOCAL = "local"  # the job is a process of this machine: submitit's stand-in for SLURM
# States of squeue in which a job will not run again by itself; those that are requeued pass through PENDING.
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT",
}  # fmt: skip


class QueueError(Exception):
    """SLURM does not answer."""


class Task(NamedTuple):
    """One job of an array: a group.

    Attributes:
        job_id: such as ``4711_3``.
        state: SLURM's word, such as PENDING or RUNNING.
    """

    job_id: str
    state: str


def write(store: Path, *, cluster: str, tasks: dict[str, list[str]]) -> None:
    """Record what was submitted.

    Args:
        store: folder of the runs.
        cluster: ``slurm`` or ``local``.
        tasks: by job id the folders of its cells, relative to the store.
    """
    folder = store / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(tasks)).partition("_")[0]
    content = {"cluster": cluster, "time_ms": int(time.time() * 1000), "tasks": tasks}
    write_json(folder / f"{first}.json", content)


def queued(store: Path) -> dict[str, Task]:
    """Return the task of each cell that is in the queue or runs from it, by folder relative to the store.

    Raises:
        QueueError: squeue does not answer.
    """
    known: dict[str, tuple[str, list[str]]] = {}
    for file in sorted((store / FOLDER).glob("*.json")):
        try:
            content = read_json(file, "cluster", "tasks") or {"cluster": "", "tasks": {}}  # removed since
        except DamagedError as error:
            raise InputError(f"{error}; cancel its jobs (scancel {file.stem}), then remove it") from error
        known |= {job_id: (content["cluster"], folders) for job_id, folders in content["tasks"].items()}
    found: dict[str, Task] = {}
    for cluster in {cluster for cluster, _ in known.values()}:
        own = states([job_id for job_id, (where, _) in known.items() if where == cluster], cluster=cluster)
        for job_id, state in own.items():
            found |= {folder: Task(job_id, state) for folder in known[job_id][1]}
    return found


def forget_ended(store: Path) -> None:
    """Remove the records of submissions that have no job left in the queue."""
    still = {task.job_id.partition("_")[0] for task in queued(store).values()}
    for file in (store / FOLDER).glob("*.json"):
        if file.stem not in still:
            file.unlink(missing_ok=True)


def states(job_ids: Sequence[str], *, cluster: str) -> dict[str, str]:
    """Return the states of those of these jobs that wait, run, or will run again.

    Raises:
        QueueError: squeue does not answer.
    """
    if not job_ids:
        return {}
    if cluster == LOCAL:
        return {job_id: "RUNNING" for job_id in job_ids if _is_process(job_id)}
    arrays = sorted({job_id.partition("_")[0] for job_id in job_ids})
    rows = [row for array in arrays for row in _squeue(array)]
    found = dict(row.split(maxsplit=1) for row in rows if row.strip())
    return {job_id: found[job_id] for job_id in job_ids if found.get(job_id, "COMPLETED") not in ENDED}


def _squeue(array: str) -> Iterable[str]:
    """Return rows ``JOB STATE``, one for each job of an array; none if SLURM no longer knows it."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={array}", "--format=%i %T"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QueueError(f"squeue: {error}") from error
    if asked.returncode != 0 and "Invalid job id" not in asked.stderr:
        lines = asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"]
        raise QueueError(f"squeue: {lines[-1].rpartition(': ')[2]}")
    return asked.stdout.splitlines() if asked.returncode == 0 else []


def _is_process(job_id: str) -> bool:
    try:
        command = Path(f"/proc/{job_id}/cmdline").read_bytes()
    except OSError:
        return False
    return b"submitit" in command
