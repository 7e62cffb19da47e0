"""Names, fingerprints and code digests: equal where results are equal, different where they may differ."""

import ast
import importlib
import itertools
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsweep import cells, grid
from kdsweep.grid import Cell

CELL = Cell(
    role="cell",
    notation="L_MSE",
    split=0,
    seed=0,
    settings={"lr": 1e-4, "kd": {"weight": 0.5, "align": "warp"}, "sizes": [256, 128]},
    evidence={"data": "aaaa", "code": "bbbb"},
    store=Path("runs"),
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


# --- names


def test_the_twelve_notations_are_those_of_the_papers_table_3() -> None:
    made = [
        grid.notation(path=path, loss=loss, distill_view=view)
        for path, loss, view in itertools.product(("L", "H", "HReg"), ("MSE", "KLD"), ("strong", "weak"))
    ]
    assert made == [
        *("L_MSE", "L_MSE_WAug", "L_KLD", "L_KLD_WAug"),
        *("H_MSE", "H_MSE_WAug", "H_KLD", "H_KLD_WAug"),
        *("HReg_MSE", "HReg_MSE_WAug", "HReg_KLD", "HReg_KLD_WAug"),
    ]


def test_a_teacher_is_named_after_the_view_it_is_trained_with() -> None:
    assert (grid.teacher_notation("strong"), grid.teacher_notation("weak")) == ("Teacher", "Teacher_WAug")


def test_run_name_title_and_folder_name_the_cell() -> None:
    cell = replace(CELL, notation="HReg_KLD_WAug", split=2, seed=5)
    assert cell.run_name == "HReg_KLD_WAug/split2"
    assert cell.title == "HReg_KLD_WAug split 2 seed 5"
    assert cell.folder == Path("runs/cells") / f"HReg_KLD_WAug-split2-seed5-{cell.fingerprint[:10]}"
    assert replace(cell, role="teacher").folder.parent == Path("runs/teachers")


# --- fingerprints

INGREDIENTS: dict[str, Any] = {
    "role": "student",
    "notation": "L_KLD",
    "split": 1,
    "seed": 1,
    "settings": {**CELL.settings, "lr": 1e-3},
    "evidence": {**CELL.evidence, "code": "cccc"},
}


@pytest.mark.parametrize("name", INGREDIENTS)
def test_every_ingredient_changes_the_fingerprint(name: str) -> None:
    assert replace(CELL, **{name: INGREDIENTS[name]}).fingerprint != CELL.fingerprint


def test_no_ingredient_is_left_out_of_the_test_above() -> None:
    held = {"store", "code", "variant", "teacher"}  # evidence and settings hold all but the first
    assert {*INGREDIENTS, *held} == {own.name for own in fields(CELL)}


def test_a_deep_setting_changes_the_fingerprint() -> None:
    changed = {**CELL.settings, "kd": {"weight": 0.5, "align": "none"}}
    assert replace(CELL, settings=changed).fingerprint != CELL.fingerprint


def test_the_store_changes_the_folder_and_nothing_else() -> None:
    moved = replace(CELL, store=Path("/elsewhere"))
    assert (moved.fingerprint, moved.place, moved) == (CELL.fingerprint, CELL.place, CELL)
    assert moved.folder == Path("/elsewhere/cells") / CELL.folder.name


def test_new_evidence_makes_a_new_fingerprint_for_the_same_place() -> None:
    later = replace(CELL, evidence={"data": "aaaa", "code": "changed"})
    assert later.place == CELL.place
    assert later.fingerprint != CELL.fingerprint
    assert later.folder != CELL.folder
    for change in ({"split": 1}, {"seed": 1}, {"notation": "L_KLD"}, {"settings": {}}):
        assert replace(CELL, **change).place != CELL.place


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(value=PLAIN)
def test_digest_does_not_depend_on_the_order_of_keys(value: Any) -> None:
    assert grid.digest(reordered(value)) == grid.digest(value)


@given(first=PLAIN, second=PLAIN)
def test_digest_tells_different_values_apart(first: Any, second: Any) -> None:
    if first != second:
        assert grid.digest(first) != grid.digest(second)


def test_digest_depends_on_the_order_of_a_list_and_refuses_what_is_not_a_number() -> None:
    assert grid.digest([1, 2]) != grid.digest([2, 1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        grid.digest(float("nan"))


# --- targets


def test_targets_are_found_at_any_depth_once_and_sorted() -> None:
    settings = {
        "path": {"_target_": "b.B", "inner": {"_target_": "a.A"}},
        "losses": [{"_target_": "c.C"}, {"_target_": "a.A"}, "d.D"],
        "name": "_target_",
    }
    assert grid.targets(settings) == ["a.A", "b.B", "c.C"]


@given(value=PLAIN)
def test_targets_of_any_nesting_are_those_put_in(value: Any) -> None:
    assert grid.targets({"_target_": "x.X", "more": [value, {"_target_": "y.Y", "value": value}]}) == ["x.X", "y.Y"]


# --- digests of code

MODULE = """
import math

RATE, SHARE = 0.1, 0.2
LIMIT: int = 3
UNRELATED = 1


def helper(x):
    return min(x, LIMIT) * SHARE


class Base:
    def value(self):
        return helper(1)


class Result(Base):
    def total(self):
        return self.value() + RATE


def unrelated():
    return math.pi
"""


@pytest.fixture
def digest_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Digest of ``Result`` in a module of the given source."""
    file = tmp_path / "kdsweep_test_module.py"
    monkeypatch.syspath_prepend(tmp_path)

    def digest(source: str, name: str = "Result") -> str:
        file.write_text(source, encoding="utf-8")
        importlib.invalidate_caches()
        grid._tree.cache_clear()
        grid._object_digest.cache_clear()
        return grid.code_digest([f"{file.stem}.{name}"])

    yield digest
    grid._tree.cache_clear()
    grid._object_digest.cache_clear()


def test_comments_docstrings_and_layout_do_not_count(digest_of: Callable[[str], str]) -> None:
    dressed = (
        MODULE.replace("import math", '"""What this is."""\n\nimport math')
        .replace("def helper(x):\n", 'def helper(\n    x,\n):\n    """Limit x."""\n    # and scale it\n')
        .replace("class Base:\n", 'class Base:\n    """The base.\n\n    Of all.\n    """\n\n')
        .replace("def unrelated", "# beside it\n\ndef unrelated")
    )
    assert dressed != MODULE
    assert digest_of(dressed) == digest_of(MODULE)
    redressed = dressed.replace("Limit x.", "Another text.")
    assert digest_of(redressed) == digest_of(MODULE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.value() +", "self.value() -"),  # the class itself
        ("helper(1)", "helper(2)"),  # its base
        ("min(x, LIMIT)", "max(x, LIMIT)"),  # a function that the base calls
        ("LIMIT: int = 3", "LIMIT: int = 4"),  # constants in each way of writing them
        ("RATE, SHARE = 0.1", "RATE, SHARE = 0.3"),
        ("def helper(x):", "def helper(x, y=1):"),
        ("class Result(Base):", "class Result(Base, object):"),
    ],
)
def test_whatever_the_object_reaches_counts(digest_of: Callable[[str], str], old: str, new: str) -> None:
    assert old in MODULE
    assert digest_of(MODULE.replace(old, new)) != digest_of(MODULE)


def test_what_stands_beside_the_object_does_not_count(digest_of: Callable[[str], str]) -> None:
    before = digest_of(MODULE)
    assert digest_of(MODULE + "\n\ndef added():\n    return helper(7)\n") == before
    assert digest_of(MODULE.replace("math.pi", "math.e").replace("UNRELATED = 1", "UNRELATED = 2")) == before
    assert digest_of(MODULE.replace("import math", "import math\nimport os")) == before


def test_mutual_recursion_ends(digest_of: Callable[[str], str]) -> None:
    source = "def even(n):\n    return n == 0 or odd(n - 1)\n\ndef odd(n):\n    return n != 0 and even(n - 1)\n"
    assert digest_of(source, "even") != digest_of(source.replace("n != 0", "n > 0"), "even")


def test_compiled_code_without_source_counts_by_its_name() -> None:
    assert grid.code_digest(["math.sin"]) != grid.code_digest(["math.cos"])


@pytest.mark.parametrize("name", cells.RESULT_CODE)
def test_every_name_of_the_result_code_exists_and_is_defined_where_it_says(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)
    assert any(attribute in grid._names(node) for node in grid._tree(module).body), f"{module} only imports {attribute}"


def test_the_result_code_names_nothing_twice() -> None:
    assert len(set(cells.RESULT_CODE)) == len(cells.RESULT_CODE)


# What the result code uses of other modules without its result depending on it: files, messages, refusals, containers,
# readers of the configuration, and the phantoms' generator, whose images are in the data's digest.
NO_RESULT = (
    *(
        "kdsweep.cells.",
        "kdsweep.checkpoint.",
        "kdsweep.errors.",
        "kdsweep.interrupts.",
        "kdsweep.limits.",
        "kdsweep.logs.",
        "kdsweep.progress.",
        "kdsweep.phantom.cohort",
        "kdsweep.records.",
    ),
    *(
        "kdsweep.compute.is_out_of_memory",
        "kdsweep.data.check_training_masks",
        "kdsweep.grid.Cell",
        "kdsweep.grid.code_digest",
        "kdsweep.loaders.Feed",
        "kdsweep.metrics.SCORES",
    ),
)


def used(name: str) -> tuple[set[str], set[str]]:
    """Names that an object reaches within its module, and those of other kdsweep modules that it uses directly."""
    module, _, attribute = name.rpartition(".")
    tree = grid._tree(module)
    defined = {key: node for node in tree.body for key in grid._names(node)}
    origin = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdsweep")
        for alias in node.names
    }
    inside: set[str] = set()
    outside: set[str] = set()
    waiting = [attribute]
    while waiting:
        key = waiting.pop()
        if key in inside or key not in defined:
            continue
        inside.add(key)
        for node in ast.walk(defined[key]):
            if isinstance(node, ast.Name):
                waiting.append(node.id)
                outside |= {origin[node.id]} if node.id in origin else set()
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in origin:
                outside.add(f"{origin[node.value.id]}.{node.attr}")
    return {f"{module}.{key}" for key in inside}, {name for name in outside if name.count(".") > 1}


def test_the_result_code_names_all_that_it_uses_of_other_modules() -> None:
    """Else a change there would leave old results standing as if they were those of the new code."""
    configured = [grid.targets(cells.plain(cells.compose([f"path={path}"]))) for path in ("L", "H", "HR")]
    pairs = [used(name) for name in {*cells.RESULT_CODE, *itertools.chain(*configured)}]
    covered = set().union(*(inside for inside, _ in pairs))
    outside = set().union(*(outside for _, outside in pairs))
    assert "kdsweep.losses.cross_entropy" in outside  # the walk sees what it should
    assert sorted(name for name in outside - covered if not name.startswith(NO_RESULT)) == []
