"""How plan and bookkeeping grow with the number of cells: time and memory of each step at 100, 1,000 and 10,000 cells.

    make growth                                   # an hour on two CPU cores
    python benchmarks/growth.py --cells 100 1000  # ten minutes

Nothing is trained: a stub writes within milliseconds what a finished cell's folder holds. All else is the project's own
code, called as the launcher calls it, then as whole commands. Linux only: the peaks of memory are read from /proc.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from machine import machine
from omegaconf import DictConfig

from kdsweep import conf_dir
from kdsweep.config import composition, identity, inputs
from kdsweep.config.composition import compose_jobs
from kdsweep.config.grid import Cell
from kdsweep.config.schema import Settings
from kdsweep.core.files import write_text
from kdsweep.results.table import Options
from kdsweep.results.tables import command as tables
from kdsweep.store import cell_folder, checkpoint
from kdsweep.sweep import estimate, launcher, plan
from kdsweep.sweep.estimate import Preview
from kdsweep.sweep.plan import Job
from kdsweep.tracking import reader, sync

PAPER_GRID = ["path=L,H,HR", "loss=mse,kld", "teacher_aug=weak,strong", "split=s0,s1,s2"]
SIZES = {  # cells by name: 36 for each seed, weight and temperature
    100: ["seed=0", "kd.weight=0.1,0.5,0.9"],
    1000: ["seed=range(0,4)", "kd.weight=0.1,0.2,0.3,0.5,0.7,0.8,0.9"],
    10000: ["seed=range(0,10)", "kd.weight=0.1,0.2,0.3,0.5,0.7,0.8,0.9", "kd.temperature=1,2,4,8"],
}
EPOCHS = 10  # of profile=quick
WEIGHTS_BYTES = 3_302_000  # of the Student's file: each rerun reads it to see that it is whole
PREVIEW = Preview(devices={"cpu": ["cpu"]}, student_epoch_s=1.0, teacher_epoch_s=10.0, forward_epoch_s=3.0)


# ---- clock and memory ----------------------------------------------------------------------------------------------


class Clock:
    """Seconds and MB at the peak of each step of this process."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        start, busy = time.perf_counter(), time.process_time()
        yield
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - busy
        self.note(name, seconds=seconds, cpu_s=cpu_s, peak_mb=_status_mb("self", "VmHWM"))

    def note(self, name: str, *, seconds: float, cpu_s: float, peak_mb: float) -> None:
        """Keep a measurement, and tell it."""
        self.steps[name] = {"seconds": round(seconds, 3), "cpu_s": round(cpu_s, 3), "peak_mb": round(peak_mb, 1)}
        sys.stderr.write(f"{name}: {seconds:.2f} s, {cpu_s:.2f} s on the CPU, {peak_mb:.0f} MB\n")


def _status_mb(process: str, key: str) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def command(clock: Clock, name: str, words: Sequence[str]) -> str:
    """Run a program to its end, and note its time and the peak of all its processes together; what it printed."""
    start, before = time.perf_counter(), _children_s()
    with tempfile.TemporaryFile("w+") as file:
        done = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file, start_new_session=True)
        peak_mb = 0.0
        while done.poll() is None:
            peak_mb = max(peak_mb, sum(_status_mb(process, "VmRSS") for process in _session(done.pid)))
            time.sleep(0.2)
        seconds = time.perf_counter() - start
        file.seek(0)
        output = file.read()
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{output[-4000:]}")
    clock.note(name, seconds=seconds, cpu_s=_children_s() - before, peak_mb=peak_mb)
    return output


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _session(leader: int) -> list[str]:
    """The processes of a session; what they share is counted in each, so their sum is an upper bound."""
    folders = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader:
            folders.append(folder.name)
    return folders


# ---- the stub ------------------------------------------------------------------------------------------------------


