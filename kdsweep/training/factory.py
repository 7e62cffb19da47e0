"""The only place where a configuration becomes objects; below it, functions take plain arguments.

What of a configuration can be told without torch is in ``config/identity.py``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import cache, lru_cache, partial
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from kdsweep.config import composition, identity
from kdsweep.config.grid import Cell
from kdsweep.core.device import Compute, find_device
from kdsweep.core.errors import InputError, exit_code, one_line
from kdsweep.data.loaders import Feed, TrainLoader, eval_part
from kdsweep.data.splits import check_training_masks
from kdsweep.data.views import Strengths, Views
from kdsweep.distill.distillation import Distillation, TeacherForward
from kdsweep.models import unet
from kdsweep.models.unet import Outputs, UNet
from kdsweep.models.weights import HUB
from kdsweep.training.learner import Learner


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
    """Return where and how the numbers of a configuration are computed."""
    return Compute(device=device(cfg), precision=cfg.precision, deterministic=cfg.deterministic)


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
    )
    return Feed(
        loader,
        eval_part(everything, part.validation),
        eval_part(everything, part.test, groups=identity.image_groups(cfg)),
    )


def _workers(cfg: DictConfig) -> int:
    if cfg.train.workers != "auto":
        return int(cfg.train.workers)
    return min(4, os.cpu_count() or 1) if device(cfg).type == "cuda" else 0


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
    return HUB + identity.imagenet(node) if node.weights == "imagenet" else str(node.weights)


def check_networks(cfg: DictConfig) -> None:
    """Raise InputError if a cell's networks or their weights cannot be had: before anything is trained."""
    networks = [cfg.student, *([cfg.teacher] if cfg.path.kd_path is not None else [])]
    for node in networks:
        _check_network(node.encoder, tuple(node.decoder_channels), _weights(node))


@lru_cache(maxsize=8)
def _check_network(encoder: str, decoder_channels: tuple[int, ...], weights: str) -> None:
    unet.unet(encoder=encoder, decoder_channels=list(decoder_channels), weights=weights, seed=0)


def check_term(cfg: DictConfig) -> None:
    """Build a cell's path and loss and take one term and its gradient of two images, before anything is trained.

    Raises:
        InputError: one of them cannot be built or called, or returns something else than one number.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            if (kd := distillation(cfg, teacher="")) is not None:
                _take_term(kd, cfg)
    except InputError:
        raise
    except Exception as error:  # of any kind: it is the user's code
        raise InputError(f"path={cfg.path.name} loss={cfg.loss.name} gives no KD term: {one_line(error)}") from error


def _take_term(kd: Distillation, cfg: DictConfig) -> None:
    chance = torch.Generator().manual_seed(0)
    side = cfg.image_size // 32

    def outputs(group: str) -> Outputs:
        channels = unet.hidden_channels(cfg[group].encoder)
        logits = torch.randn(2, 1, cfg.image_size, cfg.image_size, generator=chance)
        return Outputs(logits=logits, hidden=torch.randn(2, channels, side, side, generator=chance))

    student, teacher = outputs("student"), outputs("teacher")
    for tensor in student:
        tensor.requires_grad_()
    value = kd.term(student=student, teacher=teacher, theta=torch.eye(2, 3).repeat(2, 1, 1))
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        raise TypeError("the loss must return a tensor of one number that depends on the Student")
    value.backward()


def distillation(cfg: DictConfig, *, teacher: str) -> Distillation | None:
    """Build how the configuration's Student is taught by the Teacher of a fingerprint; None for path=none."""
    if cfg.path.kd_path is None:
        return None
    with torch.random.fork_rng(devices=[]):  # after the Student, from the same seed: paths share its initialization
        torch.manual_seed(cfg.seed)
        kd_path = hydra.utils.instantiate(cfg.path.kd_path)
        if isinstance(kd_path, partial):
            channels = {f"{name}_channels": unet.hidden_channels(cfg[name].encoder) for name in ("student", "teacher")}
            kd_path = kd_path(**channels)
    return Distillation(
        kd_path=kd_path,
        needs_logits=cfg.path.representation == "logits",
        loss=hydra.utils.instantiate(cfg.loss[cfg.path.representation]),
        weight=None if cfg.kd.weight == "matched" else cfg.kd.weight,
        ratio=cfg.kd.ratio,
        forward=TeacherForward(teacher, view=cfg.teacher_aug.distill_view, precision=cfg.kd.teacher_precision),
        align=cfg.kd.align == "warp",
    )


def learner(cfg: DictConfig, own: Cell) -> Learner:
    """The configuration's Student in training."""
    return Learner(
        title=own.title,
        role=own.role,
        network=student_network(cfg),
        view="strong",
        distillation=distillation(cfg, teacher=own.evidence.get("teacher", "")),
        lr=cfg.train.lr,
        epochs=cfg.train.epochs,
        patience=cfg.train.patience,
        folder=own.folder,
        nsd_tolerance_px=cfg.scores.nsd_tolerance_px,
        monitor=cfg.train.monitor,
    )


def teacher_learner(cfg: DictConfig, own: Cell) -> Learner:
    """The configuration's Teacher in training, on the view that ``teacher_aug.train_view`` names."""
    return Learner(
        title=own.title,
        role=own.role,
        network=teacher_network(cfg),
        view=cfg.teacher_aug.train_view,
        distillation=None,
        lr=cfg.teacher.lr,
        epochs=cfg.train.epochs,
        patience=cfg.train.patience,
        folder=own.folder,
        nsd_tolerance_px=cfg.scores.nsd_tolerance_px,
    )


def tags(cfg: DictConfig) -> dict[str, str]:
    """Tags of a run beyond its cell's: profile, and what is recorded but does not make another cell."""
    where, given = device(cfg), identity.read(cfg)
    return {
        "kdsweep.profile": cfg.profile,
        "kdsweep.device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "kdsweep.split_protocol": given.split.in_words(),
        "kdsweep.split_digest": identity.split_digest(given),
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


def print_models(argv: list[str]) -> int:
    """Print parameters, MACs and hidden shapes of the configured networks; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kdsweep models", description="What the networks consist of.")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as teacher=resnet34 image_size=128")
    overrides = parser.parse_args(argv).overrides

    def work() -> None:
        cfg = composition.compose(overrides)
        identity.read(cfg)
        student, teacher = student_network(cfg, weights="none"), teacher_network(cfg, weights="none")
        sys.stdout.write(unet.summary(teacher=teacher, student=student, image_size=cfg.image_size) + "\n")

    return exit_code(work)
