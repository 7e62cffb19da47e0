"""Run groups on the devices of this machine: each in a spawned process, one at a time on each device."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn
from omegaconf import DictConfig

from kdsweep.core.errors import CellError, InputError
from kdsweep.core.signals import Stopped
from kdsweep.sweep.engines.engine import Unit

if TYPE_CHECKING:
    from kdsweep.sweep.engines.worker import Worker
    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.plan import Job

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


class Devices:
    """The engine of one machine.

    Args:
        names: devices for groups at the same time, such as ``[cuda:0,cuda:1]``; by default all that ``device`` names.
        processes: number of groups that run at the same time on the CPU; they share its threads.
    """

    largest: int | None = None

    def __init__(self, names: Sequence[str] = (), *, processes: int = 1) -> None:
        if processes < 1:
            raise InputError(f"hydra.launcher.processes={processes} is not allowed: it must be at least 1")
        self.names = list(names) or (["cpu"] * processes if processes > 1 else [])
        self._idle: Worker | None = None  # started, and used by the first group on the device where it has timed steps
        self._idle_on = ""
        self._busy: dict[int, tuple[Unit, Worker]] = {}

    def open(self, config: DictConfig) -> None:
        """See ``Engine``."""
        self._config = config

    def check(self, jobs: Sequence[Job]) -> None:
        """See ``Engine``: any cell can be trained here."""

    def preview(self, configs: list[DictConfig], *, times: bool) -> Preview:
        """See ``Engine``; steps are always timed."""
        from kdsweep.sweep.engines import worker

        self._idle = worker.start(self._config)
        found: Preview = self._idle.call(worker.preview_cells, configs, self.names)
        self._idle_on = found.timed_on
        return found

    def queued(self, jobs: Sequence[Job]) -> set[Path]:
        """See ``Engine``: processes end with the command."""
        return set()

    def at_once(self, preview: Preview) -> int:
        """See ``Engine``."""
        return len(self.names or {name for names in preview.devices.values() for name in names})

    def close(self, error: BaseException | None) -> None:
        """See ``Engine``: processes that are stopped early save their state first."""
        from kdsweep.sweep.engines import worker

        running = [process for _, process in self._busy.values()]
        idle, self._idle, self._busy = self._idle, None, {}
        if error is not None:
            number = error.number if isinstance(error, Stopped) else signal.SIGTERM
            killed = worker.stop([*running, *([idle] if idle is not None else [])], number)
            if isinstance(error, Stopped):
                error.killed = killed
        elif idle is not None:
            idle.close()

    def run(self, units: Sequence[Unit], *, before: Sequence[Unit] = ()) -> Iterator[tuple[Unit, Any]]:
        """See ``Engine``.

        A unit whose device has failed runs on another one, as long as there is one.
        """
        named = list(dict.fromkeys(place for unit in [*before, *units] for place in unit.places))
        places = self.names if set(named) <= set(self.names) else named  # a name may stand there twice
        if self._idle is not None and self._idle_on not in places:  # it would hold memory of another device
            self._idle.close()
            self._idle = None
        yield from self._run(before, places)
        yield from self._run(units, places)

    def _run(self, units: Sequence[Unit], places: list[str]) -> Iterator[tuple[Unit, Any]]:
        waiting, lost = list(units), set[str]()
        told = False
        while waiting or self._busy:
            for orphan in [unit for unit in waiting if set(unit.places) <= lost]:
                waiting.remove(orphan)
                yield orphan, CellError(f"{', '.join(orphan.places)} does not compute any more")
            self._begin(waiting, places, lost)
            if waiting and not self._busy:
                if not told:
                    log.info("all that is left is computed by another command: waiting for it")
                told = True
                time.sleep(LOOK_EVERY_S)
            arrived = wait([process.connection for _, process in self._busy.values()], timeout=LOOK_EVERY_S)
            for number, (unit, process) in list(self._busy.items()):
                if process.connection not in arrived:
                    continue
                outcome = process.outcome()
                del self._busy[number]
                process.close()
                place = places[number]
                elsewhere = set(unit.places) - lost - {place}
                if elsewhere and _failed(outcome) and (place in lost or self._is_lost(place)):
                    log.warning("%s does not compute any more: its group moves to another device", place)
                    lost.add(place)
                    waiting.insert(0, unit)
                else:
                    yield unit, outcome

    def _begin(self, waiting: list[Unit], places: list[str], lost: set[str]) -> None:
        """Start units on free devices."""
        from kdsweep.sweep.engines import worker

        ready = [unit for unit in waiting if not unit.waits()]
        for number, place in enumerate(places):
            unit = next((unit for unit in ready if place in unit.places), None)
            if unit is not None and number not in self._busy and place not in lost:
                waiting.remove(unit)
                ready.remove(unit)
                process = None
                if self._idle is not None and self._idle_on in ("", place):
                    process, self._idle = self._idle, None
                process = process or worker.start(self._config)
                self._busy[number] = unit, process
                name = place if len(places) > 1 else ""
                process.send(worker.pin, unit.call, unit.make(), name, places.count(place))

    def _is_lost(self, place: str) -> bool:
        """Return whether a CUDA device fails in a fresh process too."""
        from kdsweep.sweep.engines import worker

        if not place.startswith("cuda"):
            return False
        process = worker.start(self._config)
        process.send(worker.probe, place)
        outcome = process.outcome()
        process.close()
        return isinstance(outcome, Exception)


def _failed(outcome: Any) -> bool:
    """Return whether any part of a unit failed."""
    parts = outcome if isinstance(outcome, list) else [outcome]
    return any(isinstance(own._return_value if isinstance(own, JobReturn) else own, Exception) for own in parts)
