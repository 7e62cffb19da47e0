"""The overrides of a command that no cell uses: nothing that is typed is dropped without a message."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from kdsweep.config import decisions, identity
from kdsweep.config.grid import TEACHER
from kdsweep.sweep.plan import Job, key_of

log = logging.getLogger(__name__)


def name_idle(jobs: Sequence[Job], configs: Sequence[DictConfig]) -> None:
    """Log one line that names the overrides which no cell uses.

    Args:
        jobs: all jobs of the command.
        configs: of these jobs, which may refer to keys that the settings do not hold.
    """
    idle = {key_of(override): override for job in jobs for override in job.overrides}
    for number, job in enumerate(jobs):
        idle = {key: override for key, override in idle.items() if not _is_used(key, job, configs, number)}
        if not idle:
            return
    names = list(dict.fromkeys(job.cell.notation for job in jobs))
    cells = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    log.warning("%s: used by no cell of this command (%s), so without effect", ", ".join(idle.values()), cells)


def _is_used(key: str, job: Job, configs: Sequence[DictConfig], number: int) -> bool:
    """Return whether a key has an effect on a cell or its Teacher.

    A group of files has, such as experiment; a user's key has if another one refers to it.
    """
    if not decisions.is_declared(key):
        groups = OmegaConf.select(configs[number], "hydra.runtime.choices") or {}
        return key in groups or f"{{{key}}}" in OmegaConf.to_yaml(configs[number])
    if decisions.names_cell(key) or decisions.is_neutral(key):  # the Student is path=none with any loss
        return True
    params, roles = identity.params(job.settings), [job.cell.role, *([TEACHER] if job.cell.teacher else [])]
    return any(decisions.decides(key, role=role, params=params) for role in roles)
