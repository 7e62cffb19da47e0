"""Measure kdsweep on a CUDA device: Table 4, lockstep against one by one and torchdistill, a profile of a step, tests.

    make gpu                                               # on a GPU, at most 9 minutes
    make gpu STUDY=1 ARGS="data=busi data.root=FOLDER"     # starts the study of Table 4, or resumes it
    python benchmarks/gpu.py --help

Each stage has parts, such as one per precision. ``--out`` is written after each part; a part that fails leaves its
error there, and one for which the time is too short is left out, which the file says. The networks are untrained,
since their weights do not change the time; the images are phantoms, except the study's. ``--device cpu`` with small
sizes rehearses the script; ``benchmarks/gpu.sh`` runs it on a machine that reaches no package registry.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from bench import GRID, Bench, described
from kernels import busiest
from machine import version_of
from programs import torchdistill_step_s
from torch.profiler import ProfilerActivity, profile

from kdsweep.config import composition, identity
from kdsweep.core.device import find_device, give_back_memory, placed
from kdsweep.core.errors import InputError, one_line
from kdsweep.core.files import write_json
from kdsweep.training import build, loop
from kdsweep.training.learner import Learner

ROOT = Path(__file__).resolve().parents[1]
SPLITS, EPOCHS = 3, 500  # of Table 4 (PAPER)
STUDY = ["-m", "+experiment=table4", "profile=paper", "weights=none", "precision=bf16"]
SAVED_WITHIN_S = 20.0
LEAST_S = 20.0  # no part is started with less
PRECISIONS = ("bf16", "fp32", "tf32")
STAGES = ("table4", "lockstep", "profile", "torchdistill", "tests")  # by value, if the time is short

Figures = dict[str, Any]


class Session:
    """What the stages share: the options, the time left, one store with its phantoms, one bench.

    Args:
        options: of the command line.
        store: folder for runs and images.
    """

    def __init__(self, options: argparse.Namespace, store: Path) -> None:
        self.options, self.store = options, store
        self.end_s = time.monotonic() + options.limit

    def left_s(self) -> float:
        """Return the seconds that are left."""
        return self.end_s - time.monotonic()

    @cached_property
    def bench(self) -> Bench:
        """The 12 cells of a split of Table 4's images, whose epochs are filled to whole batches."""
        return Bench(self.options, self.store, images=self.options.images)

    def learners(self, precision: str) -> list[Learner]:
        """Make the 12 cells in a precision."""
        return self.bench.learners([self.bench.config(*cell, f"precision={precision}") for cell in GRID])

    def fastest_s(self, step_s: Callable[[], float]) -> float:
        """Return the shortest of ``--rounds`` measurements, of fewer if the time is short."""
        shortest = float("inf")
        for _ in range(self.options.rounds):
            start_s = time.monotonic()
            shortest = min(shortest, step_s())
            if self.left_s() < 2 * (time.monotonic() - start_s):
                break
        return shortest


def table4(session: Session, group: str) -> Figures:
    """Time epochs of the Students or the Teachers of a split, validation included, and project all their trainings."""
    options, bench = session.options, session.bench
    sizes = [f"data.count={options.images}", f"image_size={options.image_size}", f"train.batch_size={options.batch}"]
    fixed = [*sizes, f"teacher={options.teacher}", f"student={options.student}", "weights=none"]
    fixed += [f"device={options.device}", f"store={session.store}"]
    fixed += ["train.monitor=loss", "precision=bf16"]
    configs = [composition.compose([*fixed, *cell]) for cell in [*GRID, ["path=none"]]]
    compute = build.compute(configs[0])
    compute.prepare()
    of_teachers = {identity.teacher_cell(settings).fingerprint: settings for settings in configs[:-1]}
    frozen = dict(zip(of_teachers, bench.teachers.values(), strict=True))  # untrained they are equal
    if group == "teachers":
        learners = [build.learner(settings, identity.teacher_cell(settings)) for settings in of_teachers.values()]
    else:
        learners = [build.learner(settings, identity.cell(settings)) for settings in configs]
    for learner in learners:
        placed(learner.trained, compute)
        learner.can_save = True
        learner.epochs = learner.patience = options.epochs + 2
    ends: list[float] = []

    def ended(epochs: int) -> None:
        bench.synchronize()
        ends.append(time.monotonic())
        if len(ends) > 2 and session.left_s() < 2 * (ends[-1] - ends[-2]):
            for learner in learners:
                learner.is_pruned = True

    loop.fit(learners, teachers=frozen, feed=build.feed(configs[0], seed=0), compute=compute, after=ended)
    if failed := [learner.failure for learner in learners if learner.failure is not None]:
        raise failed[0]
    epoch_s = (ends[-1] - ends[1]) / (len(ends) - 2)  # the first ones warm up
    return {
        "epoch_s": epoch_s,
        "epochs_timed": len(ends) - 2,
        "projected_minutes": SPLITS * EPOCHS * epoch_s / 60,
        "of": f"{SPLITS} splits x {EPOCHS} epochs, {SPLITS * len(learners)} trainings, without start, stop and test",
    }


