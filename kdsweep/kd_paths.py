"""The former address of kdsweep.distill.paths: users' own code and older configurations name it."""

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    """A name of the module, with a warning that it has moved."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kdsweep.distill import paths

    value = getattr(paths, name)
    warnings.warn("kdsweep.kd_paths has moved: import KDPath from kdsweep.distill", DeprecationWarning, stacklevel=2)
    return value
