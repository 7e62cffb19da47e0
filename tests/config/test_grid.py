"""Names and fingerprints: equal where results are equal, different where they may differ."""

import itertools
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsweep.config import grid
from kdsweep.config.grid import Cell
from kdsweep.core.errors import InputError

CELL = Cell(
    role="distilled",
    notation="L_MSE",
    split=0,
    seed=0,
    settings={"lr": 1e-4, "kd": {"weight": 0.5, "align": "warp"}, "sizes": [256, 128]},
    input_digests={"data": "aaaa", "user_code": "bbbb"},
    store=Path("runs"),
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


# --- names


def test_a_name_means_the_folders_of_all_its_cells(tmp_path) -> None:
    names = ["cells/L_MSE-split1-seed0-aa", "cells/L_MSE-split1-seed1-bb", "cells/L_MSE-split10-seed0-cc"]
    names += ["cells/L-split1-seed0-dd", "teachers/Teacher-split1-seed0-ee"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)

    def named(run: str) -> list[str]:
        return [folder.relative_to(tmp_path).as_posix() for folder in grid.folders_named(tmp_path, run)]

    assert named("L_MSE/split1") == names[:2]
    assert named("L_MSE/split1/seed1") == names[1:2]
    assert named("Teacher/split1") == names[4:]
    assert named("L_MSE-split10-seed0-cc") == names[2:3]
    assert [named(run) for run in ("", "*", "L*/split1", "../x", "cells/L-split1-seed0-dd", "L_MSE/split1/x")] == [
        []
    ] * 6


def test_the_weights_of_a_teacher_and_of_a_student_have_their_names() -> None:
    names = [grid.weights_file(role) for role in ("teacher", "student", "distilled")]
    assert names == ["teacher.safetensors", "student.safetensors", "student.safetensors"]


def test_the_twelve_notations_are_those_of_the_papers_table_3() -> None:
    made = [
        grid.notation(f"{path}_{loss}", view)
        for path, loss, view in itertools.product(("L", "H", "HReg"), ("MSE", "KLD"), ("strong", "weak"))
    ]
    made += [grid.notation("Teacher", view) for view in ("strong", "weak")]
    assert made == [
        *("L_MSE", "L_MSE_WAug", "L_KLD", "L_KLD_WAug"),
        *("H_MSE", "H_MSE_WAug", "H_KLD", "H_KLD_WAug"),
        *("HReg_MSE", "HReg_MSE_WAug", "HReg_KLD", "HReg_KLD_WAug"),
        *("Teacher", "Teacher_WAug"),
    ]


def test_run_name_title_and_folder_name_the_cell() -> None:
    cell = replace(CELL, notation="HReg_KLD_WAug", split=2, seed=5)
    assert cell.run_name == "HReg_KLD_WAug/split2"
    assert cell.title == "HReg_KLD_WAug split 2 seed 5"
    assert cell.folder == Path("runs/cells") / f"HReg_KLD_WAug-split2-seed5-{cell.fingerprint[:10]}"
    assert replace(cell, role="teacher").folder.parent == Path("runs/teachers")


# --- fingerprints

INGREDIENTS: dict[str, Any] = {
    "role": "baseline",
    "notation": "L_KLD",
    "split": 1,
    "seed": 1,
    "settings": {**CELL.settings, "lr": 1e-3},
    "input_digests": {**CELL.input_digests, "user_code": "cccc"},
}


@pytest.mark.parametrize("name", INGREDIENTS)
def test_every_ingredient_changes_the_fingerprint(name: str) -> None:
    assert replace(CELL, **{name: INGREDIENTS[name]}).fingerprint != CELL.fingerprint


def test_no_ingredient_is_left_out_of_the_test_above() -> None:
    held = {"store", "sources", "variant", "teacher", "members"}  # input_digests and settings hold all but the first
    assert {*INGREDIENTS, *held} == {each.name for each in fields(CELL)}


def test_a_deep_setting_changes_the_fingerprint() -> None:
    changed = {**CELL.settings, "kd": {"weight": 0.5, "align": "none"}}
    assert replace(CELL, settings=changed).fingerprint != CELL.fingerprint


def test_the_store_changes_the_folder_and_nothing_else() -> None:
    moved = replace(CELL, store=Path("/elsewhere"))
    assert (moved.fingerprint, moved.key, moved) == (CELL.fingerprint, CELL.key, CELL)
    assert moved.folder == Path("/elsewhere/cells") / CELL.folder.name


@pytest.mark.parametrize("notation", ["../../evil", "/evil", "a/../../../evil"])
def test_no_cell_has_a_folder_out_of_its_store(notation: str) -> None:
    run = {"role": "distilled", "notation": notation, "split": 0, "seed": 0, "fingerprint": "f" * 64}
    with pytest.raises(InputError, match="is outside of the store"):
        grid.run_folder(Path("store"), run)


def test_new_input_digests_make_a_new_fingerprint_for_the_same_key() -> None:
    later = replace(CELL, input_digests={"data": "changed", "user_code": "bbbb"})
    assert later.key == CELL.key
    assert later.fingerprint != CELL.fingerprint
    assert later.folder != CELL.folder
    for change in ({"split": 1}, {"seed": 1}, {"notation": "L_KLD"}, {"settings": {}}):
        assert replace(CELL, **change).key != CELL.key


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(value=PLAIN)
def test_digest_does_not_depend_on_the_order_of_keys(value: Any) -> None:
    assert grid.digest(reordered(value)) == grid.digest(value)


@given(first=PLAIN, second=PLAIN)
def test_digest_distinguishes_different_values(first: Any, second: Any) -> None:
    if first != second:
        assert grid.digest(first) != grid.digest(second)


def test_digest_depends_on_the_order_of_a_list_and_refuses_nan() -> None:
    assert grid.digest([1, 2]) != grid.digest([2, 1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        grid.digest(float("nan"))


# --- targets


def test_targets_are_listed_at_any_depth_once_and_sorted() -> None:
    settings = {
        "path": {"_target_": "b.B", "inner": {"_target_": "a.A"}},
        "losses": [{"_target_": "c.C"}, {"_target_": "a.A"}, "d.D"],
        "name": "_target_",
    }
    assert grid.targets(settings) == ["a.A", "b.B", "c.C"]


def test_a_class_of_the_package_that_moves_is_the_same_class() -> None:
    user = {"losses": [{"_target_": "mine.mae", "x": 1.0}, 2, "kdsweep.x"], "_target_x": "kdsweep.a"}
    for module in ("kdsweep.distill.paths", "kdsweep.elsewhere"):
        node = {"path": {"_target_": f"{module}.Hidden", "inner": {"_target_": f"{module}.A"}}, **user}
        short = {"path": {"_target_": "Hidden", "inner": {"_target_": "A"}}, **user}
        assert repr(grid.without_modules(node)) == repr(short)


@given(value=PLAIN)
def test_values_and_targets_of_any_nesting_stay(value: Any) -> None:
    node = {"_target_": "x.X", "more": [value, {"_target_": "y.Y", "value": value}]}
    assert repr(grid.without_modules(node)) == repr(node)
    assert grid.targets(node) == ["x.X", "y.Y"]
