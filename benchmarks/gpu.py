"""What a CUDA device makes of it: tests, lockstep against one by one and torchdistill, a profile of a step, Table 4.

    make gpu                                               # on a GPU, at most 9 minutes
    make gpu STUDY=1 ARGS="data=busi data.root=FOLDER"     # begins the study of Table 4, or goes on with it
    python benchmarks/gpu.py --help

Each stage writes its part of ``--out`` when it ends, and one for which the time is too short is left out, which the
file says. The networks are untrained, for their weights do not change the time; the images are phantoms, but for the
study's. ``--device cpu`` with small sizes rehearses the script.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import GRID, Bench, machine, torchdistill_step_s
from torch.profiler import ProfilerActivity, profile

from kdsweep.config import composition, identity
from kdsweep.core.device import find_device, give_back_memory, placed
from kdsweep.core.files import write_json
from kdsweep.models import unet
from kdsweep.training import factory, loop
from kdsweep.training.learner import Learner

SPLITS, EPOCHS = 3, 500  # of Table 4 (PAPER)
STUDY = ["-m", "+experiment=table4", "profile=paper", "weights=none", "precision=bf16"]
SAVED_WITHIN_S = 20.0


def tests(options: argparse.Namespace) -> dict[str, Any]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"exit_code": done.returncode, "summary": done.stdout.strip().splitlines()[-15:]}


def lockstep(options: argparse.Namespace) -> dict[str, Any]:
    """Time a step of 12 cells in lockstep and one by one, by precision, beside torchdistill; its memory and shares."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in options.precisions:
            bench = _bench(options, Path(folder) / precision, precision)
            learners = bench.learners(bench.configs)
            bench.step_s(learners)  # a warm-up
            _reset_peak()
            together = min(bench.step_s(learners) for _ in range(options.rounds))
            peak_gib = _peak_gib()
            apart = min(sum(bench.step_s([learner]) for learner in learners) for _ in range(options.rounds))
            found[precision] = {
                "lockstep_s": together,
                "one_by_one_s": apart,
                "times_as_fast": apart / together,
                "images_per_s": 12 * options.batch / together,
                "shares": bench.shares(learners),
                "peak_gib": peak_gib,
            }
            del learners
            give_back_memory()
        theirs = torchdistill_step_s(bench, Path(folder) / "torchdistill.json")
    torchdistill_s = sum(theirs.values())
    for own in list(found.values()):
        own["times_as_fast_as_torchdistill"] = torchdistill_s / own["lockstep_s"]
    return {**found, "torchdistill_s": torchdistill_s, "torchdistill_cells_s": theirs}


def one_step(options: argparse.Namespace) -> dict[str, Any]:
    """Profile a step of 12 cells: kernels, their time, and how much of the step the device is busy."""
    on_cuda = torch.cuda.is_available() and options.device != "cpu"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in options.precisions:
            bench = _bench(options, Path(folder) / precision, precision)
            learners = bench.learners(bench.configs)
            bench.step_s(learners)
            plain_s = bench.step_s(learners)
            with profile(activities=kinds) as profiled:
                bench.step_s(learners)
            kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
            steps, busy_s = len(bench.feed.train), _covered(spans) / 1e6
            by_name: dict[str, float] = {}
            for event in kernels:
                by_name[event.name] = by_name.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6 / steps
            longest = sorted(by_name.items(), key=lambda item: -item[1])[:15]
            found[precision] = {
                "step_s": plain_s,
                "kernels_per_step": len(kernels) / steps,
                "busy_s_per_step": busy_s / steps,
                "busy_share": busy_s / steps / plain_s,
                "longest_kernels_s": {name[:120]: seconds for name, seconds in longest},
            }
            del learners
            give_back_memory()
    return found


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of sorted intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def table4(options: argparse.Namespace) -> dict[str, Any]:
    """Time whole epochs of Table 4's two groups of a split, validation included, and project all of its trainings."""
    sizes = [f"data.count={options.images}", f"image_size={options.image_size}", f"train.batch_size={options.batch}"]
    fixed = [*sizes, f"teacher={options.teacher}", "weights=none", f"device={options.device}"]
    fixed += ["train.monitor=loss", "precision=bf16"]
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        cells = [[*cell, f"store={folder}"] for cell in [*GRID, ["path=none"]]]
        configs = [composition.compose([*fixed, *cell]) for cell in cells]
        compute, feed = factory.compute(configs[0]), factory.feed(configs[0], seed=0)
        compute.prepare()
        taught = {identity.teacher_cell(cfg).fingerprint: cfg for cfg in configs[:-1]}
        frozen = {name: unet.freeze(placed(factory.teacher_network(cfg), compute)) for name, cfg in taught.items()}
        groups: dict[str, Callable[[], list[Learner]]] = {
            "students": lambda: [factory.learner(cfg, identity.cell(cfg)) for cfg in configs],
            "teachers": lambda: [factory.teacher_learner(cfg, identity.teacher_cell(cfg)) for cfg in taught.values()],
        }
        for name, make in groups.items():
            learners = make()
            for learner in learners:
                for own in learner.modules().values():
                    placed(own, compute)
                learner.whole = True
                learner.epochs = learner.patience = options.epochs + 2
            ends: list[float] = []

            def ended(epochs: int, ends: list[float] = ends) -> list[Learner]:
                ends.append(time.monotonic())
                return []

            loop.fit(learners, teachers=frozen, feed=feed, compute=compute, prune=ended)
            if failed := [learner.failure for learner in learners if learner.failure is not None]:
                raise failed[0]
            seconds[name] = (ends[-1] - ends[1]) / (len(ends) - 2)  # the first ones warm up
            del learners
            give_back_memory()
    epochs = options.epochs
    minutes = {name: SPLITS * EPOCHS * each / 60 for name, each in seconds.items()}
    return {
        "epoch_s": seconds,
        "epochs_timed": epochs,
        "projected_minutes": {**minutes, "all": sum(minutes.values())},
        "of": f"{SPLITS} splits x {EPOCHS} epochs, 45 trainings, no early stop, start and test left out",
    }


