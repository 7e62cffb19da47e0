"""The options of tuning, and what would make the comparison of methods unfair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdsweep.config import identity
from kdsweep.core.errors import InputError
from kdsweep.sweep import plan
from kdsweep.sweep.plan import Job
from kdsweep.tuning import space
from kdsweep.tuning.tune import Reader, overrides_of, roles


@dataclass(frozen=True)
class Options:
    """Options of the sweeper beyond the jobs; see conf/experiment/tuned.yaml.

    Attributes:
        search: the keys that are tuned, and their values.
        trials: of each method on each split, the configured settings among them.
        round: how many of them are trained side by side; what a round has shown guides the sampler in the next.
        sampler: ``_target_`` and arguments of one of Optuna's; empty for TPE.
        pruner: the same of a pruner; empty for successive halving (``pruning.make``).
        storage: address of Optuna's database; None for a SQLite file in the store.
    """

    search: Mapping[str, Any]
    trials: int = 16
    round: int = 8
    sampler: Mapping[str, Any] = field(default_factory=dict)
    pruner: Mapping[str, Any] = field(default_factory=dict)
    storage: str | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "round"):
            if getattr(self, name) < 1:
                raise InputError(f"hydra.sweeper.{name}={getattr(self, name)} is not allowed: it must be at least 1")
        for name in ("search", "sampler", "pruner"):
            if not isinstance(own := getattr(self, name), Mapping):
                raise InputError(f"hydra.sweeper.{name}={own} is not allowed: it must be {{KEY: VALUE, ...}}")


def check_jobs(jobs: Sequence[Job], *, whole: space.Space, waits: bool, read: Reader) -> None:
    """Raise InputError if jobs cannot be tuned fairly.

    Args:
        jobs: as they are configured.
        whole: the search space.
        waits: whether the launcher waits for its groups.
        read: reads jobs from their overrides.
    """
    if not waits:
        raise InputError("hydra.launcher.wait=false: the next trials depend on those before; leave it out")
    for key in ("store", "sweep_name"):
        if len(values := {getattr(job.settings, key) for job in jobs}) > 1:
            raise InputError(f"{key}={','.join(sorted(values))}: one command tunes one sweep; give one value")
    for key in plan.swept_keys(jobs):
        if key in whole:
            raise InputError(f"{space.KEY}: {key} is swept by the command too; tune it or sweep it")
    for job in jobs:
        train, one_measure = job.settings.train, "all methods are chosen by one measure; give dice"
        if train.monitor != "dice":
            raise InputError(f"train.monitor={train.monitor}: {one_measure}")
        if job.cell.teacher is not None and job.settings.teacher.monitor != "dice":
            raise InputError(f"teacher.monitor={job.settings.teacher.monitor}: {one_measure}")
        if train.patience < train.epochs:
            raise InputError(
                f"train.patience={train.patience}: a method would be stopped by its own curve, so that budgets "
                "differ; give train.patience=${train.epochs}"
            )
    if not whole:
        raise InputError(f"{space.KEY}: all of its keys are null, so nothing is tuned; give one its values")
    for key, ends in space.ends(whole).items():
        user = next((job for job in jobs if any(_uses(job, role, key, whole) for role in roles(job))), None)
        if user is None:
            names = ", ".join(dict.fromkeys(job.cell.notation for job in jobs))
            raise InputError(f"{space.KEY}: {key} is used by none of {names}; {space.KEY}.{key}=null leaves it out")
        for value in ends:  # which raises if the key does not take it
            read([[*user.overrides, *overrides_of(1, {key: value})]])


def _uses(job: Job, role: str, key: str, whole: space.Space) -> bool:
    return key in space.used({key: whole[key]}, role=role, params=identity.params(job.settings))
