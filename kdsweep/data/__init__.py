"""Data sets, splits, views and batches. Users' own code and configuration take their names from here."""

from kdsweep.data.sources import Busi, Entry, Folder, Phantoms, Source, Udiat

__all__ = ["Busi", "Entry", "Folder", "Phantoms", "Source", "Udiat"]