def lockstep(session: Session, precision: str) -> Figures:
    """Time a step of 12 cells in lockstep, of 12 Students alone and one by one; its memory and shares."""
    bench, learners = session.bench, session.learners(precision)
    bench.step_s(learners, precision)  # a warm-up
    if on_cuda := bench.compute.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    together_s = session.fastest_s(lambda: bench.step_s(learners, precision))
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None
    shares = bench.shares(learners, precision)
    students = bench.learners([bench.config("path=none", f"precision={precision}")] * len(GRID))
    bench.step_s(students, precision)
    students_s = session.fastest_s(lambda: bench.step_s(students, precision))
    apart_s = session.fastest_s(lambda: sum(bench.step_s([learner], precision) for learner in learners))
    return {
        "lockstep_s": together_s,
        "students_alone_s": students_s,
        "overhead_over_students_and_teachers": (together_s - shares["teachers"] - students_s) / students_s,
        "one_by_one_s": apart_s,
        "times_as_fast": apart_s / together_s,
        "images_per_s": len(GRID) * session.options.batch / together_s,
        "shares": shares,
        "peak_gib": peak_gib,
    }


def torchdistill(session: Session, precision: str) -> Figures:
    """Time a step of each of the 12 cells as torchdistill trains it, one by one; of fewer if the time is short."""
    if version_of("torchdistill") == "absent":
        return {"left_out": "torchdistill is not installed"}
    file = session.store / "torchdistill.json"
    limit_s = session.left_s() - LEAST_S / 2
    cells_s = torchdistill_step_s(session.bench, file, precision=precision, limit_s=limit_s)
    figures: Figures = {"cells_s": cells_s, "workers": json.loads(file.read_text())["workers"]}
    if len(cells_s) < len(GRID):
        return figures | {"left_out": f"no time was left for {len(GRID) - len(cells_s)} of {len(GRID)} cells"}
    return figures | {"one_by_one_s": sum(cells_s.values())}


def one_step(session: Session, precision: str) -> Figures:
    """Profile a step of 12 cells: kernels, their time, and how much of the step the device is busy."""
    on_cuda = session.bench.compute.device.type == "cuda"
    bench, learners = session.bench, session.learners(precision)
    bench.step_s(learners, precision)
    plain_s, steps = session.fastest_s(lambda: bench.step_s(learners, precision)), len(bench.feed.train)
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiled:
        bench.step_s(learners, precision)
    return {"step_s": plain_s, **busiest(profiled.events() or [], steps=steps, step_s=plain_s)}


def test_files(folder: Path = ROOT / "tests") -> list[Path]:
    """Return the files that hold tests for a GPU; others may import packages that are absent."""
    return sorted(file for file in folder.rglob("test_*.py") if "pytest.mark.gpu" in file.read_text(encoding="utf-8"))


def tests(session: Session) -> Figures:
    """Run the tests that need a GPU, with their output in pytest.log; other versions' warnings are no errors."""
    files = [str(file.relative_to(ROOT)) for file in test_files()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "-W", "default", "-p", "no:cacheprovider"]
    log = session.options.out.resolve().with_name("pytest.log")
    code = run_within(session.left_s() - LEAST_S / 4, [*command, *files], log)
    figures = {"files": files, "summary": log.read_text(encoding="utf-8").strip().splitlines()[-15:]}
    if code is None:
        return figures | {"error": "stopped, since the time was over"}
    return figures if code == 0 else figures | {"error": f"exit code {code}"}


def run_within(seconds: float, command: list[str], log: Path) -> int | None:
    """Run a command, with its output in a file; return its exit code, or None if it was stopped with its children."""
    with (
        log.open("w", encoding="utf-8") as output,
        subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as running,
    ):
        try:
            return running.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            return None


