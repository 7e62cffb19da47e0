"""Names are words of the field: none of those that do not say what a value is."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("kdsweep", "tests", "benchmarks", "docs")
# Parts of names, between underscores, and why a reader stops at each.
WORDS = {
    "own": "whose? name the value, such as settings or device",
    "told": "by whom? a message, a line, a setting",
    "asked": "a cell is requested",
    "wanted": "an expected value, or a requested cell",
    "taught": "a distilled Student, or the Teacher's outputs",
    "theirs": "name the other side: Teacher, reference",
    "evidence": "digests of inputs",
    "torn": "a group in several parts",
    "book": "a workbook, a file of a sweep",
    "whole": "complete",
    "known": "name the value that was there before: recorded, existing, earlier",
    "found": "name the value that was looked for: rows, files, a score",
    "given": "an argument, a setting",
}


def bound_names(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of all that a module binds: functions, classes, arguments, variables, attributes, aliases."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case (
                ast.FunctionDef(name=str(name))
                | ast.AsyncFunctionDef(name=str(name))
                | ast.ClassDef(name=str(name))
                | ast.ExceptHandler(name=str(name))
                | ast.alias(asname=str(name))
                | ast.arg(arg=str(name))
                | ast.Name(id=str(name), ctx=ast.Store())
                | ast.Attribute(attr=str(name), ctx=ast.Store())
            ):
                yield node.lineno, name


def bad_names(source: str) -> list[str]:
    """Line and name of all that is bound, but for functions of tests: their names are sentences."""
    names = [(line, name) for line, name in bound_names(source) if not name.startswith("test_")]
    return [f"line {line}: {name}" for line, name in names if WORDS.keys() & set(name.lower().split("_"))]


def test_every_way_to_bind_a_name_is_seen_and_library_names_are_not() -> None:
    bound = """
def found(own, *, given=1): pass
class Book: pass
told: int = 1
self.whole_path = known = 2
for wanted in []: pass
with x as taught, y as theirs: pass
lambda evidence: 0
[0 for asked in []]
import os as torn
def test_a_sentence_that_is_told(asked_for): pass
"""
    names = "found own given Book told whole_path known wanted taught theirs evidence asked torn asked_for"
    assert {line.rpartition(" ")[2] for line in bad_names(bound)} == set(names.split())
    assert bad_names("study.tell(trial)\nparser.parse_known_args()\nunknown = shown = 1") == []


def test_no_name_is_one_of_these_words() -> None:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 250
    sources = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}
    bad = {name: lines for name, source in sources.items() if (lines := bad_names(source))}
    assert not bad, f"name each after what it holds; why: {WORDS}"
