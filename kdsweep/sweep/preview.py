"""Check the real networks before anything is trained: errors, devices, a rehearsal, seconds of a step."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from kdsweep.config import grid, identity
from kdsweep.core.device import Compute, find_device, give_back_memory, placed, usable_cores, usable_precision
from kdsweep.evaluation import latency, scoring
from kdsweep.models import unet
from kdsweep.runs import records
from kdsweep.sweep import plan, rehearsal
from kdsweep.sweep.estimate import Preview
from kdsweep.training import factory, loop
from kdsweep.training.meter import EpochMeter


def check(configs: list[DictConfig]) -> None:
    """Raise InputError for the first of these cells that could not be trained: networks, weights, KD term, images."""
    for cfg in configs:
        factory.check_networks(cfg)
    for cfg in _kinds(configs):
        factory.check_term(cfg)
    for cfg in {identity.batches_key(cfg, seed=0): cfg for cfg in reversed(configs)}.values():
        factory.feed(cfg, seed=cfg.seed)


def _kinds(configs: list[DictConfig]) -> list[DictConfig]:
    """Return the first configuration of each kind, see ``plan.kind_key``."""
    return list({plan.kind_key(identity.read(cfg)): cfg for cfg in reversed(configs)}.values())[::-1]


def rehearse(configs: list[DictConfig], devices: dict[str, list[str]]) -> None:
    """Go through a training and its end with each kind of these cells, see ``rehearsal.py``.

    Args:
        configs: of cells that ``check`` has passed.
        devices: the names of those to run on, by the value of ``device``.
    """
    kinds = _kinds(configs)
    for group in grid.group_by([identity.batches_key(cfg, seed=cfg.seed) for cfg in kinds]):
        members = [kinds[position] for position in group]
        rehearsal.rehearse(members, _compute(members[0], devices[str(members[0].device)][0]))
    give_back_memory()


def _compute(cfg: DictConfig, device: str) -> Compute:
    """Return where and how a configuration's numbers are computed on this machine, which may lack its precision."""
    on = find_device(device)
    return Compute(device=on, precision=usable_precision(cfg.precision, on), deterministic=cfg.deterministic)


def preview_cells(configs: list[DictConfig], devices: list[str]) -> Preview:
    """Check cells that wait to be trained on this machine, and time one step of the first one's networks.

    Args:
        configs: of all that wait.
        devices: where to run, or empty for what the configurations say.

    Raises:
        InputError: one of them could not be trained.
    """
    found = device_names(configs, devices)
    for cfg in configs:
        factory.compute(cfg)
    check(configs)
    rehearse(configs, found)
    return _timed(configs, devices=found, device=found[str(configs[0].device)][0])


def time_epoch_s(cfg: DictConfig, *, role: str) -> float:
    """Return the seconds of an epoch of a training, as if it were alone: the second one, the first warms up.

    Steps, Teacher's forwards and validation are counted, the Teacher is an untrained one. Nothing is written.

    Args:
        cfg: of a cell.
        role: ``teacher`` for the training of its Teacher, else its own.
    """
    compute = factory.compute(cfg)
    compute.prepare()
    feed = factory.feed(cfg, seed=cfg.seed)
    if role == "teacher":
        learner = factory.teacher_learner(cfg, identity.teacher_cell(cfg))
    else:
        learner = factory.learner(cfg, identity.cell(cfg))
    teachers = {}
    if learner.distillation is not None:
        network = placed(factory.teacher_network(cfg, weights="none"), compute)
        teachers[learner.distillation.forward.teacher] = unet.freeze(network)
    for module in learner.modules().values():
        placed(module, compute)
    frozen = loop.FrozenTeachers(teachers, compute)
    validation = list(scoring.eval_batches(feed.validation, compute))
    taught = [frozen.teach([learner], views) for views, _ in validation]
    for epoch in range(2):
        learner.spent_s, learner.watches, learner.means = 0.0, [], EpochMeter()
        loop.train_epoch([learner], epoch, frozen=frozen, feed=feed, compute=compute)
        if learner.failure is not None:
            raise learner.failure
        loop.validation_values(learner, validation, taught, compute)
    seconds = learner.read_watches()
    give_back_memory()
    return seconds


def device_names(configs: list[DictConfig], devices: list[str]) -> dict[str, list[str]]:
    """Names of the devices that groups can be spread over, by the value of ``device``.

    Raises:
        InputError: one of them is not there.
    """
    for name in devices:
        find_device(name)
    return {str(cfg.device): devices or factory.devices(cfg) for cfg in configs}


def preview_remote(configs: list[DictConfig], place: str, *, times: bool) -> Preview:
    """Check cells that wait to be trained on other machines, whose devices are not seen from here.

    Args:
        configs: of all that wait.
        place: what these machines are called.
        times: time a step here all the same.

    Raises:
        InputError: one of them could not be trained.
    """
    found = {str(cfg.device): [place] for cfg in configs}
    for cfg in configs:
        cfg.device = "auto"  # this machine need not have it
    check(configs)
    rehearse(configs, {"auto": ["auto"]})
    return _timed(configs, devices=found, device="auto") if times else Preview(found)


def _timed(configs: list[DictConfig], *, devices: dict[str, list[str]], device: str) -> Preview:
    first = configs[0]
    compute = _compute(first, device)
    compute.prepare()
    on = compute.device
    load = latency.load_of_others() if on.type == "cpu" else 0.0
    # On a CPU a step takes as long as its images together; on CUDA a small batch takes as long as a large one.
    images = first.train.batch_size if on.type == "cuda" else min(4, first.train.batch_size)
    timed = {"image_size": first.image_size, "compute": compute, "images": images}
    student = latency.time_step_s(factory.student_network(first, weights="none"), **timed)
    teacher = latency.StepTime(0.0, 0.0)
    if taught := [cfg for cfg in configs if identity.read(cfg).is_taught]:
        trained = all(records.read_finished(identity.teacher_cell(cfg).folder) is not None for cfg in taught)
        network = factory.teacher_network(taught[0], weights="none")
        teacher = latency.time_step_s(network, **timed, forward_only=trained)
        del network
    give_back_memory()
    ids = identity.split_ids(first)
    return Preview(
        devices=devices,
        timed_on=str(on),
        student_s=student.train,
        teacher_s=teacher.train,
        forward_s=teacher.forward,
        validation_s=student.forward,
        images=len(ids["train"]),
        validation_images=len(ids["validation"]),
        load=load,
        threads=torch.get_num_threads() if on.type == "cpu" else 0,
        cores=usable_cores(),
    )
