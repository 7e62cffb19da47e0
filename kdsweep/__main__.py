"""The Hydra entry: one job is one cell.

``python -m kdsweep -m path=L,H,HR loss=mse,kld teacher_aug=weak,strong`` runs the paper's grid on one split.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kdsweep import conf_dir
from kdsweep.errors import InputError
from kdsweep.launcher import TRACEBACK, one_line

# Torch is imported when a job runs: help and errors of the command line must come fast.
log = logging.getLogger("kdsweep")

ERROR_FILE = "error.txt"


def run_cell(cfg: DictConfig) -> float:
    """Compute one cell, unless it is finished in this store; its test Dice, which Hydra's sweepers can optimise."""
    from kdsweep import build, checkpoint, teachers, train
    from kdsweep.grid import Cell
    from kdsweep.learner import Run

    build.check(cfg)
    cell = build.cell(cfg)
    tracker = build.tracker(cfg)
    tracker.ask(cfg.sweep_name, [cell])
    finished = checkpoint.read_finished(cell.folder)
    if finished is not None:
        log.info("%s: finished already, run %s in %s", cell.title, finished["run_id"], cell.folder)
        return float(finished["test/dice"])
    build.check_networks(cfg)

    def start(own: Cell) -> Run:
        checkpoint.write_json(own.folder / "split.json", build.split_ids(cfg))
        checkpoint.write_json(own.folder / "settings.json", {"settings": own.settings, "evidence": own.evidence})
        return tracker.start(own, sweep=cfg.sweep_name, params=build.params(cfg), tags=build.tags(cfg))

    compute = build.compute(cfg)
    frozen = {}
    if cell.role == "cell":
        teacher = build.teacher_cell(cfg)
        frozen[teacher.fingerprint] = teachers.obtain(
            teacher,
            network=build.teacher_network(cfg),
            start=lambda network: build.teacher_learner(cfg, teacher, start(teacher), network),
            feed=build.feed(cfg, seed=cfg.teacher.seed),
            compute=compute,
        )
    learner = build.learner(cfg, cell, start(cell))
    (values,) = train.run([learner], teachers=frozen, feed=build.feed(cfg, seed=cfg.seed), compute=compute)
    return values["test/dice"]


@hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
def run(cfg: DictConfig) -> float:
    """One Hydra job; an error goes to the job's log in one line, its traceback to error.txt beside it."""
    error_file = Path(HydraConfig.get().runtime.output_dir) / ERROR_FILE
    error_file.unlink(missing_ok=True)
    try:
        return run_cell(cfg)
    except InputError as error:
        log.error("%s", error)
        raise
    except Exception as error:
        error_file.write_text(traceback.format_exc(), encoding="utf-8")
        log.error("%s: %s; traceback in %s", type(error).__name__, " ".join(str(error).split()), error_file)
        raise


def main() -> None:
    """The console script: run, and tell an error in one line (HYDRA_FULL_ERROR=1 shows the traceback)."""
    logging.raiseExceptions = False  # "kdsweep ... | head" must not turn each later line into a traceback
    OmegaConf.register_new_resolver("kdsweep.cell_dir", _cell_dir, replace=True)
    wants_traceback = os.environ.setdefault(TRACEBACK, os.environ.get("HYDRA_FULL_ERROR", "0")) == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra hand exceptions on instead of printing them its own way
    try:
        run()
    except KeyboardInterrupt:
        sys.stderr.write("kdsweep: stopped; the same command goes on with the cells that are not finished\n")
        sys.exit(130)
    except Exception as error:
        if wants_traceback:
            raise
        sys.exit(f"kdsweep: error: {one_line(error)}")


def _cell_dir(*, _root_: DictConfig) -> str:
    """Folder of the configured cell below the store: Hydra's job folder."""
    from kdsweep import build

    build.check(_root_)
    cell = build.cell(_root_)
    return str(cell.folder.relative_to(cell.store))


if __name__ == "__main__":
    main()
