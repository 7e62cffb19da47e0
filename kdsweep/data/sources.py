"""Data sets behind one small interface, and the random splits.

A data set is a class with ``name`` and ``entries()``: the list of its images, each with an id, a label and its files.
Everything after that (reading, checking, resizing, splitting) is the same for all.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from kdsweep.core.errors import InputError
from kdsweep.data import phantom

log = logging.getLogger(__name__)

SPLIT_SEED = 2025  # of the three random splits; the same for every data set, cell and machine
TEST_SHARE, VALIDATION_SHARE = 0.20, 0.16  # 33 and 26 of the paper's 163 images
TAKE_EMPTY = "data.allow_empty_masks=true"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class Entry(NamedTuple):
    """One image of a data set: unique id, label, image file, mask files (the lesion is their union)."""

    id: str
    label: str
    image_file: Path
    mask_files: tuple[Path, ...]


class Source(Protocol):
    """What a data set must offer."""

    name: str

    def entries(self) -> list[Entry]:
        """All images, or InputError."""


@dataclass(frozen=True)
class Udiat:
    """UDIAT, "Dataset B" (Yap et al. 2017): ``original/000001.png`` and ``GT/000001.png``, also some folders deeper.

    Labels come from DatasetB.xlsx (columns Image, Type) where it lies beside them, else they are ``unknown``.
    """

    root: str | Path
    name: str = "udiat"

    def entries(self) -> list[Entry]:
        """Images of the folder ``original`` with the mask of equal stem in ``GT``."""
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
        """Images of each class folder with all their masks."""
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
        """Images of ``images/`` with the mask of equal stem in ``masks/``."""
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
        """The phantoms, generated at the first call."""
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


@dataclass(frozen=True)
class Images:
    """A data set in memory.

    Attributes:
        name: of the data set.
        ids: N unique ids, sorted.
        labels: N labels.
        images: (N, L, L, 3) uint8, from which training views are cropped.
        masks: (N, L, L) uint8 in {0, 1}.
        eval_images: (N, S, S, 3) uint8, the whole image at the size at which it is scored.
        eval_masks: (N, S, S) uint8 in {0, 1}.
        digest: SHA-256 over ids, labels and the bytes of all files.
    """

    name: str
    ids: list[str]
    labels: list[str]
    images: np.ndarray = field(repr=False)
    masks: np.ndarray = field(repr=False)
    eval_images: np.ndarray = field(repr=False)
    eval_masks: np.ndarray = field(repr=False)
    digest: str


@dataclass(frozen=True)
class Split:
    """Indices into ``Images`` of the three parts."""

    train: list[int]
    validation: list[int]
    test: list[int]


class Listing(NamedTuple):
    """The entries of a data set, sorted by id, and the SHA-256 over their ids, labels and the bytes of all files."""

    entries: list[Entry]
    digest: str


def listing(source: Source) -> Listing:
    """What a data set consists of, without decoding an image: enough to know whether a cell is finished.

    Raises:
        InputError: nothing is there, or two images have one id.
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


def load(source: Source, *, load_size: int, image_size: int, allow_empty_masks: bool = False) -> Images:
    """Read, check and resize a whole data set once.

    Args:
        source: the data set.
        load_size: L, side in pixels of the images that are cropped.
        image_size: S, side in pixels of the crops and of the images that are scored.
        allow_empty_masks: take images without a lesion too; else an empty mask is an error, for more often than not
            it is one of the files (a mask of 0 and 1 where 0 and 255 are meant).

    Raises:
        InputError: it names every offending file (the first ten, and how many).
    """
    entries, digest = listing(source)

    def arrays(entry: Entry) -> list[np.ndarray] | ValueError:
        try:
            image, mask = read(entry, smallest=image_size)
            if not (allow_empty_masks or mask.any()):
                raise ValueError(f"{entry.mask_files[0]} is empty, no pixel is above 127 ({TAKE_EMPTY} takes it)")
        except ValueError as error:
            return error
        sizes = (load_size, image_size)
        return [*(resize_image(image, s) for s in sizes), *(resize_mask(mask, s) for s in sizes)]

    with ThreadPoolExecutor() as threads:  # Pillow and OpenCV decode and resize outside Python's lock
        results = threads.map(arrays, entries)
        hidden = not sys.stderr.isatty()
        found = list(
            tqdm(results, desc="reading images", total=len(entries), unit="image", leave=False, disable=hidden)
        )
    if problems := [str(result) for result in found if isinstance(result, ValueError)]:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(
            f"data={source.name}: {len(problems)} of {len(entries)} images: {'; '.join(problems[:10])}{more}"
        )
    images, eval_images, masks, eval_masks = (np.stack(column) for column in zip(*found, strict=True))
    ids, labels = ([getattr(entry, name) for entry in entries] for name in ("id", "label"))
    return Images(source.name, ids, labels, images, masks, eval_images, eval_masks, digest)


