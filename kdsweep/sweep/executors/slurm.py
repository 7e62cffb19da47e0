"""Groups as an array job of SLURM, submitted through submitit: ``hydra/launcher=lockstep_slurm``."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdsweep.core import signals
from kdsweep.core.errors import CellError, InputError, LostError, one_line
from kdsweep.sweep.executors import queue, remote
from kdsweep.sweep.executors.executor import Executor, LeftError, Result, Results, Work

if TYPE_CHECKING:
    import submitit

    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.plan import Job

log = logging.getLogger(__name__)

FOLDER = "slurm"  # of a store: submitit's files
LOOK_EVERY_S = 2.0
ASK_EVERY_S = 30.0  # squeue is everybody's
MISSES = 2  # so often in a row a job is not in the queue before it counts as lost
ARRAY = 1000  # jobs of one array: the most that SLURM takes unless it is configured otherwise
KILL_WAIT_S = 900.0


@dataclass(eq=False)
class _Submitted(Results):
    """The results of a work to come, with the jobs that compute it: of an earlier command's the job is not here."""

    job_ids: list[str]
    job: submitit.Job[Any] | None = None
    misses: int = 0
    states: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Future.__init__(self)

    def look(self) -> None:
        """Set the results if the job has written them, or the error if it has ended without."""
        if self.job is not None and self.job.paths.result_pickle.exists():
            self._take(self.job)
        elif self.misses >= MISSES:
            ids = ", ".join(self.job_ids)
            log_file = f"; log: {self.job.paths.stderr}" if self.job is not None else ""
            if "CANCELLED" in self.states.values():
                self.set_exception(CellError(f"job {ids} was cancelled{log_file}"))
            else:
                kind = LeftError if self.job is None else LostError
                self.set_exception(kind(f"job {ids} has ended without a result (killed?){log_file}"))

    def _take(self, job: submitit.Job[Any]) -> None:
        try:
            self.set_result(job.result())
        except Exception as error:  # of submitit itself: out of time too often, a module that is missing
            self.set_exception(CellError(f"job {job.job_id}: {_last_line(error)}; log: {job.paths.stderr}"))

    def count(self, states: dict[str, str]) -> None:
        """Count how often in a row no job was in the queue: between two states, or with a result that is late."""
        self.states |= {job_id: states[job_id] for job_id in self.job_ids if job_id in states}
        is_live = any(states.get(job_id, "COMPLETED") not in queue.ENDED for job_id in self.job_ids)
        self.misses = 0 if is_live else self.misses + 1


