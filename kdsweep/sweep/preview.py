"""Check the real networks before anything is trained: errors, devices, a rehearsal, seconds of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kdsweep.config import grid, identity
from kdsweep.config.identity import Job
from kdsweep.config.schema import Settings
from kdsweep.core.device import Compute, find_device, give_back_memory, usable_cores, usable_precision
from kdsweep.evaluation import latency
from kdsweep.store import cell_folder
from kdsweep.sweep import plan, rehearsal
from kdsweep.sweep.estimate import Preview
from kdsweep.training import build


def check(jobs: Sequence[Job]) -> None:
    """Raise InputError for the first of these cells that could not be trained: networks, weights, KD term, images."""
    for job in jobs:
        build.check_networks(job.settings)
    for job in _kinds(jobs):
        build.check_term(job.settings)
    for settings in {identity.batches_key(job.settings, seed=0): job.settings for job in reversed(jobs)}.values():
        build.feed(settings, seed=settings.seed)


def _kinds(jobs: Sequence[Job]) -> list[Job]:
    """Return the first job of each kind, see ``plan.kind_key``."""
    return list({plan.kind_key(job.settings): job for job in reversed(jobs)}.values())[::-1]


def rehearse(jobs: Sequence[Job], devices: dict[str, list[str]]) -> None:
    """Go through a training and its end with each kind of these cells, see ``rehearsal.py``.

    Args:
        jobs: of cells that ``check`` has passed.
        devices: the names of those to run on, by the value of ``device``.
    """
    kinds = _kinds(jobs)
    for group in grid.group_by([identity.batches_key(job.settings, seed=job.settings.seed) for job in kinds]):
        members = [kinds[position] for position in group]
        first = members[0].settings
        rehearsal.rehearse(members, _compute(first, devices[first.device][0]))
    give_back_memory()


def _compute(settings: Settings, device: str) -> Compute:
    """Return where and how numbers are computed on this machine, which may lack the precision of the settings."""
    on = find_device(device)
    precision = usable_precision(settings.precision, on)
    return Compute(device=on, precision=precision, deterministic=settings.deterministic)


def preview_cells(jobs: Sequence[Job], devices: list[str]) -> Preview:
    """Check cells that wait to be trained on this machine, and time one step of the first one's networks.

    Args:
        jobs: all that wait.
        devices: where to run, or empty for what the configurations say.

    Raises:
        InputError: one of them could not be trained.
    """
    names = device_names(jobs, devices)
    for job in jobs:
        build.compute(job.settings)
    check(jobs)
    rehearse(jobs, names)
    return _timed(jobs, devices=names, device=names[jobs[0].settings.device][0])


def device_names(jobs: Sequence[Job], devices: list[str]) -> dict[str, list[str]]:
    """Names of the devices that groups can be spread over, by the value of ``device``.

    Raises:
        InputError: one of them is not there.
    """
    for name in devices:
        find_device(name)
    return {job.settings.device: devices or build.devices(job.settings) for job in jobs}


def preview_remote(jobs: Sequence[Job], place: str, *, times: bool) -> Preview:
    """Check cells that wait to be trained on other machines, whose devices are not seen from here.

    Args:
        jobs: all that wait.
        place: what these machines are called.
        times: time a step here all the same.

    Raises:
        InputError: one of them could not be trained.
    """
    names = {job.settings.device: [place] for job in jobs}
    # This machine need not have the device.
    jobs = [replace(job, settings=job.settings.model_copy(update={"device": "auto"})) for job in jobs]
    check(jobs)
    rehearse(jobs, {"auto": ["auto"]})
    return _timed(jobs, devices=names, device="auto") if times else Preview(names)


def _timed(jobs: Sequence[Job], *, devices: dict[str, list[str]], device: str) -> Preview:
    first = jobs[0].settings
    compute = _compute(first, device)
    compute.prepare()
    on = compute.device
    load = latency.load_of_others() if on.type == "cpu" else 0.0
    # On a CPU a step takes as long as its images together; on CUDA a small batch takes as long as a large one.
    batch = first.train.batch_size if on.type == "cuda" else min(4, first.train.batch_size)
    timed: dict[str, Any] = {"image_size": first.image_size, "compute": compute, "images": batch}
    student = latency.time_step_s(build.student_network(first, weights="none"), **timed)
    teacher = latency.StepTime(0.0, 0.0)
    if distilled := [(job.settings, cell) for job in jobs if (cell := job.cell.teacher) is not None]:
        trained = all(cell_folder.read_finished(cell.folder) is not None for _, cell in distilled)
        network = build.teacher_network(distilled[0][0], weights="none")
        teacher = latency.time_step_s(network, **timed, forward_only=trained)
        del network
    give_back_memory()
    ids = identity.split_ids(first)
    images, validation_images = len(ids["train"]), len(ids["validation"])
    return Preview(
        devices=devices,
        timed_on=str(on),
        student_epoch_s=images * student.train + validation_images * student.forward,
        teacher_epoch_s=images * teacher.train + validation_images * teacher.forward,
        forward_epoch_s=images * teacher.forward,
        load=load,
        threads=torch.get_num_threads() if on.type == "cpu" else 0,
        cores=usable_cores(),
    )
