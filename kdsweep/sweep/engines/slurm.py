"""Groups as an array job of SLURM, submitted through submitit: ``hydra/launcher=lockstep_slurm``."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig

from kdsweep.core import signals
from kdsweep.core.errors import CellError, InputError
from kdsweep.core.signals import Stopped
from kdsweep.sweep.engines import queue
from kdsweep.sweep.engines.engine import SUBMITTED, Unit

if TYPE_CHECKING:
    import submitit

    from kdsweep.sweep.engines.remote import RemoteTask
    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.plan import Job

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
ASK_EVERY_S = 30.0  # squeue is everybody's
MISSES = 2  # so often in a row a job is not in the queue before it is given up
ARRAY = 1000  # jobs of one array: SLURM takes 1,000 unless it is told otherwise
KILL_WAIT_S = 900.0


class Slurm:
    """The engine that submits: each group is one job of an array, each with a device of its own.

    Teachers that groups need are an array before, which that of the groups depends on. What was submitted goes on
    without the command that submitted it; a job that is preempted or reaches its time limit saves what it does and is
    put into the queue again.

    The names of the options are those of Hydra's own submitit launcher; their defaults stand in the plugin's SlurmConf.

    Args:
        partition: for ``sbatch``, as are account, qos and constraint; None leaves the cluster's default.
        account: see partition.
        qos: see partition.
        constraint: see partition.
        gpus_per_node: GPUs of each group.
        cpus_per_task: CPUs of each group, and so many threads.
        mem_gb: memory of each group.
        timeout_min: limit of each job, minutes; a group that takes longer goes on in the next job.
        array_parallelism: jobs that run at the same time, at most.
        max_num_timeout: how often a job goes on after its time limit, at most.
        additional_parameters: further options of sbatch by their long names, such as ``{reservation: course}``.
        largest: cells in a group, at most; None for ``plan.LARGEST``.
        wait: stay until all is done; if not, the command ends when all is submitted, and its jobs' values are nan.
        cluster: ``slurm``, or ``local`` for jobs that are processes of this machine, all at once: to try things out.
    """

    def __init__(
        self,
        *,
        partition: str | None,
        account: str | None,
        qos: str | None,
        constraint: str | None,
        gpus_per_node: int,
        cpus_per_task: int,
        mem_gb: int,
        timeout_min: int,
        array_parallelism: int,
        max_num_timeout: int,
        additional_parameters: dict[str, str],
        largest: int | None,
        wait: bool,
        cluster: str,
    ) -> None:
        if cluster not in ("slurm", queue.LOCAL):
            raise InputError(f"hydra.launcher.cluster={cluster} is not allowed: it must be slurm or local")
        for name in additional_parameters:
            if not re.fullmatch(r"[a-z][a-z-]*", name):
                raise InputError(
                    f"hydra.launcher.additional_parameters has {name}: an option of sbatch is lower case, without --"
                )
        _check_least(gpus_per_node=(gpus_per_node, 0), cpus_per_task=(cpus_per_task, 1), mem_gb=(mem_gb, 1))
        _check_least(timeout_min=(timeout_min, 5), array_parallelism=(array_parallelism, 1))
        _check_least(max_num_timeout=(max_num_timeout, 0), largest=(1 if largest is None else largest, 1))
        self.cluster, self.largest, self.wait = cluster, largest, wait
        self._max_num_timeout, self._cpus = max_num_timeout, cpus_per_task
        where = f"SLURM{f' partition {partition}' if partition else ''}" if cluster == "slurm" else "local jobs"
        self._place = f"{where}, {gpus_per_node} GPU and {cpus_per_task} CPUs per group"
        asked = {"partition": partition, "account": account, "qos": qos, "constraint": constraint}
        self._parameters = {
            "timeout_min": timeout_min,
            **({"gpus_per_node": gpus_per_node} if gpus_per_node else {}),
            "cpus_per_task": cpus_per_task,
            "slurm_srun_args": [f"--cpus-per-task={cpus_per_task}"],  # srun does not take it over from sbatch
            "mem_gb": mem_gb,
            "tasks_per_node": 1,
            "name": "kdsweep",
            "slurm_array_parallelism": array_parallelism,
            "slurm_additional_parameters": {"requeue": True, **additional_parameters},
            **{f"slurm_{name}": value for name, value in asked.items() if value is not None},
        }
        self._own: list[str] = []  # arrays that this command submitted
        self._queued: dict[Path, queue.Task] = {}  # by folder what an earlier one did

    def open(self, config: DictConfig) -> None:
        """See ``Engine``."""
        self._config = config

    def check(self, jobs: Sequence[Job]) -> None:
        """See ``Engine``: MLflow must be a server, and SLURM and submitit must be here."""
        from kdsweep.sweep.engines import remote

        _submitit()
        if self.cluster == "slurm":
            if shutil.which("sbatch") is None:
                raise InputError(
                    "hydra/launcher=lockstep_slurm: sbatch is not on this machine; run it where jobs are submitted"
                )
            for job in jobs:
                remote.check_tracking(job.settings)

    def preview(self, configs: list[DictConfig], *, times: bool) -> Preview:
        """See ``Engine``."""
        from kdsweep.sweep.engines import remote

        return remote.preview(configs, self._place, config=self._config, times=times)

    def queued(self, jobs: Sequence[Job]) -> set[Path]:
        """See ``Engine``: an earlier command may have submitted some of these."""
        for store in {job.cell.store for job in jobs}:
            try:
                queue.forget_ended(store)
                queued = queue.queued(store)
            except queue.QueueError as error:
                raise InputError(f"{error}; what is in the queue is not known, so nothing is submitted") from error
            self._queued |= {store / folder: task for folder, task in queued.items()}
        found = {job.cell.folder for job in jobs} & self._queued.keys()
        if found:
            names = ", ".join(sorted({self._queued[folder].job_id for folder in found}))
            log.info("%d cells are in the queue already, as job %s: not submitted again", len(found), names)
        return found

    def at_once(self, preview: Preview) -> int:
        """See ``Engine``: more than one, else Teachers would be waited for by jobs that hold devices."""
        return 2

    def run(self, units: Sequence[Unit], *, before: Sequence[Unit] = ()) -> Iterator[tuple[Unit, Any]]:
        """See ``Engine``."""
        first = self._submit([unit for unit in before if not self._ahead(unit)], what="Teachers")
        if self.cluster == queue.LOCAL:  # which knows no dependencies
            yield from self._wait(first)
            first = []
        after = {job_id for unit in before for job_id in self._ahead(unit)} | {own.job_id for own in first}
        own = self._submit([unit for unit in units if not self._ahead(unit)], what="groups", after=after)
        ahead = [_Submitted(unit, job_id, None) for unit in units for job_id in self._ahead(unit)]
        self._queued = {}
        if self.wait:
            yield from self._wait([*first, *own, *ahead])
        else:
            log.info("not waiting: python -m kdsweep status shows how far it is")
            yield from ((unit, SUBMITTED) for unit in units)

    def _ahead(self, unit: Unit) -> list[str]:
        """Jobs that an earlier command has submitted for the cells of a unit."""
        return sorted({task.job_id for cell in unit.cells if (task := self._queued.get(cell.folder)) is not None})

    def _submit(self, units: Sequence[Unit], *, what: str, after: Iterable[str] = ()) -> list[_Submitted]:
        from kdsweep.sweep.engines.remote import RemoteTask

        submitted = []
        for place, own in _by_place(units).items():
            executor = self._executor(place, after=after)
            for start in range(0, len(own), ARRAY):
                part = own[start : start + ARRAY]
                remote_tasks = [RemoteTask(unit, config=self._config, threads=self._cpus) for unit in part]
                try:
                    jobs = executor.submit_array([ArrayJob(remote_task) for remote_task in remote_tasks])
                except Exception as error:  # of submitit or its command, with what sbatch printed
                    told = re.findall(r"sbatch: error: (.+)", str(error)) or [_last_line(error)]
                    raise InputError(f"the groups cannot be submitted, sbatch says: {'; '.join(told)}") from error
                tasks = {
                    job.job_id: [str(cell.folder.relative_to(place)) for cell in unit.cells]
                    for unit, job in zip(part, jobs, strict=True)
                }
                queue.write(place, cluster=self.cluster, tasks=tasks)
                submitted += [_Submitted(unit, job.job_id, job) for unit, job in zip(part, jobs, strict=True)]
                array = jobs[0].job_id.partition("_")[0]
                self._own.append(array)
                log.info("%d %s submitted as job %s; its logs: %s", len(part), what, array, executor.folder)
        return submitted

    def _executor(self, place: Path, *, after: Iterable[str]) -> Any:
        submitit = _submitit()
        timeouts = {f"{self.cluster}_max_num_timeout": self._max_num_timeout}
        executor = submitit.AutoExecutor(place / queue.FOLDER, cluster=self.cluster, **timeouts)
        arrays = sorted({job_id.partition("_")[0] for job_id in after})
        depends = {"slurm_dependency": ":".join(["afterany", *arrays])} if arrays else {}
        executor.update_parameters(**self._parameters, **depends)
        return executor

    def _wait(self, submitted: list[_Submitted]) -> Iterator[tuple[Unit, Any]]:
        """Give each unit's outcome when its jobs have ended."""
        waiting = list(submitted)
        missed: dict[str, int] = {}
        asked_s = -math.inf
        while waiting:
            time.sleep(LOOK_EVERY_S)
            if time.monotonic() - asked_s >= (LOOK_EVERY_S if self.cluster == queue.LOCAL else ASK_EVERY_S):
                asked_s = time.monotonic()
                self._count_missing(waiting, missed)
            for own in list(waiting):
                outcome = own.outcome() if own.has_result() else None
                if outcome is None and missed.get(own.job_id, 0) >= MISSES:
                    outcome = own.lost()
                if outcome is not None:
                    waiting.remove(own)
                    if all(other.unit is not own.unit for other in waiting):
                        yield own.unit, outcome

    def _count_missing(self, waiting: list[_Submitted], missed: dict[str, int]) -> None:
        """Count how often in a row jobs were not in the queue: between two states, or with a result that is late."""
        try:
            live = queue.states([own.job_id for own in waiting], cluster=self.cluster)
        except queue.QueueError as error:
            log.warning("%s; asking again", error)
            return
        for own in waiting:
            missed[own.job_id] = 0 if own.job_id in live else missed.get(own.job_id, 0) + 1

    def close(self, error: BaseException | None) -> None:
        """See ``Engine``: what was submitted goes on."""
        if error is not None and self._own:
            log.warning(
                "job %s goes on without this command: python -m kdsweep status shows how far it is, the same "
                "command waits for it again, scancel %s ends it",
                ", ".join(self._own),
                " ".join(self._own),
            )