class Slurm(Executor):
    """The executor that submits: each group is one job of an array, each with a device.

    Teachers that groups need are an array before, which that of the groups depends on. What was submitted runs on
    without the command that submitted it; a job that is preempted or reaches its time limit saves what it does and is
    put into the queue again.

    Args:
        options: of ``hydra/launcher=lockstep_slurm``, by name; the plugin's SlurmConf describes each.
    """

    def __init__(self, **options: Any) -> None:
        self.cluster, self.largest, self.wait = options["cluster"], options["largest"], options["wait"]
        if self.cluster not in ("slurm", queue.LOCAL):
            raise InputError(f"hydra.launcher.cluster={self.cluster} is not allowed: it must be slurm or local")
        for name in options["additional_parameters"]:
            if not re.fullmatch(r"[a-z][a-z-]*", name):
                raise InputError(
                    f"hydra.launcher.additional_parameters has {name}: an option of sbatch is lower case, without --"
                )
        remote.check_least(options, {**dict.fromkeys(("gpus_per_node", "max_num_timeout"), 0), "timeout_min": 5})
        remote.check_least(options, dict.fromkeys(("cpus_per_task", "mem_gb", "array_parallelism", "largest"), 1))
        gpus, self._cpus, partition = options["gpus_per_node"], options["cpus_per_task"], options["partition"]
        where = f"SLURM{f' partition {partition}' if partition else ''}" if self.cluster == "slurm" else "local jobs"
        self._place = f"{where}, {gpus} GPU and {self._cpus} CPUs per group"
        self._max_num_timeout = options["max_num_timeout"]
        chosen = {name: options[name] for name in ("partition", "account", "qos", "constraint")}
        self._parameters = {
            **{name: options[name] for name in ("timeout_min", "cpus_per_task", "mem_gb")},
            **({"gpus_per_node": gpus} if gpus else {}),
            "slurm_srun_args": [f"--cpus-per-task={self._cpus}"],  # srun does not take it over from sbatch
            "tasks_per_node": 1,
            "name": "kdsweep",
            "slurm_array_parallelism": options["array_parallelism"],
            "slurm_additional_parameters": {"requeue": True, **options["additional_parameters"]},
            **{f"slurm_{name}": value for name, value in chosen.items() if value is not None},
        }
        self._arrays: list[str] = []  # that this command submitted
        self._queued: dict[Path, queue.Task] = {}  # by folder what an earlier one did
        self._waiting: list[_Submitted] = []
        self._thread: threading.Thread | None = None

    def check(self, jobs: Sequence[Job]) -> None:
        """See ``Executor``: MLflow must be a server, and SLURM and submitit must be here."""
        _submitit()
        if self.cluster == "slurm":
            if shutil.which("sbatch") is None:
                raise InputError(
                    "hydra/launcher=lockstep_slurm: sbatch is not on this machine; run it where jobs are submitted"
                )
            for job in jobs:
                remote.check_tracking(job.settings)

    def preview(self, jobs: list[Job], *, times: bool) -> Preview:
        """See ``Executor``."""
        return remote.preview_remote(jobs, self._place, times=times)

    def queued(self, jobs: Sequence[Job]) -> set[Path]:
        """See ``Executor``: an earlier command may have submitted some of these, or their Teachers."""
        folders = {job.cell.folder for job in jobs}
        teachers = {job.cell.teacher.folder for job in jobs if job.cell.teacher is not None}
        try:
            self._queued |= queue.queued(folders | teachers)
        except queue.QueueError as error:
            raise InputError(f"{error}; the queue cannot be read, so nothing is submitted") from error
        ahead = folders & self._queued.keys()
        if ahead:
            names = ", ".join(sorted({self._queued[folder].job_id for folder in ahead}))
            log.info("%d cells are in the queue already, as job %s: not submitted again", len(ahead), names)
        return ahead

    def submit(self, works: Sequence[Work], *, after: Sequence[Results] = ()) -> list[Results]:
        """See ``Executor``; what an earlier command has left in the queue is waited for instead."""
        if self.cluster == queue.LOCAL:  # which knows no dependencies
            wait(after)
        # A job that has ended may be unknown to SLURM. Without waiting, the futures are done while the jobs are queued.
        ahead = [future for future in after if isinstance(future, _Submitted) and not (self.wait and future.done())]
        ids = {job_id for future in ahead for job_id in future.job_ids}
        depends = sorted({job_id.partition("_")[0] for job_id in ids})
        futures = {work: _Submitted(job_ids) for work in works if (job_ids := self._take_ahead(work))}
        stores: dict[Path, list[Work]] = {}
        for work in (work for work in works if work not in futures):
            stores.setdefault(work.cells[0].store, []).append(work)
        for store, group in stores.items():
            for start in range(0, len(group), ARRAY):
                futures |= self._submit_array(store, group[start : start + ARRAY], depends=depends)
        if not self.wait:
            for work, future in futures.items():
                future.set_result([math.nan] * len(work.jobs))
            log.info("not waiting: python -m kdsweep status shows how far it is")
        else:
            self._waiting += futures.values()
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()
        return [futures[work] for work in works]

    def _take_ahead(self, work: Work) -> list[str]:
        """Return the jobs that an earlier command has submitted for the cells of a work; they count once."""
        tasks = [self._queued.pop(cell.folder) for cell in work.cells if cell.folder in self._queued]
        return sorted({task.job_id for task in tasks})

    def _submit_array(self, store: Path, works: list[Work], *, depends: list[str]) -> dict[Work, _Submitted]:
        timeouts = {f"{self.cluster}_max_num_timeout": self._max_num_timeout}
        executor = _submitit().AutoExecutor(store / FOLDER, cluster=self.cluster, **timeouts)
        dependency = {"slurm_dependency": ":".join(["afterany", *depends])} if depends else {}
        executor.update_parameters(**self._parameters, **dependency)
        try:
            jobs = executor.submit_array([ArrayJob(remote.RemoteWork(work, threads=self._cpus)) for work in works])
        except Exception as error:  # of submitit or its command, with what sbatch printed
            lines = re.findall(r"sbatch: error: (.+)", str(error)) or [_last_line(error)]
            raise InputError(f"the groups cannot be submitted, sbatch says: {'; '.join(lines)}") from error
        for work, job in zip(works, jobs, strict=True):
            queue.note([cell.folder for cell in work.cells], cluster=self.cluster, job_id=job.job_id)
        array = jobs[0].job_id.partition("_")[0]
        self._arrays.append(array)
        what = "Teachers" if works[0].cells[0].role == "teacher" else "groups"
        log.info("%d %s submitted as job %s; its logs: %s", len(works), what, array, executor.folder)
        return {work: _Submitted([job.job_id], job) for work, job in zip(works, jobs, strict=True)}

    def _watch(self) -> None:
        """Set the results of what was submitted as they come; this is a thread."""
        asked_s = -math.inf
        while True:
            time.sleep(LOOK_EVERY_S)
            waiting = [future for future in self._waiting if not future.done()]
            every_s = LOOK_EVERY_S if self.cluster == queue.LOCAL else ASK_EVERY_S
            try:
                if waiting and time.monotonic() - asked_s >= every_s:
                    asked_s = time.monotonic()
                    states = queue.states(
                        [job_id for future in waiting for job_id in future.job_ids], cluster=self.cluster
                    )
                    for future in waiting:
                        future.count(states)
                for future in waiting:
                    future.look()
            except Exception as error:  # the end of this thread would be waited for without end
                log.warning("%s; asking again", one_line(error))

    def close(self, error: BaseException | None) -> None:
        """See ``Executor``: what was submitted runs on."""
        if error is not None and self._arrays:
            log.warning(
                "job %s runs on without this command: python -m kdsweep status shows how far it is, the same "
                "command waits for it again, scancel %s ends it",
                ", ".join(self._arrays),
                " ".join(self._arrays),
            )


class ArrayJob:
    """A remote work as submitit calls it in a job: it saves what it does when the job has to end.

    Args:
        remote_work: with the group.
    """

    def __init__(self, remote_work: remote.RemoteWork) -> None:
        self.remote_work = remote_work

    def __call__(self) -> list[Result]:
        """Compute the group."""
        signals.install((signal.SIGINT, signal.SIGTERM))  # after submitit, which would let SIGTERM pass
        try:
            return self.remote_work()
        except signals.Stopped as stop:
            log.warning("%s: all is saved", stop)
            if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
                # Preempted or cancelled, which is not said. SLURM requeues a job that it preempts only if that has
                # not ended by itself, so the end is SLURM's.
                time.sleep(KILL_WAIT_S)
            raise

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit when the time is nearly over: save, and resume in the queue's next turn."""
        self.remote_work.stop()
        return _submitit().helpers.DelayedSubmission(self)


def _last_line(error: Exception) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise InputError("hydra/launcher=lockstep_slurm needs submitit: pip install 'kdsweep[slurm]'") from error
    return submitit
