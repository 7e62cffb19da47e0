"""The only place where a configuration becomes objects; below it, functions take plain arguments.

What of a configuration can be told without torch is in ``config/identity.py``.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

from kdsweep.config import composition, grid, identity, inputs
from kdsweep.config.grid import TEACHER, Cell
from kdsweep.config.schema import KDPathNode, NetworkNode, Settings
from kdsweep.core.device import Compute, find_device, usable_precision
from kdsweep.core.errors import InputError, command, one_line
from kdsweep.data.loaders import Feed, TrainLoader, affordable_workers, eval_part
from kdsweep.data.splits import check_training_masks
from kdsweep.data.views import Strengths, Views
from kdsweep.distill import losses
from kdsweep.distill.distillation import Distillation, TeacherForward, Term, ViewPair
from kdsweep.distill.paths import KDPath
from kdsweep.models import unet
from kdsweep.models.unet import Outputs, UNet
from kdsweep.models.weights import IMAGENET
from kdsweep.training import guard
from kdsweep.training.learner import Learner

log = logging.getLogger(__name__)

SUPERVISED = {"bce": losses.cross_entropy, "bce_dice": losses.cross_entropy_and_dice}


def device(settings: Settings) -> torch.device:
    """The device that a configuration names.

    Raises:
        InputError: it is not there.
    """
    return find_device(settings.device)


def devices(settings: Settings) -> list[str]:
    """Names of the devices that groups of this configuration can be spread over."""
    found = device(settings)
    if found.type == "cuda" and settings.device in ("auto", "cuda"):
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [str(found)]


def compute(settings: Settings) -> Compute:
    """Return where and how the numbers of a configuration are computed.

    Raises:
        InputError: the device is not there, or does not have the precision.
    """
    found = device(settings)
    keys = {"precision": settings.precision, "kd.teacher_precision": settings.kd.teacher_precision}
    for key, precision in keys.items():
        if usable_precision(precision, found) != precision:
            raise InputError(
                f"{key}={precision} needs a CUDA device, and device={settings.device} is {found}; use fp32 or bf16"
            )
    return Compute(device=found, precision=settings.precision, deterministic=settings.deterministic)


def feed(settings: Settings, *, seed: int) -> Feed:
    """The three parts of the cell's split; seed decides order and views of the training part.

    Raises:
        InputError: the training part cannot be trained on.
    """
    everything = inputs.images(settings)
    part = inputs.split(settings)
    check_training_masks(everything, part)
    if settings.train.batch_size > len(part.train):
        raise InputError(
            f"train.batch_size={settings.train.batch_size} is larger than the training set of {len(part.train)} images"
        )
    strengths = Strengths(**settings.views.plain() | {"noise_std": tuple(settings.views.noise_std)})
    loader = TrainLoader(
        everything,
        indices=part.train,
        views=Views(image_size=settings.image_size, strengths=strengths),
        seed=seed,
        split_index=settings.split.number,
        batch_size=settings.train.batch_size,
        workers=_workers(settings),
        pinned=device(settings).type == "cuda",
        last_batch=settings.train.last_batch,
    )
    return Feed(
        loader,
        eval_part(everything, part.validation),
        eval_part(everything, part.test, groups=inputs.image_groups(settings)),
    )


def _workers(settings: Settings) -> int:
    on_cuda = min(4, os.cpu_count() or 1) if device(settings).type == "cuda" else 0
    wanted = on_cuda if settings.train.workers == "auto" else int(settings.train.workers)
    return _affordable(wanted, 8 * settings.image_size**2 * settings.train.batch_size) if wanted else 0


@cache
def _affordable(wanted: int, batch_bytes: int) -> int:
    """Return as many processes as the shared memory has room for; say once if they are fewer."""
    found = affordable_workers(wanted, batch_bytes=batch_bytes)
    if found < wanted:
        many = f"{found or 'none'} {'prepare' if found > 1 else 'prepares'} them"
        log.warning(
            "train.workers=%d: /dev/shm has no room for their batches of %.0f MB, %s; a smaller batch or more room "
            "helps, in a container --shm-size",
            wanted, batch_bytes / 1e6, many,
        )  # fmt: skip
    return found


def student_network(settings: Settings, *, weights: str | None = None) -> UNet:
    """A new Student; all cells of a seed start from the same one."""
    return _new_network(settings.student, seed=settings.seed, weights=weights)


def teacher_network(settings: Settings, *, weights: str | None = None) -> UNet:
    """A new, untrained Teacher."""
    return _new_network(settings.teacher, seed=settings.teacher.seed, weights=weights)


def _new_network(node: NetworkNode, *, seed: int, weights: str | None) -> UNet:
    return unet.unet(
        encoder=node.encoder,
        decoder_channels=node.decoder_channels,
        weights=weights or _weights(node),
        seed=seed,
    )


def _weights(node: NetworkNode) -> str:
    return IMAGENET + inputs.imagenet(node) if node.weights == "imagenet" else node.weights


def check_networks(settings: Settings) -> None:
    """Raise InputError if a cell's networks or their weights cannot be had: before anything is trained."""
    networks = [settings.student, *([settings.teacher] if settings.is_distilled else [])]
    for node in networks:
        _check_network(node.encoder, tuple(node.decoder_channels), _weights(node))


