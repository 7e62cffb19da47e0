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
from omegaconf import DictConfig
from torch import nn

from kdsweep.config import composition, identity
from kdsweep.config.grid import Cell
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


def device(cfg: DictConfig) -> torch.device:
    """The device that a configuration names.

    Raises:
        InputError: it is not there.
    """
    return find_device(str(cfg.device))


def devices(cfg: DictConfig) -> list[str]:
    """Names of the devices that groups of this configuration can be spread over."""
    found = device(cfg)
    if found.type == "cuda" and str(cfg.device) in ("auto", "cuda"):
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [str(found)]


def compute(cfg: DictConfig) -> Compute:
    """Return where and how the numbers of a configuration are computed.

    Raises:
        InputError: the device is not there, or does not have the precision.
    """
    found = device(cfg)
    for key, precision in {"precision": cfg.precision, "kd.teacher_precision": cfg.kd.teacher_precision}.items():
        if usable_precision(precision, found) != precision:
            raise InputError(
                f"{key}={precision} needs a CUDA device, and device={cfg.device} is {found}; use fp32 or bf16"
            )
    return Compute(device=found, precision=cfg.precision, deterministic=cfg.deterministic)


def feed(cfg: DictConfig, *, seed: int) -> Feed:
    """The three parts of the cell's split; seed decides order and views of the training part.

    Raises:
        InputError: the training part cannot be trained on.
    """
    everything = identity.images(cfg)
    part = identity.split(cfg)
    check_training_masks(everything, part)
    if cfg.train.batch_size > len(part.train):
        raise InputError(
            f"train.batch_size={cfg.train.batch_size} is larger than the training set of {len(part.train)} images"
        )
    strengths = Strengths(**{**identity.plain(cfg.views), "noise_std": tuple(cfg.views.noise_std)})
    loader = TrainLoader(
        everything,
        indices=part.train,
        views=Views(image_size=cfg.image_size, strengths=strengths),
        seed=seed,
        split_index=identity.read(cfg).split.number,
        batch_size=cfg.train.batch_size,
        workers=_workers(cfg),
        pinned=device(cfg).type == "cuda",
        last_batch=identity.read(cfg).train.last_batch,
    )
    return Feed(
        loader,
        eval_part(everything, part.validation),
        eval_part(everything, part.test, groups=identity.image_groups(cfg)),
    )


def _workers(cfg: DictConfig) -> int:
    on_cuda = min(4, os.cpu_count() or 1) if device(cfg).type == "cuda" else 0
    wanted = on_cuda if cfg.train.workers == "auto" else int(cfg.train.workers)
    return _affordable(wanted, 8 * cfg.image_size**2 * cfg.train.batch_size) if wanted else 0


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


def student_network(cfg: DictConfig, *, weights: str | None = None) -> UNet:
    """A new Student; all cells of a seed start from the same one."""
    return _new_network(cfg.student, seed=cfg.seed, weights=weights)


def teacher_network(cfg: DictConfig, *, weights: str | None = None) -> UNet:
    """A new, untrained Teacher."""
    return _new_network(cfg.teacher, seed=cfg.teacher.seed, weights=weights)


def _new_network(node: DictConfig, *, seed: int, weights: str | None) -> UNet:
    return unet.unet(
        encoder=node.encoder,
        decoder_channels=list(node.decoder_channels),
        weights=weights or _weights(node),
        seed=seed,
    )


def _weights(node: DictConfig) -> str:
    return IMAGENET + identity.imagenet(node) if node.weights == "imagenet" else str(node.weights)


def check_networks(cfg: DictConfig) -> None:
    """Raise InputError if a cell's networks or their weights cannot be had: before anything is trained."""
    networks = [cfg.student, *([cfg.teacher] if identity.read(cfg).is_taught else [])]
    for node in networks:
        _check_network(node.encoder, tuple(node.decoder_channels), _weights(node))


@lru_cache(maxsize=8)
def _check_network(encoder: str, decoder_channels: tuple[int, ...], weights: str) -> None:
    unet.unet(encoder=encoder, decoder_channels=list(decoder_channels), weights=weights, seed=0)


def check_term(cfg: DictConfig) -> None:
    """Build a cell's paths and losses and take the KD term and its gradient, before anything is trained.

    Raises:
        InputError: one of them cannot be built or called, returns something else than one number, teaches nothing, or
            changes what all cells share.
    """
    try:
        with guard.confined(cfg.seed):
            if (kd := distillation(cfg, teacher="")) is not None:
                _take_term(kd, cfg)
    except guard.SharedStateError as error:
        raise InputError(f"{_compared(cfg)}: {error}") from error
    except InputError:
        raise
    except Exception as error:  # of any kind: it is the user's code
        raise InputError(f"{_compared(cfg)} gives no KD term: {one_line(error)}") from error


def _compared(cfg: DictConfig) -> str:
    if cfg.method.name != "none":
        return f"method={cfg.method.name}"
    return f"path={cfg.path.name} loss={cfg.loss.name}"


