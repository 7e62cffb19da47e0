"""The images of a data set as they are listed: their files, a digest of all, and what is not used."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kdsweep.core.errors import InputError
from kdsweep.data.folders import Ignored, refuse_unprintable
from kdsweep.data.sources import Entry, Source


class Listing(NamedTuple):
    """A listed data set.

    Attributes:
        entries: sorted by id.
        digest: SHA-256 over their ids, labels and the bytes of all files.
        ignored: names of what is not used of the data set's folder, by reason; empty for a user's class.
    """

    entries: list[Entry]
    digest: str
    ignored: Ignored

    def summary(self) -> str:
        """Return the number of images, in all and of each label, such as ``163 images (110 benign, 53 malignant)``."""
        labels = Counter(entry.label for entry in self.entries)
        counts = ", ".join(f"{count} {label}" for label, count in sorted(labels.items()))
        return f"{len(self.entries)} images" + (f" ({counts})" if labels.keys() != {"unknown"} else "")


def list_images(source: Source) -> Listing:
    """List a data set without decoding its images: enough to know whether a cell is finished.

    Raises:
        InputError: there are no images, a file cannot be read, or two images have one id.
    """
    entries = sorted(source.entries())
    _check_ids(source.name, entries)
    sha = hashlib.sha256()
    for entry in entries:
        for part in (entry.id, entry.label):
            sha.update(part.encode() + b"\0")
        for file in (entry.image_file, *entry.mask_files):
            try:
                sha.update(hashlib.sha256(file.read_bytes()).digest())
            except OSError as error:
                raise InputError(f"{file} cannot be read ({error.strerror}); make it readable, or remove it") from error
    ignored = source.ignored() if hasattr(source, "ignored") else {}
    return Listing(entries, sha.hexdigest(), ignored)


def _check_ids(name: str, entries: Sequence[Entry]) -> None:
    """Raise InputError if there are no images, or two have one id, or an id is not text."""
    if not entries:
        raise InputError(f"data={name}: no images; its class lists none")
    files: dict[str, Path] = {}
    for entry in entries:
        refuse_unprintable(entry.id, f"data={name}: the id")
        if entry.id in files:
            both = f"{files[entry.id]} and {entry.image_file}"
            raise InputError(f"data={name}: two images have the id {entry.id!r}: {both}; rename one of them")
        files[entry.id] = entry.image_file
