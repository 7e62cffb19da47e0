"""Data sets behind one small interface.

A data set is a class with ``name`` and ``entries()``: the list of its images, each with an id, a label and its files.
Everything after that (reading, checking, resizing, splitting) is the same for all. kdsweep's classes also account for
the files of their folder that they do not use, in ``ignored()``.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from filelock import FileLock
from PIL import Image

from kdsweep.core.errors import InputError
from kdsweep.core.files import folded
from kdsweep.data import phantom
from kdsweep.data.class_maps import Code
from kdsweep.data.folders import LONE_MASKS, Ignored, Inventory, is_image, pair
from kdsweep.data.labels import read_labels
from kdsweep.data.pixels import Window

log = logging.getLogger(__name__)

BUSI_LAYOUT = "benign/*.png and malignant/*.png with *_mask.png, as BUSI unpacks"
NORMAL = "images of normal/, which data.source.include_normal=true takes"
MASK_NAME = re.compile(r"(.+)_mask(_\d+)?", re.IGNORECASE)


Classes = tuple[tuple[str, Code], ...]  # names, each with what a mask shows


class Entry(NamedTuple):
    """One image of a data set: unique id, label, image file, mask files, window, classes.

    The lesion is the union of the masks. With classes each mask shows those whose value or color it has; where classes
    have a label, one mask shows one class: that of ``NAME_mask_LABEL``, else that of the image's label.
    """

    id: str
    label: str
    image_file: Path
    mask_files: tuple[Path, ...]
    window: Window | None = None
    classes: Classes | None = None


class Contents(NamedTuple):
    """The images of a data set, and names of what is not used of its folder, by reason."""

    entries: list[Entry]
    ignored: Ignored


class Source(Protocol):
    """The interface of a data set."""

    name: str

    def entries(self) -> list[Entry]:
        """Return all images, or raise InputError."""


class _InFolder(ABC):
    """A data set in a folder, all of whose files are used or ignored with a reason."""

    @abstractmethod
    def _contents(self) -> Contents: ...

    def entries(self) -> list[Entry]:
        """Return the images with their masks."""
        return self._contents().entries

    def ignored(self) -> Ignored:
        """Return names of what is not used, by reason."""
        return self._contents().ignored


@dataclass(frozen=True)
class Udiat(_InFolder):
    """UDIAT, "Dataset B" (Yap et al. 2017): ``original/000001.png`` and ``GT/000001.png``, also some folders deeper.

    Labels come from DatasetB.xlsx (columns Image, Type); without it they are ``unknown``.
    """

    root: str | Path
    name: str = "udiat"

    def _contents(self) -> Contents:
        inventory = Inventory(self.root)
        folders = inventory.find(("original", "gt"), layout="original/ and GT/ next to each other, as UDIAT unpacks")
        pairs = pair(inventory, *folders)
        labels: dict[str, str] = {}
        if sheet := self._sheet(inventory, folders[0].parent):
            labels, unused = read_labels(inventory.use(sheet), [image.stem for image, _ in pairs])
            if unused:
                inventory.ignored[f"rows of {sheet.name} without an image"] = unused
        entries = [Entry(image.stem, labels.get(image.stem, "unknown"), image, masks) for image, masks in pairs]
        return Contents(entries, inventory.close(folders))

    def _sheet(self, inventory: Inventory, folder: Path) -> Path | None:
        """Return the file DatasetB.xlsx of the images' folder, or the only one elsewhere."""
        sheets = [file for file in inventory.files if file.name.lower() == "datasetb.xlsx"]
        sheets = [file for file in sheets if file.parent == folder] or sheets
        if len(sheets) > 1:
            raise InputError(f"{sheets[0]} and {sheets[1]}: which one has the labels? Remove the other")
        return sheets[0] if sheets else None


@dataclass(frozen=True)
class Busi(_InFolder):
    """BUSI (Al-Dhabyani et al. 2020): ``benign/benign (1).png`` with ``_mask.png``, ``_mask_1.png``, ...

    Args:
        root: folder that holds ``benign`` and ``malignant``, also some folders deeper.
        include_normal: also take the images without a lesion; their masks are empty.
    """

    root: str | Path
    include_normal: bool = False
    name: str = "busi"

    def _contents(self) -> Contents:
        inventory = Inventory(self.root)
        labels = ("benign", "malignant", *(("normal",) if self.include_normal else ()))
        normal = "; data.source.include_normal=true also needs normal/" if self.include_normal else ""
        folders = inventory.find(labels, layout=BUSI_LAYOUT + normal)
        entries = _class_images(inventory, dict(zip(labels, folders, strict=True)))
        if not self.include_normal:
            unused = [file for file in inventory.files if file.parent.name.lower() == "normal" and is_image(file)]
            inventory.ignore(NORMAL, [file for file in unused if file.parent.parent == folders[0].parent])
        return Contents(entries, inventory.close(folders))


