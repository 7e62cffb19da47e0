"""An account of a data set: what it holds, which images are faulty or doubtful, and which files are ignored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kdsweep.core.progress import plural, track
from kdsweep.data.folders import QUIET, Ignored, several
from kdsweep.data.images import DIM, TAKE_EMPTY, read_entry, resize_mask
from kdsweep.data.sources import Entry
from kdsweep.data.splits import PARTS

QUANTILES = (0, 5, 25, 50, 75, 95, 100)
SHOWN = 5  # ids in a line


class Measured(NamedTuple):
    """Hold the measurements of an image.

    Attributes:
        height: of the file, in pixels; 0 if it cannot be read.
        width: of the file, in pixels.
        lesion: share of the image that is lesion.
        resized: the smallest share of the sizes at which images are trained and scored.
        brightest: value of a pixel, of 255.
        fault: why the image cannot be used, in one line; empty if it can.
        classes: share of the image of each of several classes; empty for one.
    """

    height: int
    width: int
    lesion: float
    resized: float
    brightest: int
    fault: str = ""
    classes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Account:
    """Hold everything that ``text`` reports about a data set.

    Attributes:
        name: of the data set.
        entries: its images.
        measured: of each image.
        image_size: side in pixels at which images are scored.
        ignored: names of what is not used, by reason.
        split: the protocol, as ``SplitNode.in_words`` describes it.
        parts: ``train``, ``validation`` or ``test`` by image id; empty if there is no split.
        refused: why there is no split, in one line; empty if there is one.
        groups: group by image id; empty without groups.
    """

    name: str
    entries: Sequence[Entry]
    measured: Sequence[Measured]
    image_size: int
    ignored: Ignored = field(default_factory=dict)
    split: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of several classes; empty for one."""
        return tuple(name for name, _ in self.entries[0].classes or ())

    @property
    def faults(self) -> list[str]:
        """Return a line for everything that keeps the data set from being used."""
        lines = [image.fault for image in self.measured if image.fault]
        if not any(image.lesion > 0 for image in self.measured):
            lines.append(f"data={self.name}: no mask shows a lesion, so nothing can be learned")
        for index, name in enumerate(self.class_names):
            if not any(image.classes[index] > 0 for image in self.measured if image.classes):
                lines.append(f"data={self.name}: no mask shows the class {name}; leave it out of data.classes")
        if 2 * (full := sum(image.lesion == 1 for image in self.measured)) > len(self.measured):
            lines.append(f"data={self.name}: {full} masks are lesion everywhere: are they inverted, or images?")
        return [*lines, *([self.refused] if self.refused else [])]

    def doubts(self) -> dict[str, list[int]]:
        """Return indices of readable images that deserve a look, by reason."""
        size = self.image_size
        applies: dict[str, Callable[[Measured], bool]] = {
            "empty mask": lambda image: image.lesion == 0,
            "full mask": lambda image: image.lesion == 1,
            f"lesion lost at {size} pixels": lambda image: image.lesion > 0 and image.resized == 0,
            f"enlarged to {size} pixels": lambda image: min(image.height, image.width) < size,
            "nearly black image": lambda image: image.brightest <= DIM,
        }
        readable = {number: image for number, image in enumerate(self.measured) if image.height}
        return {
            reason: [n for n, image in readable.items() if is_doubtful(image)]
            for reason, is_doubtful in applies.items()
        }


def measure(entries: Sequence[Entry], *, sizes: Sequence[int], allow_empty_masks: bool) -> list[Measured]:
    """Read and measure all images, with progress; a faulty image is an entry of the result.

    Args:
        entries: of the data set.
        sizes: sides in pixels at which images are trained and scored.
        allow_empty_masks: an image without a lesion is not a fault.
    """

    def one(entry: Entry) -> Measured:
        try:
            image, mask = read_entry(entry)
        except ValueError as error:
            return Measured(0, 0, math.nan, math.nan, 0, str(error))
        is_faulty = not (allow_empty_masks or mask.any())
        fault = f"{entry.mask_files[0]} shows no lesion ({TAKE_EMPTY} takes healthy images)" if is_faulty else ""
        resized = min(float((resize_mask(mask, size) > 0).mean()) for size in sizes)
        height, width = mask.shape
        classes = tuple(float((mask == index).mean()) for index in range(1, len(entry.classes or ()) + 1))
        return Measured(height, width, float((mask > 0).mean()), resized, int(image.max()), fault, classes)

    with ThreadPoolExecutor() as threads:  # Pillow and OpenCV decode and resize outside Python's lock
        return list(track(threads.map(one, entries), what="reading images", unit="image", total=len(entries)))


