"""What runs a sweep's groups: the contract of this machine (local.py), SLURM (slurm.py) and Ray (ray.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omegaconf import DictConfig

from kdsweep.config.grid import Cell

if TYPE_CHECKING:
    from kdsweep.sweep.plan import Job, Preview


DONE, SUBMITTED = "done", "submitted"  # outcomes of a unit without a result: of Teachers; of what is not waited for


@dataclass(frozen=True, eq=False)
class Unit:
    """What one process does: a function of worker.py with a group's configurations.

    Attributes:
        call: the function, first argument the configurations.
        make: gives the configurations of the group.
        places: names of the devices of this machine where it can run.
        cells: that it computes, or the Teacher; empty if the jobs are no cells.
        waits: whether it must not be started yet.
    """

    call: Callable[[list[DictConfig]], Any]
    make: Callable[[], list[DictConfig]]
    places: list[str]
    cells: list[Cell] = field(default_factory=list)
    waits: Callable[[], bool] = lambda: False


class Engine(Protocol):
    """Runs units, several at once if it can.

    Attributes:
        largest: so many cells at most in a group; None for ``plan.LARGEST``.
    """

    largest: int | None

    def open(self, config: DictConfig) -> None:
        """Take the configuration of the sweep; called once, first."""

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise InputError if it cannot run these cells as they are configured."""

    def preview(self, configs: list[DictConfig], *, times: bool) -> Preview:
        """Check the cells that wait where torch is.

        Args:
            configs: of these cells.
            times: whether steps are to be timed although nothing of that is trained here.
        """

    def queued(self, jobs: Sequence[Job]) -> set[Path]:
        """Folders of those of these cells that an earlier command has left with it."""

    def at_once(self, preview: Preview) -> int:
        """How many units can run at the same time, as far as it knows."""

    def run(self, units: Sequence[Unit], *, before: Sequence[Unit] = ()) -> Iterator[tuple[Unit, Any]]:
        """Run each unit in a process of its own; gives results or errors as they come.

        Args:
            units: in the order in which they should begin.
            before: units that the others depend on.
        """

    def close(self, error: BaseException | None) -> None:
        """End what still runs, if an error or a signal ends the command; else give back what is held."""
