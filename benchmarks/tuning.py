"""What tuning in lockstep saves: against the same trials without pruning, and against one process per trial.

    python benchmarks/tuning.py --out benchmarks/tuning.json     # about half an hour on two CPU cores
    python benchmarks/tuning.py --help

Four methods, eight trials each, on phantoms. All sides are timed in one run. The third side is Optuna's ask and tell
around ``python -m kdsweep hydra/launcher=basic``, the same number of trials of the same space, each in a process of
its own, as Hydra's sweepers would run them; they can prune nothing. Times are the processors' seconds of all processes
(user and system), which other programs disturb less than the clock; the clock's are beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna

from kdsweep.core.files import write_json
from kdsweep.store import sweep_file
from kdsweep.tracking import reader
from kdsweep.tuning import space
from kdsweep.tuning.study import read_studies, read_trials

METHODS = (
    ["path=none"],
    ["path=L", "loss=kld", "teacher_aug=weak"],
    ["path=H", "loss=mse", "teacher_aug=weak"],
    ["path=HR", "loss=mse", "teacher_aug=weak"],
)
SWEPT = ["path=none,L,H,HR", "loss=mse", "teacher_aug=weak", "split=s0"]
SEARCH: dict[str, Any] = {"train.lr": {"log": [3e-4, 1e-2]}, "kd.weight": {"range": [0.1, 0.9]}}
NO_PRUNING = "hydra.sweeper.pruner={_target_: optuna.pruners.NopPruner}"


def used_s() -> float:
    """Return the processor seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(*words: str) -> dict[str, float]:
    """Run a command and return its seconds.

    Raises:
        CalledProcessError: it failed.
    """
    before_s, start_s = used_s(), time.monotonic()
    command = [sys.executable, "-m", "kdsweep", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"processor_s": used_s() - before_s, "clock_s": time.monotonic() - start_s}


def tuned(store: Path, common: list[str], *, trials: int, more: list[str]) -> dict[str, Any]:
    """Tune the four methods in lockstep; return seconds of the command and of the trials, and the chosen Dice."""
    as_configured = [f"hydra.sweeper.search.{key}=null" for key in ("teacher.lr", "kd.temperature")]
    options = [*as_configured, f"hydra.sweeper.trials={trials}", f"hydra.sweeper.round={trials}", *more]
    run = timed("-m", "+experiment=tuned", *SWEPT, *common, *options, f"store={store}")
    name = "phantom-quick"
    rows = read_trials(read_studies(store, name)).query("role != 'teacher'")
    chosen = rows[rows["is_chosen"]].set_index("notation")["value"]
    sweep = reader.read_sweep(store=store, uri=None, name=f"{name}{sweep_file.TUNED}")
    students = sweep.runs[sweep.runs["role"] != "teacher"]
    return {
        **run,
        "training_s": float(sum(map(sum, rows["seconds"]))),
        "trials": len(rows),
        "pruned": int((rows["state"] == "PRUNED").sum()),
        "chosen_val_dice": {key: round(float(value), 4) for key, value in chosen.items()},
        "seed_std_val_dice": {
            key: round(float(value), 4)
            for key, value in students.groupby("notation")["val_dice"].std().dropna().items()  # one seed has none
        },
    }


def one_by_one(store: Path, common: list[str], *, trials: int) -> dict[str, Any]:
    """Run as many trials of the four methods, each in a process of its own; return the seconds of them all."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = space.read(SEARCH)
    before_s, start_s, count = used_s(), time.monotonic(), 0
    for number, method in enumerate(METHODS):
        part = {key: value for key, value in search.items() if number or key != "kd.weight"}
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
        for _ in range(trials):
            trial = study.ask(part)
            words = [f"{key}={value!r}" for key, value in trial.params.items()]
            timed("-m", *method, "split=s0", *common, *words, "hydra/launcher=basic", f"store={store}")
            finished = max(store.glob("cells/*/finished.json"), key=lambda file: file.stat().st_mtime_ns)
            study.tell(trial, json.loads(finished.read_text(encoding="utf-8"))["values"]["best/val_dice"])
            count += 1
    return {"processor_s": used_s() - before_s, "clock_s": time.monotonic() - start_s, "trials": count}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="What tuning in lockstep saves.")
    parser.add_argument("--images", type=int, default=80, help="phantoms (80)")
    parser.add_argument("--epochs", type=int, default=12, help="of a whole trial (12)")
    parser.add_argument("--trials", type=int, default=8, help="of each of the four methods (8)")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    common = ["profile=quick", f"data.count={options.images}", f"train.epochs={options.epochs}", "device=cpu"]
    common += ["train.monitor=dice", "train.patience=${train.epochs}"]
    seeds = ["seed=0,1,2", "teacher.seed=0"]  # the chosen settings with three seeds: the noise of the choice
    sides = {}
    with tempfile.TemporaryDirectory() as scratch:
        stores = [Path(scratch) / name for name in ("pruned", "whole", "alone")]
        measured = {
            "pruned": lambda: tuned(stores[0], common, trials=options.trials, more=[]),
            "whole": lambda: tuned(stores[1], [*common, *seeds], trials=options.trials, more=[NO_PRUNING]),
            "one_by_one": lambda: one_by_one(stores[2], common, trials=options.trials),
        }
        for name, measure in measured.items():
            sides[name] = measure()
            sys.stderr.write(f"{name}: {json.dumps(sides[name])}\n")  # long before the end: what there is, is told
    pruned, unpruned, alone = sides.values()
    figures = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "optuna")},
        "settings": {"images": options.images, "epochs": options.epochs, "trials": options.trials},
        **sides,
        "training_share_with_pruning": round(pruned["training_s"] / unpruned["training_s"], 3),
        "times_faster_than_one_by_one": round(alone["processor_s"] / pruned["processor_s"], 2),
        "times_faster_by_the_clock": round(alone["clock_s"] / pruned["clock_s"], 2),
    }
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    if options.out:
        write_json(options.out, figures)


if __name__ == "__main__":
    main()
