"""What a command says and no cell uses: keys without effect are named, a grid that would be dropped is refused."""

import itertools
import logging
from pathlib import Path

import pytest
from commands import kdsweep
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from kdsweep.config import composition
from kdsweep.core.errors import InputError
from kdsweep.sweep import launcher, plan, typed


@pytest.fixture
def command(small_busi: Path, tmp_path: Path):
    """Jobs of one command line, which Hydra tells each job with its own overrides."""

    def make(*words: str, grid: tuple[str, ...] = (), multirun: bool = True) -> tuple[list[plan.Job], list[DictConfig]]:
        configs = []
        values = [
            [f"{word.partition('=')[0]}={value}" for value in word.partition("=")[2].split(",")] for word in words
        ]
        for job in itertools.product(*values):
            task = [f"data.root={small_busi}", f"store={tmp_path}", *job]
            cfg = composition.compose_config(["profile=quick", "data=busi", *task])
            hydra = {"overrides": {"task": task}, "runtime": {"choices": {"experiment": "mine"}}}
            hydra |= {"sweeper": {"params": dict.fromkeys(grid, "1,2")}}
            hydra |= {"mode": RunMode.MULTIRUN if multirun else RunMode.RUN}
            with open_dict(cfg):
                cfg.hydra = hydra
            configs.append(cfg)
        return plan.read_jobs(configs), configs

    return make


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        ("loss=mse kd.temperature=7", "kd.temperature=7"),
        ("+experiment=recipe loss=mse kd.temperature=7", "kd.temperature=7"),
        ("loss=mse,kld kd.temperature=7", ""),
        ("path=none kd.weight=0.9 train.lr=0.01", "kd.weight=0.9"),
        ("path=none,L teacher.lr=0.01 kd.weight=0.9", ""),
        ("path=none teacher.lr=0.01 teacher=resnet34", "teacher.lr=0.01, teacher=resnet34"),
        ("path=L loss.hidden.temperature=3", "loss.hidden.temperature=3"),
        ("path=L,H loss.hidden.temperature=3", ""),
        ("kd.ratio=2", "kd.ratio=2"),
        ("kd.weight=matched kd.ratio=2", ""),
        ("method=kd kd.temperature=2", "kd.temperature=2"),
        ("method=none,kd path=none kd.ratio=3", "kd.ratio=3"),
        ("teacher_aug=strong kd.align=none", "kd.align=none"),
        ("+path.stage=encoder.4", "+path.stage=encoder.4"),
        ("+loss.depth=3 loss.logits.temperature=${loss.depth}", ""),
        ("+split.group=patients.csv split=s0", "+split.group=patients.csv"),
        ("device=cpu seed=1 data.allow_empty_masks=true data.load_size=96 stats.margin_points=1 weights=none", ""),
    ],
)
def test_a_key_that_no_cell_uses_is_named_once(
    command, caplog: pytest.LogCaptureFixture, words: str, idle: str
) -> None:
    with caplog.at_level(logging.WARNING):
        typed.name_idle(*command(*words.split()))
    lines = [line.partition(": used by no cell of this command (")[0] for line in caplog.messages]
    assert lines == ([idle] if idle else [])


def test_a_grid_whose_keys_are_not_typed_would_be_dropped(command) -> None:
    with pytest.raises(InputError) as caught:
        command("path=L", grid=("path", "seed", "loss"), multirun=False)
    assert str(caught.value) == (
        "+experiment=mine has a grid (seed, loss): add -m to run it, or choose one cell with seed=... loss=..."
    )
    with pytest.raises(InputError, match=r"a grid \(seed\), and a command runs one: run one command for each$"):
        command("path=L,H", grid=("seed",))
    assert len(command("path=L,H", "seed=0", grid=("path", "seed"))[0]) == 2
    assert len(command("path=L", "seed=0", grid=("path", "seed"), multirun=False)[0]) == 1


def test_the_grid_of_an_experiment_is_checked_as_a_command_line_is() -> None:
    """YAML invites to write a list, of which Hydra would take the last option."""
    hydra = {
        "sweeper": {"params": {"seed": "0,1", "path": ["L", "H"]}},
        "runtime": {"choices": {"hydra/launcher": "x"}},
        "overrides": {"hydra": []},
    }
    with pytest.raises(InputError, match=r"is a list, of which only the last option counts: -m path=L,H runs each$"):
        launcher.check_sweep(OmegaConf.create({"hydra": hydra}), is_one_cell=False)


@pytest.mark.slow
def test_the_experiment_of_a_user_is_planned_with_options_in_any_order(small_busi: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ntrain: {batch_size: 4}\nhydra: {sweeper: {params: {path: 'none,L', loss: mse}}}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
    words = ["+experiment=mine", "--multirun", "--plan", "data=busi", "--config-dir", str(tmp_path / "conf")]
    words += [f"data.root={small_busi}", "profile=quick", "kd.temperature=3", "device=cpu"]
    done = kdsweep(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[HYDRA] kd.temperature=3: used by no cell of this command (Student, L_MSE_WAug), so without" in done.stdout
    assert "2 cells: 2 to run" in done.stdout
    alone = kdsweep(*(word for word in words if word != "--multirun"), cwd=tmp_path)
    assert alone.returncode == 1
    assert "kdsweep: error: +experiment=mine has a grid (path, loss): add -m to run it" in alone.stderr