@lru_cache(maxsize=8)
def _check_network(encoder: str, decoder_channels: tuple[int, ...], weights: str) -> None:
    unet.unet(encoder=encoder, decoder_channels=list(decoder_channels), weights=weights, seed=0)


def check_term(settings: Settings) -> None:
    """Build a cell's paths and losses and take the KD term and its gradient, before anything is trained.

    Raises:
        InputError: one of them cannot be built or called, returns something else than one number, teaches nothing, or
            changes what all cells share.
    """
    try:
        with guard.confined(settings.seed):
            if (kd := distillation(settings, teacher="")) is not None:
                _take_term(kd, settings)
    except guard.SharedStateError as error:
        raise InputError(f"{_compared(settings)}: {error}") from error
    except InputError:
        raise
    except Exception as error:  # of any kind: it is the user's code
        raise InputError(f"{_compared(settings)} gives no KD term: {one_line(error)}") from error


def _compared(settings: Settings) -> str:
    if settings.method.name != "none":
        return f"method={settings.method.name}"
    return f"path={settings.path.name} loss={settings.loss.name}"


def _take_term(kd: Distillation, settings: Settings) -> None:
    chance = torch.Generator().manual_seed(0)
    count, size = min(2, settings.train.batch_size), settings.image_size

    def outputs(node: NetworkNode, stages: set[str]) -> Outputs:
        widths = unet.stage_channels(node.encoder, tuple(node.decoder_channels))
        sides = {stage: unet.stage_size(stage, image_size=size) for stage in stages}
        maps = {name: torch.randn(count, widths[name], side, side, generator=chance) for name, side in sides.items()}
        return Outputs(maps)

    student, teacher = outputs(settings.student, kd.stages), outputs(settings.teacher, kd.teacher_stages)
    for maps in student.values():
        maps.requires_grad_()
    mask = (torch.rand(count, 1, size, size, generator=chance) > 0.5).float()
    views = ViewPair(torch.eye(2, 3).repeat(count, 1, 1), student_mask=mask, teacher_mask=mask)
    for name, value in kd.values(student=student, teacher=teacher, views=views).items():
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
            raise TypeError(f"{name}: the loss must return a tensor of one number that depends on the Student")
        gradients = torch.autograd.grad(value, list(student.values()), allow_unused=True, retain_graph=True)
        if not any(own is not None and own.any() for own in gradients):
            batches = f"batches of {count} (train.batch_size={settings.train.batch_size})"
            raise InputError(f"{_compared(settings)} gives no KD term: {name} has no gradient in {batches}")
    for name, term in kd.terms.items():
        adapter = getattr(term.kd_path, "adapter", None)
        if isinstance(adapter, nn.Conv2d) and adapter.in_channels == adapter.out_channels:
            both = f"Teacher and Student both have {adapter.in_channels} channels at {term.stages[0]}"
            log.warning("%s, term %s: %s; its adapter is not needed", _compared(settings), name, both)


def distillation(settings: Settings, *, teacher: str) -> Distillation | None:
    """Build how the configuration's Student is taught by the Teacher of a fingerprint; None for a baseline."""
    if not settings.is_distilled:
        return None
    with guard.confined(settings.seed):  # after the Student, from the same seed: paths share its initialization
        terms = _method_terms(settings) if settings.method.terms else {"kd": _term(settings)}
    return Distillation(
        terms=terms,
        weight=settings.kd_weight,
        ratio=settings.kd.ratio,
        forward=TeacherForward(
            teacher, view=settings.teacher_aug.distill_view, precision=settings.kd.teacher_precision
        ),
        align=settings.kd.align == "warp",
    )


