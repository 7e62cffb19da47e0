"""The architecture: imports run downwards only, and each foreign library has its one place."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import kdsweep

PACKAGE = Path(kdsweep.__file__).parent
FILES = {file.stem: file for file in sorted(PACKAGE.glob("*.py"))}

# From top to bottom: a module may import only modules further down.
LAYERS = (
    "__main__",
    "launcher",
    "announce",
    "slurm",
    "on_ray",
    "node",
    "devices",
    "worker",
    "engine",
    "group",
    "plan",
    "mirror",
    "report",
    "facts",
    "figures",
    "contours",
    "plots",
    "status",
    "submissions",
    "export",
    "predict",
    "tables",
    "costs",
    "comparisons",
    "effects",
    "footnotes",
    "formats",
    "sweeps",
    "stats",
    "teachers",
    "latency",
    "build",
    "cells",
    "user_code",
    "train",
    "scoring",
    "learner",
    "tracking",
    "database",
    "records",
    "checkpoint",
    "compute",
    "loaders",
    "metrics",
    "views",
    "run_data",
    "data",
    "phantom",
    "kd_paths",
    "losses",
    "models",
    "limits",
    "progress",
    "logs",
    "composition",
    "grid",
    "interrupts",
    "errors",
    "__init__",
)

ENGINES = {"devices", "engine", "node", "on_ray", "slurm"}
READS_CONFIG = {
    "__main__",
    "announce",
    "build",
    "cells",
    "user_code",
    "composition",
    "group",
    "launcher",
    "plan",
    "worker",
} | ENGINES
CONFINED = {"mlflow": {"tracking"}, "omegaconf": READS_CONFIG, "ray": {"on_ray"}, "submitit": {"slurm"}}


def is_entry_block(node: ast.AST) -> bool:
    """Whether it is ``if __name__ == "__main__":``, the script at a module's end."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a module, function bodies and TYPE_CHECKING blocks included, its entry script left out."""
    for child in ast.iter_child_nodes(tree):
        if not is_entry_block(child):
            yield child
            yield from nodes(child)


def imported(source: str) -> set[str]:
    """Dotted names of all modules that a module's source imports; of the package also ``from kdsweep import x``."""
    found: set[str] = set()
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"kdsweep.{alias.name}" for alias in node.names} if base == "kdsweep" else {base}
    return found


def own_imports(source: str) -> set[str]:
    """Modules of the package that a module's source imports; what is not a module lies in ``__init__``."""
    names = {name.split(".")[1] for name in imported(source) if name.startswith("kdsweep.")}
    return {name if name in FILES else "__init__" for name in names}


def read(name: str) -> str:
    return FILES[name].read_text(encoding="utf-8")


def upward(name: str, source: str) -> set[str]:
    """What a module imports from its own height or above."""
    return {other for other in own_imports(source) if LAYERS.index(other) <= LAYERS.index(name)}


def test_every_module_has_its_place_in_the_order() -> None:
    assert FILES.keys() <= set(LAYERS), "give a new module its place in LAYERS"


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name: str) -> None:
    assert upward(name, read(name)) == set()


@pytest.mark.parametrize("name", FILES)
def test_imports_of_the_package_are_absolute(name: str) -> None:
    assert not any(module.startswith(".") for module in imported(read(name)))


def test_the_walk_sees_imports_wherever_they_stand() -> None:
    assert own_imports("from kdsweep import build, data") == {"build", "data"}
    assert own_imports("import kdsweep.train as t") == {"train"}
    assert own_imports("from kdsweep import __version__") == {"__init__"}
    assert own_imports("def f():\n    from kdsweep.build import compose") == {"build"}
    assert own_imports("if TYPE_CHECKING:\n    from kdsweep.tracking import Sweep") == {"tracking"}
    assert own_imports("if __name__ == '__main__':\n    from kdsweep.build import x") == set()
    assert upward("losses", "from kdsweep import train, errors") == {"train"}


@pytest.mark.parametrize(("library", "allowed"), CONFINED.items())
def test_confined_libraries_are_imported_only_where_they_belong(library: str, allowed: set[str]) -> None:
    users = {name for name in FILES if any(module.split(".")[0] == library for module in imported(read(name)))}
    assert users <= allowed
    assert users


@pytest.mark.parametrize("name", FILES)
def test_nothing_that_runs_code_from_a_file_is_called(name: str) -> None:
    for node in ast.walk(ast.parse(read(name))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("pickle.load", "pickle.loads", "eval", "exec", "yaml.load", "joblib.load"), node.lineno
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", f"line {node.lineno}"
        if called in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle", "False") == "False", f"line {node.lineno}"


def test_torch_load_is_called_by_its_full_name() -> None:
    """Else the test above would not see it."""
    for name in FILES:
        assert not re.search(r"from (torch|pickle) import .*\bloads?\b", read(name)), name


def strings(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from strings(key)
            yield from strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)
    elif isinstance(node, str):
        yield node


@pytest.mark.parametrize(
    "file", sorted(kdsweep.conf_dir().rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}"
)
def test_configuration_files_hold_no_absolute_paths(file: Path) -> None:
    for text in strings(yaml.safe_load(file.read_text(encoding="utf-8"))):
        group_override = text.startswith("override /")  # Hydra's way of naming a group
        assert group_override or not re.search(r"(^|[\s=:])(/|~|[A-Za-z]:\\)", text), text
