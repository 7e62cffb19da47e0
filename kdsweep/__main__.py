"""The Hydra entry: one job is one cell.

``python -m kdsweep -m path=L,H,HR loss=mse,kld teacher_aug=weak,strong`` runs the paper's grid on one split.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kdsweep import conf_dir
from kdsweep.core import logs, signals
from kdsweep.sweep.callback import TRACEBACK, at_end, one_line
from kdsweep.sweep.launcher import trains_cells

# Torch is imported when a job runs: help and errors of the command line must come fast.


@hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
@trains_cells
def run(cfg: DictConfig) -> float:
    """One Hydra job: its cell's test Dice, which Hydra's sweepers can optimise."""
    from kdsweep.sweep import plan

    (job,) = plan.read_jobs([cfg])
    if job.finished is not None:
        plan.tell_finished(job)
        return float(job.finished["test/dice"])

    from kdsweep.training import group

    logs.claim(Path(HydraConfig.get().runtime.output_dir))
    (result,) = group.run_group([cfg])
    if isinstance(result, Exception) and cfg.retry_failed:
        (result,) = group.run_group([cfg])
    if isinstance(result, Exception):
        raise result
    return result


def main() -> None:
    """The console script: run, and tell an error in one line (HYDRA_FULL_ERROR=1 shows the traceback)."""
    sys.argv[1:] = ["hydra.launcher.plan=true" if word == "--plan" else word for word in sys.argv[1:]]
    signals.install()
    logging.raiseExceptions = False  # "kdsweep ... | head" must not turn each later line into a traceback
    OmegaConf.register_new_resolver("kdsweep.cell_dir", _cell_dir, replace=True)
    wants_traceback = os.environ.setdefault(TRACEBACK, os.environ.get("HYDRA_FULL_ERROR", "0")) == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra hand exceptions on instead of printing them its own way
    try:
        run()
    except signals.Stopped as stop:
        sys.stderr.write(f"kdsweep: {stop.told()}\n")
        sys.exit(stop.exit_code)
    except Exception as error:
        if wants_traceback:
            raise
        sys.exit(f"kdsweep: error: {one_line(error)}")
    finally:
        at_end.close()


def _cell_dir(*, _root_: DictConfig) -> str:
    """Folder of the configured cell below the store: Hydra's job folder."""
    from kdsweep.config import identity

    identity.check(_root_)
    cell = identity.cell(_root_)
    return str(cell.folder.relative_to(cell.store))


if __name__ == "__main__":
    main()
