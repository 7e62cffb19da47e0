"""The folder of a data set: its files, the folders of images and masks in it, and an account of what is not used.

Every file is used, or ignored with a reason, or doubtful; a doubtful file is an InputError that names it.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from kdsweep.core.errors import InputError
from kdsweep.core.files import folded

COMMON = ".png, .jpg, .bmp, .tif, .webp, .dcm, ..."
DICOM = frozenset({".dcm", ".dicom"})
NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow names these formats and does not decode them
DEEPEST = 3  # levels of folders below the root that are read
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}
SHOWN = 3  # names in a line on ignored files

Ignored = dict[str, list[str]]  # names, relative to the root, by reason
ELSEWHERE, LONE_MASKS, NOT_IMAGES = "images in other folders", "masks without an image", "files that are not images"
UNREADABLE = "folders that cannot be read"
HIDDEN, DEEPER, OTHER = "hidden files", f"folders below level {DEEPEST}", "other files"
QUIET = {HIDDEN, DEEPER, OTHER}  # expected: a sweep does not mention them, the command ``data`` does


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the image formats that Pillow decodes, and of DICOM."""
    formats = Image.registered_extensions().items()
    return DICOM.union(suffix for suffix, name in formats if name in Image.OPEN and name not in NO_PIXELS)


def is_image(file: Path) -> bool:
    """Return whether a file has the suffix of an image format."""
    return file.suffix.lower() in image_suffixes()


def printable(name: str) -> str:
    """Return a file name for a message: bytes that are not UTF-8 and control characters are escaped."""
    return "".join(f"\\x{ord(letter) & 0xFF:02x}" if _is_control(letter) else letter for letter in name)


def refuse_unprintable(name: str, what: str) -> None:
    """Raise InputError for a name that JSON, CSV and messages cannot hold: not UTF-8, or with control characters."""
    if any(map(_is_control, name)):
        raise InputError(f"{what} '{printable(name)}' has bytes that are not UTF-8, or control characters: rename it")


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cs")  # Cs: how Python holds a byte that is not UTF-8


