"""A user's code: the digest of all that a configuration names, and the one form of the numbers that it takes.

Pure Python, no torch: a sweep is planned before torch is imported. Equal source gives an equal digest on Python 3.11,
3.12 and 3.13.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from kdsweep.config.grid import PACKAGE, digest
from kdsweep.core.errors import InputError

INSTALLED = {"site-packages", "dist-packages"}
PYTHON = sysconfig.get_path("stdlib")
EXACT = 2.0**53  # whole numbers below it are equal as int and float
FLOATS = ("temperature", "power")  # numbers of shipped losses, as all fingerprints hold them


def user_code_digest(targets: list[str]) -> str:
    """Return the digest of a user's code, or "" if all targets are in this package.

    A changed helper counts as much as a changed loss. Comments, docstrings and layout do not count, nor do installed
    packages. A module that is imported by a computed name (``importlib.import_module``) is not seen. ``targets`` are
    dotted names of functions and classes, as ``_target_`` gives them.

    Raises:
        InputError: the module of a target does not exist, or is not Python that can be read.
    """
    names = [name for target in targets if not target.startswith(f"{PACKAGE}.") for name in _target_modules(target)]
    digests: dict[str, str] = {}
    while names:
        name = names.pop()
        if name not in digests and (file := _user_file(name)) is not None:
            digests[name], imported = _read(name, file, file.stat().st_mtime_ns)
            names += imported
    return digest(digests) if digests else ""


def _target_modules(target: str) -> list[str]:
    """Return the module of a target and the packages that it is in."""
    parts = target.split(".")
    if len(parts) == 1:
        rule = f"a function or class with its module, {target}.NAME"
        raise InputError(f"_target_={target} is not allowed: it must be {rule}")
    for count in range(len(parts) - 1, 0, -1):
        if _find_spec(".".join(parts[:count])) is not None:
            return [".".join(parts[:end]) for end in range(1, count + 1)]
    raise InputError(f"_target_={target}: there is no module {parts[0]}; start the command in its folder")


@cache
def _find_spec(name: str) -> ModuleSpec | None:
    """Find a module without importing the packages that it is in, which may take seconds or have effects."""
    parent = name.rpartition(".")[0]
    if not parent:
        try:
            return importlib.util.find_spec(name)
        except ValueError:  # such as __main__, which has no spec
            return None
    package = _find_spec(parent)
    if package is None or package.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(name, list(package.submodule_search_locations))


@cache
def _user_file(name: str) -> Path | None:
    """Return the file of a module, or None for modules of Python, installed packages and this package."""
    top = name.partition(".")[0]
    is_python = top in sys.stdlib_module_names
    spec = PathFinder.find_spec(top) if is_python else None if top == PACKAGE else _find_spec(name)
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    file = Path(spec.origin)
    if INSTALLED & set(file.parts) or file.is_relative_to(PYTHON):
        return None
    if is_python:
        raise InputError(f"{file}: {top} is the name of a module of Python, which Python may take; rename the file")
    return file


@cache
def _read(name: str, file: Path, _: int) -> tuple[str, list[str]]:
    """Return the digest of a module and the modules that it may import; a compiled one imports nothing."""
    if file.suffix != ".py":
        return hashlib.sha256(file.read_bytes()).hexdigest(), []
    try:
        tree = ast.parse(file.read_bytes())
        code = digest(bare(tree))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as Python: {' '.join(str(error).split())}") from error
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    return code, list(_imports(tree, package=package))


def canonical(value: Any, *, is_float: bool = False) -> Any:
    """Return nested values with each number in one form: a float without a fraction is the whole number, 4.0 is 4.

    With ``is_float`` a whole number is a float instead, as in FLOATS.
    """
    if isinstance(value, dict):
        is_shipped = str(value.get("_target_")).startswith(f"{PACKAGE}.")
        return {key: canonical(inner, is_float=is_shipped and key in FLOATS) for key, inner in value.items()}
    if isinstance(value, list):
        return [canonical(inner) for inner in value]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < EXACT or value % 1:
        return value
    return float(value) if is_float else int(value)


def _imports(tree: ast.Module, *, package: str) -> Iterator[str]:
    """Yield all modules that may be imported: ``from a import b`` may mean the module a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def bare(node: Any) -> Any:
    """Return a syntax tree as nested lists, without docstrings: equal on each Python version for equal code.

    A statement that is a string alone is a docstring or does nothing. Fields without a value are left out: Python adds
    such fields from version to version, and 3.12 an empty text to an f-string's width.
    """
    if isinstance(node, ast.AST):
        fields = {name: bare(value) for name, value in ast.iter_fields(node)}
        if isinstance(node, ast.JoinedStr):
            fields["values"] = [value for value in fields["values"] if value != ["Constant", {"value": "''"}]]
        return [type(node).__name__, {name: value for name, value in fields.items() if value not in (None, [])}]
    if isinstance(node, list):
        statements = [each for each in node if not (isinstance(each, ast.Expr) and _is_text(each.value))]
        return [bare(each) for each in statements]
    return None if node is None else repr(node)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
