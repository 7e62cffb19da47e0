"""The digest of a user's code: what is reached counts, how it is written does not, on each Python version."""

import ast
import importlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kdsweep.config import user_code
from kdsweep.core.errors import InputError

FILES = {
    "own_losses.py": "import math\n\nfrom own_helpers import scale\n\n\ndef mae(x):\n    return scale(x) * math.pi\n",
    "own_helpers.py": "FACTOR = 1\n\n\ndef scale(x):\n    return FACTOR * x\n",
    "own_paths.py": "import own_base\n\n\nclass Attention(own_base.Energy):\n    power = 2\n",
    "own_base.py": "class Energy:\n    power = 1\n",
    "own_package/__init__.py": "WEIGHT = 1\n",
    "own_package/losses.py": "from . import tools\nfrom .sub.deep import depth\n\nloss = lambda: tools.a + depth\n",
    "own_package/tools.py": "a = 1\n",
    "own_package/sub/__init__.py": "",
    "own_package/sub/deep.py": "from ..late import late\n\ndepth = late\n",
    "own_package/late.py": "late = 1\n",
    "unrelated.py": "a = 1\n",
}

# Everything that a Python version has tokenized or unparsed in another way than the one before.
SOURCE = '''
"""Module."""
import functools  # comment


def shown(x, *, width=3):
    """Docstring with # no comment."""
    text = f"{x!r:>{width}} {{literal}} {'inner'}" f'{x}'  # comment
    more = f"""
    over {x}
      lines # no comment
    """
    return text + more + rb"\\d".decode() + "# no comment"


class Empty(Exception):
    """Only a docstring."""


@functools.cache
async def later(x: int | None = None) -> dict[str, int]:
    if (y := x) and x is not None: return {"a": y}
    return {}
'''


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Digest of a target with some of FILES changed."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(target: str, **changed: str) -> str:
        for name, source in FILES.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(changed.get(file.stem, source), encoding="utf-8")
        importlib.invalidate_caches()
        for cached in (user_code._find_spec, user_code._user_file, user_code._read):
            cached.cache_clear()
        return user_code.user_code_digest([target])

    return make


def test_the_packages_code_has_no_digest() -> None:
    assert user_code.user_code_digest(["kdsweep.distill.losses.mse", "kdsweep.distill.paths.Logits"]) == ""


@pytest.mark.parametrize(
    ("target", "file", "old", "new"),
    [
        ("own_losses.mae", "own_losses", "math.pi", "math.e"),
        ("own_losses.mae", "own_helpers", "FACTOR = 1", "FACTOR = 1000"),  # a helper in another module
        ("own_paths.Attention", "own_base", "power = 1", "power = 3"),  # the class that a path inherits
        ("own_package.losses.loss", "__init__", "WEIGHT = 1", "WEIGHT = 2"),  # a package runs its code
        ("own_package.losses.loss", "tools", "a = 1", "a = 2"),  # a relative import
        ("own_package.losses.loss", "deep", "depth = late", "depth = -late"),
        ("own_package.losses.loss", "late", "late = 1", "late = 2"),  # a relative import from the package above
    ],
)
def test_all_that_is_imported_counts(digest: Callable[..., str], target: str, file: str, old: str, new: str) -> None:
    (source,) = [source for name, source in FILES.items() if Path(name).stem == file and old in source]
    assert digest(target, **{file: source.replace(old, new)}) != digest(target)


def test_comments_docstrings_layout_and_modules_next_to_it_do_not_count(digest: Callable[..., str]) -> None:
    before = digest("own_losses.mae")
    dressed = FILES["own_losses.py"].replace("def mae(x):\n", 'def mae(\n    x\n):\n    """Text."""\n    # why\n\n')
    assert digest("own_losses.mae", own_losses=f'"""What it is."""\n{dressed}', unrelated="a = 2\n") == before


@pytest.mark.parametrize("target", ["no_such_module.mae", "own_missing.loss"])
def test_a_target_without_a_module_is_named_in_one_line(target: str) -> None:
    with pytest.raises(InputError, match=rf"^_target_={target}: there is no module {target.partition('.')[0]}; start"):
        user_code.user_code_digest([target])


def test_a_file_that_is_no_python_is_named(digest: Callable[..., str]) -> None:
    with pytest.raises(InputError, match=r"own_helpers\.py: not readable as Python: "):
        digest("own_losses.mae", own_helpers="def (:\n")


RECORDED = "f63fabaae63670d662d8433e5d8153649c818c9e299a84b273588d516641622c"


def test_the_bare_source_is_the_recorded_one() -> None:
    bare = user_code.bare(ast.parse(SOURCE))
    assert not any(text in str(bare) for text in ("Docstring", "Module.", "  # comment"))
    assert "lines # no comment" in str(bare)
    assert user_code.digest(bare) == RECORDED


@pytest.mark.parametrize("python", ["python3.11", "python3.12", "python3.13", "python3.14"])
def test_each_python_gives_the_recorded_digest(python: str, tmp_path: Path) -> None:
    """The modules of the digest import nothing but the standard library, so any Python can run them."""
    executable = shutil.which(python)
    if executable is None or subprocess.run([executable, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} is not on this machine")
    (tmp_path / "source.txt").write_text(SOURCE, encoding="utf-8")
    package = Path(user_code.__file__).parent.parent.parent
    code = (
        "import sys; import ast; from pathlib import Path; from kdsweep.config import user_code as u; "
        "print(u.digest(u.bare(ast.parse(Path(sys.argv[1]).read_bytes()))))"
    )
    command = [executable, "-B", "-c", code, str(tmp_path / "source.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=package)
    assert done.stdout.strip() == RECORDED