def _class_images(inventory: Inventory, folders: dict[str, Path]) -> list[Entry]:
    """Return the images of BUSI's class folders, by label, with all their masks."""
    entries = []
    for label, folder in folders.items():
        masks: dict[str, list[Path]] = {}
        images = []
        for file in inventory.images(folder):
            if match := MASK_NAME.fullmatch(file.stem):
                masks.setdefault(folded(match[1]), []).append(file)
            else:
                images.append(file)
        entries += [Entry(file.stem, label, file, tuple(masks.pop(folded(file.stem), ()))) for file in images]
        inventory.ignore(LONE_MASKS, [file for files in masks.values() for file in files])
    return entries


@dataclass(frozen=True)
class Folder(_InFolder):
    """A plain folder: ``images/`` and ``masks/`` by equal name. Any image format that Pillow reads, or DICOM.

    Args:
        root: the folder.
        labels: of classes with a mask each, ``NAME_mask_LABEL.png`` for the image NAME. An image that has none of these
            has ``NAME.png``, whose class is not named: it must be black.
    """

    root: str | Path
    name: str = "folder"
    labels: tuple[str, ...] = ()

    def _contents(self) -> Contents:
        inventory = Inventory(self.root)
        folders = inventory.find(("images", "masks"), layout="folders images/ and masks/ next to each other")
        pairs = pair(inventory, *folders, suffixes=[f"_mask_{folded(label)}" for label in self.labels])
        entries = [Entry(image.stem, "unknown", image, masks) for image, masks in pairs]
        return Contents(entries, inventory.close(folders))


@dataclass(frozen=True)
class Phantoms:
    """Synthetic B-mode images, made once and kept as files in BUSI's layout.

    Args:
        count: number of images.
        seed: of the generator.
        cache_dir: holds one folder per (count, seed, version of the generator).
    """

    count: int
    seed: int
    cache_dir: str | Path
    name: str = "phantom"

    def entries(self) -> list[Entry]:
        """Return the phantoms, generated at the first call.

        Raises:
            InputError: they cannot be written.
        """
        root = Path(self.cache_dir) / f"{self.count}-seed{self.seed}-generator{phantom.GENERATOR_VERSION}"
        if not root.is_dir():
            try:
                root.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(root.parent / ".lock"):  # another process may be making them
                    if not root.is_dir():
                        self._generate(root)
            except OSError as error:
                remedy = "make room, or choose another folder with store=DIR"
                raise InputError(
                    f"{root}: {self.count} phantoms cannot be written ({error.strerror or error}); {remedy}"
                ) from error
        inventory = Inventory(root)
        entries = _class_images(inventory, {folder.name: folder for folder in inventory.folders[1:]})
        if len(entries) != self.count:
            remedy = "delete this folder, and they are made again"
            raise InputError(f"{root} holds {len(entries)} of {self.count} phantoms: {remedy}")
        return entries

    def _generate(self, root: Path) -> None:
        for left in root.parent.glob(".making-*"):  # by a process that was killed
            shutil.rmtree(left)
        scratch = Path(tempfile.mkdtemp(dir=root.parent, prefix=".making-"))
        log.info("making %d phantoms, once: %s", self.count, root)

        def write(index: int, label: str) -> None:
            item = phantom.phantom(seed=self.seed, index=index, label=label)
            folder = scratch / label
            folder.mkdir(exist_ok=True)
            Image.fromarray(item.image).save(folder / f"{item.id}.png", compress_level=1)
            Image.fromarray(item.mask * np.uint8(255)).save(folder / f"{item.id}_mask.png")

        try:
            with ThreadPoolExecutor() as threads:  # NumPy, OpenCV and Pillow work outside Python's lock
                list(threads.map(write, range(self.count), phantom.labels(self.count)))
            scratch.replace(root)
        except OSError:  # a full disk: what was written would keep it full
            shutil.rmtree(scratch, ignore_errors=True)
            raise


@dataclass(frozen=True)
class ReadAs:
    """A data set that is read with ``data.window`` and ``data.classes``; in all else it is that data set."""

    source: Source
    window: Window | None
    classes: Classes | None

    def entries(self) -> list[Entry]:
        """Return the images, each with window and classes."""
        return [entry._replace(window=self.window, classes=self.classes) for entry in self.source.entries()]

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "source"), name)  # also of a copy in the making


def read_as(source: Any, window: Sequence[float] | None, classes: Mapping[str, Any] | None = None) -> Any:
    """Return a data set, read with a window and classes if there are some: a ``Source``."""
    if window is None and classes is None:
        return source
    codes = {name: tuple(code) if isinstance(code, list) else code for name, code in (classes or {}).items()}
    labels = tuple(code for code in codes.values() if isinstance(code, str))
    if labels and isinstance(source, Folder):
        source = replace(source, labels=labels)
    return ReadAs(source, (window[0], window[1]) if window else None, tuple(codes.items()) or None)
