"""Data sets, splits, views and batches. User code and configuration take their names from here."""

import os

# Before the import of albumentations, which looks in a package index for a newer version of itself.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from kdsweep.data.sources import Busi, Entry, Folder, Phantoms, Source, Udiat

__all__ = ["Busi", "Entry", "Folder", "Phantoms", "Source", "Udiat"]
