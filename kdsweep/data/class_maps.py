"""Masks of several classes: the value or the color of a pixel says which class it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kdsweep.data.folders import DICOM
from kdsweep.data.pixels import DoubtError, color_codes, mask_colors, named_colors, naming, upright

AS_CLASSES = "save each class as data.classes says and all else as 0"
Code = int | tuple[int, int, int] | str  # of a class in a mask: a value, a color, or the label of the mask or image


def read_class_map(file: Path, codes: Sequence[Code]) -> np.ndarray:
    """Read a mask of several classes as (H, W) uint8, upright: k where it has the k-th code, 0 where it is black.

    Args:
        file: of any mode; the values of a palette with colors are its indices.
        codes: all values, or all colors.

    Raises:
        FileError: the file is unreadable, or has a value or color that is not a code.
    """
    with naming(file):
        if file.suffix.lower() in DICOM:
            raise DoubtError("is a DICOM file, as a mask cannot be; save it as PNG")
        picture, by_value = upright(file), isinstance(codes[0], int)
        pixels = _values(picture) if by_value else color_codes(_colors(picture))
        classes = np.zeros(pixels.shape, np.uint8)
        for index, code in enumerate(np.array(codes) if by_value else color_codes(np.array(codes)), start=1):
            classes[pixels == code] = index
        if (unnamed := pixels[(classes == 0) & (pixels != 0)]).size:
            colors = unnamed[:, None] if by_value else np.stack([unnamed >> 16, unnamed >> 8 & 255, unnamed & 255], 1)
            remedy = "name them, or make them black"
            raise DoubtError(f"has {named_colors(colors)}, which data.classes does not name; {remedy}")
        return classes


def _values(picture: Image.Image) -> np.ndarray:
    """Return the values (H, W) int64 of a mask: gray as it shows, or the indices of a palette that has a color."""
    palette = np.array(picture.getpalette() if picture.mode == "P" else [], np.uint8).reshape(-1, 3)
    if picture.mode == "1" or picture.mode.startswith("I") or _has_color(palette):
        return np.asarray(picture).astype(np.int64)
    colors = mask_colors(picture, AS_CLASSES)
    if _has_color(colors):
        raise DoubtError("is in color; give data.classes a color [r, g, b] for each name")
    return colors[..., 0].astype(np.int64)


def _colors(picture: Image.Image) -> np.ndarray:
    """Return the colors (H, W, 3) uint8 of a mask."""
    if picture.mode.startswith("I"):
        raise DoubtError("is gray of more than 8 bits; give data.classes a value for each name, or save it in color")
    return mask_colors(picture, AS_CLASSES)


def _has_color(colors: np.ndarray) -> bool:
    return bool((colors != colors[..., :1]).any())
