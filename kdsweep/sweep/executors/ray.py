"""Groups as tasks of a Ray cluster, existing or on this machine alone: ``hydra/launcher=lockstep_ray``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from kdsweep.config.identity import Job
from kdsweep.core import signals
from kdsweep.core.errors import InputError
from kdsweep.sweep.executors.executor import Executor, Results, Work, check_least, check_tracking
from kdsweep.sweep.executors.worker import RemoteWork

STOP_WITHIN_S = 12.0  # a little longer than a process gets


class OnRay(Executor):
    """The executor that hands each group to a Ray cluster as a task.

    Ray starts a task where its GPUs, CPUs and memory are free, and again elsewhere if its machine or process dies; the
    task then resumes from its checkpoints. The plugin's RayConf describes each option.
    """

    def __init__(self, **options: Any) -> None:
        check_least(options, {"gpus": 0, "cpus": 1, "memory_gb": 0, "retries": 0, "largest": 1})
        self.largest, self._address, self._cpus = options["largest"], options["address"], options["cpus"]
        self.machines = f"Ray, {options['gpus']:g} GPU and {self._cpus} CPUs per group"
        self._needs = {"num_gpus": options["gpus"], "num_cpus": self._cpus, "max_retries": options["retries"]}
        if options["memory_gb"] is not None:
            self._needs["memory"] = int(options["memory_gb"] * 2**30)
        self._running: list[Any] = []

    def check(self, jobs: Sequence[Job]) -> None:
        """See ``Executor``: on several machines MLflow must be a server, and one must have what a group needs."""
        machines = [node for node in self._connect().nodes() if node["Alive"]]
        if len({node["NodeManagerHostname"] for node in machines}) > 1:
            check_tracking(jobs)
        for option, need in (("gpus", self._needs["num_gpus"]), ("cpus", self._cpus)):
            most = max((node["Resources"].get(option[:-1].upper(), 0) for node in machines), default=0)
            if need > most:
                raise InputError(
                    f"hydra.launcher.{option}={need:g}: the largest machine of the Ray cluster has {most:g}; give less"
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

    def submit(self, work: Work) -> Results | None:
        """See ``Executor``."""
        # A fresh process for each: what one leaves behind (memory, threads, loggers) would reach the next.
        task = self._connect().remote(max_calls=1, **self._needs)(RemoteWork.__call__)
        self._running.append(task.remote(RemoteWork(work, threads=self._cpus)))
        results: Results = self._running[-1].future()
        return results

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
