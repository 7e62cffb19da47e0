"""Compute groups on this machine: each in a fresh process on one of its devices, or one by one in this process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kdsweep.core.errors import CellError, DeviceError, InputError
from kdsweep.core.signals import Stopped
from kdsweep.sweep.executors import worker
from kdsweep.sweep.executors.executor import Executor, Results, Work

if TYPE_CHECKING:
    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.plan import Job

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0

_Waiting = tuple[Work, Results]


class Local(Executor):
    """The executor of one machine: for each device a thread that starts one process after the other.

    Args:
        devices: for groups at the same time, such as ``[cuda:0,cuda:1]``; by default all that ``device`` names.
        processes: number of groups that run at the same time on the CPU; they share its threads.
    """

    def __init__(self, devices: Sequence[str] = (), *, processes: int = 1) -> None:
        if processes < 1:
            raise InputError(f"hydra.launcher.processes={processes} is not allowed: it must be at least 1")
        self.names = list(devices) or (["cpu"] * processes if processes > 1 else [])
        self._changed = threading.Condition()  # holds whatever the threads share
        self._waiting: list[_Waiting] = []
        self._running: set[worker.Process] = set()
        self._served: list[str] = []  # a device for each thread
        self._lost: set[str] = set()
        self._is_closed = self._has_said = False

    def preview(self, jobs: list[Job], *, times: bool) -> Preview:
        """See ``Executor``; steps are always timed."""
        from kdsweep.sweep import preview

        result: Preview = self._call(preview.preview_cells, jobs, self.names)
        return result

    def at_once(self, preview: Preview) -> int:
        """See ``Executor``."""
        return len(self.names or {name for names in preview.devices.values() for name in names})

    def submit(self, works: Sequence[Work], *, after: Sequence[Results] = ()) -> list[Results]:
        """See ``Executor``; what a device has that does not compute any more moves to another one."""
        wait(after)
        added: list[_Waiting] = [(work, Future()) for work in works]
        devices = list(dict.fromkeys(device for work in works for device in work.devices))
        devices = self.names if set(devices) <= set(self.names) else devices  # a name may stand there several times
        with self._changed:
            self._waiting += added
            for device in dict.fromkeys(devices):
                for _ in range(devices.count(device) - self._served.count(device)):
                    self._served.append(device)
                    threading.Thread(target=self._serve, args=(device,), daemon=True).start()
            self._fail_orphans()
            self._changed.notify_all()
        return [future for _, future in added]

    def close(self, error: BaseException | None) -> None:
        """See ``Executor``: processes that are stopped early save their state first."""
        if error is None:
            return
        with self._changed:
            self._is_closed = True
            running = list(self._running)
            self._changed.notify_all()
        killed = worker.stop(running)
        if isinstance(error, Stopped):
            error.killed = killed

    def _serve(self, device: str) -> None:
        """Compute what waits, one after the other; this is a thread."""
        while (waiting := self._next(device)) is not None:
            work, future = waiting
            share, is_alone = self._served.count(device), len(self._served) == 1
            jobs = work.jobs if is_alone else [on_device(job, device) for job in work.jobs]
            compute = partial(worker.compute_on, share=share, is_alone=is_alone)
            try:
                future.set_result(self._call(compute, replace(work, jobs=jobs, waits=bool), device))
            except DeviceError:
                self._lose(device, waiting)
            except Exception as error:
                future.set_exception(error)

    def _next(self, device: str) -> _Waiting | None:
        """Return the next work for a device once there is one; None when the device or the executor has ended."""
        with self._changed:
            while not self._is_closed and device not in self._lost:
                here = [waiting for waiting in self._waiting if device in waiting[0].devices]
                for waiting in here:
                    if not _waits(waiting[0]):
                        self._waiting.remove(waiting)
                        return waiting
                if here and not self._running and not self._has_said:
                    log.info("all that is left is computed by another command: waiting for it")
                    self._has_said = True
                self._changed.wait(LOOK_EVERY_S)
        return None

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in a fresh process."""
        with self._changed:
            if self._is_closed:
                raise CellError("the command has ended")
            process = worker.Process(function, *args)
            self._running.add(process)
        try:
            return process.result()
        finally:
            with self._changed:
                self._running.discard(process)
                self._changed.notify_all()

    def _lose(self, device: str, waiting: _Waiting) -> None:
        """Use a device no more; what it had to compute waits for another one."""
        with self._changed:
            self._lost.add(device)
            self._waiting.insert(0, waiting)
            if set(waiting[0].devices) - self._lost:
                log.warning("%s does not compute any more: its group moves to another device", device)
            self._fail_orphans()
            self._changed.notify_all()

    def _fail_orphans(self) -> None:
        for work, future in [waiting for waiting in self._waiting if set(waiting[0].devices) <= self._lost]:
            self._waiting.remove((work, future))
            future.set_exception(CellError(f"{', '.join(work.devices)} does not compute any more"))


def _waits(work: Work) -> bool:
    try:
        return work.waits()
    except OSError:  # its process says what is wrong with the folder
        return False


def on_device(job: Job, device: str) -> Job:
    """Return a job with another device."""
    return replace(job, settings=job.settings.model_copy(update={"device": device}))


class InProcess(Executor):
    """The executor that computes one cell after the other in this process, where a debugger can follow."""

    largest = 1
    is_queue = False

    def preview(self, jobs: list[Job], *, times: bool) -> Preview:
        """See ``Executor``; steps are always timed."""
        from kdsweep.sweep import preview

        result = preview.preview_cells(jobs, [])
        return replace(result, devices={device: names[:1] for device, names in result.devices.items()})

    def at_once(self, preview: Preview) -> int:
        """See ``Executor``."""
        return 1

    def submit(self, works: Sequence[Work], *, after: Sequence[Results] = ()) -> list[Results]:
        """See ``Executor``; all is done when it returns."""
        futures: list[Results] = [Future() for _ in works]
        for work, future in zip(works, futures, strict=True):
            future.set_result(worker.compute(work))
        return futures
