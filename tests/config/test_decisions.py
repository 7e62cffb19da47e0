"""What each key decides: the fingerprint, idle keys, variants and tables follow from it."""

from typing import Any

import pytest

from kdsweep.config import composition, decisions, grid, identity
from kdsweep.config.grid import ROLES

LOSSES = "kdsweep.distill.losses"
BASE = ["profile=quick", "weights=none", "data.count=8"]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory):
    """The cell of overrides, and its Teacher."""
    store = tmp_path_factory.mktemp("store")

    def make(*overrides: str) -> tuple[str, str]:
        cell = identity.cell(composition.compose([*BASE, f"store={store}", *overrides]))
        return cell.fingerprint, cell.teacher.fingerprint if cell.teacher else ""

    return make


def test_each_key_of_the_schema_says_what_it_decides() -> None:
    markers = [marker for key in decisions.KEYS.values() for marker in key.decides]
    assert all(key.decides for key in decisions.KEYS.values())
    assert {role for marker in markers for role in marker.roles or ()} == set(ROLES)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("train.lr=0.5", "student"),
        ("train.patience=3", "student teacher"),
        ("train.epochs=3", "student teacher"),
        ("deterministic=true", "student teacher"),
        ("views.shift=0.1", "student teacher"),
        ("kd.weight=0.9", "student"),
        ("teacher_aug.distill_view=strong", "student"),
        ("teacher.lr=0.5", "student teacher"),
        ("teacher.seed=7", "student teacher"),
        ("data.source.seed=7", "student teacher"),
        ("+data.window=[0,4095]", "student teacher"),
        ("+data.window=null", ""),  # the default
        ("loss.logits.temperature=3", "student"),
        ("kd.temperature=3", "student"),
        ("loss.hidden.temperature=3", ""),
        ("kd.ratio=3", ""),
        ("kd.lambda=1", ""),  # as kd.weight=0.5
        ("teacher.epochs=10", ""),  # as train.epochs
        ("teacher.patience=6", ""),  # as train.patience
        ("teacher.patience=7", "student teacher"),
        ("train.patience=7", "student teacher"),
        ("data.load_size=73", ""),  # as without
        ("train.last_batch=smaller", ""),  # the default
        *((local, "") for local in ("device=cpu", "train.workers=1", "stats.margin_points=1", "sweep_name=x")),
        *((local, "") for local in ("retry_failed=true", "tracking.experiment=x", "data.allow_empty_masks=true")),
    ],
)
def test_a_key_changes_the_cells_that_it_decides(cells, override: str, changed: str) -> None:
    before, after = cells("path=L"), cells("path=L", override)
    names = zip(("student", "teacher"), before, after, strict=True)
    assert " ".join(name for name, one, other in names if one != other) == changed


def test_the_alignment_of_equal_views_makes_no_other_cell(cells) -> None:
    assert cells("teacher_aug=strong", "kd.align=none") == cells("teacher_aug=strong")
    assert cells("teacher_aug=weak", "kd.align=none") != cells("teacher_aug=weak")


def test_the_students_keys_decide_nothing_of_the_other_roles() -> None:
    keys = {"train.lr": "1", "kd.weight": "1", "teacher.lr": "1", "student.encoder": "x", "image_size": "64"}
    used = {role: set(decisions.used_by(role, keys, {})) for role in ROLES}
    baseline = {"train.lr", "student.encoder", "image_size"}
    assert used == {"distilled": set(keys), "baseline": baseline, "teacher": {"teacher.lr", "image_size"}}


@pytest.mark.parametrize(
    ("key", "params", "expected"),
    [
        ("kd.temperature", {"loss.logits._target_": f"{LOSSES}.mse", "loss.hidden._target_": f"{LOSSES}.mse"}, False),
        ("kd.temperature", {"loss.logits._target_": "mine.mae", "loss.hidden._target_": f"{LOSSES}.mse"}, True),
        ("kd.temperature", {"loss.logits._target_": f"{LOSSES}.kld_pixels"}, True),
        ("kd.temperature", {"method.name": "kd"}, False),
        ("train.epochs", {"teacher.epochs": "3"}, True),
        ("kd.align", {"teacher_aug.distill_view": "strong"}, False),
        ("kd.align", {"teacher_aug.distill_view": "weak"}, True),
        ("kd.ratio", {"kd.weight": "0.5"}, False),
        ("kd.ratio", {"kd.weight": "matched"}, True),
        ("path.kd_path.stage", {"method.name": "kd"}, False),
        ("loss.hidden.temperature", {"path.representation": "hidden"}, True),
        ("loss.hidden.temperature", {"path.representation": "logits"}, False),
        ("split.group", {"split.protocol": "paper"}, False),
        ("split.group", {"split.protocol": "kfold"}, True),
        ("teacher", {}, True),
        ("path.zoom", {}, True),
        ("a.key.of.an.earlier.version", {}, True),
    ],
)
def test_whether_a_key_counts_follows_from_others(key: str, params: dict[str, Any], expected: bool) -> None:
    assert decisions.decides(key, role="distilled", params=params) is expected


def test_the_kinds_of_keys() -> None:
    keys = [*decisions.LEAVES, "data.source.root", "data.source.cache_dir", "data.source.seed", "cell.path"]
    kinds = {key: decisions.kind(key) for key in keys}
    assert {key for key, kind in kinds.items() if kind == "local"} == {
        *("device", "retry_failed", "scores.each_epoch", "stats.margin_points", "store", "sweep_name"),
        *("tracking.uri", "train.workers"),
        *("tracking.experiment", "data.allow_empty_masks"),
    }
    places = {"weights", "data.root", "data.source.root", "data.source.cache_dir"}
    assert {key for key, kind in kinds.items() if kind == "place"} == places
    sections = ("cell", "method", "path", "loss", "teacher_aug", "split", "seed", "teacher.seed")
    assert all((kind in ("name", "factor")) == grid.is_under(key, sections) for key, kind in kinds.items())
    for key in ("method", "path", "loss", "teacher_aug", "split", "split.index", "split.fold", "seed"):
        assert decisions.kind(key) == "name", key
    for key in ("teacher", "teacher.seed", "kd.weight", "split.group", "path.kd_path.stage", "data.root"):
        assert decisions.kind(key) != "name", key


def test_a_users_key_is_not_declared_but_an_argument_is() -> None:
    for key in ("train", "train.lr", "loss.logits.delta", "path.kd_path.depth"):
        assert decisions.is_declared(key), key
    for key in ("mine", "path.zoom", "experiment"):
        assert not decisions.is_declared(key), key
