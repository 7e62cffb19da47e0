"""Shows the lockstep launchers to Hydra, which takes plugins from the namespace ``hydra_plugins`` alone.

This folder has no ``__init__.py``: one would hide the plugins of other packages.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from kdsweep.core.errors import InputError
from kdsweep.sweep import launcher


class LockstepLauncher(launcher.LockstepLauncher):
    """``hydra/launcher=lockstep``: groups on the devices of this machine; see kdsweep/sweep/engines/local.py."""

    def __init__(self, devices: Sequence[str] = (), *, processes: int = 1, plan: bool = False) -> None:
        from kdsweep.sweep.engines.local import Devices

        super().__init__(Devices(devices, processes=processes), plan=plan)


class SlurmLauncher(launcher.LockstepLauncher):
    """``hydra/launcher=lockstep_slurm``: groups as an array job; see kdsweep/sweep/engines/slurm.py."""

    def __init__(self, *, plan: bool = False, **options: Any) -> None:
        from kdsweep.sweep.engines.slurm import Slurm

        super().__init__(Slurm(**options), plan=plan)


class RayLauncher(launcher.LockstepLauncher):
    """``hydra/launcher=lockstep_ray``: groups as Ray tasks; see kdsweep/sweep/engines/ray.py."""

    def __init__(self, *, plan: bool = False, **options: Any) -> None:
        from kdsweep.sweep.engines.ray import OnRay

        super().__init__(OnRay(**options), plan=plan)


class LockstepSweeper(BasicSweeper):
    """``hydra/sweeper=lockstep``: Hydra's basic sweeper, which composes every job to see whether that can be done.

    The launchers compose and check every job before the first one starts, in a small part of the time. With a search
    space the jobs are tuned; see kdsweep/sweep/tuner.py. It is an option of this sweeper, not a sweeper of its own,
    since an experiment file cannot choose another sweeper than conf/config.yaml does.
    """

    def __init__(
        self, max_batch_size: int | None, params: Any = None, *, also: Sequence[str] = (), **tuning: Any
    ) -> None:
        super().__init__(max_batch_size, params)
        self._also, self._tuning = also, tuning

    def setup(self, **given: Any) -> None:
        """Take a launcher that tunes if there is something to tune."""
        super().setup(**given)
        if self._tuning["search"]:
            from kdsweep.sweep import tuner

            self.launcher = tuner.tuned(self.launcher, self._tuning)

    # Hydra's is a static method, which could not know the further grids; it is called on the sweeper all the same.
    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Return the jobs of the grid, then those of each grid of ``also``: its words take the place of the grid's."""
        assert self.hydra_context is not None
        parse = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides
        grids = [overrides]
        for words in self._also:
            try:
                own = parse(shlex.split(words))
            except ValueError as error:
                raise InputError(f"hydra.sweeper.also: {words}: {error}; its words are those of a shell") from error
            keys = {word.key_or_group for word in own}
            grids.append([*(word for word in overrides if word.key_or_group not in keys), *own])
        jobs = [job for grid in grids for batch in BasicSweeper.split_arguments(grid, None) for job in batch]
        size = max_batch_size or len(jobs)
        return [jobs[start : start + size] for start in range(0, len(jobs), size)]

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Leave it to the launcher."""


@dataclass
class LockstepSweeperConf(BasicSweeperConf):
    """As Hydra's basic sweeper, further grids, and what is tuned (each option of that: kdsweep/sweep/methods.py)."""

    _target_: str = "hydra_plugins.kdsweep_lockstep.LockstepSweeper"
    _recursive_: bool = False
    also: list[str] = field(default_factory=list)  # such as "method=cwd,at path=none": a grid beside that of params
    # Any, not a dict: into one without keys Hydra lets no command line put any.
    search: Any = None
    trials: int = 16
    round: int = 8
    sampler: Any = None
    pruner: Any = None
    storage: str | None = None
    budget: Any = None


@dataclass
class LockstepConf:
    """Options of ``hydra/launcher=lockstep``."""

    _target_: str = "hydra_plugins.kdsweep_lockstep.LockstepLauncher"
    devices: list[str] = field(default_factory=list)
    processes: int = 1
    plan: bool = False


@dataclass
class SlurmConf:
    """Options of ``hydra/launcher=lockstep_slurm``; each is described in kdsweep/sweep/engines/slurm.py."""

    _target_: str = "hydra_plugins.kdsweep_lockstep.SlurmLauncher"
    plan: bool = False
    largest: int | None = None
    wait: bool = True
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int = 1
    cpus_per_task: int = 8
    mem_gb: int = 32
    timeout_min: int = 720
    array_parallelism: int = 256
    max_num_timeout: int = 20
    additional_parameters: dict[str, str] = field(default_factory=dict)
    cluster: str = "slurm"


@dataclass
class RayConf:
    """Options of ``hydra/launcher=lockstep_ray``; each is described in kdsweep/sweep/engines/ray.py."""

    _target_: str = "hydra_plugins.kdsweep_lockstep.RayLauncher"
    plan: bool = False
    largest: int | None = None
    address: str | None = None
    gpus: float = 1.0
    cpus: int = 1
    memory_gb: float | None = None
    retries: int = 3


for name, node in (("lockstep", LockstepConf), ("lockstep_slurm", SlurmConf), ("lockstep_ray", RayConf)):
    ConfigStore.instance().store(group="hydra/launcher", name=name, node=node, provider="kdsweep")
ConfigStore.instance().store(group="hydra/sweeper", name="lockstep", node=LockstepSweeperConf, provider="kdsweep")
