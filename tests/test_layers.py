"""The architecture: which room may import which, no circles inside one, and each foreign library has its one place."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import kdsweep

PACKAGE = Path(kdsweep.__file__).parent
# By dotted name without the package: "training.build", "__main__"; a room's own file by the room's name: "training".
FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}

# What a room may import; kdsweep/__init__.py may be imported by all. One place may import only places above it.
BELOW_TRAINING = {"core", "data", "config", "models", "store", "distill", "evaluation"}
MAY_IMPORT = {
    "__init__": set(),
    "core": set(),
    "data": {"core"},
    "config": {"core", "data"},
    "models": {"core", "data", "config"},
    "store": {"core", "config"},
    "distill": {"core", "models", "data"},
    "evaluation": {"core", "data", "models", "config"},
    "tuning": {"core", "config", "store"},
    "tracking": {"core", "config", "store"},
    "training": BELOW_TRAINING,
    "results": BELOW_TRAINING | {"tracking", "tuning"},
    "export": BELOW_TRAINING | {"tracking", "results"},
    "sweep": BELOW_TRAINING | {"tracking", "training", "tuning", "results", "export"},
    "plugins": {"core", "sweep"},
    "cli": {"core", "training", "results", "export", "sweep"},
    "__main__": {"core", "config", "sweep", "cli"},
}
ROOMS = MAY_IMPORT.keys() - {"__init__", "__main__", "cli", "plugins"}

# What does not keep to it yet, by module. A line goes when its import goes.
EXCEPTIONS: dict[str, set[str]] = {}

# Rooms and modules that may import a library.
CONFINED = {
    "mlflow": {"tracking"},
    "omegaconf": {"__main__", "config", "sweep"},
    "optuna": {"tuning"},
    "ray": {"sweep.executors.ray"},
    "submitit": {"sweep.executors.slurm"},
}


def room(name: str) -> str:
    return name.partition(".")[0]


def is_entry_block(node: ast.AST) -> bool:
    """Whether it is ``if __name__ == "__main__":``, the script at a module's end."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def is_type_checking(node: ast.AST) -> bool:
    """Whether it is ``if TYPE_CHECKING:``, imports that never run."""
    return isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING"


def nodes(tree: ast.AST, *, running: bool = False) -> Iterator[ast.AST]:
    """All nodes of a module, function bodies included, its entry script left out.

    Args:
        tree: the module.
        running: leave out TYPE_CHECKING blocks too; what is under ``else`` there runs, and is still left out.
    """
    for child in ast.iter_child_nodes(tree):
        if not is_entry_block(child) and not (running and is_type_checking(child)):
            yield child
            yield from nodes(child, running=running)


def imported(source: str, *, running: bool = False) -> set[str]:
    """Dotted names of all that a module's source imports; of the package with x of ``from kdsweep.room import x``."""
    names: set[str] = set()
    for node in nodes(ast.parse(source), running=running):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            is_package = base.split(".")[0] == "kdsweep"
            names |= {f"{base}.{alias.name}" for alias in node.names} if is_package else {base}
    return names


def package_imports(source: str, *, running: bool = False) -> set[str]:
    """Modules of the package that a module's source imports; for what is no module, the one that it is taken from."""
    modules = set()
    for name in imported(source, running=running):
        if name.split(".")[0] == "kdsweep":
            module = name.removeprefix("kdsweep").removeprefix(".")
            while module and module not in FILES:
                module = module.rpartition(".")[0]
            modules.add(module or "__init__")
    return modules


def read(name: str) -> str:
    return FILES[name].read_text(encoding="utf-8")


def forbidden(name: str, source: str) -> set[str]:
    """What a module imports of rooms that its own room may not import."""
    allowed = MAY_IMPORT[room(name)] | {room(name), "__init__"}
    return {other for other in package_imports(source) if room(other) not in allowed}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle in a graph, the first node again at its end; empty if there is none."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for other in sorted(graph.get(path[-1], ())):
            if other in path:
                return [*path[path.index(other) :], other]
            path_back = search([*path, other]) if other not in done else []
            if path_back:
                return path_back
        done.add(path[-1])
        return []

    return next((path_back for name in sorted(graph) if name not in done and (path_back := search([name]))), [])


