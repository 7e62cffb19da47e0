"""Labels of a data set's images from a spreadsheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdsweep.core.errors import InputError
from kdsweep.core.files import folded
from kdsweep.data.folders import is_image, several

REMEDY = "correct it, or move it elsewhere: then there are no labels"


def read_labels(sheet: Path, stems: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Read labels from the columns Image and Type of an Excel file.

    An image is named by its number (a spreadsheet turns 000001 into 1), by its stem, or by its file name.

    Args:
        sheet: the file.
        stems: names of the images, without suffix.

    Returns:
        The label of each stem, and the rows that name no image.

    Raises:
        InputError: the file cannot be read, two rows contradict each other, or an image has no label.
    """
    labels: dict[str, str] = {}
    names: dict[str, str] = {}
    for image, label in _rows(sheet):
        key = _key(image)
        names.setdefault(key, image)
        if labels.setdefault(key, label) != label:
            raise InputError(f"{sheet}: image {image} is {labels[key]!r} in one row and {label!r} in another; {REMEDY}")
    by_stem = {stem: labels.get(_key(stem), "") for stem in stems}
    if missing := [stem for stem, label in by_stem.items() if not label]:
        raise InputError(f"{sheet} has no label for {several(missing)} of {len(stems)} images; {REMEDY}")
    unused = labels.keys() - {_key(stem) for stem in stems}
    return by_stem, [name for key, name in names.items() if key in unused]


def _rows(sheet: Path) -> list[tuple[str, str]]:
    """Return image and label of each row that is not blank."""
    import pandas as pd

    try:
        table = pd.read_excel(sheet, dtype=str)
    except Exception as error:  # of pandas, openpyxl, zipfile, or an XML parser
        reason = " ".join(str(error).split())
        raise InputError(f"{sheet} is not a readable .xlsx file ({reason}); {REMEDY}") from error
    if not {"Image", "Type"} <= set(table.columns):
        there = ", ".join(map(str, table)) or "none"
        raise InputError(f"{sheet}: labels need the columns Image and Type, it has {there}; {REMEDY}")
    cells = table[["Image", "Type"]].dropna(subset="Image").fillna("")
    return [(image.strip(), label.strip().lower()) for image, label in cells.itertuples(index=False)]


def _key(name: str) -> str:
    """Return what rows and stems have in common: no suffix of an image, no leading zeros, one form of letters."""
    stem = folded(Path(name).stem if is_image(Path(name)) else name)
    return stem.lstrip("0") if stem.isdecimal() else stem
