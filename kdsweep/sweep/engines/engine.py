"""The interface of all engines: this machine (local.py), SLURM (slurm.py) and Ray (ray.py)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omegaconf import DictConfig

from kdsweep.config.grid import Cell
from kdsweep.core.errors import DeviceError
from kdsweep.core.progress import plural
from kdsweep.runs import records

if TYPE_CHECKING:
    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.plan import Job


log = logging.getLogger(__name__)

DONE, SUBMITTED = "done", "submitted"  # outcomes of units without a result: of Teachers; of those not waited for


@dataclass(frozen=True, eq=False)
class Unit:
    """The work of one process: a function of worker.py with a group's configurations.

    Attributes:
        call: the function, first argument the configurations.
        make: returns the configurations of the group.
        places: names of the devices of this machine where it can run.
        cells: the cells, or the Teacher, that it computes; empty if the jobs are no cells.
        waits: returns whether the unit must not start yet.
        is_asked: whether its cells are those of a sweep; trials are not, and are not logged to MLflow.
    """

    call: Callable[[list[DictConfig]], Any]
    make: Callable[[], list[DictConfig]]
    places: list[str]
    cells: list[Cell] = field(default_factory=list)
    waits: Callable[[], bool] = lambda: False
    is_asked: bool = True


class Engine(Protocol):
    """An engine runs units, several at once if it can.

    Attributes:
        largest: the most cells in a group; None for ``plan.LARGEST``.
    """

    largest: int | None

    def open(self, config: DictConfig) -> None:
        """Take the configuration of the sweep; called once, first."""

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise InputError if the engine cannot run these cells as they are configured."""

    def preview(self, configs: list[DictConfig], *, times: bool) -> Preview:
        """Check the waiting cells in a process with torch.

        Args:
            configs: of these cells.
            times: whether to time steps even if this machine trains none of the cells.
        """

    def queued(self, jobs: Sequence[Job]) -> set[Path]:
        """Return the folders of those of these cells that an earlier command has left with the engine."""

    def at_once(self, preview: Preview) -> int:
        """Return how many units can run at the same time, as far as the engine knows."""

    def run(self, units: Sequence[Unit], *, before: Sequence[Unit] = ()) -> Iterator[tuple[Unit, Any]]:
        """Run each unit in a process of its own; yield results or errors as they come.

        Args:
            units: in the order in which they should begin.
            before: units that the others depend on.
        """

    def close(self, error: BaseException | None) -> None:
        """Stop running units if an error or a signal ends the command; else release what is held."""


def run_units(engine: Engine, units: Sequence[Unit], *, before: Sequence[Unit] = ()) -> Iterator[tuple[Unit, Any]]:
    """Run units as ``Engine.run`` does; what a failed device has ended goes on in fresh processes.

    Errors of CUDA's are raised late, so the first fresh process waits for each call, to learn which cell is to blame.
    That one fails, and the others go on without it and without waiting.

    Args:
        engine: runs them.
        units: in the order in which they should begin.
        before: units that the others depend on.
    """
    open_units, outcomes = {unit: unit for unit in units}, dict[Unit, Any]()
    searching = False
    while open_units:
        again: dict[Unit, Unit] = {}
        for part, found in engine.run(list(open_units), before=before):
            if part in before:
                yield part, found
                continue
            unit = open_units[part]
            outcomes[unit] = _merged(outcomes.get(unit), found)
            lost = _lost(outcomes[unit])
            if lost and not (searching and len(lost) == len(part.cells)):
                again[_rest(unit, lost, searching=not searching)] = unit
                continue
            for position in lost:  # nobody was found to blame: the device itself, or what the cells share
                records.write_failed(unit.cells[position].folder, str(outcomes[unit][position]))
            yield unit, outcomes.pop(unit)
        open_units, before, searching = again, (), not searching
        if again:
            count = plural(sum(len(unit.cells) for unit in again), "cell")
            search = "which wait for each kernel to find the one to blame"
            how = search if searching else "without the one to blame"
            log.warning("a device failed: going on in a fresh process with %s, %s", count, how)


def _lost(outcome: Any) -> list[int]:
    """Return the positions of results that a failed device has kept from being computed."""
    parts = outcome if isinstance(outcome, list) else []
    return [position for position, result in enumerate(parts) if isinstance(result, DeviceError)]


def _merged(before: Any, found: Any) -> Any:
    """Return the results of a unit, of which ``found`` are those that were lost before."""
    if before is None or not isinstance(found, list):
        return found
    for position, result in zip(_lost(before), found, strict=True):
        before[position] = result
    return before


def _rest(unit: Unit, positions: list[int], *, searching: bool) -> Unit:
    """Return a unit of a part of another one's cells."""
    return replace(
        unit,
        call=partial(blocking, unit.call) if searching else unit.call,
        make=partial(_chosen, unit.make, positions),
        cells=[unit.cells[position] for position in positions],
    )


def _chosen(make: Callable[[], list[DictConfig]], positions: list[int]) -> list[DictConfig]:
    configs = make()
    return [configs[position] for position in positions]


def blocking(call: Callable[[list[DictConfig]], Any], configs: list[DictConfig]) -> Any:
    """Call a function of configurations so that an error of CUDA's is raised by the cell that caused it; slower."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # read when CUDA is used first
    return call(configs)
