"""The plan of a sweep: which jobs are which cells, what is finished, and which are trained together; without torch."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kdsweep.config import composition, decisions, grid, identity
from kdsweep.config.grid import TEACHER, Cell
from kdsweep.config.identity import Job
from kdsweep.config.schema import Settings
from kdsweep.core.files import without_folders
from kdsweep.store import cell_folder, sweep_file

LARGEST = 60  # cells in a group: more gain nothing (README, Lockstep), but each keeps a log open and Adam's state
FORMS = ("log", "range", "int")  # of the values of a tuned key, below it

# ---- jobs and their names --------------------------------------------------------------------------------------------


def read_jobs(configs: Iterable[DictConfig]) -> list[Job]:
    """Check all configurations of a command and return the jobs of their cells; raise the first InputError."""
    jobs, choices = [], []
    for cfg in configs:
        settings = composition.read(cfg)
        overrides = list(OmegaConf.select(cfg, "hydra.overrides.task") or [])
        choices.append(dict(OmegaConf.select(cfg, "hydra.runtime.choices") or {}))
        composition.check_grid(cfg, overrides, multirun=True)
        tuned = tuple(key for key in map(key_of, overrides) if grid.is_under(key, _searched(cfg)))
        kept = [override for override in overrides if key_of(override) not in tuned]
        # Groups of files have an effect, such as experiment; a user's key has if another one refers to it.
        keys = [key for key in map(key_of, kept) if not decisions.is_declared(key)]
        used = tuple(key for key in keys if key in choices[-1] or f"{{{key}}}" in OmegaConf.to_yaml(cfg))
        jobs.append(Job(settings, identity.cell(settings), kept, tuned=tuned, used=used))
    return read_states(name_variants(jobs, choices))


def key_of(override: str) -> str:
    """Return the key of an override."""
    return override.lstrip("+~").partition("=")[0]


def _searched(cfg: DictConfig) -> tuple[str, ...]:
    """Return the keys of which tuning sets the values: they differ between methods and splits, and are no variants."""
    search: Any = OmegaConf.to_container(OmegaConf.select(cfg, "hydra.sweeper.search") or OmegaConf.create())
    keys = [key.rpartition(".") for key in grid.flatten(search)]
    return tuple(node if name in FORMS else f"{node}.{name}".lstrip(".") for node, _, name in keys)


def read_states(jobs: Sequence[Job]) -> list[Job]:
    """Return jobs with what the store holds of their cells; those that were finished before stay as they are."""
    states = [job.finished or cell_folder.read_finished(job.cell.folder) for job in jobs]
    return [
        replace(job, finished=state, begun=0 if state else cell_folder.epochs(job.cell.folder))
        for job, state in zip(jobs, states, strict=True)
    ]


def name_variants(jobs: Sequence[Job], choices: Sequence[dict[str, str]]) -> list[Job]:
    """Return jobs whose cells have their variants: the swept values that distinguish cells of one name in a sweep.

    A key that an earlier command of the sweep varied counts too, so that a value can be added to its list later. One
    whose values all give the same cell does not. ``choices`` are each job's options of the groups of files.
    """
    sweeps: dict[tuple[Path, str], list[Job]] = defaultdict(list)
    for job in jobs:
        sweeps[job.cell.store, job.settings.sweep_name].append(job)
    keys = {sweep: [*swept_keys(members), *sweep_file.read(*sweep).swept] for sweep, members in sweeps.items()}
    if not any(keys.values()):
        return list(jobs)
    rows: list[dict[str, str]] = []
    shared: dict[str, Set[tuple[str, str]]] = {}  # by cell what all of its jobs have in common
    for job, options in zip(jobs, choices, strict=True):
        values = options | identity.params(job.settings)
        swept = keys[job.cell.store, job.settings.sweep_name]
        rows.append({key: str(values[key]) for key in swept if values.get(key) is not None})
    rows = _with_last_names(rows)
    for job, row in zip(jobs, rows, strict=True):
        shared[job.cell.fingerprint] = shared.get(job.cell.fingerprint, row.items()) & row.items()
    return [
        _named(job, {key: value for key, value in row.items() if (key, value) in shared[job.cell.fingerprint]})
        for job, row in zip(jobs, rows, strict=True)
    ]


def _with_last_names(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return rows in which a path is its last name, where no other value of its key has that name."""
    names = {item: without_folders(item[1]) for item in {item for row in rows for item in row.items()}}
    counts = Counter((key, name) for (key, _), name in names.items())
    return [
        {key: names[key, value] if counts[key, names[key, value]] == 1 else value for key, value in row.items()}
        for row in rows
    ]


def _named(job: Job, variant: dict[str, str]) -> Job:
    params, teacher = identity.params(job.settings), job.cell.teacher
    if teacher is not None:
        teacher = replace(teacher, variant=decisions.used_by(TEACHER, variant, params))
    variant = decisions.used_by(job.cell.role, variant, params)
    return replace(job, cell=replace(job.cell, variant=variant, teacher=teacher))


