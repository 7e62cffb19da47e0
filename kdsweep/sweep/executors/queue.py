"""The jobs of SLURM's queue that cells wait for: noted in each cell's folder, compared with ``squeue`` when read.

A cell that waits in the queue holds no lock yet, and must not be submitted a second time.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from kdsweep.core.errors import CellError
from kdsweep.core.files import DamagedError, read_json, write_json

NOTE = "job.json"
LOCAL = "local"  # the job is a process of this machine: submitit's stand-in for SLURM
# States of squeue in which a job will not run again by itself; those that are requeued pass through PENDING.
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT",
}  # fmt: skip


class QueueError(CellError):
    """SLURM does not answer."""


class Task(NamedTuple):
    """One job of an array: a group.

    Attributes:
        job_id: such as ``4711_3``.
        state: SLURM's word, such as PENDING or RUNNING.
    """

    job_id: str
    state: str


def note(folders: Iterable[Path], *, cluster: str, job_id: str) -> None:
    """Note in the folders of cells which job was submitted for them.

    Args:
        folders: of the cells.
        cluster: ``slurm`` or ``local``.
        job_id: of the job.
    """
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / NOTE, {"cluster": cluster, "job": job_id})


def queued(folders: Iterable[Path]) -> dict[Path, Task]:
    """Return the task of each of these cells that is in the queue or runs from it.

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
        current = states([job_id for where, job_id in notes if where == cluster], cluster=cluster)
        live = {job_id: state for job_id, state in current.items() if state not in ENDED}
        for job_id, state in live.items():
            tasks |= dict.fromkeys(notes[cluster, job_id], Task(job_id, state))
    return tasks


def states(job_ids: Sequence[str], *, cluster: str) -> dict[str, str]:
    """Return the states of those of these jobs that the queue still knows.

    Raises:
        QueueError: squeue does not answer.
    """
    if cluster == LOCAL:
        return {job_id: "RUNNING" for job_id in job_ids if _is_process(job_id)}
    arrays = sorted({job_id.partition("_")[0] for job_id in job_ids})
    rows = [row for array in arrays for row in _squeue(array)]
    current = dict(row.split(maxsplit=1) for row in rows if row.strip())
    return {job_id: current[job_id] for job_id in job_ids if job_id in current}


def _squeue(array: str) -> Iterable[str]:
    """Return rows ``JOB STATE``, one for each job of an array; none if SLURM has forgotten it."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={array}", "--format=%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QueueError(f"squeue: {error}") from error
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise QueueError(f"squeue: {lines[-1].rpartition(': ')[2]}")
    return done.stdout.splitlines() if done.returncode == 0 else []


def _is_process(job_id: str) -> bool:
    try:
        return b"submitit" in Path(f"/proc/{job_id}/cmdline").read_bytes()
    except OSError:
        return False
