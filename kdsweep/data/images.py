"""Images and masks of a data set: read strictly, checked, resized once, kept in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from kdsweep.core.errors import InputError
from kdsweep.core.progress import track
from kdsweep.data.sources import Entry, Source, listing

log = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the pixels that networks are given, from 0 to 1, by channel
IMAGENET_STD = (0.229, 0.224, 0.225)
DIM = 16  # of 255: the peak of 12-bit data in 16 bits
TAKE_EMPTY = "data.allow_empty_masks=true"


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


def load_images(source: Source, *, load_size: int, image_size: int, allow_empty_masks: bool = False) -> Images:
    """Read, check and resize a whole data set once.

    Args:
        source: the data set.
        load_size: L, side in pixels of the images that are cropped.
        image_size: S, side in pixels of the crops and of the images that are scored.
        allow_empty_masks: accept images without a lesion. By default an empty mask is an error, since it mostly comes
            from a mistake in the files (a mask of 0 and 1 where 0 and 255 are meant).

    Raises:
        InputError: some files are wrong; the message counts them and names the first ten.
    """
    entries, digest, _ = listing(source)
    _check_memory(len(entries), load_size=load_size, image_size=image_size)

    def arrays(entry: Entry) -> list[np.ndarray] | ValueError:
        try:
            image, mask = read_entry(entry, smallest=image_size)
            if not (allow_empty_masks or mask.any()):
                raise ValueError(f"{entry.mask_files[0]} is empty, no pixel is above 127 ({TAKE_EMPTY} takes it)")
        except ValueError as error:
            return error
        sizes = (load_size, image_size)
        return [*(resize_image(image, s) for s in sizes), *(resize_mask(mask, s) for s in sizes)]

    with ThreadPoolExecutor() as threads:  # Pillow and OpenCV decode and resize outside Python's lock
        results = threads.map(arrays, entries)
        found = list(track(results, what="reading images", unit="image", total=len(entries)))
    if problems := [str(result) for result in found if isinstance(result, ValueError)]:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(
            f"data={source.name}: {len(problems)} of {len(entries)} images: {'; '.join(problems[:10])}{more}"
        )
    images, eval_images, masks, eval_masks = (np.stack(column) for column in zip(*found, strict=True))
    _warn_of_dim(source.name, entries, images)
    ids, labels = ([getattr(entry, name) for entry in entries] for name in ("id", "label"))
    return Images(source.name, ids, labels, images, masks, eval_images, eval_masks, digest)


def _warn_of_dim(name: str, entries: Sequence[Entry], images: np.ndarray) -> None:
    """Log how many images (N, S, S, 3) are nearly black."""
    if dim := [entry.image_file for entry, image in zip(entries, images, strict=True) if image.max() <= DIM]:
        log.warning(
            "data=%s: %d of %d images are nearly black, at most %d of 255, the first is %s; "
            "12 bits saved as 16 look so: multiply them by 16",
            *(name, len(dim), len(entries), DIM, dim[0]),
        )


def _check_memory(count: int, *, load_size: int, image_size: int) -> None:
    """Raise InputError if the images cannot be held: the system would end the process without a word."""
    needed = 4 * count * (load_size**2 + image_size**2)  # bytes: three of an image, one of a mask
    free = _available_memory()
    if needed > free:
        raise InputError(
            f"data.load_size={load_size}: {count} images of this size need {needed / 2**30:.0f} GiB of memory, "
            f"{free / 2**30:.0f} GiB are free; take a smaller one (256 for image_size=224)"
        )


def _available_memory() -> int:
    """Return the bytes of memory that can be had, file caches included; all of the machine's where Linux is not."""
    try:
        known = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return 1024 * int(known["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_entry(entry: Entry, *, smallest: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Read image (H, W, 3) uint8 and mask (H, W) uint8 in {0, 1} of one entry.

    Raises:
        ValueError: a file is wrong; the message says which, and how.
    """
    if not entry.mask_files:
        raise ValueError(f"{entry.image_file} has no mask")
    image = read_gray_or_color(entry.image_file)
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


class _UnknownRangeError(ValueError):
    """Pixels of which nobody knows what is white."""


def _open(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as picture:
            if picture.mode in ("F", "I"):
                raise _UnknownRangeError(
                    f"{file} has pixels of 32 bits, whose range is not known; save it with 8 or 16 bits"
                )
            if picture.mode.startswith("I;16"):
                return (np.asarray(picture) / 257).round().astype(np.uint8)
            return np.asarray(picture.convert("RGB"))
    except _UnknownRangeError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError on broken PNG chunks
        raise ValueError(f"{file} is not a readable image") from error


def read_gray_or_color(file: Path) -> np.ndarray:
    """Read any image file as (H, W, 3) uint8; ValueError names an unreadable one."""
    pixels = _open(file)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def read_mask(file: Path) -> np.ndarray:
    """Read a mask of any mode (1-bit, gray, palette, RGB, RGBA) as (H, W) uint8 in {0, 1}, thresholded at 127."""
    pixels = _open(file)
    gray = pixels if pixels.ndim == 2 else pixels.max(axis=2)
    return (gray > 127).astype(np.uint8)


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (size, size, 3), without keeping the aspect ratio (PAPER: fixed 224 x 224)."""
    shrinks = min(image.shape[:2]) >= size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W) uint8 in {0, 1} to (size, size): a pixel is lesion if at least half of its area is."""
    share = cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    return (share >= 0.5).astype(np.uint8)
