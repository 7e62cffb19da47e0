"""Images and masks of a data set: read strictly, checked, resized once, kept in memory."""

from __future__ import annotations

import logging
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from kdsweep.core.errors import InputError, some
from kdsweep.core.files import folded
from kdsweep.core.logs import FILE_ONLY
from kdsweep.core.memory import available_memory
from kdsweep.core.progress import track
from kdsweep.data.class_maps import AS_CLASSES, read_class_map
from kdsweep.data.listing import list_images
from kdsweep.data.pixels import AS_MASK, FileError, naming, read_gray_or_color, read_mask
from kdsweep.data.sources import Classes, Entry, Source

log = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the pixels that networks see, from 0 to 1, by channel
IMAGENET_STD = (0.229, 0.224, 0.225)
DIM = 16  # of 255: the peak of 12-bit data in 16 bits
TAKE_EMPTY = "data.allow_empty_masks=true"
SMALLEST = 32  # pixels a side: less shows nothing that a network could find
NAMED = 3  # images in a warning
WARNINGS = {  # what an image may be, and how the data set's line about such images continues
    "enlarged": "are smaller than image_size={size} and are enlarged",
    "full": "are lesion everywhere, as with inverted masks",
    "lost": "lose their lesion at image_size={size}: it is too small",
    "dim": f"are nearly black, at most {DIM} of 255; 12 bits saved as 16 look so: multiply them by 16",
}


@dataclass(frozen=True)
class Images:
    """A data set in memory.

    Attributes:
        name: of the data set.
        ids: N unique ids, sorted.
        labels: N labels.
        images: (N, L, L, 3) uint8, from which training views are cropped.
        masks: (N, L, L) uint8 in {0, 1}, or in {0, ..., K} of K classes.
        eval_images: (N, S, S, 3) uint8, the uncropped image at the size at which it is scored.
        eval_masks: (N, S, S) uint8, as ``masks``.
        digest: SHA-256 over ids, labels and the bytes of all files.
        class_names: K names; empty for one class.
    """

    name: str
    ids: list[str]
    labels: list[str]
    images: np.ndarray = field(repr=False)
    masks: np.ndarray = field(repr=False)
    eval_images: np.ndarray = field(repr=False)
    eval_masks: np.ndarray = field(repr=False)
    digest: str
    class_names: tuple[str, ...] = ()


class _Loaded(NamedTuple):
    """Arrays of an entry: image and mask to be cropped, image and mask to be scored; and the WARNINGS that apply."""

    arrays: list[np.ndarray]
    warnings: list[str]


def load_images(source: Source, *, load_size: int, image_size: int, allow_empty_masks: bool = False) -> Images:
    """Read, check and resize a complete data set once, and log what is unusual in it, one line for each kind.

    Args:
        source: the data set.
        load_size: L, side in pixels of the images that are cropped.
        image_size: S, side in pixels of the crops and of the images that are scored.
        allow_empty_masks: accept images without a lesion. By default an empty mask is an error, since it mostly comes
            from a mistake in the files.

    Raises:
        InputError: some files are wrong; the message counts them and names the first ten. Or most masks are full.
    """
    entries, digest, _ = list_images(source)
    _check_memory(len(entries), load_size=load_size, image_size=image_size)

    def load(entry: Entry) -> _Loaded | FileError:
        try:
            image, mask = read_entry(entry)
            with naming(entry.image_file):
                if not (allow_empty_masks or mask.any()):
                    raise FileError(f"{entry.mask_files[0]} is empty, all of it is black ({TAKE_EMPTY} takes it)")
                return _load(image, mask, load_size=load_size, image_size=image_size)
        except FileError as error:
            return error

    with ThreadPoolExecutor() as threads:  # Pillow and OpenCV decode and resize outside Python's lock
        read = track(threads.map(load, entries), what="reading images", unit="image", total=len(entries))
        results = list(read)
    if problems := [str(result) for result in results if isinstance(result, FileError)]:
        lines = some(problems, most=10, separator="; ")
        raise InputError(f"data={source.name}: {len(problems)} of {len(entries)} images: {lines}")
    loaded = [result for result in results if isinstance(result, _Loaded)]
    ids, labels = ([getattr(entry, name) for entry in entries] for name in ("id", "label"))
    names = tuple(name for name, _ in entries[0].classes or ())
    warnings = {i: one.warnings for i, one in zip(ids, loaded, strict=True)}
    _report(source.name, warnings, image_size=image_size, remedy=AS_CLASSES if names else AS_MASK)
    images, masks, eval_images, eval_masks = map(np.stack, zip(*(one.arrays for one in loaded), strict=True))
    return Images(source.name, ids, labels, images, masks, eval_images, eval_masks, digest, names)