def _take_term(kd: Distillation, cfg: DictConfig) -> None:
    chance = torch.Generator().manual_seed(0)
    count, size = min(2, cfg.train.batch_size), cfg.image_size

    def outputs(node: DictConfig, stages: set[str]) -> Outputs:
        widths = unet.stage_channels(node.encoder, tuple(node.decoder_channels))
        sides = {stage: unet.stage_size(stage, image_size=size) for stage in stages}
        maps = {name: torch.randn(count, widths[name], side, side, generator=chance) for name, side in sides.items()}
        return Outputs(maps)

    student, teacher = outputs(cfg.student, kd.stages), outputs(cfg.teacher, kd.teacher_stages)
    for maps in student.values():
        maps.requires_grad_()
    mask = (torch.rand(count, 1, size, size, generator=chance) > 0.5).float()
    views = ViewPair(torch.eye(2, 3).repeat(count, 1, 1), student_mask=mask, teacher_mask=mask)
    for name, value in kd.values(student=student, teacher=teacher, views=views).items():
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
            raise TypeError(f"{name}: the loss must return a tensor of one number that depends on the Student")
        gradients = torch.autograd.grad(value, list(student.values()), allow_unused=True, retain_graph=True)
        if not any(own is not None and own.any() for own in gradients):
            batches = f"batches of {count} (train.batch_size={cfg.train.batch_size})"
            raise InputError(f"{_compared(cfg)} gives no KD term: {name} has no gradient in {batches}")
    for name, term in kd.terms.items():
        adapter = getattr(term.kd_path, "adapter", None)
        if isinstance(adapter, nn.Conv2d) and adapter.in_channels == adapter.out_channels:
            both = f"Teacher and Student both have {adapter.in_channels} channels at {term.stages[0]}"
            log.warning("%s, term %s: %s; its adapter is not needed", _compared(cfg), name, both)


def distillation(cfg: DictConfig, *, teacher: str) -> Distillation | None:
    """Build how the configuration's Student is taught by the Teacher of a fingerprint; None for a baseline."""
    given = identity.read(cfg)
    if not given.is_taught:
        return None
    with guard.confined(cfg.seed):  # after the Student, from the same seed: paths share its initialization
        terms = _method_terms(cfg, given.method.shares()) if given.method.terms else {"kd": _term(cfg)}
    return Distillation(
        terms=terms,
        weight=given.kd_weight,
        ratio=cfg.kd.ratio,
        forward=TeacherForward(teacher, view=cfg.teacher_aug.distill_view, precision=cfg.kd.teacher_precision),
        align=cfg.kd.align == "warp",
    )


def _method_terms(cfg: DictConfig, shares: dict[str, float]) -> dict[str, Term]:
    """Build the comparisons of a method, each of which names its stage."""
    terms = {}
    for name, node in cfg.method.terms.items():
        kd_path = _kd_path(cfg, node.path)
        if kd_path.stages is None:
            raise InputError(f"method.terms.{name}.path={node.path._target_} says not which stages it takes")
        terms[name] = Term(kd_path, composition.build(node.loss), kd_path.stages, shares[name])
    return terms


def _term(cfg: DictConfig) -> Term:
    """Build the comparison of ``path`` and ``loss``."""
    representation, kd_path = cfg.path.representation, _kd_path(cfg, cfg.path.kd_path)
    implied = (unet.HIDDEN, "logits") if representation == "logits" else (unet.HIDDEN,)
    return Term(kd_path, composition.build(cfg.loss[representation]), kd_path.stages or implied)


def _kd_path(cfg: DictConfig, node: DictConfig) -> KDPath:
    """Build a KD path; one that is ``_partial_`` is given the channels of its stage in both networks."""
    kd_path = composition.build(node)
    if not isinstance(kd_path, partial):
        return cast("KDPath", kd_path)
    stage = kd_path.keywords.get("stage", unet.HIDDEN)
    stages = {"student": stage, "teacher": kd_path.keywords.get("teacher_stage") or stage}
    widths = {name: unet.stage_channels(cfg[name].encoder, tuple(cfg[name].decoder_channels)) for name in stages}
    return cast("KDPath", kd_path(**{f"{name}_channels": widths[name][stages[name]] for name in stages}))


def learner(cfg: DictConfig, own: Cell) -> Learner:
    """The configuration's Student in training."""
    given = identity.read(cfg)
    return Learner(
        title=own.title,
        role=own.role,
        network=student_network(cfg),
        view="strong",
        distillation=distillation(cfg, teacher=own.evidence.get("teacher", "")),
        lr=cfg.train.lr,
        supervised=SUPERVISED[given.train.supervised],
        schedule=given.train.schedule,
        epochs=cfg.train.epochs,
        patience=cfg.train.patience,
        folder=own.folder,
        fused=device(cfg).type == "cuda",
        nsd_tolerance_px=cfg.scores.nsd_tolerance_px,
        monitor=cfg.train.monitor,
    )


def teacher_learner(cfg: DictConfig, own: Cell) -> Learner:
    """The configuration's Teacher in training, on the view that ``teacher_aug.train_view`` names."""
    given = identity.read(cfg)
    supervised, schedule = given.teacher_recipe
    return Learner(
        title=own.title,
        role=own.role,
        network=teacher_network(cfg),
        view=cfg.teacher_aug.train_view,
        distillation=None,
        lr=cfg.teacher.lr,
        supervised=SUPERVISED[supervised],
        schedule=schedule,
        epochs=given.teacher_epochs,
        patience=cfg.train.patience,
        folder=own.folder,
        fused=device(cfg).type == "cuda",
        nsd_tolerance_px=cfg.scores.nsd_tolerance_px,
        monitor=given.teacher.monitor,
    )


def tags(cfg: DictConfig) -> dict[str, str]:
    """Tags of a run beyond its cell's: profile, and what is recorded but does not make another cell."""
    where, given = device(cfg), identity.read(cfg)
    return {
        "kdsweep.profile": cfg.profile,
        "kdsweep.precision": cfg.precision,
        "kdsweep.device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "kdsweep.split_protocol": given.split.in_words(),
        "kdsweep.split_digest": identity.split_digest(given),
        "kdsweep.split_images": "/".join(str(len(ids)) for ids in identity.split_ids(given).values()),
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
    cfg = composition.compose(overrides)
    identity.read(cfg)
    student, teacher = student_network(cfg, weights="none"), teacher_network(cfg, weights="none")
    sys.stdout.write(unet.summary(teacher=teacher, student=student, image_size=cfg.image_size) + "\n")