def read(entry: Entry, *, smallest: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) uint8 and mask (H, W) uint8 in {0, 1} of one entry.

    Raises:
        ValueError: says which file is wrong, and how.
    """
    if not entry.mask_files:
        raise ValueError(f"{entry.image_file} has no mask")
    image = read_grey_or_colour(entry.image_file)
    height, width = image.shape[:2]
    if min(height, width) < smallest:
        raise ValueError(f"{entry.image_file} is {width} x {height} pixels, smaller than image_size={smallest}")
    mask = np.zeros((height, width), np.uint8)
    for file in entry.mask_files:
        part = read_mask(file)
        if part.shape != mask.shape:
            raise ValueError(f"{file} is {part.shape[1]} x {part.shape[0]} pixels, its image {width} x {height}")
        mask |= part
    return image, mask


def _open(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as picture:
            if picture.mode.startswith("I;16"):
                return (np.asarray(picture) / 257).round().astype(np.uint8)
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError on broken PNG chunks
        raise ValueError(f"{file} is not a readable image") from error


def read_grey_or_colour(file: Path) -> np.ndarray:
    """Any image file as (H, W, 3) uint8; ValueError names an unreadable one."""
    pixels = _open(file)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def read_mask(file: Path) -> np.ndarray:
    """A mask of any mode (1-bit, grey, palette, RGB, RGBA) as (H, W) uint8 in {0, 1}, thresholded at 127."""
    pixels = _open(file)
    grey = pixels if pixels.ndim == 2 else pixels.max(axis=2)
    return (grey > 127).astype(np.uint8)


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 to (size, size, 3); the aspect ratio is not kept, as the paper's fixed 224 x 224 implies."""
    shrinks = min(image.shape[:2]) >= size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """(H, W) uint8 in {0, 1} to (size, size): a pixel is lesion if at least half of its area is."""
    share = cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    return (share >= 0.5).astype(np.uint8)


def split(count: int, *, index: int) -> Split:
    """Random split number ``index`` of ``count`` images: 104 / 26 / 33 at the paper's 163, 64 / 16 / 20 % elsewhere.

    Raises:
        InputError: too few images for three parts.
    """
    from sklearn.model_selection import ShuffleSplit  # takes a second, and who only asks for fingerprints needs none

    test, validation = round(count * TEST_SHARE), round(count * VALIDATION_SHARE)
    if min(test, validation) < 1 or count - test - validation < 1:
        raise InputError(f"the data set has {count} images; training, validation and test need at least 4")
    shuffles = ShuffleSplit(n_splits=index + 1, test_size=test, train_size=count - test, random_state=SPLIT_SEED)
    rest, test_part = list(shuffles.split(np.zeros(count)))[index]
    return Split(train=rest[validation:].tolist(), validation=rest[:validation].tolist(), test=test_part.tolist())


def check_training_masks(images: Images, part: Split) -> None:
    """Raise InputError if no training image shows a lesion: nothing could be learned."""
    if not images.masks[part.train].any():
        raise InputError(
            f"data={images.name}: all {len(part.train)} training masks are empty; a lesion's pixels must be above 127"
        )


def _existing(root: str | Path) -> Path:
    root = Path(str(root))  # a folder called 2024 comes as a number
    if not root.is_dir():
        raise InputError(f"data.root={root}: no such folder; give the folder that holds the images")
    return root


def _images(folder: Path) -> list[Path]:
    """Image files in a folder; hidden ones are what a Mac leaves beside them (``._000001.png``)."""
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))


def _find_folder(root: Path, name: str, *, hint: str) -> Path:
    """The folder ``name`` (any case) under root, at most two folders deeper."""
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
