"""The only place where a configuration becomes objects; below it, functions take plain arguments."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from kdsweep import conf_dir, data, grid, limits, models, tracking, train
from kdsweep.errors import InputError
from kdsweep.grid import Cell
from kdsweep.kd_paths import KDPath
from kdsweep.learner import Distillation, Learner, Run
from kdsweep.loaders import Feed, TrainLoader, eval_part
from kdsweep.models import UNet
from kdsweep.views import Strengths, Views

# The code that determines a result, beside what a configuration names by _target_.
RESULT_CODE = [
    "kdsweep.build.distillation",
    "kdsweep.build.feed",
    "kdsweep.build.learner",
    "kdsweep.build.teacher_learner",
    "kdsweep.data.load",
    "kdsweep.data.split",
    "kdsweep.learner.Distillation",
    "kdsweep.learner.Learner",
    "kdsweep.loaders.TrainLoader",
    "kdsweep.loaders.eval_part",
    "kdsweep.losses.cross_entropy",
    "kdsweep.metrics.per_image",
    "kdsweep.metrics.mean_dice",
    "kdsweep.metrics.trivial_dice",
    "kdsweep.models.unet",
    "kdsweep.models.TrimmedMobileNetV3Small",
    "kdsweep.train.conclude",
    "kdsweep.train.fit",
    "kdsweep.views.Views",
    "kdsweep.views.id_number",
    "kdsweep.views.normalise",
    "kdsweep.views.sampling_theta",
    "kdsweep.views.warp",
]


def check(cfg: DictConfig) -> None:
    """Raise InputError for the first value out of its range: one line with key, value and what is allowed."""
    limits.check(params(cfg))
    device(cfg)


def device(cfg: DictConfig) -> torch.device:
    """The device that ``device`` names; ``auto`` is CUDA if there is one.

    Raises:
        InputError: not a device, or not there.
    """
    name = str(cfg.device)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()) or (kind == "cpu" and number):
        raise InputError(f"device={name} is not allowed: it must be auto, cpu, cuda or cuda:NUMBER")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={name}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use device=cpu or auto"
        )
    return torch.device(name)


def compute(cfg: DictConfig) -> train.Compute:
    """Where and how the numbers are computed."""
    return train.Compute(device=device(cfg), precision=cfg.precision)


def load_size(cfg: DictConfig) -> int:
    """Side in pixels of the images that crops are taken from: 256 for 224, and in that ratio."""
    return cfg.data.load_size or round(cfg.image_size * 256 / 224)


def images(cfg: DictConfig) -> data.Images:
    """The data set in memory; read once per process."""
    source = hydra.utils.instantiate(cfg.data.source)
    takes_empty = bool(cfg.data.get("allow_empty_masks"))
    return _load(source, load_size=load_size(cfg), image_size=cfg.image_size, allow_empty_masks=takes_empty)


@lru_cache(maxsize=2)
def _load(source: data.Source, *, load_size: int, image_size: int, allow_empty_masks: bool) -> data.Images:
    return data.load(source, load_size=load_size, image_size=image_size, allow_empty_masks=allow_empty_masks)


def feed(cfg: DictConfig, *, seed: int) -> Feed:
    """The three parts of the cell's split; seed decides order and views of the training part.

    Raises:
        InputError: the training part cannot be trained on.
    """
    everything = images(cfg)
    part = data.split(len(everything.ids), index=cfg.split)
    data.check_training_masks(everything, part)
    if cfg.train.batch_size > len(part.train):
        raise InputError(
            f"train.batch_size={cfg.train.batch_size} is larger than the training set of {len(part.train)} images"
        )
    strengths = Strengths(**{**_plain(cfg.views), "noise_std": tuple(cfg.views.noise_std)})
    loader = TrainLoader(
        everything,
        indices=part.train,
        views=Views(image_size=cfg.image_size, strengths=strengths),
        seed=seed,
        split_index=cfg.split,
        batch_size=cfg.train.batch_size,
        workers=_workers(cfg),
    )
    return Feed(loader, eval_part(everything, part.validation), eval_part(everything, part.test))


def _workers(cfg: DictConfig) -> int:
    if cfg.train.workers != "auto":
        return int(cfg.train.workers)
    return min(4, os.cpu_count() or 1) if device(cfg).type == "cuda" else 0


def cell(cfg: DictConfig) -> Cell:
    """The cell that a configuration describes, with its fingerprint."""
    common, evidence = _common(cfg)
    if cfg.path.kd_path is None:
        own = {**common, "network": _network(cfg.student), "lr": cfg.train.lr}
        evidence |= _weights_evidence("student", cfg.student) | {
            "code": grid.code_digest([*RESULT_CODE, *grid.targets(own)])
        }
        return _cell(cfg, "student", cfg.path.notation, own, evidence)
    loss = cfg.loss[_representation(cfg)]
    taught = {
        "path": _plain(cfg.path),
        "loss": _plain(loss),
        "distill_view": cfg.teacher_aug.distill_view,
        "kd": _plain(cfg.kd),
    }
    master = teacher_cell(cfg)
    own = {**common, "network": _network(cfg.student), "lr": cfg.train.lr, **taught, "teacher": master.settings}
    evidence |= _weights_evidence("student", cfg.student) | {"teacher": master.fingerprint}
    evidence["code"] = grid.code_digest([*RESULT_CODE, *grid.targets(own)])
    name = grid.notation(path=cfg.path.notation, loss=cfg.loss.name.upper(), distill_view=cfg.teacher_aug.distill_view)
    return _cell(cfg, "cell", name, own, evidence)


def teacher_cell(cfg: DictConfig) -> Cell:
    """The Teacher that a configuration's cell learns from."""
    common, evidence = _common(cfg)
    own = {**common, "network": _network(cfg.teacher), "lr": cfg.teacher.lr, "train_view": cfg.teacher_aug.train_view}
    evidence |= _weights_evidence("teacher", cfg.teacher) | {
        "code": grid.code_digest([*RESULT_CODE, *grid.targets(own)])
    }
    name = grid.teacher_notation(cfg.teacher_aug.train_view)
    return _cell(cfg, "teacher", name, own, evidence, seed=cfg.teacher.seed)