def study(options: argparse.Namespace, *, within_s: float) -> dict[str, Any]:
    """Begin the study of Table 4 with these overrides, or go on with it; stop it when the time is over."""
    command = [sys.executable, "-m", "kdsweep", *STUDY, f"store={options.store}", *options.overrides]
    start_s = time.monotonic()
    with subprocess.Popen(command) as running:
        try:
            running.wait(timeout=max(1.0, within_s - SAVED_WITHIN_S))
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGTERM)  # it saves what it has and ends
    shown = subprocess.run(
        [sys.executable, "-m", "kdsweep", "tables", "table4", "--store", str(options.store)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "command": " ".join(command[1:]),
        "seconds": time.monotonic() - start_s,
        "is_done": running.returncode == 0,
        "table": (shown.stdout or shown.stderr).splitlines(),
    }


def _bench(options: argparse.Namespace, store: Path, precision: str) -> Bench:
    own = argparse.Namespace(**{**vars(options), "precision": precision})
    bench = Bench(own, store)
    bench.compute.prepare()
    return bench


def _reset_peak() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_initialized() else None


STAGES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tests": tests,
    "lockstep": lockstep,
    "profile": one_step,
    "table4": table4,
}


def main() -> None:
    """Run the stages; each writes its figures at once."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", default=",".join(STAGES), help="of them all, in this order (%(default)s)")
    parser.add_argument("--study", action="store_true", help="instead, begin the study or go on with it")
    parser.add_argument("--store", type=Path, default=Path("multirun"), help="of the study (multirun)")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds in all (540)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=163, help="of the data set of Table 4 (163)")
    parser.add_argument("--teacher", default="resnext101", help="a file of conf/teacher")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=4, help="steps of an epoch, the unit that is timed (4)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts (3)")
    parser.add_argument("--epochs", type=int, default=5, help="timed for Table 4 (5)")
    parser.add_argument("--precisions", default="fp32,tf32,bf16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu.json"))
    parser.add_argument("overrides", nargs="*", help="of the study, such as data=busi data.root=FOLDER")
    options = parser.parse_args()
    options.precisions = options.precisions.split(",")
    end_s = time.monotonic() + options.limit
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    found["machine"] = machine(find_device(options.device))
    found["settings"] = {name: str(value) for name, value in vars(options).items() if name != "overrides"}
    wanted = ["study"] if options.study else options.stages.split(",")
    for name in wanted:
        start_s = time.monotonic()
        if start_s + 30 > end_s:
            found[name] = {"left_out": f"no time was left of {options.limit:g} s"}
        else:
            try:
                found[name] = (
                    study(options, within_s=end_s - start_s) if name == "study" else STAGES[name](options)
                ) | {"took_s": time.monotonic() - start_s}
            except Exception as error:  # the other stages still measure something
                found[name] = {"error": f"{type(error).__name__}: {error}"}
        write_json(options.out, found)
        sys.stdout.write(f"{name}: {json.dumps(found[name], indent=1)}\n")
        sys.stdout.flush()
    sys.exit(any("error" in found[name] for name in wanted))


if __name__ == "__main__":
    main()
