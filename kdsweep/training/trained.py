"""A Teacher that comes trained: of a file, or of a finished run of the store."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from kdsweep.config import identity, inputs
from kdsweep.config.grid import TEACHER
from kdsweep.config.networks import Architecture
from kdsweep.config.schema import Settings
from kdsweep.core.errors import InputError
from kdsweep.core.progress import plural
from kdsweep.data import run_data
from kdsweep.models.build import new_network
from kdsweep.models.networks import Network
from kdsweep.models.weights import load_weights
from kdsweep.store import cell_folder


def network(settings: Settings) -> Network:
    """Return the network that ``teacher`` describes, with the weights of ``teacher.trained``.

    Raises:
        InputError: there is no such file or run, or its weights are not those of the complete network.
    """
    return _network(settings.teacher, settings.logits, inputs.trained_file(settings), label=_label(settings))


def _label(settings: Settings) -> str:
    return f"teacher.trained={settings.teacher.trained}"


def _network(architecture: Architecture, logits: int, file: Path, *, label: str) -> Network:
    untrained = new_network(architecture, logits=logits, weights="none", seed=0)
    load_weights(untrained, file, label=label, complete=True)
    return untrained


def check(settings: Settings) -> None:
    """Raise InputError if the trained Teacher does not fit the settings, or a run has seen images that are held out.

    A run may not have been trained on images of the same data set that are for validation or test here.
    """
    file = inputs.trained_file(settings)
    if str(settings.teacher.trained).startswith(inputs.RUN):
        _check_run(settings, file.parent)
    _check_file(settings.teacher.as_json(), settings.logits, file, _label(settings))


@lru_cache(maxsize=8)
def _check_file(architecture: str, logits: int, file: Path, label: str) -> None:
    _network(Architecture.model_validate_json(architecture), logits, file, label=label)


def _check_run(settings: Settings, folder: Path) -> None:
    record, label = cell_folder.read(folder), f"{_label(settings)}: {folder.name}"
    if record.status != "FINISHED":
        raise InputError(f"{label} is not finished; the command of its sweep resumes it")
    group = "teacher" if record.tags["kdsweep.role"] == TEACHER else "student"
    there = identity.architecture(record.params, group) or Architecture()
    for key in Architecture.model_fields:
        if (of_run := getattr(there, key)) != (value := getattr(settings.teacher, key)):
            raise InputError(
                f"{label} has {key}={of_run}, not teacher.{key}={value}; teacher=student takes the network of a Student"
            )
    if (classes := run_data.class_names(record.params)) != settings.class_names:
        of_run, expected = (", ".join(names) or "one" for names in (classes, settings.class_names))
        raise InputError(f"{label} has the classes {of_run}, data.classes has {expected}; choose a run of the same")
    parts, seen = inputs.split_ids(settings), set(cell_folder.read_split(folder)["train"])
    held_out = [image for part in ("validation", "test") for image in parts[part] if image in seen]
    if held_out and record.params.get("data.name") == settings.data.name:
        raise InputError(
            f"{label} was trained on {plural(len(held_out), 'image')} that this split holds out, the first is "
            f"{held_out[0]}; give the run of the same split: {inputs.RUN}NOTATION/split{{split}}"
        )