class Inventory:
    """All files of a folder, each to be used or ignored.

    Args:
        root: the folder, as ``data.root`` names it.

    Attributes:
        files: those that are neither hidden nor too deep, sorted.
        folders: those that were read, sorted; the root is the first.
        ignored: names by reason; complete after ``close``.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(str(root)).expanduser()  # a folder called 2024 arrives as a number
        if not self.root.is_dir():
            raise InputError(f"data.root={root}: no such folder; name the folder that holds the images")
        refuse_unprintable(str(self.root), "data.root")
        self.files: list[Path] = []
        self.folders: list[Path] = []
        self.ignored: Ignored = {}
        self._used: set[Path] = set()
        self._read(self.root, level=0)
        self.files.sort()
        self.folders.sort()

    def _read(self, folder: Path, *, level: int) -> None:
        self.folders.append(folder)
        try:
            children = [(folder / child.name, child.is_dir()) for child in os.scandir(folder)]
        except OSError as error:
            if folder == self.root:
                raise InputError(f"data.root={folder}: cannot be read ({error.strerror}); make it readable") from error
            self.ignore(UNREADABLE, [folder])
            return
        for child, is_folder in children:
            if child.name.startswith(".") or child.name.lower() in SYSTEM_FILES:
                self.ignore(HIDDEN, [child])
            elif not is_folder:
                self.files.append(child)
            elif level == DEEPEST:
                self.ignore(DEEPER, [child])
            else:
                self._read(child, level=level + 1)

    def name(self, file: Path) -> str:
        """Return a file's name relative to the root, for a message."""
        return printable(str(file.relative_to(self.root)))

    def ignore(self, reason: str, files: Iterable[Path]) -> None:
        """Note files as ignored."""
        files = list(files)
        self._used.update(files)
        if files:
            self.ignored.setdefault(reason, []).extend(self.name(file) for file in files)

    def use(self, file: Path) -> Path:
        """Note a file as used and return it."""
        self._used.add(file)
        return file

    def images(self, folder: Path) -> list[Path]:
        """Return the images in a folder and note them as used; raise InputError for none or doubtful names."""
        inside = [file for file in self.files if file.parent == folder]
        images = [file for file in inside if is_image(file)]
        if not images:
            below = [file for file in self.files if folder in file.parents]
            there = f"; it has {several([self.name(file) for file in inside or below])}" if below else ""
            where = printable(str(folder))
            raise InputError(f"{where}: no images{there}; they must be directly in it, {COMMON}")
        names: dict[str, Path] = {}
        for file in images:
            refuse_unprintable(str(file.relative_to(self.root)), f"data.root={self.root}:")
            if not file.is_file():  # a pipe would be waited for
                raise InputError(f"{file} is a broken link, a pipe or a device, not an image: remove it")
            other = names.setdefault(folded(file.stem), self.use(file))
            if other != file:
                raise InputError(f"{other} and {file.name} have one name: remove or rename one of them")
        return images

    def find(self, names: Sequence[str], *, layout: str) -> list[Path]:
        """Return the folders of these names, in any case, that are next to each other.

        Those directly in the root come first; else there must be one such set, at most two folders deeper.

        Args:
            names: in lower case.
            layout: what is expected, for the message.

        Raises:
            InputError: there is no such set, or several.
        """
        children: dict[Path, dict[str, list[Path]]] = {}
        for folder in self.folders[1:]:
            children.setdefault(folder.parent, {}).setdefault(folder.name.lower(), []).append(folder)
        complete = [parent for parent, there in children.items() if all(name in there for name in names)]
        if self.root in complete:
            complete = [self.root]
        if not complete:
            self._refuse_incomplete(names, layout)
        if len(complete) > 1:
            sets = several([self.name(parent) + "/" for parent in complete])
            remedy = f"name one of them, such as data.root={printable(str(complete[0]))}"
            raise InputError(f"data.root={self.root} holds more than one data set: {sets}; {remedy}")
        by_name = [children[complete[0]][name] for name in names]
        if double := next((folders for folders in by_name if len(folders) > 1), None):
            both = " and ".join(map(self.name, double))
            raise InputError(f"data.root={self.root}: folders {both} differ by case alone; rename one of them")
        return [folders[0] for folders in by_name]

    def _refuse_incomplete(self, names: Sequence[str], layout: str) -> None:
        there = {name: [folder for folder in self.folders[1:] if folder.name.lower() == name] for name in names}
        missing = next((name for name in names if not there[name]), names[-1])
        others = [self.name(folder) + "/" for name in names if name != missing for folder in there[name]]
        where = f"next to {', '.join(others[:SHOWN])}" if others else "in it"
        remedy = f"expected {layout}"
        if self.root.name.lower() in names:
            remedy = f"name the folder above, data.root={self.root.parent}"
        raise InputError(f"data.root={self.root}: no folder {missing}/ {where}; {remedy}")

    def close(self, read: Sequence[Path]) -> Ignored:
        """Account for the remaining files and return all ignored ones.

        Args:
            read: the folders of the data set's images and masks.
        """
        rest = [file for file in self.files if file not in self._used]
        self.ignore(NOT_IMAGES, [file for file in rest if file.parent in read])
        self.ignore(ELSEWHERE, [file for file in rest if file.parent not in read and is_image(file)])
        self.ignore(OTHER, [file for file in rest if file not in self._used])
        return {reason: sorted(names) for reason, names in sorted(self.ignored.items())}


def pair(
    inventory: Inventory, image_dir: Path, mask_dir: Path, *, suffixes: Sequence[str] = ()
) -> list[tuple[Path, tuple[Path, ...]]]:
    """Return each image with the mask of equal name; masks without an image are noted as ignored.

    With ``suffixes``, in lower case, an image has a mask for each of them, of its name and the suffix; without any of
    these it has the mask of equal name.

    Raises:
        InputError: no image has a mask, or ``Inventory.images`` refuses a folder.
    """
    images, masks = inventory.images(image_dir), inventory.images(mask_dir)
    by_name = {folded(mask.stem): mask for mask in masks}
    pairs = []
    for image in images:
        name = folded(image.stem)
        names = [name + suffix for suffix in suffixes if name + suffix in by_name] or [name]
        pairs.append((image, tuple(by_name[each] for each in names if each in by_name)))
    paired = {mask for _, masks_of_image in pairs for mask in masks_of_image}
    lone = [mask for mask in masks if mask not in paired]
    if len(lone) == len(masks):
        example = f"{images[0]} and {inventory.name(masks[0])}"
        remedy = f"name masks NAME{', NAME'.join(suffixes)} for an image NAME" if suffixes else "give both one name"
        raise InputError(f"no image has a mask of its name: {example}; {remedy}")
    inventory.ignore(LONE_MASKS, lone)
    return pairs


def ignored_line(ignored: Ignored) -> str:
    """Return in one line the files of a data set that are ignored, as counts with the first names; empty if none."""
    loud = {reason: names for reason, names in ignored.items() if reason not in QUIET}
    return "; ".join(f"{reason}: {several(names)}" for reason, names in loud.items())


def several(names: Sequence[str], *, shown: int = SHOWN) -> str:
    """Return a count with the first names."""
    return f"{len(names)} ({', '.join(names[:shown])}{', ...' if len(names) > shown else ''})"