def _load(image: np.ndarray, mask: np.ndarray, *, load_size: int, image_size: int) -> _Loaded:
    crops, truth = resize_image(image, load_size), resize_mask(mask, load_size)
    eval_image, eval_truth = resize_image(image, image_size), resize_mask(mask, image_size)
    applies = {
        "enlarged": min(image.shape[:2]) < image_size,
        "full": mask.all(),
        "lost": mask.any() and not (truth.any() and eval_truth.any()),
        "dim": crops.max() <= DIM,
    }
    return _Loaded([crops, truth, eval_image, eval_truth], [kind for kind in WARNINGS if applies[kind]])


def _report(name: str, warnings: dict[str, list[str]], *, image_size: int, remedy: str) -> None:
    """Log a line for each kind of warning, from the kinds by image id; raise InputError if most masks are full."""
    extra = FILE_ONLY if multiprocessing.parent_process() else None  # the screen has the line of the parent's check
    for kind, text in WARNINGS.items():
        if not (ids := [image_id for image_id, kinds in warnings.items() if kind in kinds]):
            continue
        line = f"data={name}: {len(ids)} of {len(warnings)} images {text.format(size=image_size)}"
        line += f" ({some(ids, most=NAMED)})"
        if kind == "full" and 2 * len(ids) > len(warnings):
            raise InputError(f"{line}; {remedy}")
        log.warning("%s", line, extra=extra)


def _check_memory(count: int, *, load_size: int, image_size: int) -> None:
    """Raise InputError if the images cannot be held: the system would end the process without a word."""
    needed = 4 * count * (load_size**2 + image_size**2)  # bytes: three of an image, one of a mask
    free = available_memory()
    if needed > free:
        raise InputError(
            f"data.load_size={load_size}: {count} images of this size need {needed / 2**30:.0f} GiB of memory, "
            f"{free / 2**30:.0f} GiB are free; take a smaller one (256 for image_size=224)"
        )


def read_entry(entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    """Read image (H, W, 3) uint8 and mask (H, W) uint8 of one entry, both upright; 0 is background.

    Raises:
        FileError: a file is wrong or doubtful; the message is one line with its name.
    """
    if not entry.mask_files:
        raise FileError(f"{entry.image_file} has no mask")
    image = read_gray_or_color(entry.image_file, entry.window)
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST:
        raise FileError(f"{entry.image_file} is {width} x {height} pixels, an image needs {SMALLEST} a side")
    mask, parts = np.zeros((height, width), np.uint8), dict[Path, np.ndarray]()
    for file in entry.mask_files:
        part = _read_classes(file, entry, entry.classes) if entry.classes else read_mask(file)
        if part.shape != mask.shape:
            raise FileError(f"{file} is {part.shape[1]} x {part.shape[0]} pixels, its image {width} x {height}")
        for other, earlier in parts.items():
            if ((earlier > 0) & (part > 0) & (earlier != part)).any():
                raise FileError(f"{other} and {file} give a pixel two classes; correct one of them")
        parts[file], mask = part, np.maximum(mask, part)
    return image, mask


def _read_classes(file: Path, entry: Entry, classes: Classes) -> np.ndarray:
    """Read a mask as (H, W) uint8: k where the k-th class is, 0 elsewhere."""
    codes = [code for _, code in classes]
    if not isinstance(codes[0], str):
        return read_class_map(file, codes)
    labels, mask = [folded(str(code)) for code in codes], read_mask(file)
    suffix = folded(file.stem).removeprefix(f"{folded(entry.image_file.stem)}_mask_")
    label = suffix if suffix in labels else folded(entry.label)
    if label in labels:
        return mask * np.uint8(labels.index(label) + 1)
    if mask.any():
        remedy = (
            f"add it, or with data=folder name the mask {entry.image_file.stem}_mask_LABEL, a label of data.classes"
        )
        raise FileError(f"{file} shows a lesion of the label {entry.label}, which data.classes does not name; {remedy}")
    return mask


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (size, size, 3), without keeping the aspect ratio (PAPER: fixed 224 x 224)."""
    shrinks = min(image.shape[:2]) >= size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Resize a mask (H, W) uint8 to (size, size): a pixel is lesion if at least half of its area is.

    With several classes it is the class, or the background, of the largest area; of equal areas, to 0.001 %, a class
    comes before the background and an earlier class before a later one.
    """

    def share_of(part: np.ndarray) -> np.ndarray:
        return cv2.resize(part.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)

    indices = range(1, int(mask.max()) + 1)
    if len(indices) <= 1:
        share = share_of(mask)
        return (share >= 0.5).astype(np.uint8)
    areas = np.round([share_of(mask == index) for index in (*indices, 0)], 5)  # sums of float32 differ in the last bit
    return np.array([*indices, 0], np.uint8)[np.argmax(areas, axis=0)]