def study(session: Session) -> Figures:
    """Start the study of Table 4 with the overrides of the command line, or resume it; stop when the time is over."""
    options = session.options
    command = [sys.executable, "-m", "kdsweep", *STUDY, f"store={options.store}", *options.overrides]
    with subprocess.Popen(command) as running:
        try:
            running.wait(timeout=max(1.0, session.left_s() - SAVED_WITHIN_S))
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGTERM)  # it saves its state and ends
    shown = subprocess.run(
        [sys.executable, "-m", "kdsweep", "tables", "table4", "--store", str(options.store)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "command": " ".join(command[1:]),
        "is_done": running.returncode == 0,
        "table": (shown.stdout or shown.stderr).splitlines(),
    }


def parts(session: Session, stage: str) -> dict[str, Callable[[], Figures]]:
    """Return the parts of a stage by name, the most valuable first."""
    each = {"lockstep": lockstep, "profile": one_step, "torchdistill": torchdistill}
    if stage in each:
        return {precision: partial(each[stage], session, precision) for precision in session.options.precisions}
    if stage == "table4":
        return {group: partial(table4, session, group) for group in ("students", "teachers")}
    return {"all": partial({"tests": tests, "study": study}[stage], session)}


def run_stage(
    stage: str, each: dict[str, Callable[[], Figures]], session: Session, write: Callable[[str, str, Figures], None]
) -> None:
    """Run the parts of a stage; those that would not end in time, judged by the longest before, are left out."""
    needed_s = LEAST_S
    for name, part in each.items():
        start_s, left_s = time.monotonic(), session.left_s()
        if left_s < needed_s:
            write(stage, name, {"left_out": f"{max(0.0, left_s):.0f} s were left, {needed_s:.0f} s are needed"})
            continue
        try:
            figures = part()
        except Exception as error:  # the other parts still measure something
            figures = {"error": one_line(error)}
        took_s = time.monotonic() - start_s
        needed_s = max(needed_s, took_s)
        write(stage, name, figures | {"took_s": took_s})
        give_back_memory()


def compare(results: Figures) -> Figures:
    """Return what follows from several parts: the minutes of Table 4, and lockstep against torchdistill."""
    minutes = [part.get("projected_minutes") for part in results.get("table4", {}).values()]
    against = {}
    for precision, part in results.get("torchdistill", {}).items():
        together_s = results.get("lockstep", {}).get(precision, {}).get("lockstep_s")
        if together_s and "one_by_one_s" in part:
            against[precision] = part["one_by_one_s"] / together_s
    return {
        "table4_minutes": sum(minutes) if len(minutes) == 2 and all(minutes) else None,
        "lockstep_times_as_fast_as_torchdistill": against,
    }


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options and the names of the stages; end with a message if one is not allowed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated, in their order (%(default)s)")
    parser.add_argument("--study", action="store_true", help="instead, start the study or resume it")
    parser.add_argument("--store", type=Path, default=Path("multirun"), help="of the study (multirun)")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds in all (540)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=163, help="of the data set of Table 4 (163)")
    parser.add_argument("--teacher", default="resnext101", help="a file of conf/teacher")
    parser.add_argument("--student", default="mobilenetv3_small", help="a file of conf/student")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each cell by torchdistill (4)")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of which the fastest counts (5)")
    parser.add_argument("--epochs", type=int, default=5, help="timed for Table 4 (5)")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="comma-separated, in this order")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu.json"))
    parser.add_argument("overrides", nargs="*", help="of the study, such as data=busi data.root=FOLDER")
    options = parser.parse_args(arguments)
    stages, options.precisions = options.stages.split(","), options.precisions.split(",")
    for name, values, allowed in (("stages", stages, STAGES), ("precisions", options.precisions, PRECISIONS)):
        if unknown := set(values) - set(allowed):
            parser.error(f"--{name}: unknown {', '.join(sorted(unknown))}; allowed are {', '.join(allowed)}")
    if options.overrides and not options.study:
        parser.error(f"{' '.join(options.overrides)}: overrides are for --study")
    return options, ["study"] if options.study else [name for name in STAGES if name in stages]


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; return 1 if a part failed, 2 if nothing could be measured."""
    options, stages = parse(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results: Figures = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    try:
        results["machine"] = described(find_device(options.device))
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    results["settings"] = {name: str(value) for name, value in vars(options).items() if name != "overrides"}

    def write(stage: str, name: str, figures: Figures) -> None:
        results[stage][name] = figures
        results["compared"] = compare(results)
        write_json(options.out, results)
        sys.stdout.write(f"{stage} {name}: {json.dumps(figures, indent=1)}\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory() as folder:
        session = Session(options, Path(folder))
        for stage in stages:
            results[stage] = {}
            run_stage(stage, parts(session, stage), session, write)
    return int(any("error" in part for stage in stages for part in results[stage].values()))


if __name__ == "__main__":
    sys.exit(main())
