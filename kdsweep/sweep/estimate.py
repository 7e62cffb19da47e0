"""Describe a sweep before it runs, without torch: its cells, the time at most, changes, overrides without effect."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from kdsweep.config import decisions, grid, identity, inputs
from kdsweep.config.grid import TEACHER, Cell
from kdsweep.config.identity import Job
from kdsweep.config.schema import Settings
from kdsweep.core.errors import some
from kdsweep.core.progress import duration, left_s, plural
from kdsweep.data.folders import QUIET, ignored_line
from kdsweep.store import cell_folder
from kdsweep.sweep import plan
from kdsweep.sweep.plan import key_of

log = logging.getLogger(__name__)

NAMED = 12  # Teachers in a plan


@dataclass(frozen=True)
class Preview:
    """Devices, and seconds of an epoch, that the check of the real networks returns (rehearsal.py)."""

    devices: dict[str, list[str]]  # where groups can run at the same time, by the value of ``device``
    timed_on: str = ""  # a device; empty if the seconds are guesses, which only put groups in order
    student_epoch_s: float = 1.0  # steps and validation, as for a Teacher that is trained
    teacher_epoch_s: float = 4.0
    forward_epoch_s: float = 1.0  # of a frozen Teacher; those in validation are computed once for all epochs
    threads: int = 0  # of the timed steps, on the CPU

    @property
    def places(self) -> int:
        """Return how many groups can run at the same time; on the CPU these are processes."""
        return max(len(names) for names in self.devices.values())


def group_s(group: Sequence[Job], preview: Preview) -> float:
    """Return the seconds of a group on one device once its Teachers are trained, if no early stop ends a cell."""
    forwards = {forward_of(job) for job in group if job.cell.teacher is not None}
    epochs = max(job.epochs_left for job in group)
    students = [(job.epochs_left, _student_epoch_s(job, preview)) for job in group]
    return left_s([[*students, (epochs * len(forwards), preview.forward_epoch_s)]])


def _student_epoch_s(job: Job, preview: Preview) -> float:
    """Return the seconds of a cell's epoch: as recorded, without the Teacher's forwards, or else of timed steps."""
    seconds = cell_folder.read(job.cell.folder).seconds if job.begun else []
    forwards_s = preview.forward_epoch_s if job.cell.teacher is not None else 0.0
    return max(0.0, statistics.mean(seconds) - forwards_s) if seconds else preview.student_epoch_s


def teachers_s(jobs: Sequence[Job], preview: Preview, *, places: int = 1) -> float:
    """Return the seconds of training the Teachers that these jobs lack, on so many devices."""
    missing = plan.missing_teachers(jobs)
    left = [max(0, job.settings.teacher_epochs - cell_folder.epochs(cell.folder)) for cell, job in missing]
    return left_s([[(epochs, preview.teacher_epoch_s)] for epochs in left], places=places)


def longest_s(groups: Sequence[Sequence[Job]], preview: Preview, *, places: int = 1) -> float:
    """Return the seconds until groups have ended on so many devices, Teachers first."""
    jobs, seconds = list(chain(*groups)), [[(1, group_s(group, preview))] for group in groups]
    return teachers_s(jobs, preview, places=places) + left_s(seconds, places=places)


def forward_of(job: Job) -> tuple[str, str, str]:
    """Return which Teacher forward a cell learns from; jobs with equal ones share it."""
    view, precision = job.settings.teacher_aug.distill_view, job.settings.kd.teacher_precision
    return job.cell.input_digests["teacher"], view, precision


def describe(jobs: Sequence[Job], *, groups: Sequence[Sequence[Job]], preview: Preview | None) -> str:
    """Return one line on what will run: cells, groups, Teachers, data, device, the longest that it can take.

    ``jobs`` are all of the sweep, ``groups`` those that wait, as they are trained together.
    """
    unique, waiting = plan.unique(jobs), list(chain(*groups))
    first, begun = unique[0].settings, sum(job.begun > 0 for job in waiting)
    repeats = f" ({len(jobs) - len(unique)} repeated jobs are the same cell)" if len(jobs) > len(unique) else ""
    resumed = f", {begun} of them from a checkpoint" if begun else ""
    finished = len(unique) - len(waiting)
    parts = [f"{plural(len(unique), 'cell')}{repeats}: {len(waiting)} to run{resumed}, {finished} finished"]
    if groups:
        shared, missing = len(plan.teachers(waiting)), len(_untrained_teachers(waiting))
        counts = [plural(len(groups), "lockstep group"), plural(shared, "shared Teacher"), plural(missing, "Teacher")]
        parts.append(f"{', '.join(counts)} to train")
    parts.append(describe_data(first))
    if preview is not None:
        parts.append(_describe_time(groups, preview))
    return "; ".join([*parts, f"profile={first.profile}", f"sweep {first.sweep_name}"])


def _untrained_teachers(jobs: Sequence[Job]) -> list[Cell]:
    """Return the Teachers that will be trained."""
    return [cell for cell, job in plan.missing_teachers(jobs) if job.settings.teacher.trained is None]


def _describe_time(groups: Sequence[Sequence[Job]], preview: Preview) -> str:
    """Return the devices and, if a step was timed, the longest that groups can take on them."""
    names = list(dict.fromkeys(chain(*preview.devices.values())))
    where, places, slowdown = f"device {', '.join(names)}", preview.places, 1.0
    if preview.threads and names == [preview.timed_on]:  # processes on one CPU, each with its part of the threads
        threads = max(1, preview.threads // places)
        slowdown = preview.threads / threads
        where += f" with {plural(threads, 'thread')}" + (f" in each of {places} processes" if places > 1 else "")
    if not preview.timed_on:
        return where
    longest = duration(slowdown * longest_s(groups, preview, places=places))
    return f"{where}; at most about {longest} if no early stop ends a cell sooner"


def describe_data(settings: Settings) -> str:
    """Return the data set with the number of its images, in all and of each label, and of what is ignored."""
    ignored = sum(len(names) for reason, names in inputs.ignored(settings).items() if reason not in QUIET)
    images = f"data={settings.data.name} with {inputs.listing(settings).summary()} at {settings.image_size} pixels"
    return f"{images}, {ignored} ignored" if ignored else images


def ignored_lines(jobs: Sequence[Job]) -> list[str]:
    """Return a line with the first names of what is ignored, for each data set of which something is."""
    kinds = {(str(job.settings.data.source), job.settings.split.group): job.settings for job in jobs}
    lines = [(settings.data.name, ignored_line(inputs.ignored(settings))) for settings in kinds.values()]
    return [f"data={name}, ignored: {line}" for name, line in lines if line]


def overview(jobs: Sequence[Job], *, groups: Sequence[Sequence[Job]], preview: Preview | None) -> str:
    """Return what a sweep would compute and for how long at most, a line per group; arguments as of ``describe``."""
    lines = [describe(jobs, groups=groups, preview=preview), *ignored_lines(jobs)]
    if preview is None:
        return "\n".join(lines)
    for number, group in enumerate(groups, start=1):
        first, names = group[0].settings, Counter(job.cell.notation for job in group)
        listed = ", ".join(f"{name} x {count}" if count > 1 else name for name, count in names.items())
        devices = " or ".join(dict.fromkeys(preview.devices[first.device]))  # one CPU for several processes
        where = f"split {first.split.number} seed {first.seed} on {devices}"
        size, time = plural(len(group), "cell"), duration(group_s(group, preview))
        lines.append(f"group {number}: {size}, {where}, {time}: {listed}")
    waiting = list(chain(*groups))
    if teachers := [cell.title for cell in _untrained_teachers(waiting)]:
        seconds = teachers_s(waiting, preview)
        lines.append(f"Teachers first, {duration(seconds)}: {some(teachers, most=NAMED)}")
    hours = longest_s(groups, preview) / 3600
    lines.append(f"at most {hours:.2g} device hours from one timed step on {preview.timed_on}; nothing was started")
    return "\n".join(lines)


def log_progress(ended_s: Sequence[float], all_s: Sequence[float], *, places: int, passed_s: float) -> None:
    """Log how many groups have ended, and the time left if the others are as much faster or slower than estimated.

    ``ended_s`` and ``all_s`` are estimated seconds of groups, ``passed_s`` those since the first began.
    """
    others = len(all_s) - len(ended_s)
    if others == 0:
        return
    done_s, end_s = (left_s([[(1, group_s)] for group_s in groups], places=places) for groups in (ended_s, all_s))
    about = duration(max(0.0, passed_s / (done_s or 1.0) * end_s - passed_s))
    left = "the others are running" if 1 < places >= others else f"about {about} left"
    log.info("%d of %d groups done, %s", len(ended_s), len(all_s), left)


# ---- changes and overrides without effect ----------------------------------------------------------------------------


def log_changes(jobs: Sequence[Job]) -> None:
    """Log why cells are computed that the store holds under the same name: what changed since."""
    requested = {job.cell.folder for job in jobs}
    new: dict[str, list[Job]] = {}
    for job in plan.waiting(jobs):
        # Others of the name of a tuned cell are its study's trials.
        before = None if job.tuned else cell_folder.read_predecessor(job.cell, excluded=requested)
        if before is not None:
            new.setdefault(_difference(before, job.cell), []).append(job)
    for difference, members in new.items():
        count, titles = plural(len(members), "cell"), _few([job.cell.title for job in members])
        are = "is" if len(members) == 1 else "are"
        log.info("%s %s new (%s): the store holds results of that name, but %s", count, are, titles, difference)


def _difference(before: dict[str, Any], cell: Cell) -> str:
    """Return as text what differs between an earlier cell of the same name and this one."""
    inputs, version = before.get("input_digests", {}), str(grid.RESULTS_VERSION)
    if inputs.get("results_version", "0") != version:  # the first ones had none
        old_version = inputs.get("results_version", "0")
        remedy = "their tables, report and predictions can still be made"
        return f"they are of results version {old_version}, this is version {version}; {remedy}"
    old, new = grid.flatten(before["settings"]), grid.flatten(cell.settings)
    keys = [key for key in sorted(old.keys() | new.keys()) if repr(old.get(key)) != repr(new.get(key))]  # 1 is not 1.0
    changes = [f"{key} ({old.get(key, 'unset')} -> {new.get(key, 'unset')})" for key in keys]
    names = {"user_code": "your own code", "data": "the images", "student_weights": "the file of student.weights"}
    names |= {"split": "the images of the split's parts", "groups": "the groups of split.group"}
    changes += [name for key, name in names.items() if inputs.get(key) != cell.input_digests.get(key)]
    return f"since then this has changed: {_few(changes or ['its Teacher'], 4)}"


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def log_idle(jobs: Sequence[Job]) -> None:
    """Log one line that names the overrides which no cell uses."""
    idle = {key_of(override): override for job in jobs for override in job.overrides}
    for job in jobs:
        idle = {key: override for key, override in idle.items() if not _is_used(key, job)}
        if not idle:
            return
    cells = _few(list(dict.fromkeys(job.cell.notation for job in jobs)))
    log.warning("%s: used by no cell of this command (%s), so without effect", ", ".join(idle.values()), cells)


def _is_used(key: str, job: Job) -> bool:
    """Return whether a key has an effect on a cell or its Teacher."""
    if not decisions.is_declared(key):
        return key in job.used
    if decisions.kind(key) in ("name", "place", "local"):  # the Student is path=none with any loss
        return True
    params, roles = identity.params(job.settings), [job.cell.role, *([TEACHER] if job.cell.teacher else [])]
    return any(decisions.decides(key, role=role, params=params) for role in roles)