class _Submitted(NamedTuple):
    """A job of this command, or, without ``job``, of an earlier one."""

    unit: Unit
    job_id: str
    job: submitit.Job[Any] | None

    def has_result(self) -> bool:
        return self.job is not None and self.job.paths.result_pickle.exists()

    def outcome(self) -> Any:
        assert self.job is not None
        try:
            return self.job.result()
        except Exception as error:  # what submitit itself tells: out of time too often, a module that is missing
            return CellError(f"job {self.job_id}: {_last_line(error)}; log: {self.job.paths.stderr}")

    def lost(self) -> Any:
        if self.job is None:
            return CellError(f"job {self.job_id}, submitted before, has ended without it")
        return CellError(
            f"job {self.job_id} has ended without a result (cancelled or killed?); log: {self.job.paths.stderr}"
        )


class ArrayJob:
    """A remote task as submitit calls it in a job: it saves what it does when the job has to end.

    Args:
        remote_task: with the group.
    """

    def __init__(self, remote_task: RemoteTask) -> None:
        self.remote_task = remote_task

    def __call__(self) -> Any:
        """Run the group."""
        signals.install()  # after submitit, which would let SIGTERM pass
        try:
            return self.remote_task()
        except Stopped as stop:
            log.warning("%s: all is saved", stop)
            if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
                # Preempted or cancelled, nobody tells which. SLURM requeues a job that it preempts only if that has
                # not ended by itself, so the end is SLURM's.
                time.sleep(KILL_WAIT_S)
            raise

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit when the time is nearly over: save, and go on from there in the queue's next turn."""
        self.remote_task.stop(signal.SIGTERM)
        return _submitit().helpers.DelayedSubmission(self)


def _by_place(units: Sequence[Unit]) -> dict[Path, list[Unit]]:
    """Units by the folder that their notes and logs go to: the store, or the sweep's where they are no cells."""
    found: dict[Path, list[Unit]] = {}
    for unit in units:
        place = unit.cells[0].store if unit.cells else Path(unit.make()[0].hydra.sweep.dir)
        found.setdefault(place, []).append(unit)
    return found


def _check_least(**values: tuple[int, int]) -> None:
    for name, (value, least) in values.items():
        if value < least:
            raise InputError(f"hydra.launcher.{name}={value} is not allowed: it must be at least {least}")


def _last_line(error: Exception) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise InputError("hydra/launcher=lockstep_slurm needs submitit: pip install 'kdsweep[slurm]'") from error
    return submitit