def text(account: Account) -> str:
    """Return the account: the answer in the first line, then faults and doubts, then the details."""
    sections = [_answer(account), _list("faults", account.faults), _list("worth a look", _doubt_lines(account))]
    sections += [_counts(account), "\n".join(_details(account))]
    return "\n\n".join(section for section in sections if section) + "\n"


def _answer(account: Account) -> str:
    count = sum(bool(image.fault) for image in account.measured)
    reasons = [f"{count} of them faulty"] if count else []
    reasons += ["the split is refused"] if account.refused else []
    verdict = f"usable at image_size={account.image_size}"
    if account.faults:
        verdict = f"NOT usable: {', '.join(reasons) or 'see its masks'}"
    return f"data={account.name}: {plural(len(account.entries), 'image')}, {verdict}"


def _list(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines)]) if lines else ""


def _doubt_lines(account: Account) -> list[str]:
    faulty = {number for number, image in enumerate(account.measured) if image.fault}
    ids = {
        reason: [account.entries[number].id for number in numbers if number not in faulty]
        for reason, numbers in account.doubts().items()
    }
    ids |= {f"ignored, {reason}": names for reason, names in account.ignored.items() if reason not in QUIET}
    return [f"{reason}: {several(names, shown=SHOWN)}" for reason, names in ids.items() if names]


def _counts(account: Account) -> str:
    """Return a table of images: a row per label, a column per part."""
    columns = [*(PARTS if account.parts else ()), "all"]
    labels = sorted({entry.label for entry in account.entries})
    cells = Counter((entry.label, account.parts.get(entry.id, "")) for entry in account.entries)
    rows = [["images", *columns]]
    for name, members in [*((label, [label]) for label in labels), *([("all", labels)] if len(labels) > 1 else [])]:
        of_parts = [sum(cells[label, part] for label in members) for part in columns[:-1]]
        rows.append([name, *map(str, of_parts), str(sum(n for (label, _), n in cells.items() if label in members))])
    first = max(len(row[0]) for row in rows)
    return "\n".join(row[0].ljust(first) + "".join(cell.rjust(12) for cell in row[1:]) for row in rows)


def _details(account: Account) -> list[str]:
    readable = [image for image in account.measured if image.height]
    lines = []
    if readable:
        sizes = sorted(readable, key=lambda image: image.height * image.width)
        named = zip(("smallest", "median", "largest"), (sizes[0], sizes[len(sizes) // 2], sizes[-1]), strict=True)
        lines.append("size in pixels: " + ", ".join(f"{name} {image.width} x {image.height}" for name, image in named))
    if lesions := [100 * image.lesion for image in readable if image.lesion > 0]:
        values = np.percentile(lesions, QUANTILES)
        named_shares = zip(("min", "5 %", "25 %", "median", "75 %", "95 %", "max"), values, strict=True)
        lines.append("lesion in % of the image: " + ", ".join(f"{name}: {value:.3g}" for name, value in named_shares))
    lines += _class_lines(account, readable)
    doubts = account.doubts()
    lines.append("; ".join(f"{reason}: {len(numbers)}" for reason, numbers in doubts.items()))
    several_masks = sum(len(entry.mask_files) > 1 for entry in account.entries)
    lines.append(f"images with several mask files: {several_masks}")
    lines.append(f"split: {account.split}" + ("" if account.parts else ", refused"))
    lines.append(_groups_line(account))
    lines += [
        f"ignored, {reason}: {several(names, shown=SHOWN)}"
        for reason, names in account.ignored.items()
        if reason in QUIET
    ]
    return lines


def _class_lines(account: Account, readable: Sequence[Measured]) -> list[str]:
    """Return a line for each of several classes: images that show it, and its share of the pixels of all images."""
    lines, pixels = [], [image.height * image.width for image in readable]
    for index, name in enumerate(account.class_names):
        areas = [image.classes[index] * count for image, count in zip(readable, pixels, strict=True)]
        shown = plural(sum(area > 0 for area in areas), "image")
        lines.append(f"class {name}: in {shown}, {100 * sum(areas) / max(1, sum(pixels)):.3g} % of all pixels")
    return lines


def _groups_line(account: Account) -> str:
    if not account.groups:
        return "groups: none; split.group keeps the images of a patient in one part (docs/data.md)"
    sizes = Counter(account.groups.values())
    return f"groups: {len(sizes)} of 1 to {max(sizes.values())} images"
