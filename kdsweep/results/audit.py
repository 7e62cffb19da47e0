"""``python -m kdsweep audit data=NAME data.root=DIR``: near-duplicates of a data set, as groups for its splits.

It writes groups.csv (``split.group=groups.csv`` keeps each group on one side), pairs.csv and a contact sheet.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from kdsweep.config import composition, inputs
from kdsweep.core.errors import InputError
from kdsweep.core.files import private_path, write_text
from kdsweep.core.progress import plural, track
from kdsweep.data import duplicates
from kdsweep.data.folders import ignored_line
from kdsweep.data.pixels import read_gray_or_color
from kdsweep.data.sources import Entry

THUMB_PX, ROWS_A_SHEET, IMAGES_A_ROW = 160, 12, 8


def write(entries: list[Entry], out: Path) -> str:
    """Find the near-duplicates among a data set's images and write them; return a summary.

    Args:
        entries: of the data set.
        out: folder for groups.csv (id, group, label: every image, alone if nothing is like it), pairs.csv (first,
            second, kind, strength) and sheet-1.png, sheet-2.png, ... (a row per group).

    Raises:
        InputError: an image cannot be read, or the folder cannot be written to.
    """

    def progress(steps: Iterable[int], name: str) -> Iterable[int]:
        listed = list(steps)
        return track(listed, what=name, unit="step", total=len(listed))

    try:
        images = [_gray(entries[number]) for number in progress(range(len(entries)), "reading images")]
    except ValueError as error:
        raise InputError(str(error)) from error
    pairs = duplicates.find_pairs(images, [entry.label for entry in entries], progress=progress)
    groups = duplicates.join(len(entries), pairs)
    names = {number: f"g{rank:03d}" for rank, members in enumerate(groups, start=1) for number in members}
    table = pd.DataFrame({"id": [entry.id for entry in entries]})
    table["group"] = [names.get(number, f"alone-{number:04d}") for number in range(len(entries))]
    table["label"] = [entry.label for entry in entries]
    listing = pd.DataFrame(pairs, columns=["first", "second", "kind", "strength"])
    for column in ("first", "second"):
        listing[column] = [entries[number].id for number in listing[column]]
    try:
        write_text(out / "groups.csv", table.to_csv(index=False))
        write_text(out / "pairs.csv", listing.round(3).to_csv(index=False))
        sheets = _write_sheets(groups, images, entries, pairs, out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from error
    return _summary(entries, groups, Counter(pair.kind for pair in pairs), sheets=sheets, out=out)


def _summary(entries: list[Entry], groups: list[list[int]], kinds: Counter[str], *, sheets: int, out: Path) -> str:
    mixed = [members for members in groups if len({entries[number].label for number in members}) > 1]
    listed = "; ".join(", ".join(entries[number].id for number in members) for members in mixed)
    lines = [
        f"{plural(len(entries), 'image')}: {plural(len(groups), 'group')} of {sum(map(len, groups))} images that show "
        f"the same frame or neighboring views; pairs: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}",
        *([f"{plural(len(mixed), 'group')} with more than one label: {listed}"] if mixed else []),
        f"wrote {out / 'groups.csv'}, pairs.csv and {plural(sheets, 'contact sheet')}; look at them: an image that "
        "does not belong gets another group name in groups.csv",
        f"to keep groups together: split=kfold split.group={out / 'groups.csv'}",
    ]
    return "\n".join(lines) + "\n"


def _gray(entry: Entry) -> np.ndarray:
    return np.asarray(cv2.cvtColor(read_gray_or_color(entry.image_file, entry.window), cv2.COLOR_RGB2GRAY))


def _write_sheets(
    groups: list[list[int]],
    images: list[np.ndarray],
    entries: list[Entry],
    pairs: list[duplicates.Pair],
    out: Path,
) -> int:
    """Write the groups' thumbnails, a group to a row (a long one to several), and return the number of sheets."""
    kinds: dict[int, set[str]] = {}
    for pair in pairs:
        kinds.setdefault(pair.first, set()).add(pair.kind)
        kinds.setdefault(pair.second, set()).add(pair.kind)
    rows = []
    for rank, members in enumerate(groups, start=1):
        title = f"g{rank:03d}: {', '.join(sorted(set.union(*(kinds[number] for number in members))))}"
        for start in range(0, len(members), IMAGES_A_ROW):
            rows.append(_row(title, members[start : start + IMAGES_A_ROW], images, entries))
    for number, start in enumerate(range(0, len(rows), ROWS_A_SHEET), start=1):
        sheet = np.concatenate(rows[start : start + ROWS_A_SHEET])
        file = out / f"sheet-{number}.png"
        if not cv2.imwrite(str(file), sheet):
            raise OSError(0, "the picture is not written", str(file))
    return -(-len(rows) // ROWS_A_SHEET)


def _row(title: str, members: list[int], images: list[np.ndarray], entries: list[Entry]) -> np.ndarray:
    """Return a row of thumbnails (THUMB_PX + 40, W) uint8 with the title above and ids below."""
    canvas = np.full((THUMB_PX + 40, IMAGES_A_ROW * (THUMB_PX + 4)), 255, np.uint8)
    write = partial(
        cv2.putText, canvas, fontFace=cv2.FONT_HERSHEY_SIMPLEX, fontScale=0.42, color=0, lineType=cv2.LINE_AA
    )
    write(title, org=(4, 14))
    for place, number in enumerate(members):
        image = images[number]
        scale = THUMB_PX / max(image.shape)
        height, width = (max(1, round(side * scale)) for side in image.shape)
        left = place * (THUMB_PX + 4)
        canvas[20 : 20 + height, left : left + width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        write(entries[number].id, org=(left + 2, THUMB_PX + 34))
    return canvas


def audit(overrides: Sequence[str], *, out: Path | None = None) -> None:
    """Audit the data set that overrides name."""
    settings = composition.compose(overrides)
    listing = inputs.listing(settings)
    out = private_path(out, "--out", default=f"audit/{settings.data.name}-{listing.digest[:8]}")
    sys.stdout.write(f"data={settings.data.name}: {len(listing.entries)} images are compared; results go to {out}\n")
    if line := ignored_line(listing.ignored):
        sys.stdout.write(f"data={settings.data.name}, ignored: {line}\n")
    sys.stdout.flush()
    sys.stdout.write(write(listing.entries, out))
