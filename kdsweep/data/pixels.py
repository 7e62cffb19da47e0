"""Pixels of one file: an image as RGB, a mask as zeros and ones. Files whose meaning is doubtful are refused."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kdsweep.core.errors import some
from kdsweep.data.folders import DICOM

if TYPE_CHECKING:
    from pydicom import Dataset

AS_MASK = "save the lesion as 255 and all else as 0"
SET_WINDOW = "set data.window=[low,high], or save it with 8 bits"
LABELS = 8  # a mask of at most as many colors is a map of labels, one of more was compressed or smoothed

# All that is read of a DICOM file: nothing of its patient.
ELEMENTS = [
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
    *("RescaleIntercept", "RescaleSlope", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
]
Window = tuple[float, float]


class FileError(ValueError):
    """A file that cannot be used; the message is one line with its name and the remedy."""


class DoubtError(ValueError):
    """Pixels of which two readings are possible; the message continues the name of the file."""


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Turn each error of the work on a file into a FileError with the file's name."""
    name = os.fsencode(file).decode("utf-8", "backslashreplace")
    try:
        yield
    except FileError:
        raise
    except DoubtError as error:
        raise FileError(f"{name} {error}") from error
    except Exception as error:  # Pillow raises SyntaxError, struct.error and more on damaged files
        raise FileError(f"{name} is not a readable image ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, UnidentifiedImageError):
        return "its content is of no image format; save it again or leave it out"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"{text}; save it with fewer pixels"
    if isinstance(error, MemoryError | cv2.error):
        return f"{type(error).__name__} {text}".strip() + "; save it with fewer pixels or free memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeEncodeError):
        return "its name is not in UTF-8; rename it"
    return f"{text or type(error).__name__}; save it again or leave it out"


def upright(file: Path) -> Image.Image:
    """Return the decoded picture of a file as a viewer shows it, turned as its EXIF orientation says."""
    # Pillow maps a TIFF opened by name into memory, where it confuses the sides of a picture that is rotated.
    with file.open("rb") as stream, Image.open(stream) as picture:
        pages = getattr(picture, "n_frames", 1)
        if pages > 1 and picture.format != "MPO":  # a camera's JPEG with a preview: the first is the photograph
            raise DoubtError(f"holds {pages} pages or frames; save one of them as a separate file")
        if picture.format == "PPM" and picture.mode == "I":  # 16 bits, as the format has at most
            return picture.convert("I;16")
        if picture.mode == "F":
            raise DoubtError("has pixels of 32 bits, of unknown range; save it with 8 or 16 bits")
        return ImageOps.exif_transpose(picture)


def _varying_alpha(picture: Image.Image) -> np.ndarray | None:
    """Return the opacity (H, W) uint8 of a picture, or None if it is the same everywhere and so has no shape."""
    if not picture.has_transparency_data:
        return None
    alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
    return None if alpha.min() == alpha.max() else alpha


def _visible(picture: Image.Image) -> np.ndarray:
    """Return a picture as (H, W, 3) uint8 on a black ground, so that what is transparent stays invisible."""
    colors, alpha = np.asarray(picture.convert("RGB")), _varying_alpha(picture)
    if alpha is None:
        return colors
    return ((colors.astype(np.uint16) * alpha[..., None] + 127) // 255).astype(np.uint8)


def read_gray_or_color(file: Path, window: Window | None = None) -> np.ndarray:
    """Read any image file as (H, W, 3) uint8, upright; raise FileError for one that cannot be used.

    Args:
        file: of any format that Pillow decodes, or DICOM.
        window: the values that become black and white in a gray image of more than 8 bits. None takes the window of
            a DICOM file, and the full range of 16 bits of another.
    """
    with naming(file):
        if file.suffix.lower() in DICOM:
            return _read_dicom(file, window)
        picture = upright(file)
        if not picture.mode.startswith("I"):
            return _visible(picture)
        values = np.asarray(picture)
        if window is None and picture.mode == "I":
            raise DoubtError(f"has pixels of 32 bits, from {values.min()} to {values.max()}; {SET_WINDOW}")
        return _as_rgb(_levels(values, *(window or (0, 65535))))


def _as_rgb(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, axis=2)


def _levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return gray levels uint8: low and less are 0, high and more 255, linear between, rounded here and only here."""
    levels: np.ndarray = np.clip((values - float(low)) * (255 / (float(high) - float(low))), 0, 255)
    return levels.round().astype(np.uint8)


def _read_dicom(file: Path, window: Window | None) -> np.ndarray:
    """Read a DICOM file with one frame as (H, W, 3) uint8."""
    try:
        import pydicom
        from pydicom.pixels import get_decoder
    except ImportError as error:
        raise DoubtError("is a DICOM file; pip install 'kdsweep[dicom]' reads it") from error
    logging.getLogger("pydicom").setLevel(logging.ERROR)  # no lines on padding and the like, which name no file
    warnings.filterwarnings("ignore", module="pydicom")
    try:
        data = pydicom.dcmread(file, specific_tags=ELEMENTS)
    except pydicom.errors.InvalidDicomError as error:
        raise ValueError("its content is not DICOM") from error
    if (frames := int(data.get("NumberOfFrames") or 1)) > 1:
        raise DoubtError(f"holds {frames} pages or frames; save one of them as a separate file")
    syntax = data.file_meta.TransferSyntaxUID
    if not get_decoder(syntax).is_available:
        remedy = "pip install 'pylibjpeg[all]', or save it uncompressed"
        raise DoubtError(f"is compressed as {syntax.name}, for which no decoder is installed; {remedy}")
    pixels = data.pixel_array
    if pixels.ndim == 3 and pixels.dtype == np.uint8:  # RGB: pydicom has converted YBR
        return np.ascontiguousarray(pixels)
    if pixels.ndim == 3 or not data.PhotometricInterpretation.startswith("MONOCHROME"):
        kind = f"{data.PhotometricInterpretation} of {data.BitsAllocated} bits"
        raise DoubtError(f"has pixels of the kind {kind}; save it in gray, or in RGB of 8 bits")
    levels = _dicom_levels(pixels, data, window)
    return _as_rgb(255 - levels if data.PhotometricInterpretation == "MONOCHROME1" else levels)


def _dicom_levels(pixels: np.ndarray, data: Dataset, window: Window | None) -> np.ndarray:
    """Return gray levels uint8 of stored pixels: 8 bits as they are, others through the window, else the file's."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    values = apply_modality_lut(pixels, data)
    has_window = None not in (data.get("WindowCenter"), data.get("WindowWidth"))
    are_levels = data.BitsStored == 8 and data.PixelRepresentation == 0 and np.array_equal(values, pixels)
    if are_levels and (window or not has_window):
        return pixels.astype(np.uint8)
    if window:
        return _levels(values, *window)
    if not has_window:
        raise DoubtError(f"has values from {values.min():g} to {values.max():g} and no window; {SET_WINDOW}")
    with np.errstate(over="ignore"):  # far outside of a sigmoid
        black, white = apply_voi_lut(np.array([-1e30, 1e30]), data)
        return _levels(apply_voi_lut(values, data), black, white)


def read_mask(file: Path) -> np.ndarray:
    """Read a mask of any mode as (H, W) uint8 in {0, 1}, upright; see ``lesion``.

    Raises:
        FileError: the file is unreadable, or what in it is lesion is doubtful.
    """
    with naming(file):
        if file.suffix.lower() in DICOM:
            raise DoubtError(f"is a DICOM file, as a mask cannot be; {AS_MASK}, as PNG")
        picture = upright(file)
        if picture.mode == "I":
            raise DoubtError(f"has pixels of 32 bits; {AS_MASK}")
        if picture.mode.startswith("I;16"):
            return lesion(np.asarray(picture).astype(np.uint16))
        return lesion(mask_colors(picture))


def color_codes(colors: np.ndarray) -> np.ndarray:
    """Return a number for each color (..., 3)."""
    red, green, blue = np.moveaxis(colors.astype(np.int64), -1, 0)
    return (red << 16) + (green << 8) + blue


def mask_colors(picture: Image.Image, remedy: str = AS_MASK) -> np.ndarray:
    """Return the visible colors (H, W, 3) uint8 of a mask; raise DoubtError if some of its shape is hidden."""
    stored, colors, alpha = np.asarray(picture), _visible(picture), _varying_alpha(picture)
    if _varies(stored) and not _varies(colors):
        raise DoubtError(f"has pixels that differ but show one color (palette or transparency); {remedy}, opaque")
    if alpha is not None:
        hidden = np.asarray(picture.convert("RGB"))[alpha == 0]
        if hidden.size and (hidden != hidden[0]).any():
            raise DoubtError(f"has several colors under transparent pixels; {remedy}, opaque")
    return colors


def _varies(pixels: np.ndarray) -> bool:
    return bool((pixels != pixels[0, 0]).any())


def lesion(mask: np.ndarray) -> np.ndarray:
    """Return where a mask has its lesion.

    A pixel is lesion if its brightest channel is above half of the range (127 of 255). In a mask that stays below
    everywhere, such as one of 0 and 1, every pixel that is not black is lesion; such a mask must have two colors.

    Args:
        mask: (H, W) or (H, W, 3), uint8 or uint16.

    Returns:
        (H, W) uint8 in {0, 1}; all 0 only if the mask is black.

    Raises:
        DoubtError: lesion or background have more than one color, as maps of several classes do.
    """
    levels = codes = mask
    if mask.ndim == 3:
        levels, codes = mask.max(axis=2), color_codes(mask)
    half = int(np.iinfo(mask.dtype).max) // 2
    first = np.unique(codes, return_index=True)[1]
    if levels.max() > half:
        inside = levels > half
        if len(first) > 2:
            near, few = (0, 0) if len(first) <= LABELS else (half // 4, codes.size // 1000)
            _check_areas(mask, codes, inside, near=near, few=few)
    else:
        inside = levels > 0
        if inside.any() and (len(first) != 2 or inside.all()):
            colors = mask.reshape(codes.size, -1)[first]
            raise DoubtError(f"has {named_colors(colors)}, all below half of the range; {AS_MASK}")
    return inside.astype(np.uint8)


def _check_areas(mask: np.ndarray, codes: np.ndarray, inside: np.ndarray, *, near: int, few: int) -> None:
    """Raise DoubtError if lesion or background have areas of more than one color.

    Edges are of any color, smoothed as they often are: only pixels count whose neighbors have the same color.

    Args:
        mask: (H, W) or (H, W, 3).
        codes: (H, W), one number per color.
        inside: (H, W) bool, the lesion.
        near: the largest difference of a channel by which compression changes a color.
        few: pixels that are not yet an area.
    """
    plane, window = codes.astype(np.float32), np.ones((3, 3), np.uint8)  # exact: 24 bits at most
    flat = cv2.dilate(plane, window) == cv2.erode(plane, window)
    areas = []
    for side in (flat & ~inside, flat & inside):
        _, first, counts = np.unique(codes[side], return_index=True, return_counts=True)
        colors = mask[side].reshape(-1, mask[0, 0].size)[first].astype(int)
        if len(colors):
            main = colors[counts.argmax()]
            others = colors[(np.abs(colors - main).max(axis=1) > near) & (counts > few)]
            areas.append(np.vstack([main[None], others]))
    if any(len(colors) > 1 for colors in areas):
        raise DoubtError(f"has areas of {named_colors(np.vstack(areas))}, but background and lesion are two; {AS_MASK}")


def named_colors(colors: np.ndarray) -> str:
    """Return the first colors (N, C) in words, gray ones as one number."""
    colors = np.unique(colors, axis=0)
    names = [str(color[0]) if len(set(color)) == 1 else f"({', '.join(map(str, color))})" for color in colors.tolist()]
    return f"the {'value' if len(names) == 1 else 'values'} {some(names, most=5)}"