def _method_terms(settings: Settings) -> dict[str, Term]:
    """Build the comparisons of a method, each of which names its stage."""
    terms, shares = {}, settings.method.shares()
    for name, node in settings.method.terms.items():
        kd_path = _kd_path(settings, node.path)
        if kd_path.stages is None:
            raise InputError(f"method.terms.{name}.path={node.path.target} says not which stages it takes")
        terms[name] = Term(kd_path, composition.build(node.loss), kd_path.stages, shares[name])
    return terms


def _term(settings: Settings) -> Term:
    """Build the comparison of ``path`` and ``loss``."""
    assert settings.path.kd_path is not None
    kd_path = _kd_path(settings, settings.path.kd_path)
    implied = (unet.HIDDEN, "logits") if settings.path.representation == "logits" else (unet.HIDDEN,)
    return Term(kd_path, composition.build(identity.loss(settings)), kd_path.stages or implied)


def _kd_path(settings: Settings, node: KDPathNode) -> KDPath:
    """Build a KD path; one that is ``_partial_`` is given the channels of its stage in both networks."""
    kd_path = composition.build(node.plain())
    if not isinstance(kd_path, partial):
        return cast("KDPath", kd_path)
    stage = kd_path.keywords.get("stage", unet.HIDDEN)
    stages = {"student": stage, "teacher": kd_path.keywords.get("teacher_stage") or stage}
    networks = {"student": settings.student, "teacher": settings.teacher}
    channels = {
        f"{name}_channels": unet.stage_channels(network.encoder, tuple(network.decoder_channels))[stages[name]]
        for name, network in networks.items()
    }
    return cast("KDPath", kd_path(**channels))


def learner(settings: Settings, cell: Cell) -> Learner:
    """Return the network of a cell in training: the Student, or the Teacher with its own rate, epochs and view."""
    is_teacher = cell.role == TEACHER
    recipe = settings.teacher_recipe if is_teacher else (settings.train.supervised, settings.train.schedule)
    return Learner(
        title=cell.title,
        role=cell.role,
        network=teacher_network(settings) if is_teacher else student_network(settings),
        view=settings.teacher_aug.train_view if is_teacher else "strong",
        distillation=None if is_teacher else distillation(settings, teacher=cell.evidence.get("teacher", "")),
        lr=settings.teacher.lr if is_teacher else settings.train.lr,
        supervised=SUPERVISED[recipe[0]],
        schedule=recipe[1],
        epochs=settings.teacher_epochs if is_teacher else settings.train.epochs,
        patience=settings.train.patience,
        folder=cell.folder,
        fused=device(settings).type == "cuda",
        nsd_tolerance_px=settings.scores.nsd_tolerance_px,
        monitor=settings.teacher.monitor if is_teacher else settings.train.monitor,
    )


def tags(settings: Settings) -> dict[str, str]:
    """Tags of a run beyond its cell's: profile, and what is recorded but does not make another cell."""
    where = device(settings)
    return {
        "kdsweep.profile": settings.profile,
        "kdsweep.precision": settings.precision,
        "kdsweep.device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "kdsweep.split_protocol": settings.split.in_words(),
        "kdsweep.split_digest": grid.digest(inputs.split_ids(settings)),
        "kdsweep.split_images": "/".join(str(len(ids)) for ids in inputs.split_ids(settings).values()),
        "kdsweep.threads": str(torch.get_num_threads()),
        "kdsweep.torch": torch.__version__,
        "mlflow.source.git.commit": git_commit(),
    }


@cache
def git_commit() -> str:
    """Commit of the checkout that runs, with ``-dirty`` if it was changed; ``unknown`` outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


@command
def print_models(argv: list[str]) -> None:
    """Print parameters, MACs and hidden shapes of the configured networks."""
    parser = argparse.ArgumentParser(prog="python -m kdsweep models", description="What the networks consist of.")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as teacher=resnet34 image_size=128")
    overrides = parser.parse_intermixed_args(argv).overrides
    settings = composition.compose(overrides)
    student, teacher = student_network(settings, weights="none"), teacher_network(settings, weights="none")
    sys.stdout.write(unet.summary(teacher=teacher, student=student, image_size=settings.image_size) + "\n")