def stub(cell: Cell, settings: Settings, *, weights: Path) -> None:
    """STUB, no training: write what the folder of a finished cell holds, with made-up scores, within milliseconds.

    Args:
        cell: that is not trained.
        settings: its configuration.
        weights: file that stands for the trained ones; it gets one more name, and takes no more room.
    """
    split = inputs.split_ids(settings)
    tags = {
        "kdsweep.profile": settings.profile,
        "kdsweep.device": "cpu",
        "kdsweep.threads": "1",
        "kdsweep.torch": "stub",
    }
    params = identity.params(settings) | identity.factors(settings, role=cell.role)
    cell_folder.describe(cell, split=split, params=params, tags=tags)
    rng = np.random.default_rng(int(cell.fingerprint[:12], 16))
    now_ms = cell_folder.now_ms()
    values = {"train/loss": 0.5, "train/kd": 0.1, "train/supervised": 0.4, "val/loss": 0.5, "val/dice": 0.5}
    history = [{"epoch": epoch, **values} for epoch in range(EPOCHS)]
    cell_folder.write_progress(
        cell.folder, epochs=EPOCHS, history=history, times_ms=[now_ms] * EPOCHS, seconds=[1.0] * EPOCHS
    )
    scores = pd.DataFrame({"image": split["test"], "label": "benign"})
    for name in ("dice", "iou", "precision", "sensitivity", "hd95_px"):
        scores[name] = rng.uniform(0.3, 0.9, len(scores))
    write_text(cell.folder / "test_scores.csv", scores.to_csv(index=False))
    masks = np.zeros((len(scores), settings.image_size, settings.image_size), bool)
    checkpoint.save_predictions(cell.folder / "test_predictions.npz", masks, ids=split["test"])
    write_text(cell.folder / "history.csv", pd.DataFrame(history).to_csv(index=False))
    name = f"{'teacher' if cell.role == 'teacher' else 'student'}.safetensors"
    os.link(weights, cell.folder / name)
    files = [name, "history.csv", "test_predictions.npz", "test_scores.csv", "split.json"]
    final = {"test/dice": float(scores["dice"].mean()), "test/trivial_dice": 0.1, "epochs": float(EPOCHS)}
    cell_folder.write_finished(cell.folder, values=final, files=files)


# ---- the steps -----------------------------------------------------------------------------------------------------


class Command:
    """A command line as Hydra sees it: its sweep's configuration and its jobs.

    Args:
        words: of the command line, without ``-m``.
    """

    def __init__(self, words: list[str]) -> None:
        self.loader = GlobalHydra.instance().config_loader()
        self.config = self.loader.load_configuration("config", words, run_mode=RunMode.MULTIRUN)
        HydraConfig.instance().set_config(self.config)
        (self.jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)

    def compose(self) -> Iterator[DictConfig]:
        """The configurations of the jobs, as ``launch`` has them."""
        return compose_jobs(self.loader, self.config, self.jobs)