def uses(name: str, library: str) -> bool:
    return any(module.split(".")[0] == library for module in imported(read(name)))


def test_every_module_lies_in_a_room() -> None:
    assert {room(name) for name in FILES} == MAY_IMPORT.keys(), "give a new room its line in MAY_IMPORT"
    assert {name for name in FILES if "." not in name} == MAY_IMPORT.keys() - {"plugins"}
    assert [name for name in FILES if room(name) == "plugins"] == ["plugins.hydra_plugins.kdsweep_lockstep"]


def test_the_rooms_themselves_have_no_circle() -> None:
    assert circle({"data": {"core"}, "core": {"store"}, "store": {"data"}}) == ["core", "store", "data", "core"]
    assert circle(MAY_IMPORT) == []


@pytest.mark.parametrize("name", FILES)
def test_a_room_imports_only_what_it_may(name: str) -> None:
    assert forbidden(name, read(name)) == EXCEPTIONS.get(name, set())


def test_what_is_known_is_about_modules_that_are_there() -> None:
    assert EXCEPTIONS.keys() <= FILES.keys()


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_no_circle_inside_a_room(name: str) -> None:
    room_modules = [module for module in FILES if room(module) == name]
    assert (
        circle({module: package_imports(read(module), running=True) & set(room_modules) for module in room_modules})
        == []
    )


@pytest.mark.parametrize("name", FILES)
def test_imports_of_the_package_are_absolute(name: str) -> None:
    assert not any(module.startswith(".") for module in imported(read(name)))


def test_the_walk_sees_imports_wherever_they_stand() -> None:
    assert package_imports("from kdsweep.data import phantom, views") == {"data.phantom", "data.views"}
    assert package_imports("from kdsweep.data import Entry") == {"data"}
    assert package_imports("from kdsweep.data.sources import Entry") == {"data.sources"}
    assert package_imports("import kdsweep.training.loop as t") == {"training.loop"}
    assert package_imports("from kdsweep import __version__") == package_imports("import kdsweep") == {"__init__"}
    assert package_imports("from kdsweep.sweep.executors import slurm") == {"sweep.executors.slurm"}
    assert package_imports("def f():\n    from kdsweep.training.build import feed") == {"training.build"}
    checked = "if TYPE_CHECKING:\n    from kdsweep.tracking.mirror import Sweep"
    assert package_imports(checked) == {"tracking.mirror"}
    assert package_imports(checked, running=True) == set()
    assert package_imports("if __name__ == '__main__':\n    from kdsweep.training.build import x") == set()
    source = "from kdsweep.training import loop\nfrom kdsweep.models import unet\nfrom kdsweep import conf_dir"
    assert forbidden("distill.losses", source) == {"training.loop"}


@pytest.mark.parametrize(("library", "allowed"), CONFINED.items())
def test_confined_libraries_are_imported_only_where_they_belong(library: str, allowed: set[str]) -> None:
    users = {name for name in FILES if uses(name, library)}
    assert {name for name in users if not {name, room(name)} & allowed} == set()
    assert users


def test_importing_a_room_is_quick() -> None:
    """A room's own file loads neither torch nor mlflow."""
    names = [f"kdsweep.{name}" for name, file in FILES.items() if file.name == "__init__.py" and name != "__init__"]
    assert {room(name.removeprefix("kdsweep.")) for name in names} == ROOMS
    code = f"import sys, {', '.join(names)}; print(sorted({{'torch', 'mlflow'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_addresses_that_others_know_stay() -> None:
    """Configurations of old runs name them, and users' own code."""
    from kdsweep import data, distill
    from kdsweep.distill import paths

    assert all(getattr(data, name) is getattr(data.sources, name) for name in data.__all__)
    assert {"Busi", "Entry", "Folder", "Phantoms", "Source", "Udiat"} == set(data.__all__)
    assert distill.KDPath is paths.KDPath
    with pytest.raises(AttributeError):
        distill.other  # noqa: B018


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
