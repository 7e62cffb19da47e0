"""Data sets behind one small interface.

A data set is a class with ``name`` and ``entries()``: the list of its images, each with an id, a label and its files.
Everything after that (reading, checking, resizing, splitting) is the same for all.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from filelock import FileLock
from PIL import Image

from kdsweep.core.errors import InputError
from kdsweep.data import phantom

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class Entry(NamedTuple):
    """One image of a data set: unique id, label, image file, mask files (the lesion is their union)."""

    id: str
    label: str
    image_file: Path
    mask_files: tuple[Path, ...]


class Source(Protocol):
    """The interface of a data set."""

    name: str

    def entries(self) -> list[Entry]:
        """Return all images, or raise InputError."""


@dataclass(frozen=True)
class Udiat:
    """UDIAT, "Dataset B" (Yap et al. 2017): ``original/000001.png`` and ``GT/000001.png``, also some folders deeper.

    Labels come from DatasetB.xlsx (columns Image, Type) where it lies beside them, else they are ``unknown``.
    """

    root: str | Path
    name: str = "udiat"

    def entries(self) -> list[Entry]:
        """Return the images of the folder ``original`` with the mask of equal stem in ``GT``."""
        originals = _find_folder(_existing(self.root), "original", hint="original/ and GT/ as UDIAT unpacks")
        labels = _udiat_labels(originals.parent)
        pairs = _equal_stems(originals, _find_folder(originals.parent, "GT", hint="a folder GT beside original/"))
        return [Entry(image.stem, labels.get(image.stem, "unknown"), image, masks) for image, masks in pairs]


@dataclass(frozen=True)
class Busi:
    """BUSI (Al-Dhabyani et al. 2020): ``benign/benign (1).png`` with ``_mask.png``, ``_mask_1.png``, ... beside it.

    Args:
        root: folder that holds ``benign`` and ``malignant``.
        include_normal: also take the images without a lesion; their masks are empty.
    """

    root: str | Path
    include_normal: bool = False
    name: str = "busi"

    def entries(self) -> list[Entry]:
        """Return the images of each class folder with all their masks."""
        root = _existing(self.root)
        found = []
        for label in ("benign", "malignant", *(("normal",) if self.include_normal else ())):
            files = _images(root / label) if (root / label).is_dir() else []
            masks: dict[str, list[Path]] = {}
            for file in files:
                if match := re.fullmatch(r"(.+)_mask(_\d+)?", file.stem):
                    masks.setdefault(match[1], []).append(file)
            images = [file for file in files if not re.fullmatch(r".+_mask(_\d+)?", file.stem)]
            found += [Entry(file.stem, label, file, tuple(masks.get(file.stem, ()))) for file in images]
        if not found:
            raise InputError(
                f"data.root={self.root}: no images found; BUSI holds benign/*.png and malignant/*.png with *_mask.png"
            )
        return found


@dataclass(frozen=True)
class Folder:
    """A plain folder: ``images/`` and ``masks/`` by equal stem. Any image format that Pillow reads."""

    root: str | Path
    name: str = "folder"

    def entries(self) -> list[Entry]:
        """Return the images of ``images/`` with the mask of equal stem in ``masks/``."""
        root = _existing(self.root)
        images = _find_folder(root, "images", hint="folders images/ and masks/")
        pairs = _equal_stems(images, _find_folder(root, "masks", hint="a folder masks/ beside images/"))
        return [Entry(image.stem, "unknown", image, masks) for image, masks in pairs]


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
        """Return the phantoms, generated at the first call."""
        root = Path(self.cache_dir) / f"{self.count}-seed{self.seed}-generator{phantom.GENERATOR_VERSION}"
        if not root.is_dir():
            root.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(root.parent / ".lock"):  # another process may be making them
                if not root.is_dir():
                    self._generate(root)
        return Busi(root).entries()

    def _generate(self, root: Path) -> None:
        for left in root.parent.glob(".making-*"):  # by a process that was killed
            shutil.rmtree(left)
        scratch = Path(tempfile.mkdtemp(dir=root.parent, prefix=".making-"))
        log.info("making %d phantoms, once: %s", self.count, root)
        for item in phantom.cohort(count=self.count, seed=self.seed):
            folder = scratch / item.label
            folder.mkdir(exist_ok=True)
            Image.fromarray(item.image).save(folder / f"{item.id}.png", compress_level=1)
            Image.fromarray(item.mask * np.uint8(255)).save(folder / f"{item.id}_mask.png")
        scratch.replace(root)


class Listing(NamedTuple):
    """The entries of a data set, sorted by id, and the SHA-256 over their ids, labels and the bytes of all files."""

    entries: list[Entry]
    digest: str


def listing(source: Source) -> Listing:
    """List a data set without decoding its images: enough to know whether a cell is finished.

    Raises:
        InputError: there are no images, or two of them have one id.
    """
    entries = sorted(source.entries())
    ids = [entry.id for entry in entries]
    if len(set(ids)) < len(ids):
        raise InputError(f"data={source.name}: two images have the id {next(i for i in ids if ids.count(i) > 1)!r}")
    sha = hashlib.sha256()
    for entry in entries:
        for part in (entry.id, entry.label):
            sha.update(part.encode() + b"\0")
        for file in (entry.image_file, *entry.mask_files):
            sha.update(hashlib.sha256(file.read_bytes()).digest())
    return Listing(entries, sha.hexdigest())


def _existing(root: str | Path) -> Path:
    root = Path(str(root)).expanduser()  # a folder called 2024 comes as a number
    if not root.is_dir():
        raise InputError(f"data.root={root}: no such folder; give the folder that holds the images")
    return root


def _images(folder: Path) -> list[Path]:
    """Return the image files in a folder, without the hidden ones that a Mac adds (``._000001.png``)."""
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))


def _find_folder(root: Path, name: str, *, hint: str) -> Path:
    """Return the folder ``name`` (any case) under root, at most two folders deeper."""
    for pattern in ("*", "*/*", "*/*/*"):
        for folder in sorted(root.glob(pattern)):
            if folder.is_dir() and folder.name.lower() == name.lower():
                return folder
    raise InputError(f"data.root={root}: no folder {name}/ in it; expected {hint}")


def _equal_stems(image_dir: Path, mask_dir: Path) -> list[tuple[Path, tuple[Path, ...]]]:
    images = _images(image_dir)
    if not images:
        raise InputError(f"{image_dir}: no images found; expected files ending in {', '.join(SUFFIXES)}")
    masks = {file.stem: file for file in _images(mask_dir)}
    return [(image, (masks[image.stem],) if image.stem in masks else ()) for image in images]


def _udiat_labels(root: Path) -> dict[str, str]:
    sheets = sorted(root.glob("DatasetB.xlsx"))
    if not sheets:
        return {}
    import pandas as pd

    table = pd.read_excel(sheets[0], dtype=str)
    if not {"Image", "Type"} <= set(table.columns):
        raise InputError(f"{sheets[0]}: labels need the columns Image and Type, found {', '.join(map(str, table))}")
    names = table["Image"].str.strip().str.zfill(6)  # spreadsheets turn 000001 into 1
    return dict(zip(names, table["Type"].str.strip().str.lower(), strict=True))
