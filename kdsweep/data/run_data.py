"""The test images of a finished run, by the configuration that the run recorded."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdsweep.core.errors import InputError
from kdsweep.data import sources
from kdsweep.data.images import read_entry, resize_image, resize_mask
from kdsweep.data.pixels import Window

# A record may come from elsewhere: it can only choose among these, and nothing that it names is imported.
SOURCES: dict[str, Callable[..., Any]] = {
    f"kdsweep.data.{cls.__name__}": cls for cls in (sources.Udiat, sources.Busi, sources.Folder, sources.Phantoms)
}


class Scored(NamedTuple):
    """An image (S, S, 3) uint8 and its mask (S, S) uint8 of class indices, as they are scored."""

    image: np.ndarray
    mask: np.ndarray


def source(params: Mapping[str, Any], *, store: Path, root: Path | None = None) -> sources.Source:
    """Return the data set of a run.

    Args:
        params: the flat configuration that the run recorded, as values or, as MLflow keeps them, as strings.
        store: folder of the runs, where phantoms are.
        root: folder of the images, if they have moved since.

    Raises:
        InputError: the data set is not one of kdsweep's.
    """
    prefix = "data.source."
    values = {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}
    name = values.pop("_target_", "none recorded")
    if name not in SOURCES:
        remedy = "name the data set with the command: data=NAME data.root=DIR hydra.searchpath=[file://FOLDER]"
        raise InputError(f"data.source={name}: only {', '.join(SOURCES)} can be read again from a run; {remedy}")
    arguments = {key: _value(value) for key, value in values.items() if key not in ("root", "cache_dir")}
    if "root" in values:
        arguments["root"] = str(root or values["root"])
    if "cache_dir" in values:
        arguments["cache_dir"] = str(store / "phantoms")
    try:
        source: sources.Source = sources.read_as(SOURCES[name](**arguments), window(params), classes(params))
    except TypeError as error:
        raise InputError(f"data.source={name}: the run recorded other options than it has now ({error})") from error
    return source


def scored(of: sources.Source, ids: Iterable[str], *, image_size: int) -> dict[str, Scored]:
    """Read images of a data set by id, at the size (S pixels) at which they are scored, or raise InputError."""
    entries = {entry.id: entry for entry in of.entries()}
    scored = {}
    for image_id in ids:
        if image_id not in entries:
            raise InputError(f"data={of.name}: image {image_id} of the run is not in the data set any more")
        try:
            image, mask = read_entry(entries[image_id])
        except ValueError as error:
            raise InputError(f"data={of.name}: {error}") from error
        scored[image_id] = Scored(resize_image(image, image_size), resize_mask(mask, image_size))
    return scored


def window(params: Mapping[str, Any]) -> Window | None:
    """Return the ``data.window`` of a run from its flat configuration."""
    recorded = _value(params.get("data.window"))
    return tuple(recorded) if recorded is not None else None


def classes(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the ``data.classes`` of a run from its flat configuration."""
    recorded = params.get("data.classes")  # JSON, or "None" as MLflow keeps it
    codes: dict[str, Any] | None = json.loads(recorded) if recorded not in (None, "None") else None
    return codes


def class_names(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of several classes from a run's flat configuration; empty for one."""
    return tuple(classes(params) or ())


def _value(recorded: Any) -> Any:
    """Return a value as it was before MLflow stored it as a string."""
    if not isinstance(recorded, str):
        return recorded
    try:
        return ast.literal_eval(recorded)
    except (ValueError, SyntaxError):
        return recorded