def swept_keys(jobs: Sequence[Job]) -> list[str]:
    """Return the keys and groups to which a command gives several values, beyond the names of cells and local keys.

    1e-3 and 0.001 are one value: those of a key are compared as the settings hold them.
    """
    typed = [{key_of(override): override.partition("=")[2] for override in job.overrides} for job in jobs]
    changed = [key for key in dict.fromkeys(itertools.chain(*typed)) if len({row.get(key) for row in typed}) > 1]
    keys = [key for key in changed if decisions.kind(key) not in ("name", "local")]
    params = [identity.params(job.settings) for job in jobs] if keys else []
    values = {key: {str(flat[key]) if key in flat else None for flat in params} for key in keys}
    return [key for key in keys if len(values[key]) > 1 or values[key] == {None}]


# ---- what is checked and requested -----------------------------------------------------------------------------------


def kinds(jobs: Sequence[Job]) -> list[Job]:
    """Return jobs that represent all others in the checks with torch: one for each batches, one for each kind."""
    first: dict[str, Job] = {}
    for job in jobs:
        for key in (identity.batches_key(job.settings, seed=0), kind_key(job.settings)):
            first.setdefault(key, job)
    return list(dict.fromkeys(first.values()))


def kind_key(settings: Settings) -> str:
    """Return a key that is equal for cells whose networks, KD terms and ends of training need one check only.

    Every key of the configuration counts except those that only number trainings or say how long they are. Of the
    floating-point numbers, which a sweep varies most, 0 and 1 count, and whether others are below, between or above.
    """
    counted: Any = {"seed": True, "split": True}
    counted |= {"train": {"epochs", "patience", "workers"}, "teacher": {"seed", "epochs"}}
    return grid.digest(json.loads(settings.model_dump_json(exclude=counted), parse_float=_range))


def _range(number: str) -> list[bool]:
    value = float(number)
    return [value >= 0, value > 0, value >= 1, value > 1]


def watch(jobs: Sequence[Job], *, command: str = "") -> None:
    """Write what each sweep requests, finished or not, to its file, and keep MLflow up to date with the folders."""
    from kdsweep.tracking import sync  # with mlflow, which the processes that train do not need

    mirrors: dict[tuple[Path, str | None, str], dict[str, list[Job]]] = defaultdict(lambda: defaultdict(list))
    for job in jobs:
        tracked = job.settings.tracking
        mirrors[job.cell.store, tracked.uri, tracked.experiment][job.settings.sweep_name].append(job)
    for (store, uri, experiment), sweeps in mirrors.items():
        folders = {name: _request(store, name, members, command) for name, members in sweeps.items()}
        trains = any(waiting(members) for members in sweeps.values())
        sync.Sync(store=store, uri=uri, experiment=experiment, sweeps=folders, trains=trains)


def _request(store: Path, sweep: str, jobs: list[Job], command: str) -> list[Path]:
    """Add the cells of jobs and their Teachers to the file of a sweep; return their folders."""
    cells, frozen, swept = [job.cell for job in unique(jobs)], [cell for cell, _ in teachers(jobs)], swept_keys(jobs)
    more = decisions.varied_keys([identity.params(job.settings) for job in jobs]) if swept else []
    tuned = list(dict.fromkeys(key for job in jobs for key in job.tuned))
    varied: Any = {"swept": swept, "varied": swept + more, "tuned": tuned}
    sweep_file.add(store, sweep, cells=cells, teachers=frozen, **varied, command=command)
    return [cell.folder for cell in [*frozen, *cells]]


# ---- groups ----------------------------------------------------------------------------------------------------------


def unique(jobs: Sequence[Job]) -> list[Job]:
    """Return the first job of each cell: ``path=none`` has no loss, so each loss requests it again."""
    return list({job.cell.fingerprint: job for job in reversed(jobs)}.values())[::-1]


def waiting(jobs: Sequence[Job]) -> list[Job]:
    """Return one job for each cell that is not finished."""
    return [job for job in unique(jobs) if job.finished is None]


def form_groups(
    jobs: Sequence[Job], *, devices: dict[str, list[str]], largest: int | None = None, apart: Set[Path] = frozenset()
) -> list[list[Job]]:
    """Form lockstep groups: jobs that can share every batch, divided where they would leave devices idle.

    ``devices`` are those where groups can run at the same time, by the value of ``device``. A group has at most
    ``largest`` cells, by default LARGEST. Cells of the folders ``apart`` are in a queue already.
    """
    keys = []
    for job in jobs:
        # What another command computes, or has left in a queue, is a group apart: that waits, and the others need not.
        state = f"{cell_folder.is_held(job.cell.folder)} {job.cell.folder in apart}"
        keys.append(f"{identity.batches_key(job.settings, seed=job.settings.seed)} {state}")
    likeness = [job.cell.input_digests.get("teacher", "") for job in jobs]
    counts = Counter(job.settings.device for job in jobs)
    groups = []
    for members in grid.group_by(keys):
        device = jobs[members[0]].settings.device
        share = -(-counts[device] // len(devices[device]))
        groups += grid.divide(members, largest=min(share, largest or LARGEST), likeness=likeness)
    return [[jobs[position] for position in members] for members in groups]


def teachers(jobs: Sequence[Job]) -> list[tuple[Cell, Job]]:
    """Return the Teachers that jobs learn from, each once, with a job that needs it."""
    return list({cell.folder: (cell, job) for job in jobs if (cell := job.cell.teacher) is not None}.values())


def missing_teachers(jobs: Sequence[Job]) -> list[tuple[Cell, Job]]:
    """Return those of ``teachers`` that the store lacks."""
    return [(cell, job) for cell, job in teachers(jobs) if cell_folder.read_finished(cell.folder) is None]
