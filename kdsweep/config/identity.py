"""The cell that settings describe: its fingerprint, its Teacher, and the cells that can share its batches.

It runs without torch: a sweep is checked and planned before any process has waited for that import.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdsweep.config import decisions, grid, inputs, user_code
from kdsweep.config.grid import BASELINE, DISTILLED, TEACHER, Cell
from kdsweep.config.networks import UNSET, Architecture
from kdsweep.config.schema import Settings
from kdsweep.core.errors import InputError

AS_JSON = ("network", "stages", "output", "input", "ensemble")  # keys of networks whose values MLflow keeps as JSON
# The settings that determine batches and their computation.
BATCHES = ("data", "image_size", "views", "precision", "deterministic", "train.batch_size", "train.last_batch")


@dataclass(frozen=True, eq=False)
class Job:
    """A cell to be computed: the launcher sends jobs to the processes that train."""

    settings: Settings
    cell: Cell  # that the settings describe, with its variant
    overrides: list[str] = field(default_factory=list)  # as they are typed
    finished: dict[str, float] | None = None  # final values of the cell, if the store holds them
    begun: int = 0  # epochs that its checkpoint holds
    tuned: tuple[str, ...] = ()  # keys of which tuning has set the values
    used: tuple[str, ...] = ()  # keys of overrides which the schema does not have and which have an effect

    @property
    def epochs_left(self) -> int:
        """Return how many epochs are left if no early stop ends it sooner."""
        return max(0, self.settings.train.epochs - self.begun)


def job(settings: Settings) -> Job:
    """Return the job of a cell outside of a sweep."""
    return Job(settings, cell(settings))


def cell(settings: Settings) -> Cell:
    """Return the cell that settings describe, with its fingerprint."""
    if not settings.is_distilled:
        return _cell(settings, BASELINE, settings.path.notation)
    name = settings.method.notation
    if name is None:
        loss(settings)  # raises if the path has none
        name = f"{settings.path.notation}_{settings.loss.name.upper()}"
    notation = grid.notation(name, settings.teacher_aug.distill_view)
    return _cell(settings, DISTILLED, notation, teacher=teacher_cell(settings))


def teacher_cell(settings: Settings) -> Cell:
    """Return the Teacher that the cell of these settings learns from; one that comes trained has no training view."""
    members = {
        name: replace(teacher_cell(member), variant={"teacher": member.teacher.name})
        for name, member in settings.members.items()
    }
    if settings.teacher.trained is not None and not members:
        return _cell(settings, TEACHER, "Teacher")
    return _cell(settings, TEACHER, grid.notation("Teacher", settings.teacher_aug.train_view), members=members)


def _cell(
    settings: Settings,
    role: str,
    notation: str,
    *,
    teacher: Cell | None = None,
    members: dict[str, Cell] | None = None,
) -> Cell:
    decided = decisions.deciding(settings, role)
    name, network = ("teacher", settings.teacher) if role == TEACHER else ("student", settings.student)
    is_trained = role == TEACHER and settings.teacher.trained is not None
    weights = inputs.trained_digest(settings) if is_trained else inputs.weights_digests(name, network)
    input_digests = inputs.image_digests(settings) | weights
    members = members or {}
    input_digests |= {f"teacher.{name}": member.fingerprint for name, member in members.items()}
    sources = {"data.root": str(settings.data.root or ""), f"{name}.weights": network.weights}
    if "split" in input_digests:
        sources["split"] = settings.split.in_words()
    if teacher is not None:
        input_digests["teacher"] = teacher.fingerprint
        sources |= {"teacher.seed": str(teacher.seed), "teacher.weights": settings.teacher.weights}
        sources |= {"teacher.trained": settings.teacher.trained} if settings.teacher.trained is not None else {}
    if code := user_code.user_code_digest(grid.targets(decided)):
        input_digests["user_code"] = code
    return Cell(
        role=role,
        notation=notation,
        split=settings.split.number,
        seed=settings.seed if role != TEACHER else 0 if is_trained else settings.teacher.seed,
        settings=grid.without_modules(decided),
        input_digests=input_digests | {"results_version": str(grid.RESULTS_VERSION)},
        store=Path(settings.store).absolute(),
        sources=sources,
        teacher=teacher,
        members=members,
    )


def loss(settings: Settings) -> dict[str, Any]:
    """Return the loss's function for the representation that the path takes.

    Raises:
        InputError: it has none.
    """
    representation = settings.path.representation
    function = settings.loss.hidden if representation == "hidden" else settings.loss.logits
    if representation is None or function is None:
        raise InputError(
            f"path.representation={representation} is not allowed: loss={settings.loss.name} has none for it"
        )
    return function


def batches_key(settings: Settings, *, seed: int) -> str:
    """Return a key that is equal for trainings that can share every batch.

    All else may differ inside a lockstep group: path, loss, views, Teacher, Student, rates, weights, epochs.
    """
    decided = decisions.deciding(settings, BASELINE)
    shared = {key: value for key, value in decided.items() if grid.is_under(key, BATCHES)}
    where = [settings.store, settings.tracking.uri, settings.tracking.experiment]
    computed = [settings.train.workers, settings.device]
    return grid.digest([shared, inputs.image_digests(settings), settings.split.number, seed, computed, where])


def params(settings: Settings) -> dict[str, Any]:
    """Return the flat configuration, keys joined by dots, as MLflow keeps it; a module's arguments are JSON."""
    values = settings.plain()
    for node in (values["student"], values["teacher"]):
        node |= {key: json.dumps(node[key]) for key in AS_JSON if node.get(key) is not None}
    if settings.data.classes:
        values["data"]["classes"] = json.dumps(settings.data.classes)
    return grid.flatten(values)


def architecture(params: grid.Params, group: str) -> Architecture | None:
    """Return the network that a flat configuration describes; None if it has none for the group.

    Args:
        params: of ``params``, values or, as MLflow keeps them, strings. An ensemble is not one network.
        group: ``student`` or ``teacher``.
    """
    if str(params.get(f"{group}.ensemble")) not in UNSET:
        return None
    values = {key: params.get(f"{group}.{key}") for key in Architecture.model_fields}
    values = {key: value for key, value in values.items() if str(value) not in UNSET}
    texts = {key: value for key, value in values.items() if key != "encoder" and isinstance(value, str)}
    values |= {key: json.loads(text) for key, text in texts.items()}
    return Architecture.model_validate(values) if values else None


def factors(settings: Settings, *, role: str) -> dict[str, str]:
    """Return the factors as a cell uses them: first among the params, so MLflow compares runs by them."""
    if role == TEACHER:
        return {} if settings.teacher.trained is not None else {"cell.teacher_aug": settings.teacher_aug.train_view}
    if role == BASELINE:
        return {"cell.path": "none"}
    by_method = {"cell.method": settings.method.name}
    by_path = {"cell.path": settings.path.name, "cell.loss": settings.loss.name}
    compared = by_method if settings.method.terms else by_path
    return compared | {"cell.teacher_aug": settings.teacher_aug.distill_view}
