"""How long a sweep takes at most, and what is said of it before it runs.

Runs without torch; what only the real networks can tell is a ``Preview``, made where torch is (preview.py).
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kdsweep.config import identity
from kdsweep.config.schema import Settings
from kdsweep.core.progress import duration, left_s, plural
from kdsweep.data.folders import QUIET, ignored_line
from kdsweep.store import cell_folder
from kdsweep.sweep import plan
from kdsweep.sweep.plan import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preview:
    """Devices and times that a check of the real networks finds before anything is trained.

    Attributes:
        devices: names of those where groups can run at the same time, by the value of ``device``.
        timed_on: the device of the times; empty if nothing was timed, because the groups run on other machines. The
            times are then guesses that only put groups in order.
        student_epoch_s: seconds of a Student's epoch: its steps and its validation.
        teacher_epoch_s: of an epoch of a Teacher's training.
        forward_epoch_s: of a Teacher's forwards in an epoch; those in validation are computed once for all.
        load: of the processor before, if other programs took a good part of it; else 0.
        threads: of the timed steps, on the CPU; else 0.
        cores: that the command may use, for ``threads``.
    """

    devices: dict[str, list[str]]
    timed_on: str = ""
    student_epoch_s: float = 1.0
    teacher_epoch_s: float = 4.0
    forward_epoch_s: float = 1.0
    load: float = 0.0
    threads: int = 0
    cores: int = 0

    @property
    def places(self) -> int:
        """Return how many groups can run at the same time; on the CPU these are processes."""
        return max(len(names) for names in self.devices.values())

    @property
    def place_threads(self) -> int:
        """Return the threads of each place on the CPU; 0 elsewhere."""
        return max(1, self.threads // self.places) if self.threads else 0

    def slowdown(self, groups: int) -> float:
        """Return how many times as long a group takes next to others on the CPU, of which each has some threads."""
        if not self.threads:
            return 1.0
        busy = max(1, min(self.places, groups))
        return busy * self.threads / min(busy * self.place_threads, max(self.cores, self.threads))


def longest_s(groups: Sequence[Sequence[Job]], preview: Preview) -> float:
    """Return the seconds until groups have ended, Teachers first, if no early stop ends a cell sooner."""
    works = [_trainings(group, preview) for group in groups]
    teachers = [[training] for training in _teachers([job for group in groups for job in group], preview)]
    return sum(left_s(part, places=preview.places) * preview.slowdown(len(part)) for part in (teachers, works) if part)


def device_s(groups: Sequence[Sequence[Job]], preview: Preview) -> float:
    """Return the seconds of all of that on one device."""
    return teachers_s([job for group in groups for job in group], preview) + left_s(
        _trainings(group, preview) for group in groups
    )


def teachers_s(jobs: Sequence[Job], preview: Preview) -> float:
    """Return the seconds of training the Teachers that these jobs lack, on one device."""
    return left_s([_teachers(jobs, preview)])


def group_s(group: Sequence[Job], preview: Preview) -> float:
    """Return the seconds of a group on one device once its Teachers are there."""
    return left_s([_trainings(group, preview)])


def _trainings(group: Sequence[Job], preview: Preview) -> list[tuple[float, float]]:
    """Return epochs left and seconds per epoch of a group's Students, and of the Teacher forwards that they share."""
    epochs = [job.epochs_left for job in group]
    forwards = {forward_of(job) for job in group if job.cell.role == "distilled"}
    students = [(job.epochs_left, _student_epoch_s(job, preview)) for job in group]
    return [*students, (max(epochs) * len(forwards), preview.forward_epoch_s)]


def _teachers(jobs: Sequence[Job], preview: Preview) -> list[tuple[float, float]]:
    """Return epochs left and seconds per epoch of the Teachers that these jobs lack."""
    missing = plan.missing_teachers(jobs)
    left = [max(0, job.settings.teacher_epochs - cell_folder.epochs(cell.folder)) for cell, job in missing]
    return [(epochs, preview.teacher_epoch_s) for epochs in left]


def _student_epoch_s(job: Job, preview: Preview) -> float:
    """Return the seconds of a cell's epoch: as recorded, without the Teacher's forwards, or else of timed steps."""
    seconds = cell_folder.read(job.cell.folder).seconds if job.begun else []
    if not seconds:
        return preview.student_epoch_s
    forwards_s = preview.forward_epoch_s if job.cell.role == "distilled" else 0.0
    return max(0.0, statistics.mean(seconds) - forwards_s)


