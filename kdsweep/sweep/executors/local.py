"""Compute groups on this machine: each in a fresh process on one of its devices, or one by one in this process."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from kdsweep.config.identity import Job
from kdsweep.core.errors import CellError, DeviceError
from kdsweep.core.signals import Stopped
from kdsweep.store import cell_folder
from kdsweep.sweep.estimate import Preview
from kdsweep.sweep.executors import worker
from kdsweep.sweep.executors.executor import Executor, Result, Results, Work, check_least

log = logging.getLogger(__name__)


class Local(Executor):
    """The executor of one machine: one process at a time on each device, one after the other.

    Args:
        devices: for groups at the same time, such as ``[cuda:0,cuda:1]``; by default all that ``device`` names.
        processes: number of groups that run at the same time on the CPU; they share its threads.
    """

    def __init__(self, devices: Sequence[str] = (), *, processes: int = 1) -> None:
        check_least({"processes": processes}, {"processes": 1})
        self._names = list(devices) or (["cpu"] * processes if processes > 1 else [])
        self._processes, self._threads = worker.Processes(), ThreadPoolExecutor(1000)
        self._running: dict[Results, str] = {}  # their devices
        self._lost: set[str] = set()

    def check(self, jobs: Sequence[Job]) -> None:
        """See ``Executor``; if any cell waits, the server of processes imports what they need in the meantime."""
        if jobs:
            worker.start_server()

    def preview(self, jobs: list[Job], *, times: bool) -> Preview:
        """See ``Executor``; steps are always timed."""
        result: Preview = self._processes.call(partial(worker.preview, devices=self._names), jobs)
        return result

    def submit(self, work: Work) -> Results | None:
        """See ``Executor``; a device that does not compute any more is not used again."""
        names = [name for name in work.devices if name not in self._lost]
        if not names:
            lost: Results = Future()
            lost.set_exception(CellError(f"{', '.join(work.devices)} does not compute any more"))
            return lost
        busy = Counter(device for future, device in self._running.items() if not future.done())
        device = next((name for name in names if busy[name] < names.count(name)), None)
        if device is None or _is_elsewhere(work):
            return None
        future = self._threads.submit(self._compute, work, device)
        self._running[future] = device
        return future

    def _compute(self, work: Work, device: str) -> list[Result]:
        """Compute a work on a device; this is a thread."""
        if len(work.devices) > 1:
            jobs = [replace(job, settings=job.settings.model_copy(update={"device": device})) for job in work.jobs]
            work = replace(work, jobs=jobs)
        try:
            results: list[Result] = self._processes.call(compute_on, work, device)
        except DeviceError as error:
            self._lost.add(device)
            if set(work.devices) - self._lost:
                log.warning("%s: its group moves to another device", error)
            raise
        return results

    def close(self, error: BaseException | None) -> None:
        """See ``Executor``: processes that are stopped early save their state first."""
        killed = self._processes.stop() if error is not None else 0
        if isinstance(error, Stopped):
            error.killed = killed


def _is_elsewhere(work: Work) -> bool:
    """Return whether other processes compute all cells of a work at the moment."""
    try:
        return all(cell_folder.is_held(cell.folder) for cell in work.cells)
    except OSError:  # its process says what is wrong with the folder
        return False


def compute_on(work: Work, device: str) -> list[Any]:
    """Do as ``worker.compute`` on one of the devices of this machine; on the CPU each process takes its threads.

    Raises:
        DeviceError: the device does not compute.
    """
    import torch

    if len(work.devices) > 1:
        os.environ["TQDM_DISABLE"] = "1"  # the progress bar would overwrite that of another process
    if (share := work.devices.count(device)) > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // share))
    try:
        torch.ones(8, device=device).sum().item()
    except Exception as error:
        raise DeviceError(f"{device} does not compute any more") from error
    return worker.compute(work)


class InProcess(Executor):
    """The executor that computes one cell after the other in this process, where a debugger can follow."""

    largest = 1
    _next: tuple[Work, Results] | None = None

    def preview(self, jobs: list[Job], *, times: bool) -> Preview:
        """See ``Executor``; steps are always timed."""
        result = worker.preview(jobs)
        return replace(result, devices={device: names[:1] for device, names in result.devices.items()})

    def submit(self, work: Work) -> Results | None:
        """See ``Executor``; ``look`` computes it."""
        if self._next is not None:
            return None
        self._next = work, Future()
        return self._next[1]

    def look(self) -> None:
        """See ``Executor``."""
        if self._next is not None:
            work, future = self._next
            future.set_result(worker.compute(work))
            self._next = None
