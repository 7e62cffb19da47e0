"""Jobs of a command line, without Hydra's launcher."""

import pytest
from hydra.types import RunMode
from omegaconf import open_dict

from kdsweep.config import composition
from kdsweep.sweep import plan


@pytest.fixture
def configs(small_busi, tmp_path):
    """Makes the configurations of the jobs of one command line, of which Hydra gives each its overrides."""

    def make(*each: list[str], grid: tuple[str, ...] = ()):
        fixed = ["profile=quick", "data=busi", f"data.root={small_busi}", "device=cpu", f"store={tmp_path}"]
        made = []
        for overrides in each:
            task = [*fixed, "train.batch_size=8", *overrides]
            cfg = composition.compose_config(task)
            choices = {"teacher": "resnet18", "experiment": "mine"}
            choices |= {key: value for key, _, value in (override.partition("=") for override in overrides)}
            with open_dict(cfg):
                cfg.hydra = {
                    "overrides": {"task": task},
                    "runtime": {"choices": choices},
                    "sweeper": {"params": dict.fromkeys(grid, "1,2")},
                    "mode": RunMode.MULTIRUN,
                }
            made.append(cfg)
        return made

    return make


@pytest.fixture
def jobs(configs):
    """Makes the jobs of one command line from the overrides of each."""

    def make(*each: list[str]) -> list[plan.Job]:
        return plan.read_jobs(configs(*each))

    return make
