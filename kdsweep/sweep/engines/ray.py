"""Run groups as tasks of a Ray cluster, existing or on this machine alone: ``hydra/launcher=lockstep_ray``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from kdsweep.core import signals
from kdsweep.core.errors import CellError, InputError
from kdsweep.sweep.engines.engine import Unit

if TYPE_CHECKING:
    from kdsweep.sweep.engines.remote import RemoteTask
    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.plan import Job


LOOK_EVERY_S = 1.0
STOP_WITHIN_S = 12.0  # a little longer than a process gets


class OnRay:
    """The engine that hands each group to a Ray cluster as a task.

    Ray starts a task where its GPUs, CPUs and memory are free, and again elsewhere if its machine or process dies; the
    task then goes on from its checkpoints.

    Args:
        address: of a running cluster, such as ``auto`` or ``10.0.0.1:6379``; None starts one of this machine alone.
        gpus: per group; a fraction lets groups share a GPU.
        cpus: per group, and its number of threads.
        memory_gb: per group; None leaves memory uncounted.
        retries: the most restarts of a group whose machine or process died.
        largest: the most cells in a group; None for ``plan.LARGEST``.
    """

    def __init__(
        self,
        *,
        address: str | None,
        gpus: float,
        cpus: int,
        memory_gb: float | None,
        retries: int,
        largest: int | None,
    ) -> None:
        least = {"gpus": (gpus, 0), "cpus": (cpus, 1), "memory_gb": (memory_gb, 0), "retries": (retries, 0)}
        for name, (value, lowest) in {**least, "largest": (largest, 1)}.items():
            if value is not None and value < lowest:
                raise InputError(f"hydra.launcher.{name}={value} is not allowed: it must be at least {lowest}")
        self.largest = largest
        self._address = address
        self._place = f"Ray, {gpus:g} GPU and {cpus} CPUs per group"
        self._cpus = cpus
        self._needs: dict[str, Any] = {"num_gpus": gpus, "num_cpus": cpus, "max_retries": retries}
        if memory_gb is not None:
            self._needs["memory"] = int(memory_gb * 2**30)
        self._running: list[Any] = []

    def open(self, config: DictConfig) -> None:
        """See ``Engine``."""
        self._config = config

    def check(self, jobs: Sequence[Job]) -> None:
        """See ``Engine``: on several machines MLflow must be a server, and one must have what a group needs."""
        from kdsweep.sweep.engines import remote

        ray = self._connect()
        machines = {own["NodeManagerHostname"] for own in ray.nodes() if own["Alive"]}
        if len(machines) > 1:
            for job in jobs:
                remote.check_tracking(job.settings)
        for name, key in (("GPU", "num_gpus"), ("CPU", "num_cpus")):
            most = max((own["Resources"].get(name, 0) for own in ray.nodes() if own["Alive"]), default=0)
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

    def preview(self, configs: list[DictConfig], *, times: bool) -> Preview:
        """See ``Engine``."""
        from kdsweep.sweep.engines import remote

        return remote.preview(configs, self._place, config=self._config, times=times)

    def queued(self, jobs: Sequence[Job]) -> set[Path]:
        """See ``Engine``: tasks end with the command."""
        return set()

    def at_once(self, preview: Preview) -> int:
        """See ``Engine``: more than one, else tasks would hold devices while they wait for Teachers."""
        return 2

    def run(self, units: Sequence[Unit], *, before: Sequence[Unit] = ()) -> Iterator[tuple[Unit, Any]]:
        """See ``Engine``."""
        ray = self._connect()
        yield from self._run(ray, before)
        yield from self._run(ray, units)

    def _run(self, ray: Any, units: Sequence[Unit]) -> Iterator[tuple[Unit, Any]]:
        from kdsweep.sweep.engines.remote import RemoteTask

        # A fresh process for each: what one leaves behind (memory, threads, loggers) would reach the next.
        task = ray.remote(max_calls=1, **self._needs)(_do)
        waiting = {task.remote(RemoteTask(unit, config=self._config, threads=self._cpus)): unit for unit in units}
        while waiting:
            self._running = list(waiting)
            try:
                done, _ = ray.wait(self._running, num_returns=1, timeout=LOOK_EVERY_S)
            except KeyboardInterrupt:  # Ray turns any exception of a signal handler into this
                signals.check()
                raise
            for own in done:
                yield waiting.pop(own), _outcome(ray, own)
        self._running = []

    def close(self, error: BaseException | None) -> None:
        """See ``Engine``."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        if error is not None and self._running:
            for own in self._running:
                ray.cancel(own)
            # They save what they do.
            _, late = ray.wait(self._running, num_returns=len(self._running), timeout=STOP_WITHIN_S)
            if isinstance(error, signals.Stopped):
                error.killed = len(late)
        ray.shutdown()


def _loopback(address: str | None) -> dict[str, Any]:
    """Return options that hide a cluster of this machine from others; Ray would choose the network's address."""
    if address is None:
        return {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    host = address.partition(":")[0]
    return {"_node_ip_address": host} if host.startswith("127.") else {}


def _do(remote_task: RemoteTask) -> Any:
    """Run the task."""
    return remote_task()


def _outcome(ray: Any, own: Any) -> Any:
    try:
        return ray.get(own)
    except ray.exceptions.RayError as error:
        return CellError(f"its Ray task failed: {' '.join(str(error).split())[:300]}")
