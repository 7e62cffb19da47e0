"""The only place where settings become objects; below it, functions take plain arguments."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch

from kdsweep.config import composition, grid, identity, inputs
from kdsweep.config.grid import TEACHER, Cell
from kdsweep.config.networks import Architecture, NetworkNode
from kdsweep.config.schema import KDPathNode, Settings
from kdsweep.core.device import Compute, find_device, usable_precision
from kdsweep.core.errors import InputError
from kdsweep.core.files import without_folders
from kdsweep.data.loaders import EpochBatches, Feed, TrainLoader, affordable_workers, eval_part
from kdsweep.data.splits import check_training_masks
from kdsweep.data.views import Strengths, Views
from kdsweep.distill import losses
from kdsweep.distill.distillation import Distillation, TeacherForward, Term
from kdsweep.distill.paths import KDPath
from kdsweep.models.build import new_network, stage_channels
from kdsweep.models.build import summary as summary_of
from kdsweep.models.ensemble import Ensemble
from kdsweep.models.networks import HIDDEN, Network
from kdsweep.models.weights import IMAGENET
from kdsweep.store import cell_folder
from kdsweep.training import guard, trained
from kdsweep.training.learner import Learner

log = logging.getLogger(__name__)

SUPERVISED = {"bce": losses.cross_entropy, "bce_dice": losses.cross_entropy_and_dice}


def devices(settings: Settings) -> list[str]:
    """Return the names of the devices that groups can be spread over."""
    one = find_device(settings.device)
    if one.type == "cuda" and settings.device in ("auto", "cuda"):
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [str(one)]


def compute(settings: Settings) -> Compute:
    """Return device and precision; raise InputError if the device is absent or does not have the precision."""
    on = find_device(settings.device)
    for key, precision in (("precision", settings.precision), ("kd.teacher_precision", settings.kd.teacher_precision)):
        if usable_precision(precision, on) != precision:
            message = f"{key}={precision} needs a CUDA device, and device={settings.device} is {on}; use fp32 or bf16"
            raise InputError(message)
    return Compute(device=on, precision=settings.precision, deterministic=settings.deterministic)


def feed(settings: Settings, *, seed: int) -> Feed:
    """Return the parts of a cell's split, views drawn by seed; raise InputError if they cannot be trained on."""
    everything, part, batch = inputs.images(settings), inputs.split(settings), settings.train.batch_size
    check_training_masks(everything, part)
    if batch > len(part.train):
        raise InputError(f"train.batch_size={batch} is larger than the training set of {len(part.train)} images")
    strengths = Strengths(**settings.views.plain() | {"noise_std": tuple(settings.views.noise_std)})
    batches = EpochBatches(
        indices=part.train,
        batch_size=batch,
        seed=seed,
        split_index=settings.split.number,
        last_batch=settings.train.last_batch,
    )
    return Feed(
        train=TrainLoader(
            everything,
            views=Views(image_size=settings.image_size, strengths=strengths),
            batches=batches,
            workers=_workers(settings),
            pinned=find_device(settings.device).type == "cuda",
        ),
        validation=eval_part(everything, part.validation),
        test=eval_part(everything, part.test, groups=inputs.image_groups(settings)),
    )


def _workers(settings: Settings) -> int:
    """Return how many processes prepare batches, as far as the shared memory has room for them."""
    number = settings.train.workers
    if number == "auto":
        number = min(4, os.cpu_count() or 1) if find_device(settings.device).type == "cuda" else 0
    return _affordable(int(number), 8 * settings.image_size**2 * settings.train.batch_size)


@cache
def _affordable(number: int, batch_bytes: int) -> int:
    possible = affordable_workers(number, batch_bytes=batch_bytes) if number else 0
    if possible < number:
        line = "train.workers=%d: /dev/shm has no room for their batches of %.0f MB, %d of them work; "
        line += "a smaller batch or more room helps, in a container --shm-size"
        log.warning(line, number, batch_bytes / 1e6, possible)
    return possible


def student_network(settings: Settings, *, weights: str | None = None) -> Network:
    """Return a new Student; all cells of a seed start from the same one."""
    return _new_network(settings.student, logits=settings.logits, seed=settings.seed, weights=weights)


def teacher_network(settings: Settings, *, weights: str | None = None) -> Network:
    """Return a new Teacher, untrained unless it comes trained."""
    if members := settings.members:
        return Ensemble({name: teacher_network(member, weights=weights) for name, member in members.items()})
    if weights is None and settings.teacher.trained is not None:
        return trained.network(settings)
    return _new_network(settings.teacher, logits=settings.logits, seed=settings.teacher.seed, weights=weights)


def _new_network(node: NetworkNode, *, logits: int, seed: int, weights: str | None) -> Network:
    with guard.confined(seed):
        return new_network(node, logits=logits, weights=weights or _weights(node), seed=seed)


def _weights(node: NetworkNode) -> str:
    return IMAGENET + inputs.imagenet(node) if node.weights == "imagenet" else node.weights


def check_networks(settings: Settings) -> None:
    """Raise InputError if a cell's networks cannot be built or their weights are absent."""
    for member in settings.members.values():
        check_networks(member)
    if settings.members:
        return
    is_trained = settings.is_distilled and settings.teacher.trained is not None
    if is_trained:
        trained.check(settings)
    for node in (
        (settings.student, settings.teacher) if settings.is_distilled and not is_trained else (settings.student,)
    ):
        _check_network(node.as_json(), settings.logits, _weights(node))


@lru_cache(maxsize=8)
def _check_network(architecture: str, logits: int, weights: str) -> None:
    new_network(Architecture.model_validate_json(architecture), logits=logits, weights=weights, seed=0)