def measure(size: int, folder: Path) -> dict[str, Any]:
    """All steps for one size; runs in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes of the commands
    logging.basicConfig(level=logging.WARNING)
    store, clock = folder / f"store{size}", Clock()
    where = [f"store={store}", f"data.source.cache_dir={folder / 'phantoms'}", "profile=quick", "device=cpu"]
    words = [*PAPER_GRID, *SIZES[size], *where]
    weights = folder / f"weights{size}"
    weights.write_bytes(bytes(WEIGHTS_BYTES))
    inputs.listing(composition.compose(where))  # the phantoms are made once
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        sweep = planned(words, clock)
        command(clock, "whole command: --plan, nothing finished", ["-m", "kdsweep", "-m", *words, "--plan"])
        count = finished(words, sweep, clock, weights=weights)
        seeds = [word for word in words if word.startswith(("split=", "seed="))]
        finished(["path=none", *seeds, *where], [], Clock(), weights=weights)  # the Student, for Table 4
        again(words, clock)
    read_back(store, clock)
    command(clock, "whole command: rerun, all finished", ["-m", "kdsweep", "-m", *words])
    command(clock, "whole command: tables table4", ["-m", "kdsweep", "tables", "table4", "--store", str(store)])
    shutil.rmtree(store)
    return {"cells": count, "steps": clock.steps}


def planned(words: list[str], clock: Clock) -> list[Job]:
    """Everything until the first group would be trained, but the look at the real networks."""
    with clock.step("the command line into jobs"):
        sweep = Command(words)
    with clock.step("compose the jobs, read them as cells"):
        jobs = plan.read_jobs(sweep.compose())
        gc.freeze()  # as the launcher does
    with clock.step("the kinds that torch has to look at"):
        plan.kinds(jobs)
    with clock.step("find what waits, form groups"):
        groups = plan.form_groups(plan.waiting(jobs), devices=PREVIEW.devices)
    with clock.step("estimate and overview"):
        estimate.overview(jobs, groups=groups, preview=PREVIEW)
    with clock.step("tell what changed"):
        estimate.log_changes(jobs)
    with clock.step("write what the sweep asks for, to files and MLflow"):
        plan.watch(jobs)
        sync.close_all()
    return jobs


def finished(words: list[str], jobs: list[Job], clock: Clock, *, weights: Path) -> int:
    """Put stubs into the folders of all cells and their Teachers, and log them to MLflow; how many cells."""
    jobs = jobs or plan.read_jobs(Command(words).compose())
    with clock.step("(write the stubs)"):
        for cell, settings in {job.cell.folder: (job.cell, job.settings) for job in jobs}.values():
            stub(cell, settings, weights=weights)
        for cell, job in plan.missing_teachers(jobs):
            stub(cell, job.settings, weights=weights)
    jobs = [replace(job, finished={"test/dice": 0.5}) for job in jobs]
    with clock.step("log all to MLflow (SQLite)"):
        plan.watch(jobs)
        sync.close_all()
    return len(plan.unique(jobs))


def again(words: list[str], clock: Clock) -> None:
    """The same command when all is finished."""
    gc.collect()
    configs = Command(words).compose()
    with clock.step("rerun: read the jobs, check what is finished"):
        jobs = plan.read_jobs(configs)
    if any(job.finished is None for job in jobs):
        raise RuntimeError("a stub is not taken as finished")
    with clock.step("rerun: returns of the jobs"):
        _ = [launcher.job_return(job.overrides, 0.5) for job in jobs]
    with clock.step("rerun: MLflow has all"):
        plan.watch(jobs)
        sync._opened[-1]._tried.wait()
    with clock.step("look of the mirror, nothing new"):
        sync._opened[-1]._pass()
    sync.close_all()


def read_back(store: Path, clock: Clock) -> None:
    """The sweep read from MLflow, and its tables."""
    with clock.step("read the sweep from MLflow"):
        sweep = reader.read_sweep(store=store, uri=None, name=None)
    for which in ("table3", "table4", "effects"):
        with clock.step(f"make {which}"):
            table = tables.make(which, sweep, Options(store))
            tables.write(table, name=which, sweep=sweep, out=store / "tables")


# ---- report --------------------------------------------------------------------------------------------------------


def exponent(small: dict[str, Any], large: dict[str, Any], step: str) -> float:
    """Of growth between two sizes: 1 is linear. NaN below 0.05 s, where it would be noise."""
    before, after = (each["steps"][step]["cpu_s"] for each in (small, large))
    if min(before, after) < 0.05:
        return math.nan
    return math.log(after / before) / math.log(large["cells"] / small["cells"])


def report(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    sizes, host = figures["sizes"], figures["machine"]
    counts = [f"{each['cells']:,} cells" for each in sizes]
    growth = [f"growth to {count}" for count in counts[1:]]
    load = ", ".join(f"{each['load'][0]:.1f} to {each['load'][1]:.1f}" for each in sizes)
    lines = [
        f"{host['cpu']}, {host['cores']} cores, Python {host['python']}, Hydra {host['hydra-core']}, "
        f"MLflow {host['mlflow']}, {host['date']}; load while measured: {load}. No cell is trained: all are stubs.",
        "",
        "| step: seconds, of the CPU (peak MB) | " + " | ".join([*counts, *growth]) + " |",
        "| --- |" + " ---: |" * (len(counts) + len(growth)),
    ]
    for step in sizes[0]["steps"]:
        taken = [each["steps"][step] for each in sizes]
        shown = [f"{each['seconds']:.1f}, {each['cpu_s']:.1f} ({each['peak_mb']:.0f})" for each in taken]
        powers = [exponent(small, large, step) for small, large in itertools.pairwise(sizes)]
        shown += ["" if math.isnan(power) else f"{power:.2f}" for power in powers]
        lines.append(f"| {step} | {' | '.join(shown)} |")
    lines += ["", "Growth: the exponent of the CPU time between two sizes, 1 is linear. Commands: MB of all processes."]
    return "\n".join(lines)


def main() -> None:
    """Measure each size in a process of its own, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", type=int, nargs="+", choices=sorted(SIZES), default=sorted(SIZES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/growth.json"))
    options = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine("hydra-core", "omegaconf", "mlflow", "pandas", "torch"), "sizes": []}
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        for size in options.cells:
            load = os.getloadavg()[0]
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as alone:
                measured = alone.submit(measure, size, Path(folder)).result()
            figures["sizes"].append({**measured, "load": [load, os.getloadavg()[0]]})
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(figures, indent=1) + "\n")
    sys.stdout.write(report(figures) + "\n")


if __name__ == "__main__":
    main()
