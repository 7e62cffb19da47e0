"""The keys that a command gives and that no cell uses: nothing that is typed is dropped without a word."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from kdsweep.config import grid, identity
from kdsweep.config.schema import DataNode, LossNode, Node, PathNode
from kdsweep.sweep.plan import Job

log = logging.getLogger(__name__)

# Parts of the configuration that may have keys of the user's own, to which other keys refer.
OPEN: dict[str, type[Node]] = {"path": PathNode, "loss": LossNode, "data": DataNode}


def name_idle(jobs: Sequence[Job], configs: Sequence[DictConfig]) -> None:
    """Log one line that names the typed keys which no cell uses.

    Args:
        jobs: all jobs of the command.
        configs: of these jobs, which may refer to keys that the settings do not hold.
    """
    idle = {_key(word): word for job in jobs for word in job.overrides if not _is_factor(_key(word))}
    for number, job in enumerate(jobs):
        if not idle:
            return
        params, roles = identity.params(job.settings), [job.cell.role, *(["teacher"] if job.cell.teacher else [])]
        unused = [grid.unused(role, params) for role in roles]
        used = {
            key
            for key in idle
            if any(not grid.is_under(key, keys) for keys in unused) and _is_read(key, configs, number)
        }
        idle = {key: word for key, word in idle.items() if key not in used}
    if idle:
        names = list(dict.fromkeys(job.cell.notation for job in jobs))
        cells = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        log.warning("%s: used by no cell of this command (%s), so without effect", ", ".join(idle.values()), cells)


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _is_factor(key: str) -> bool:
    """Return whether a key names a cell: the Student is path=none with any loss."""
    return key in grid.NAMES


def _is_read(key: str, configs: Sequence[DictConfig], number: int) -> bool:
    """Return whether the program reads a key, or another key refers to it."""
    section, _, name = key.partition(".")
    if section not in OPEN or "." in name or name in OPEN[section].model_fields:
        return True
    return not name or f"{{{key}}}" in OmegaConf.to_yaml(configs[number])
