"""The KD paths, the losses, and the distillation that combines them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdsweep.distill.paths import KDPath

__all__ = ["KDPath"]


def __getattr__(name: str) -> Any:
    """Import KDPath at its first use: it loads torch."""
    if name != "KDPath":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kdsweep.distill.paths import KDPath

    return KDPath
