"""Groups as tasks of a Ray cluster, existing or on this machine alone: ``hydra/launcher=lockstep_ray``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from kdsweep.core import signals
from kdsweep.core.errors import InputError, LostError
from kdsweep.sweep.executors import remote
from kdsweep.sweep.executors.executor import Executor, Result, Results, Work

if TYPE_CHECKING:
    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.plan import Job

STOP_WITHIN_S = 12.0  # a little longer than a process gets


class OnRay(Executor):
    """The executor that hands each group to a Ray cluster as a task.

    Ray starts a task where its GPUs, CPUs and memory are free, and again elsewhere if its machine or process dies; the
    task then resumes from its checkpoints.

    Args:
        options: of ``hydra/launcher=lockstep_ray``, by name; the plugin's RayConf describes each.
    """

    def __init__(self, **options: Any) -> None:
        remote.check_least(options, {"gpus": 0, "cpus": 1, "memory_gb": 0, "retries": 0, "largest": 1})
        self.largest, self._address, self._cpus = options["largest"], options["address"], options["cpus"]
        self._place = f"Ray, {options['gpus']:g} GPU and {self._cpus} CPUs per group"
        self._needs = {"num_gpus": options["gpus"], "num_cpus": self._cpus, "max_retries": options["retries"]}
        if options["memory_gb"] is not None:
            self._needs["memory"] = int(options["memory_gb"] * 2**30)
        self._running: list[Any] = []

    def check(self, jobs: Sequence[Job]) -> None:
        """See ``Executor``: on several machines MLflow must be a server, and one must have what a group needs."""
        machines = [node for node in self._connect().nodes() if node["Alive"]]
        if len({node["NodeManagerHostname"] for node in machines}) > 1:
            for job in jobs:
                remote.check_tracking(job.settings)
        for name, key in (("GPU", "num_gpus"), ("CPU", "num_cpus")):
            most = max((node["Resources"].get(name, 0) for node in machines), default=0)
            if self._needs[key] > most:
                option = key.removeprefix("num_")
                raise InputError(
                    f"hydra.launcher.{option}={self._needs[key]:g}: the largest machine of the Ray cluster has "
                    f"{most:g}; give less"
                )

    def _connect(self) -> Any:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise InputError("hydra/launcher=lockstep_ray needs Ray: pip install 'kdsweep[ray]'") from error
        if not ray.is_initialized():
            try:
                ray.init(address=self._address or "local", **_loopback(self._address))
            except (ConnectionError, RuntimeError, ValueError) as error:
                line = " ".join(str(error).split())[:200]
                raise InputError(
                    f"hydra.launcher.address={self._address}: no Ray cluster answers: {line}; if it asks for a token, "
                    "set RAY_AUTH_MODE=token in the environment"
                ) from error
        return ray

    def preview(self, jobs: list[Job], *, times: bool) -> Preview:
        """See ``Executor``."""
        return remote.preview_remote(jobs, self._place, times=times)

    def submit(self, works: Sequence[Work], *, after: Sequence[Results] = ()) -> list[Results]:
        """See ``Executor``."""
        wait(after)
        ray = self._connect()
        # A fresh process for each: what one leaves behind (memory, threads, loggers) would reach the next.
        task = ray.remote(max_calls=1, **self._needs)(_compute)
        references = [task.remote(remote.RemoteWork(work, threads=self._cpus)) for work in works]
        self._running += references
        return [_future(reference) for reference in references]

    def close(self, error: BaseException | None) -> None:
        """See ``Executor``: tasks that are stopped early save their state first."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        if error is not None and self._running:
            for reference in self._running:
                ray.cancel(reference)
            _, late = ray.wait(self._running, num_returns=len(self._running), timeout=STOP_WITHIN_S)
            if isinstance(error, signals.Stopped):
                error.killed = len(late)
        self._running = []
        ray.shutdown()


def _loopback(address: str | None) -> dict[str, Any]:
    """Return options that hide a cluster of this machine from others; Ray would choose the network's address."""
    if address is None:
        return {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    host = address.partition(":")[0]
    return {"_node_ip_address": host} if host.startswith("127.") else {}


def _compute(remote_work: remote.RemoteWork) -> list[Result]:
    return remote_work()


def _future(reference: Any) -> Results:
    """Return the results of a task to come; an error of Ray's means that its process was lost."""
    future: Results = Future()

    def end(done: Results) -> None:
        if (error := done.exception()) is None:
            future.set_result(done.result())
        else:
            future.set_exception(LostError(f"its Ray task failed: {' '.join(str(error).split())[:300]}"))

    reference.future().add_done_callback(end)
    return future