def _cell(
    cfg: DictConfig, role: str, name: str, own: dict[str, Any], evidence: dict[str, str], seed: int | None = None
) -> Cell:
    return Cell(
        role=role,
        notation=name,
        split=cfg.split,
        seed=cfg.seed if seed is None else seed,
        settings=own,
        evidence=evidence,
        store=Path(cfg.store),
    )


def _common(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """What every training of a configuration depends on: settings, and digests of what lies outside them."""
    source = {key: value for key, value in _plain(cfg.data.source).items() if key not in ("root", "cache_dir")}
    settings = {
        "profile": cfg.profile,
        "data": {"name": cfg.data.name, "source": source, "load_size": load_size(cfg)},
        "image_size": cfg.image_size,
        "views": _plain(cfg.views),
        "precision": cfg.precision,
        "train": {key: cfg.train[key] for key in ("epochs", "batch_size", "patience")},
    }
    return settings, {"data": images(cfg).digest}


def _network(node: DictConfig) -> dict[str, Any]:
    weights = node.weights if node.weights in ("imagenet", "none") else "file"
    return {"encoder": node.encoder, "decoder_channels": list(node.decoder_channels), "weights": weights}


def _weights_evidence(group: str, node: DictConfig) -> dict[str, str]:
    if node.weights == "none":
        return {}
    if node.weights == "imagenet":
        return {f"{group}_weights": "@".join(models.imagenet_source(node.encoder))}
    file = Path(str(node.weights))
    if not file.is_file():
        raise InputError(f"{group}.weights={file}: no such file; use imagenet, none, or a .safetensors or .pt file")
    return {f"{group}_weights": _file_digest(file, file.stat().st_mtime_ns)}


@lru_cache(maxsize=8)
def _file_digest(file: Path, _: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _representation(cfg: DictConfig) -> str:
    kind: type[KDPath] = hydra.utils.get_class(cfg.path.kd_path._target_)
    return kind.representation


def _plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def student_network(cfg: DictConfig, *, weights: str | None = None) -> UNet:
    """A new Student; all cells of a seed start from the same one."""
    return _new_network(cfg.student, seed=cfg.seed, weights=weights)


def teacher_network(cfg: DictConfig, *, weights: str | None = None) -> UNet:
    """A new, untrained Teacher."""
    return _new_network(cfg.teacher, seed=cfg.teacher.seed, weights=weights)


def _new_network(node: DictConfig, *, seed: int, weights: str | None) -> UNet:
    return models.unet(
        encoder=node.encoder,
        decoder_channels=list(node.decoder_channels),
        weights=weights or str(node.weights),
        seed=seed,
    )


def check_networks(cfg: DictConfig) -> None:
    """Raise InputError if a cell's networks or their weights cannot be had: before anything is trained."""
    networks = {"student": cfg.student} | ({"teacher": cfg.teacher} if cfg.path.kd_path is not None else {})
    for group, node in networks.items():
        _check_network(group, node.encoder, tuple(node.decoder_channels), node.hidden_channels, str(node.weights))


@lru_cache(maxsize=8)
def _check_network(
    group: str, encoder: str, decoder_channels: tuple[int, ...], hidden_channels: int, weights: str
) -> None:
    network = models.unet(encoder=encoder, decoder_channels=list(decoder_channels), weights=weights, seed=0)
    if (channels := network.encoder.out_channels[-1]) != hidden_channels:
        raise InputError(f"{group}.hidden_channels={hidden_channels} is not allowed: {encoder} has {channels}")


def split_ids(cfg: DictConfig) -> dict[str, list[str]]:
    """Image ids of the split's three parts: written beside the run."""
    everything = images(cfg)
    part = data.split(len(everything.ids), index=cfg.split)
    return {name: [everything.ids[i] for i in indices] for name, indices in vars(part).items()}


def distillation(cfg: DictConfig, *, teacher: str) -> Distillation | None:
    """How the configuration's Student is taught, by the Teacher of a fingerprint; None for path=none."""
    if cfg.path.kd_path is None:
        return None
    with torch.random.fork_rng(devices=[]):  # after the Student, from the same seed: paths share its initialisation
        torch.manual_seed(cfg.seed)
        kd_path = hydra.utils.instantiate(cfg.path.kd_path)
    return Distillation(
        kd_path=kd_path,
        loss=hydra.utils.instantiate(cfg.loss[kd_path.representation]),
        weight=cfg.kd.weight,
        teacher=teacher,
        view=cfg.teacher_aug.distill_view,
        align=cfg.kd.align == "warp",
    )


def learner(cfg: DictConfig, own: Cell, run: Run) -> Learner:
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
        run=run,
    )


def teacher_learner(cfg: DictConfig, own: Cell, run: Run, network: UNet) -> Learner:
    """The configuration's Teacher in training, on the view that ``teacher_aug.train_view`` names."""
    return Learner(
        title=own.title,
        role=own.role,
        network=network,
        view=cfg.teacher_aug.train_view,
        distillation=None,
        lr=cfg.teacher.lr,
        epochs=cfg.train.epochs,
        patience=cfg.train.patience,
        folder=own.folder,
        run=run,
    )


def tracker(cfg: DictConfig) -> tracking.Tracker:
    """The MLflow store of the configuration."""
    return tracking.Tracker(store=Path(cfg.store), uri=cfg.tracking.uri, experiment=cfg.tracking.experiment)


def params(cfg: DictConfig) -> dict[str, Any]:
    """The flat resolved configuration, keys joined by dots: what MLflow keeps of a run."""
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    flat: dict[str, Any] = grid.flatten(_plain(own))
    return flat


def tags(cfg: DictConfig) -> dict[str, str]:
    """Tags of a run beyond its cell's: profile, and what is recorded but does not make another cell."""
    where = device(cfg)
    return {
        "kdsweep.profile": cfg.profile,
        "kdsweep.device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "kdsweep.threads": str(torch.get_num_threads()),
        "kdsweep.torch": torch.__version__,
        "mlflow.source.git.commit": git_commit(),
    }


def git_commit() -> str:
    """Commit of the checkout that runs, with ``-dirty`` if it was changed; ``unknown`` outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def compose(overrides: list[str]) -> DictConfig:
    """The configuration of one cell from overrides, outside of a Hydra run.

    Raises:
        InputError: an override is wrong.
    """
    from hydra.errors import HydraException

    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return hydra.compose("config", overrides)
    except HydraException as error:
        raise InputError(" ".join(str(error).split()).partition(" To append")[0]) from error


def print_models(overrides: list[str]) -> int:
    """Print parameters, MACs and hidden shapes of the configured networks; the exit code."""
    try:
        cfg = compose(overrides)
        check(cfg)
        student, teacher = student_network(cfg, weights="none"), teacher_network(cfg, weights="none")
    except InputError as error:
        sys.stderr.write(f"kdsweep: error: {error}\n")
        return 1
    sys.stdout.write(models.summary(teacher=teacher, student=student, image_size=cfg.image_size) + "\n")
    return 0
