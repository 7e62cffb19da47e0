"""The plan of a sweep: which jobs are which cells, what is finished, and which are trained together.

Runs without torch.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kdsweep.config import composition, decisions, grid, identity
from kdsweep.config.grid import Cell
from kdsweep.config.schema import Settings
from kdsweep.core.errors import InputError
from kdsweep.core.progress import plural
from kdsweep.store import cell_folder, sweep_file

log = logging.getLogger(__name__)

LARGEST = 60  # cells in a group: more gain nothing (README, Lockstep), but each keeps a log open and Adam's state


@dataclass(frozen=True, eq=False)
class Job(identity.Job):
    """A job of a sweep, with the state of its cell in the store.

    Attributes:
        finished: final values of an earlier computation of the cell, if there is one.
        begun: epochs that the cell has behind it and that a checkpoint holds.
        tuned: keys of which tuning has set the values.
    """

    finished: dict[str, float] | None = None
    begun: int = 0
    tuned: tuple[str, ...] = ()

    @property
    def epochs_left(self) -> int:
        """Return how many epochs are left if no early stop ends it sooner."""
        return max(0, self.settings.train.epochs - self.begun)


def read_jobs(configs: Sequence[DictConfig]) -> list[Job]:
    """Check all configurations of a command and return the jobs of their cells.

    Raises:
        InputError: the first error of a configuration.
    """
    jobs: list[Job] = []
    choices: list[dict[str, str]] = []  # the options of each group of configuration files
    for cfg in configs:
        settings = composition.read(cfg)
        if OmegaConf.select(cfg, "hydra.job.chdir"):
            why = "relative paths count from the folder of the command, and cells of a group share their process"
            raise InputError(f"hydra.job.chdir=true is not allowed: {why}; leave it out")
        overrides = list(cfg.hydra.overrides.task) if "hydra" in cfg else []
        choices.append(dict(cfg.hydra.runtime.choices) if "hydra" in cfg else {})
        composition.check_grid(cfg, overrides)
        keys = _tuned_keys(cfg)
        tuned = tuple(key for key in map(key_of, overrides) if grid.is_under(key, keys))
        kept = [override for override in overrides if key_of(override) not in tuned]
        jobs.append(Job(settings, identity.cell(settings), kept, tuned=tuned))
    return [_with_state(job) for job in name_variants(jobs, choices)]


def key_of(override: str) -> str:
    """Return the key of an override."""
    return override.lstrip("+~").partition("=")[0]


def _with_state(job: Job) -> Job:
    finished = cell_folder.read_finished(job.cell.folder)
    return replace(job, finished=finished, begun=0 if finished else cell_folder.epochs(job.cell.folder))


def _tuned_keys(cfg: DictConfig) -> tuple[str, ...]:
    """Return the keys of which tuning sets the values: they differ between methods and splits, and are no variants."""
    search: Any = OmegaConf.to_container(OmegaConf.select(cfg, "hydra.sweeper.search") or OmegaConf.create())
    keys = [re.sub(r"\.(log|range|int)$", "", key) for key in grid.flatten(search)]
    return tuple(keys)


def name_variants(jobs: Sequence[Job], choices: Sequence[dict[str, str]]) -> list[Job]:
    """Return jobs whose cells have their variants: the swept values that distinguish cells of one name in a sweep.

    A key that an earlier command of the sweep varied counts too, so that a value can be added to its list later. One
    whose values all give the same cell does not.

    Args:
        jobs: of one command.
        choices: by job the options of each group of configuration files.
    """
    sweeps: dict[tuple[Path, str], list[Job]] = {}
    for job in jobs:
        sweeps.setdefault((job.cell.store, job.settings.sweep_name), []).append(job)
    keys = {
        place: [
            *swept_keys([job.overrides for job in own], [job.settings for job in own]),
            *sweep_file.read(*place).swept,
        ]
        for place, own in sweeps.items()
    }
    if not any(keys.values()):
        return list(jobs)
    rows = []
    for job, options in zip(jobs, choices, strict=True):
        values = options | identity.params(job.settings)
        swept = keys[job.cell.store, job.settings.sweep_name]
        rows.append({key: str(values[key]) for key in swept if values.get(key) is not None})
    shared: dict[str, dict[str, str]] = {}
    for job, row in zip(jobs, rows, strict=True):
        same = shared.setdefault(job.cell.fingerprint, row)
        shared[job.cell.fingerprint] = {key: value for key, value in same.items() if row.get(key) == value}
    return [_named(job, shared[job.cell.fingerprint]) for job in jobs]


def _named(job: Job, variant: dict[str, str]) -> Job:
    params = identity.params(job.settings)
    teacher = job.cell.teacher
    if teacher is not None:
        teacher = replace(teacher, variant=decisions.used_by(teacher.role, variant, params))
    cell = replace(job.cell, variant=decisions.used_by(job.cell.role, variant, params), teacher=teacher)
    return replace(job, cell=cell)


def swept_keys(overrides: Sequence[Sequence[str]], read: Sequence[Settings]) -> list[str]:
    """Return the keys and groups to which a command gives several values, beyond the names of cells and local keys.

    1e-3 and 0.001 are one value: those of a key are compared as the settings hold them.

    Args:
        overrides: of each job.
        read: settings of each job.
    """
    values = [{key_of(each): each.partition("=")[2] for each in job} for job in overrides]
    changed = [key for key in dict.fromkeys(itertools.chain(*values)) if len({job.get(key) for job in values}) > 1]
    keys = [key for key in changed if not (decisions.names_cell(key) or decisions.is_local(key))]
    params = [identity.params(settings) for settings in read] if keys else []
    read_values = {key: {str(flat[key]) if key in flat else None for flat in params} for key in keys}
    return [key for key in keys if len(read_values[key]) > 1 or read_values[key] == {None}]


def kinds(jobs: Sequence[Job]) -> list[Job]:
    """Return jobs that stand for all others in the checks where torch is: one for each batches, one for each kind."""
    found: dict[str, Job] = {}
    for job in jobs:
        for key in (identity.batches_key(job.settings, seed=0), kind_key(job.settings)):
            found.setdefault(key, job)
    return list({job.cell.folder: job for job in found.values()}.values())


def kind_key(settings: Settings) -> str:
    """Return a key that is equal for cells whose networks, KD terms and ends of training need one check only.

    Every key of the configuration counts except those that only number trainings or say how long they are. Of the
    floating-point numbers, which a sweep varies most, 0 and 1 count, and whether others are below, between or above.
    """
    counted: Any = {"seed": True, "split": True}
    counted |= {"train": {"epochs", "patience", "workers"}, "teacher": {"seed", "epochs"}}
    return grid.digest(_coarse(settings.model_dump(exclude=counted)))


def _coarse(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _coarse(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_coarse(own) for own in value]
    if isinstance(value, float) and value not in (0, 1):
        return f"{value > 0} {value > 1}"
    return value


def watch(jobs: Sequence[Job], *, command: str = "") -> None:
    """Write what each sweep requests, finished or not, to its file, and keep MLflow up to date with the folders.

    Args:
        jobs: all that are requested.
        command: that requests them, as it can be typed again.
    """
    from kdsweep.tracking import sync  # with mlflow, which the processes that train do not need

    mirrors: dict[tuple[Path, str | None, str], dict[str, list[Job]]] = {}
    for job in jobs:
        tracked = job.settings.tracking
        sweeps = mirrors.setdefault((job.cell.store, tracked.uri, tracked.experiment), {})
        sweeps.setdefault(job.settings.sweep_name, []).append(job)
    for (store, uri, experiment), sweeps in mirrors.items():
        folders = {}
        for sweep, members in sweeps.items():
            cells, teachers = [job.cell for job in unique(members)], teacher_cells(members)
            folders[sweep] = [cell.folder for cell in [*teachers, *cells]]
            swept = swept_keys([job.overrides for job in members], [job.settings for job in members])
            sweep_file.add(
                store,
                sweep,
                cells=cells,
                teachers=teachers,
                swept=swept,
                varied=swept + decisions.varied_keys([identity.params(job.settings) for job in members])
                if swept
                else [],
                tuned=list(dict.fromkeys(key for job in members for key in job.tuned)),
                command=command,
            )
        trains = any(waiting(members) for members in sweeps.values())
        sync.Sync(store=store, uri=uri, experiment=experiment, sweeps=folders, trains=trains)


def teacher_cells(jobs: Sequence[Job]) -> list[Cell]:
    """Return the Teachers that jobs learn from, each once."""
    return list({cell.folder: cell for job in jobs if (cell := job.cell.teacher) is not None}.values())


def tell_changes(jobs: Sequence[Job]) -> None:
    """Say why cells are computed that the store holds under the same name: what changed since."""
    asked = {job.cell.folder for job in jobs}
    new: dict[str, list[Job]] = {}
    for job in waiting(jobs):
        if job.tuned:  # others of its name are its study's trials
            continue
        if (before := cell_folder.read_predecessor(job.cell, besides=asked)) is not None:
            new.setdefault(_difference(before, job.cell), []).append(job)
    for difference, own in new.items():
        log.info(
            "%s new (%s): the store holds results of that name, but %s",
            f"{plural(len(own), 'cell')} {'is' if len(own) == 1 else 'are'}",
            ", ".join(job.cell.title for job in own[:3]) + (", ..." if len(own) > 3 else ""),
            difference,
        )


def _difference(before: dict[str, Any], cell: Cell) -> str:
    """Return in words what differs between an earlier cell of the same name and this one."""
    old_evidence = before["evidence"]
    version = old_evidence.get("results_version", "0")  # the first ones had none
    if version != str(grid.RESULTS_VERSION):
        return (
            f"they are of results version {version}, this is version {grid.RESULTS_VERSION}; "
            "their tables, report and predictions can still be made"
        )
    old, new = grid.flatten(before["settings"]), grid.flatten(cell.settings)
    keys = [key for key in sorted(old.keys() | new.keys()) if repr(old.get(key)) != repr(new.get(key))]  # 1 is not 1.0
    found = [f"{key} ({old.get(key, 'unset')} -> {new.get(key, 'unset')})" for key in keys]
    names = {"user_code": "your own code", "data": "the images", "student_weights": "the file of student.weights"}
    names |= {"split": "the images of the split's parts", "groups": "the groups of split.group"}
    found += [words for key, words in names.items() if old_evidence.get(key) != cell.evidence.get(key)]
    if not found and old_evidence.get("teacher") != cell.evidence.get("teacher"):
        found = ["its Teacher"]
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return f"since then this has changed: {', '.join(found[:4])}{more}"


def unique(jobs: Sequence[Job]) -> list[Job]:
    """Return the first job of each cell: ``path=none`` has no loss, so each loss asks for it again."""
    return list({job.cell.fingerprint: job for job in reversed(jobs)}.values())[::-1]


def waiting(jobs: Sequence[Job]) -> list[Job]:
    """Return one job for each cell that is not finished."""
    return [job for job in unique(jobs) if job.finished is None]


def read_again(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs with the results of those that have been finished since they were read."""
    return [job if job.finished else replace(job, finished=cell_folder.read_finished(job.cell.folder)) for job in jobs]


