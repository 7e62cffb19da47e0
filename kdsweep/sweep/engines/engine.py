"""The interface of all engines: this machine (local.py), SLURM (slurm.py) and Ray (ray.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omegaconf import DictConfig

from kdsweep.config.grid import Cell

if TYPE_CHECKING:
    from kdsweep.sweep.plan import Job, Preview


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
