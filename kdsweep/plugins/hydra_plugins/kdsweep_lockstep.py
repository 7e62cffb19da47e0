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
from hydra.utils import get_class

from kdsweep.core.errors import InputError
from kdsweep.sweep import launcher


class LockstepLauncher(launcher.LockstepLauncher):
    """The launcher of the configurations below: ``options`` are the arguments of the executor's class."""

    def __init__(self, *, executor: str, plan: bool = False, **options: Any) -> None:
        super().__init__(get_class(executor)(**options), plan=plan)


class LockstepSweeper(BasicSweeper):
    """``hydra/sweeper=lockstep``: Hydra's basic sweeper, but the launcher composes and checks the jobs, far faster.

    With a search space the jobs are tuned (kdsweep/sweep/tuner.py): an option of this sweeper, since an experiment file
    cannot choose another sweeper than conf/config.yaml does.
    """

    def __init__(
        self,
        max_batch_size: int | None,
        params: Any = None,
        *,
        also: Sequence[str] = (),
        is_one_cell: bool = False,
        **tuning: Any,
    ) -> None:
        super().__init__(max_batch_size, params)
        self._also, self._tuning, self._is_one_cell = () if is_one_cell else also, tuning, is_one_cell

    def setup(self, *, config: Any, **context: Any) -> None:
        """Check the sweep, and take a launcher that tunes if there is something to tune."""
        launcher.check_sweep(config, is_one_cell=self._is_one_cell)
        super().setup(config=config, **context)
        if self._tuning["search"]:
            from kdsweep.sweep import tuner

            self.launcher = tuner.tuned(self.launcher, self._tuning)

    # Hydra's is a static method, which could not read the further grids; Hydra calls it on the sweeper all the same.
    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Return the jobs of the grid, then those of each grid of ``also``, which replaces some of its overrides."""
        assert self.hydra_context is not None
        parse = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides
        grids = [overrides]
        for line in self._also:
            try:
                further = parse(shlex.split(line))
            except ValueError as error:
                raise InputError(f"hydra.sweeper.also: {line}: {error}; it is split as a shell does") from error
            keys = {override.key_or_group for override in further}
            grids.append([*(override for override in overrides if override.key_or_group not in keys), *further])
        jobs = [job for grid in grids for batch in BasicSweeper.split_arguments(grid, None) for job in batch]
        size = max_batch_size or len(jobs)
        return [jobs[start : start + size] for start in range(0, len(jobs), size)]

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Leave it to the launcher."""


@dataclass
class LockstepSweeperConf(BasicSweeperConf):
    """As Hydra's basic sweeper, further grids, and what is tuned (each option of that: kdsweep/tuning/tune.py)."""

    _target_: str = "hydra_plugins.kdsweep_lockstep.LockstepSweeper"
    _recursive_: bool = False
    also: list[str] = field(default_factory=list)  # such as "method=cwd,at path=none": a grid next to that of params
    is_one_cell: bool = False  # of a command without -m
    # Any, not a dict: into one without keys Hydra lets no command line put any.
    search: Any = None
    trials: int = 16
    round: int = 8
    sampler: Any = None
    pruner: Any = None
    storage: str | None = None


@dataclass
class OneByOneConf:
    """Options of ``hydra/launcher=one_by_one``: one cell after the other in this process, as without -m."""

    _target_: str = "hydra_plugins.kdsweep_lockstep.LockstepLauncher"
    executor: str = "kdsweep.sweep.executors.local.InProcess"
    plan: bool = False


@dataclass
class LockstepConf(OneByOneConf):
    """Options of ``hydra/launcher=lockstep``: groups on the devices of this machine."""

    executor: str = "kdsweep.sweep.executors.local.Local"
    devices: list[str] = field(default_factory=list)  # for groups at the same time; by default all of ``device``
    processes: int = 1  # groups at the same time on the CPU


@dataclass
class SlurmConf(OneByOneConf):
    """Options of ``hydra/launcher=lockstep_slurm``, with the names of Hydra's submitit launcher."""

    executor: str = "kdsweep.sweep.executors.slurm.Slurm"
    largest: int | None = None  # cells in a group, at most
    wait: bool = True  # stay until all is done; if not, the command ends when all is submitted
    partition: str | None = None  # for sbatch, as the next three; null leaves the cluster's default
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int = 1  # of each group, as the next two
    cpus_per_task: int = 8  # and so many threads
    mem_gb: int = 32
    timeout_min: int = 720  # of each job; a group that takes longer resumes in the next job
    array_parallelism: int = 256  # jobs that run at the same time, at most
    max_num_timeout: int = 20  # how often a job resumes after its time limit, at most
    additional_parameters: dict[str, str] = field(default_factory=dict)  # of sbatch, such as {reservation: course}
    cluster: str = "slurm"  # local: processes of this machine, all at once, to try things out


@dataclass
class RayConf(OneByOneConf):
    """Options of ``hydra/launcher=lockstep_ray``."""

    executor: str = "kdsweep.sweep.executors.ray.OnRay"
    largest: int | None = None  # cells in a group, at most
    address: str | None = None  # of a running cluster: auto, HOST:PORT; null starts one of this machine alone
    gpus: float = 1.0  # of each group; a fraction lets groups share a GPU
    cpus: int = 1  # of each group, and its number of threads
    memory_gb: float | None = None  # of each group; null leaves memory uncounted
    retries: int = 3  # the most restarts of a group whose machine or process died


NODES = {"lockstep": LockstepConf, "one_by_one": OneByOneConf, "lockstep_slurm": SlurmConf, "lockstep_ray": RayConf}
for name, node in NODES.items():
    ConfigStore.instance().store(group="hydra/launcher", name=name, node=node, provider="kdsweep")
ConfigStore.instance().store(group="hydra/sweeper", name="lockstep", node=LockstepSweeperConf, provider="kdsweep")