def forward_of(job: Job) -> tuple[str, str, str]:
    """Return which Teacher forward a cell learns from; jobs with equal ones share it."""
    view, precision = job.settings.teacher_aug.distill_view, job.settings.kd.teacher_precision
    return job.cell.evidence["teacher"], view, precision


def describe(jobs: Sequence[Job], *, groups: Sequence[Sequence[Job]], preview: Preview | None) -> str:
    """Return one line on what will run: cells, groups, Teachers, data, device, the longest that it can take.

    Args:
        jobs: of the whole sweep.
        groups: what waits, as it is trained together.
        preview: None if nothing waits.
    """
    unique, count = plan.unique(jobs), sum(len(group) for group in groups)
    first = unique[0].settings
    repeats = f" ({len(jobs) - len(unique)} repeated jobs are the same cell)" if len(jobs) > len(unique) else ""
    begun = sum(job.begun > 0 for group in groups for job in group)
    resumed = f", {begun} of them from a checkpoint" if begun else ""
    line = f"{plural(len(unique), 'cell')}{repeats}: {count} to run{resumed}, {len(unique) - count} finished"
    if groups:
        members = [job for group in groups for job in group]
        shared = {forward_of(job)[0] for job in members if job.cell.role == "distilled"}
        line += f"; {plural(len(groups), 'lockstep group')}, {plural(len(shared), 'shared Teacher')}"
        line += f", {plural(len(plan.missing_teachers(members)), 'Teacher')} to train"
    line += f"; {describe_data(first)}"
    if preview is not None:
        names = list(dict.fromkeys(name for device in preview.devices.values() for name in device))
        line += f"; device {', '.join(names)}"
        if preview.threads and names == [preview.timed_on]:
            line += f" with {plural(preview.place_threads, 'thread')}"
            line += f" in each of {preview.places} processes" if preview.places > 1 else ""
    if preview is not None and preview.timed_on:
        longest = duration(longest_s(groups, preview))
        line += f"; at most about {longest} if no early stop ends a cell sooner"
        if preview.load:
            line += f" (timed while other programs were at work, load {preview.load:.1f}: without them it is less)"
    return f"{line}; profile={first.profile}; sweep {first.sweep_name}"


def describe_data(settings: Settings) -> str:
    """Return the data set with the number of its images, in all and of each label, and of what is ignored."""
    listed = identity.listing(settings)
    ignored = sum(len(names) for reason, names in identity.ignored(settings).items() if reason not in QUIET)
    line = f"data={settings.data.name} with {listed.summary()} at {settings.image_size} pixels"
    return f"{line}, {ignored} ignored" if ignored else line


def ignored_lines(jobs: Sequence[Job]) -> list[str]:
    """Return a line with the first names of what is ignored, for each data set of which something is."""
    kinds = {(str(job.settings.data.source), job.settings.split.group): job.settings for job in jobs}
    lines = [(settings.data.name, ignored_line(identity.ignored(settings))) for settings in kinds.values()]
    return [f"data={name}, ignored: {line}" for name, line in lines if line]


def log_ignored(jobs: Sequence[Job]) -> None:
    """Log the lines of ``ignored_lines``."""
    for line in ignored_lines(jobs):
        log.warning("%s", line)


def overview(jobs: Sequence[Job], *, groups: Sequence[Sequence[Job]], preview: Preview | None) -> str:
    """Return what a sweep would compute and for how long at most, a line per group.

    The arguments are those of ``describe``.
    """
    lines = [describe(jobs, groups=groups, preview=preview), *ignored_lines(jobs)]
    if preview is None:
        return "\n".join(lines)
    members = [job for group in groups for job in group]
    for number, group in enumerate(groups, start=1):
        first = group[0].settings
        names = Counter(job.cell.notation for job in group)
        listed = ", ".join(f"{name} x {count}" if count > 1 else name for name, count in names.items())
        places = " or ".join(dict.fromkeys(preview.devices[first.device]))  # one CPU for several processes
        where = f"split {first.split.number} seed {first.seed} on {places}"
        size, time = plural(len(group), "cell"), duration(group_s(group, preview))
        lines.append(f"group {number}: {size}, {where}, {time}: {listed}")
    teachers = [cell.title for cell, _ in plan.missing_teachers(members)]
    if teachers:
        lines.append(f"Teachers first, {duration(teachers_s(members, preview))}: {', '.join(teachers)}")
    hours = device_s(groups, preview) / 3600
    lines.append(f"at most {hours:.2g} device hours from one timed step on {preview.timed_on}; nothing was started")
    return "\n".join(lines)
