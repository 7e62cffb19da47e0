"""Equal settings give the results that were recorded: whoever changes them raises RESULTS_VERSION.

Seven cells (every path with every loss, half of them with each Teacher, and the Student), the methods and both Teachers
are trained for two epochs of two steps on synthetic images. To record them again, after RESULTS_VERSION was raised:

    KDSWEEP_RECORD=1 python -m pytest tests/test_golden.py

The tolerance lets other CPUs, thread counts and PyTorch versions pass, which sum in another order, and stops a change
of what is computed. Measured on two CPU cores: two threads instead of one, or no oneDNN, move the recorded losses by at
most 0.7 % where they are near 1e-5 (1e-7 in all), and Dice by 0.0006; kd.temperature=1.1 moves a loss by 1.2 %,
kd.weight=0.51 by 2 %, a rotation of 46 degrees instead of 45 by 10 %.
"""

import json
import os
from pathlib import Path

import pytest
from small import TEACHER

from kdsweep.config import composition, grid, identity
from kdsweep.config.grid import Cell
from kdsweep.store import cell_folder
from kdsweep.training import group

RECORDED = Path(__file__).parent / "golden.json"
LOSS = {"rel": 2e-3, "abs": 1e-6}
OF_METHODS = {"rel": 1e-2, "abs": 1e-6}  # cosines and maxima of maps: two threads move SKD's by 0.2 %
DICE = {"abs": 0.005}  # a fraction: single pixels near the threshold may fall to the other side
GRID = [
    *([f"path={path}", f"loss={loss}"] for path in ("L", "H", "HR") for loss in ("mse", "kld")),
    ["path=none"],
    *([f"method={name}"] for name in ("kd", "cwd", "cwd_feature", "fitnet", "at", "skd", "ifvd", "dist")),
    *([f"method={name}"] for name in ("pkd", "cirkd", "emkd", "spkd", "mgd", "reviewkd")),
]


def train(images: Path, store: Path) -> dict[str, dict[str, float]]:
    """By notation what two epochs give: losses of both, Dice of validation and test images."""
    fixed = ["profile=quick", "data=busi", f"data.root={images}", "device=cpu", f"store={store}", *TEACHER]
    fixed += ["train.epochs=2", "train.batch_size=8", "train.workers=0", "train.lr=1e-4", "teacher.lr=1e-4"]
    views = ["weak", "strong"]
    settings = [composition.compose([*fixed, *cell, f"teacher_aug={views[n % 2]}"]) for n, cell in enumerate(GRID)]
    results = group.run_group([identity.job(each) for each in settings])
    assert [result for result in results if isinstance(result, Exception)] == []
    cells = [identity.cell(each) for each in settings]
    teachers = {cell.teacher.notation: cell.teacher for cell in cells if cell.teacher is not None}
    return {cell.notation: values_of(cell) for cell in [*cells, *teachers.values()]}


def values_of(cell: Cell) -> dict[str, float]:
    record = cell_folder.read(cell.folder)
    last = record.history[-1]
    return {
        **{
            name: float(f"{last[name]:.7g}")
            for name in sorted(last)
            if name.endswith(("loss", "kd", "supervised", "dice"))
        },
        "test/dice": float(f"{record.values['test/dice']:.7g}"),
    }


def test_results_are_those_recorded_for_this_results_version(small_busi: Path, tmp_path: Path) -> None:
    trained = train(small_busi, tmp_path)
    if os.environ.get("KDSWEEP_RECORD"):
        RECORDED.write_text(json.dumps({"results_version": grid.RESULTS_VERSION, "cells": trained}, indent=1) + "\n")
    recorded = json.loads(RECORDED.read_text())
    assert recorded["results_version"] == grid.RESULTS_VERSION, "record these results again, see above"
    assert trained.keys() == recorded["cells"].keys()
    assert len(trained) == len(GRID) + 2
    off = []
    for name, values in recorded["cells"].items():
        for key, value in values.items():
            is_method = "_" not in name.removesuffix("_WAug") and name.partition("_")[0] not in ("Student", "Teacher")
            bound = DICE if key.endswith("dice") else OF_METHODS if is_method else LOSS
            if trained[name].get(key) != pytest.approx(value, **bound):
                off.append(f"{name} {key}: {trained[name].get(key)} instead of {value}")
    assert not off, f"the results changed: raise RESULTS_VERSION (kdsweep/config/grid.py) and record again; {off}"