def distillation(settings: Settings, *, teacher: str) -> Distillation | None:
    """Return how the Student learns from the Teacher of a fingerprint; None for a baseline.

    Raises:
        InputError: a path or loss cannot be built, or its code changes what all cells of a process share.
    """
    if not settings.is_distilled:
        return None
    try:
        with guard.confined(settings.seed):  # after the Student, from the same seed: paths share its initialization
            terms = _terms(settings)
    except guard.SharedStateError as error:
        is_method = settings.method.name != "none"
        name = f"method={settings.method.name}" if is_method else f"path={settings.path.name} loss={settings.loss.name}"
        raise guard.SharedStateError(f"{name}: {error}") from error
    return Distillation(
        terms=terms,
        weight=settings.kd_weight,
        ratio=settings.kd.ratio,
        forward=TeacherForward(
            teacher, view=settings.teacher_aug.distill_view, precision=settings.kd.teacher_precision
        ),
        align=settings.kd.align == "warp",
    )


def _terms(settings: Settings) -> dict[str, Term]:
    """Return the comparisons of a method, each of which names its stage, or that of ``path`` and ``loss``."""
    common: Any = {"resize": settings.kd.resize, "classes": len(settings.class_names) or 1}
    if not settings.method.terms:
        assert settings.path.kd_path is not None
        kd_path = _kd_path(settings, settings.path.kd_path)
        implied = (HIDDEN, "logits") if settings.path.representation == "logits" else (HIDDEN,)
        loss = composition.build(identity.loss(settings))
        return {"kd": Term(kd_path, loss, kd_path.stages or implied, **common)}
    terms, shares = {}, settings.method.shares()
    for name, node in settings.method.terms.items():
        kd_path = _kd_path(settings, node.path)
        if kd_path.stages is None:
            raise InputError(f"method.terms.{name}.path={node.path.target} does not say which stages it takes")
        terms[name] = Term(kd_path, composition.build(node.loss), kd_path.stages, shares[name], **common)
    return terms


def _kd_path(settings: Settings, node: KDPathNode) -> KDPath:
    """Return a KD path; one that is ``_partial_`` gets the channels of its stage in both networks."""
    kd_path = composition.build(node.plain())
    if isinstance(kd_path, partial):
        stage = kd_path.keywords.get("stage", HIDDEN)
        kd_path = kd_path(
            student_channels=_channels(settings, settings.student)[stage],
            teacher_channels=_channels(settings, settings.teacher)[kd_path.keywords.get("teacher_stage") or stage],
        )
    return cast("KDPath", kd_path)


def _channels(settings: Settings, node: NetworkNode) -> dict[str, int]:
    return stage_channels(node, logits=settings.logits, image_size=settings.image_size)


def learner(settings: Settings, cell: Cell) -> Learner:
    """Return the network of a cell in training: the Student, or the Teacher with the keys of ``teacher``."""
    is_teacher = cell.role == TEACHER
    recipe = settings.teacher_recipe if is_teacher else (settings.train.supervised, settings.train.schedule)
    return Learner(
        title=cell.title,
        role=cell.role,
        network=teacher_network(settings) if is_teacher else student_network(settings),
        view=settings.teacher_aug.train_view if is_teacher else "strong",
        distillation=None if is_teacher else distillation(settings, teacher=cell.input_digests.get("teacher", "")),
        lr=settings.teacher.lr if is_teacher else settings.train.lr,
        supervised=SUPERVISED[recipe[0]],
        schedule=recipe[1],
        epochs=settings.train.epochs if not is_teacher else 0 if cell.members else settings.teacher_epochs,
        patience=settings.teacher_patience if is_teacher else settings.train.patience,
        folder=cell.folder,
        fused=find_device(settings.device).type == "cuda",
        nsd_tolerance_px=settings.scores.nsd_tolerance_px,
        tests_each_epoch=settings.scores.each_epoch,
        monitor=settings.teacher.monitor if is_teacher else settings.train.monitor,
    )


def describe(settings: Settings, cell: Cell) -> None:
    """Write into the folder of a cell which cell it is."""
    params = without_folders(identity.params(settings)) | identity.factors(settings, role=cell.role)
    cell_folder.describe(cell, split=inputs.split_ids(settings), params=params, tags=tags(settings))


def tags(settings: Settings) -> dict[str, str]:
    """Return tags of a run beyond its cell's: the profile, and facts that do not make another cell."""
    on = find_device(settings.device)
    return {
        "kdsweep.profile": settings.profile,
        "kdsweep.precision": settings.precision,
        "kdsweep.device": torch.cuda.get_device_name(on) if on.type == "cuda" else "cpu",
        "kdsweep.split_protocol": settings.split.in_words(),
        "kdsweep.split_digest": grid.digest(inputs.split_ids(settings)),
        "kdsweep.split_images": "/".join(str(len(ids)) for ids in inputs.split_ids(settings).values()),
        "kdsweep.threads": str(torch.get_num_threads()),
        "kdsweep.torch": torch.__version__,
        "mlflow.source.git.commit": git_commit(),
    }


@cache
def git_commit() -> str:
    """Return the commit of the checkout that runs, with ``-dirty`` if it was changed; ``unknown`` outside one."""
    arguments = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def summary(overrides: Sequence[str]) -> str:
    """Return parameters, MACs and hidden shapes of the networks that overrides configure."""
    settings = composition.compose(overrides)
    student, teacher = student_network(settings, weights="none"), teacher_network(settings, weights="none")
    return summary_of(teacher=teacher, student=student, image_size=settings.image_size)