def tell_finished(job: Job) -> None:
    """Log one line that names the run of a cell that is not computed again."""
    from kdsweep.tracking import sync

    run_id = sync.run_id(job.cell.folder) or "not in MLflow yet"
    log.info("%s: finished already, run %s in %s", job.cell.title, run_id, job.cell.folder)


def failure(cell: Cell, error: object) -> str:
    """Return a line on a cell that failed: why, and where to read more."""
    text = str(error)
    return f"{'' if text.startswith(cell.title) else f'{cell.title}: '}{text}; log: {cell.folder / 'kdsweep.log'}"


def form_groups(
    jobs: Sequence[Job], *, devices: dict[str, list[str]], largest: int | None = None, apart: Set[Path] = frozenset()
) -> list[list[Job]]:
    """Form lockstep groups: jobs that can share every batch, divided where they would leave devices idle.

    Args:
        jobs: each of another cell.
        devices: names of those where groups can run at the same time, by the value of ``device``.
        largest: so many at most in a group, however few devices there are; None for LARGEST.
        apart: folders of cells that are in a queue already, and so in groups of their own.
    """
    keys = [identity.batches_key(job.settings, seed=job.settings.seed) for job in jobs]
    # What another command is at, or has left in a queue, is a group of its own: that waits, and the others need not.
    taken = [(cell_folder.is_held(job.cell.folder), job.cell.folder in apart) for job in jobs]
    keys = [f"{key} {of}" for key, of in zip(keys, taken, strict=True)]
    likeness = [job.cell.evidence.get("teacher", "") for job in jobs]
    alike = Counter(job.settings.device for job in jobs)
    groups = []
    for members in grid.group_by(keys):
        device = jobs[members[0]].settings.device
        share = -(-alike[device] // len(devices[device]))
        groups += grid.divide(members, largest=min(share, largest or LARGEST), likeness=likeness)
    return [[jobs[position] for position in members] for members in groups]


def missing_teachers(jobs: Sequence[Job]) -> list[tuple[Cell, Job]]:
    """Return the Teachers that these jobs need and the store lacks, each with a job that needs it."""
    needed = {cell.fingerprint: (cell, job) for job in jobs if (cell := job.cell.teacher) is not None}
    return [(cell, job) for cell, job in needed.values() if cell_folder.read_finished(cell.folder) is None]
