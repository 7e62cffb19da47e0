"""conf/ is found however the package is started, and the wheel carries what it needs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kdsweep

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def composed(command: list[str], *, cwd: Path, path: str | None = None) -> tuple[str, str]:
    """The searched configuration folder and the composed value of image_size."""
    env = {**os.environ, **({"PYTHONPATH": path} if path else {})}
    run = {"cwd": cwd, "env": env, "capture_output": True, "text": True, "timeout": 120, "check": True}
    searched = subprocess.run([*command, "--info", "searchpath"], **run).stdout
    (line,) = [line for line in searched.splitlines() if "main" in line and "file://" in line]
    job = subprocess.run([*command, "profile=quick", "--cfg", "job"], **run).stdout
    (size,) = [line for line in job.splitlines() if line.startswith("image_size")]
    return line.split("file://")[1].split()[0].rstrip("|"), size


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel built from the checkout, and a folder that it is installed into."""
    out, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(ROOT)], check=True)
    (file,) = out.glob("kdsweep-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(site), str(file)], check=True)
    return file, site


def test_from_the_checkout():
    folder, size = composed([sys.executable, "-m", "kdsweep"], cwd=ROOT)
    assert Path(folder) == ROOT / "conf"
    assert size == "image_size: 64"


def test_from_another_working_directory(tmp_path):
    folder, size = composed([sys.executable, "-m", "kdsweep"], cwd=tmp_path)
    assert Path(folder) == ROOT / "conf"
    assert size == "image_size: 64"


def test_from_an_installed_wheel(wheel, tmp_path):
    _, site = wheel
    folder, size = composed([sys.executable, "-m", "kdsweep"], cwd=tmp_path, path=str(site))
    assert Path(folder) == site / "kdsweep" / "conf"
    assert size == "image_size: 64"


def test_through_the_console_script_of_the_wheel(wheel, tmp_path):
    _, site = wheel
    folder, size = composed([str(site / "bin" / "kdsweep")], cwd=tmp_path, path=str(site))
    assert Path(folder) == site / "kdsweep" / "conf"
    assert size == "image_size: 64"


def test_through_the_console_script_of_the_environment(tmp_path):
    folder, size = composed([str(Path(sys.executable).with_name("kdsweep"))], cwd=tmp_path)
    assert Path(folder) == ROOT / "conf"
    assert size == "image_size: 64"


def test_the_wheel_holds_all_configuration_and_no_image(wheel):
    names = zipfile.ZipFile(wheel[0]).namelist()
    conf = {f"kdsweep/conf/{file.relative_to(ROOT / 'conf')}" for file in (ROOT / "conf").rglob("*.yaml")}
    assert conf <= set(names)
    assert not [name for name in names if name.endswith((".png", ".pt", ".safetensors", ".db"))]
    assert not [name for name in names if name.startswith("tests/")]


def test_the_wheel_shows_its_launcher_to_hydra_and_hides_nobody_elses(wheel, tmp_path):
    file, site = wheel
    names = zipfile.ZipFile(file).namelist()
    plugins = [name for name in names if "plugins" in name and not name.startswith("kdsweep-")]
    assert plugins == ["hydra_plugins/kdsweep_lockstep.py"]
    command = [sys.executable, "-m", "kdsweep", "--cfg", "hydra", "--package", "hydra.launcher"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert "_target_: hydra_plugins.kdsweep_lockstep.LockstepLauncher" in done.stdout


def test_a_sweep_through_the_console_script(wheel, small_busi, tmp_path):
    """Its processes have to import a main module that is not a package's."""
    overrides = ["profile=quick", "train.epochs=1", "train.batch_size=8", "data=busi", f"data.root={small_busi}"]
    command = [str(wheel[1] / "bin" / "kdsweep"), "-m", "path=none", "seed=0,1", *overrides]
    env = {**os.environ, "PYTHONPATH": str(wheel[1])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 cells: 2 to run, 0 finished; 2 lockstep groups, 0 shared Teachers, 0 Teachers to train" in done.stdout
    assert len(list(tmp_path.glob("multirun/cells/*/finished.json"))) == 2


def test_models_command_prints_both_networks(tmp_path):
    command = [sys.executable, "-m", "kdsweep", "models"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    for part in ("95,755,409", "820,385", "2048 x 7 x 7", "96 x 7 x 7", "20.47 G"):
        assert part in done.stdout


def test_help_shows_the_words_and_hydras_page_the_configuration(tmp_path):
    def run(*words):
        command = [sys.executable, "-m", "kdsweep", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    words = run("--help")
    for word in ("status", "tables", "figures", "report", "predict", "export", "models"):
        assert f"\n  {word} " in words
    assert "`python -m kdsweep -m --help` lists" in " ".join(words.split())
    assert "== Configuration groups ==" in run("-m", "--help")
    assert run("--version") == f"kdsweep, version {kdsweep.__version__}\n"


def test_a_shell_completes_words_and_options(tmp_path):
    def complete(*words, **environment):
        command = [sys.executable, "-m", "kdsweep", *words]
        env = {**os.environ, **environment}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False).stdout

    assert "complete -o nosort -F _kdsweep_completion kdsweep" in complete(_KDSWEEP_COMPLETE="bash_source")
    for words, number, expected in (("kdsweep ta", "1", "tables"), ("kdsweep tables --publ", "2", "--published")):
        done = complete(_KDSWEEP_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=number)
        assert done == f"plain,{expected}\n"


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("tabels", "do you mean tables?"),
        ("train", "it must be one of status, tables, figures, report, predict, export"),
    ],
)
def test_a_word_that_is_none_is_told_in_one_line(tmp_path, word, remedy):
    command = [sys.executable, "-m", "kdsweep", word]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"kdsweep: error: {word} is not a word of this command; {remedy}")
    assert done.stderr.count("\n") == 1


def test_help_is_quick_because_torch_is_not_imported(tmp_path):
    code = "import sys, kdsweep.__main__; print(sorted({'torch', 'mlflow', 'pandas', 'hydra'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
