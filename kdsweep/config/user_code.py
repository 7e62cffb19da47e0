"""A user's own code: the digest of what a configuration names, and the one form of the numbers that it is passed.

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
EXACT = 2.0**53  # whole numbers below it are equal as int and float


def user_code_digest(targets: list[str]) -> str:
    """Return the digest of a user's code, or "" if all targets lie in this package.

    A changed helper counts as much as a changed loss. Comments, docstrings and layout do not count, nor do installed
    packages. A module that is imported by a computed name (``importlib.import_module``) is not seen.

    Args:
        targets: dotted names of functions and classes, as ``_target_`` gives them.

    Raises:
        InputError: a target's module is not found, or is not Python that can be read.
    """
    own = [target for target in targets if target.partition(".")[0] != PACKAGE]
    digests: dict[str, str] = {}
    waiting = [name for target in own for name in _target_modules(target)]
    while waiting:
        name = waiting.pop()
        if name in digests or (file := _user_file(name)) is None:
            continue
        digests[name], imported = _read(name, file, file.stat().st_mtime_ns)
        waiting += imported
    return digest(digests) if digests else ""


def _target_modules(target: str) -> list[str]:
    """The module of a target with the packages that it lies in."""
    parts = target.split(".")
    if len(parts) == 1:
        raise InputError(
            f"_target_={target} is not allowed: it must be a function or class with its module, {target}.NAME"
        )
    for count in range(len(parts) - 1, 0, -1):
        if _find_spec(".".join(parts[:count])) is not None:
            return [".".join(parts[:end]) for end in range(1, count + 1)]
    raise InputError(f"_target_={target}: there is no module {parts[0]}; start the command in its folder")


@cache
def _find_spec(name: str) -> ModuleSpec | None:
    """Find a module without importing the packages that it lies in, which may take seconds or do something."""
    parent, _, _ = name.rpartition(".")
    if not parent:
        try:
            return importlib.util.find_spec(name)
        except ValueError:  # such as __main__, which has no spec
            return None
    package = _find_spec(parent)
    if package is None or package.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(name, list(package.submodule_search_locations))


def _user_file(name: str) -> Path | None:
    """The file of a module, or None for Python's own modules, installed packages and this package."""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names and (shadowed := _shadowed(top)) is not None:
        raise InputError(
            f"{shadowed}: {top} is the name of a module of Python, which is taken instead; rename the file"
        )
    spec = None if top in sys.stdlib_module_names or top == PACKAGE else _find_spec(name)
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    file = Path(spec.origin)
    return None if INSTALLED & set(file.parts) else file


@cache
def _shadowed(top: str) -> str | None:
    """The user's file that has the name of a module of Python."""
    python = sysconfig.get_path("stdlib")
    folders = [Path(folder) for folder in ["", *sys.path]]
    users = [str(each) for each in folders if not each.is_relative_to(python) and not INSTALLED & set(each.parts)]
    spec = PathFinder.find_spec(top, users)
    return spec.origin if spec is not None and spec.has_location else None


@cache
def _read(name: str, file: Path, _: int) -> tuple[str, list[str]]:
    """Digest of a module's source, and the names of the modules that it may import; a compiled one imports nothing."""
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
    """Return nested values of a user's own keys with each number in one form, so that equal numbers are equal text.

    A number is a float where the function or class that it is passed to declares one. Elsewhere a float without a
    fraction is the whole number: 4.0 is 4.

    Args:
        value: dicts, lists and plain values; ``_target_`` in a dict names what takes the others.
        is_float: whether a number is declared as float.
    """
    if isinstance(value, dict):
        target = value.get("_target_")
        floats = float_arguments(target) if isinstance(target, str) else ()
        return {key: canonical(inner, is_float=key in floats) for key, inner in value.items()}
    if isinstance(value, list):
        return [canonical(inner, is_float=is_float) for inner in value]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < EXACT:
        return value
    if is_float:
        return float(value)
    return int(value) if value == int(value) else value


def float_arguments(target: str) -> frozenset[str]:
    """Return the arguments that a function or class declares as float, by annotation or by default.

    The source is read, not imported: that of a loss imports torch. What a module imports from elsewhere declares none.

    Args:
        target: its dotted name.
    """
    module, _, name = target.rpartition(".")
    spec = _find_spec(module) if module else None
    if spec is None or not spec.has_location or not str(spec.origin).endswith(".py"):
        return frozenset()
    file = Path(str(spec.origin))
    return _declared_floats(file, file.stat().st_mtime_ns).get(name, frozenset())


@cache
def _declared_floats(file: Path, _: int) -> dict[str, frozenset[str]]:
    """Arguments declared as float, by the name of a module's function or class; none if it is not Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # user_code_digest names the file
        return {}
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: frozenset(_floats(node)) for node in tree.body if isinstance(node, kinds)}


def _floats(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    if isinstance(node, ast.ClassDef):  # its constructor's arguments, or the fields of a dataclass
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                yield from _floats(part)
            elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                yield from [part.target.id] if _is_float(part.annotation, part.value) else []
        return
    positional = [*node.args.posonlyargs, *node.args.args]
    defaults = [*[None] * (len(positional) - len(node.args.defaults)), *node.args.defaults]
    arguments = zip([*positional, *node.args.kwonlyargs], [*defaults, *node.args.kw_defaults], strict=True)
    yield from (argument.arg for argument, default in arguments if _is_float(argument.annotation, default))


def _is_float(annotation: ast.expr | None, default: ast.expr | None) -> bool:
    names = {inner.id for inner in ast.walk(annotation) if isinstance(inner, ast.Name)} if annotation else set()
    return "float" in names or (isinstance(default, ast.Constant) and isinstance(default.value, float))


def _imports(tree: ast.Module, *, package: str) -> Iterator[str]:
    """Names of all modules that may be imported: ``from a import b`` may mean the module a.b."""
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
        return [bare(each) for each in node if not _is_text(each)]
    return None if node is None else repr(node)


def _is_text(node: Any) -> bool:
    """Return whether a node is a statement that is a string alone."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
