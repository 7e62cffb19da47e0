"""How fast lockstep is: against one cell at a time, against torchdistill, and against the bare cost of the Students.

    make bench                                    # on this machine, about 20 minutes on two CPU cores
    python benchmarks/bench.py --help

All sides are timed in one run, turn and turn about, and compared by medians: machines are noisy, ratios less so. The
networks are the paper's, untrained, for their weights do not change the time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import machine
from programs import run, torchdistill_step_s

from kdsweep.config import composition, identity
from kdsweep.config.schema import Settings
from kdsweep.core.device import placed
from kdsweep.data.loaders import Feed
from kdsweep.models import networks
from kdsweep.models.networks import Network
from kdsweep.store import cell_folder, checkpoint
from kdsweep.training import build, loop
from kdsweep.training.learner import Learner
from kdsweep.training.meter import EpochMeter

GRID = [
    [f"path={path}", f"loss={loss}", f"teacher_aug={view}"]
    for path in ("L", "H", "HR")
    for loss in ("mse", "kld")
    for view in ("strong", "weak")
]
SWEEP = ["-m", "path=L,H,HR", "loss=mse,kld", "teacher_aug=strong,weak"]
COUNTS = (1, 2, 4, 8, 12)
LOCKSTEP = {  # the rows of 12 cells that differ in precision: (of Students, of Teachers)
    "fp32": ("fp32", "fp32"),
    "bf16": ("fp32", "bf16"),
    "all bf16": ("bf16", "bf16"),
}


class Bench:
    """The 12 cells of one split with what they share, and a clock.

    Args:
        options: of the command line.
        store: folder for runs and images.
        images: number of phantoms; by default as many as fill ``options.steps`` batches.
    """

    def __init__(self, options: argparse.Namespace, store: Path, *, images: int | None = None) -> None:
        self.options, self.store = options, store
        steps_images = options.steps * options.batch
        count = images or next(n for n in itertools.count(4) if n - round(0.2 * n) - round(0.16 * n) >= steps_images)
        self.overrides = [
            *(f"store={store}", f"data.count={count}", f"image_size={options.image_size}", "weights=none"),
            *(f"teacher={options.teacher}", f"student={options.student}"),
            *(f"train.batch_size={options.batch}", f"device={options.device}"),
            *("train.epochs=1", "train.lr=1e-4", "train.last_batch=fill"),  # all batches have one size
        ]
        self.configs = [self.config(*cell) for cell in GRID]
        self.student = self.config("path=none")
        self.feed: Feed = build.feed(self.student, seed=0)
        if images is None and self.feed.train.image_count != steps_images:
            raise ValueError(f"no data set has {steps_images} training images: another --steps or --batch is needed")
        self.compute = build.compute(self.student)
        self.teachers = self._teachers()
        self._frozen: dict[str, loop.FrozenTeachers] = {}  # by the Students' precision
        self.epoch = 0

    def config(self, *overrides: str) -> Settings:
        """Compose a cell."""
        return composition.compose([*self.overrides, *overrides])

    def _teachers(self) -> dict[str, Network]:
        """Untrained Teachers, put into the store as if they had been trained."""
        frozen: dict[str, Network] = {}
        for settings in self.configs:
            cell = identity.teacher_cell(settings)
            if cell.fingerprint not in frozen:
                network = build.teacher_network(settings)
                checkpoint.save_network(cell.folder / "teacher.safetensors", network)
                cell_folder.write_finished(cell.folder, values={"test/dice": 0.0}, files=["teacher.safetensors"])
                frozen[cell.fingerprint] = networks.freeze(placed(network, self.compute))
        return frozen

    def learners(self, configs: list[Settings]) -> list[Learner]:
        """Make new learners on the device."""
        made = [build.learner(settings, identity.cell(settings)) for settings in configs]
        for learner in made:
            placed(learner.trained, self.compute)
        return made

    def step_s(self, learners: list[Learner], precision: str = "fp32") -> float:
        """Return the seconds per step of one epoch of a group in the Students' precision."""
        frozen = self._frozen_in(precision)
        frozen.compute.prepare()  # the flags of the process may be those of another precision
        self.epoch += 1
        for learner in learners:
            learner.means = EpochMeter()  # a new epoch begins
        self.synchronize()
        start = time.perf_counter()
        loop.train_epoch(learners, self.epoch, frozen=frozen, feed=self.feed, compute=frozen.compute)
        self.synchronize()
        if failed := [learner.failure for learner in learners if learner.failure is not None]:
            raise failed[0]
        return (time.perf_counter() - start) / len(self.feed.train)

    def _frozen_in(self, precision: str) -> loop.FrozenTeachers:
        """Return the Teachers by the names that cells of a precision have for them: untrained they are the same."""
        if precision not in self._frozen:
            configs = [self.config(*cell, f"precision={precision}") for cell in GRID]
            names = dict.fromkeys(identity.teacher_cell(settings).fingerprint for settings in configs)
            teachers = dict(zip(names, self.teachers.values(), strict=True))
            self._frozen[precision] = loop.FrozenTeachers(teachers, build.compute(configs[0]))
        return self._frozen[precision]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.compute.device.type == "cuda":
            torch.cuda.synchronize(self.compute.device)

    def shares(self, learners: list[Learner], precision: str = "fp32") -> dict[str, float]:
        """Return the seconds per step by what they are spent on."""
        spent = {"students": 0.0, "teachers": 0.0, "data": 0.0}
        with (
            self._clocked(loop, "_step", spent, "students"),
            self._clocked(loop.FrozenTeachers, "teach", spent, "teachers"),
            self._clocked(loop, "normalize", spent, "data"),
            self._clocked_loader(spent),
        ):
            total = self.step_s(learners, precision)
        shares = {name: seconds / len(self.feed.train) for name, seconds in spent.items()}
        return {**shares, "rest": total - sum(shares.values()), "total": total}

    @contextmanager
    def _clocked(self, owner: Any, name: str, spent: dict[str, float], label: str) -> Iterator[None]:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.synchronize()
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            self.synchronize()
            spent[label] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)
        yield
        setattr(owner, name, inner)

    @contextmanager
    def _clocked_loader(self, spent: dict[str, float]) -> Iterator[None]:
        inner = self.feed.train.epoch

        def timed(number: int, *, first: int = 0) -> Iterator[Any]:
            batches = inner(number, first=first)
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                spent["data"] += time.perf_counter() - start
                if batch is None:
                    return
                yield batch

        self.feed.train.epoch = timed
        yield
        self.feed.train.epoch = inner

    def command(self, *more: str, store: Path) -> tuple[float, float]:
        """Run the 12 cells as a user does; seconds from start to end, and GiB of the largest process at its peak."""
        overrides = [each for each in self.overrides if not each.startswith("store=")]
        start = time.perf_counter()
        gib = run([sys.executable, "-m", "kdsweep", *SWEEP, *overrides, f"store={store}", *more])
        return time.perf_counter() - start, gib


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures; times in seconds per step unless the name says otherwise."""
    bench = Bench(options, folder / "store")
    groups: dict[str, tuple[list[Learner], str]] = {}
    for row, (precision, teachers) in LOCKSTEP.items():
        both = [f"precision={precision}", f"kd.teacher_precision={teachers}"]
        groups[row] = bench.learners([bench.config(*cell, *both) for cell in GRID]), precision
    fp32, _ = groups["fp32"]
    (alone,) = bench.learners([bench.student])
    turns: dict[str, list[float]] = {}
    shares: dict[str, list[dict[str, float]]] = {row: [] for row in groups}
    commands: dict[str, list[tuple[float, float]]] = {"lockstep": [], "basic": []}
    rival: list[dict[str, float]] = []

    def turn(name: str, seconds: float) -> None:
        turns.setdefault(name, []).append(seconds)
        sys.stderr.write(f"{name}: {seconds:.2f} s\n")

    for learners, precision in [*groups.values(), ([alone], "fp32")]:
        bench.step_s(learners, precision)  # a warm-up
    for number in range(options.rounds):
        for count in COUNTS:
            turn(f"lockstep {count}", bench.step_s(fp32[:count]))
        for row in ("bf16", "all bf16"):
            turn(f"lockstep {row}", bench.step_s(*groups[row]))
        turn("one by one", sum(bench.step_s([learner]) for learner in fp32))
        turn("student", bench.step_s([alone]))
        for row, group in groups.items():
            shares[row].append(bench.shares(*group))
        for launcher, measured in commands.items():
            store = folder / f"{launcher}{number}"
            _share(folder / "store", store)
            measured.append(bench.command(f"hydra/launcher={launcher}", store=store))
            turn(f"command {launcher}", measured[-1][0])
        if options.teacher.startswith("res"):  # its hooks name a ResNet's layers
            rival.append(torchdistill_step_s(bench, folder / "torchdistill.json"))
            turn("torchdistill", sum(rival[-1].values()))
    medians = {name: statistics.median(values) for name, values in turns.items()}
    return {
        "settings": {
            **{name: value for name, value in vars(options).items() if name != "out"},
            "steps_per_epoch": len(bench.feed.train),
        },
        "machine": described(bench.compute.device),
        "median": medians,
        "all": turns,
        "shares": {
            row: {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
            for row, rounds in shares.items()
        },
        "peak_gib": {launcher: max(gib for _, gib in runs) for launcher, runs in commands.items()},
        "peak_cuda_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "torchdistill_cells": rival,
    }


def _share(source: Path, store: Path) -> None:
    """Give a new store the images and Teachers of another one."""
    store.mkdir()
    for name in ("phantoms", "teachers"):
        (store / name).symlink_to(source.resolve() / name, target_is_directory=True)


def described(device: torch.device) -> dict[str, Any]:
    """Return the machine with its device and threads."""
    names = ("torch", "torchvision", "timm", "torchdistill", "hydra-core", "mlflow", "mlflow-skinny")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {**machine(*names), "threads": torch.get_num_threads(), "device": name}


def report(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    settings, host, median = figures["settings"], figures["machine"], figures["median"]
    fp32 = median["lockstep 12"]
    lines = [
        f"{settings['image_size']} x {settings['image_size']} pixels, batch {settings['batch']}, Teacher "
        f"{settings['teacher']}, Student {settings['student']}, "
        f"{host['device']} ({host['cpu']}, {host['threads']} threads), PyTorch {host['torch']}, "
        f"torchdistill {host['torchdistill']}, {host['date']}; medians of {settings['rounds']} rounds",
        "",
        "| 12 cells of one split | seconds | times as fast as lockstep, fp32 | as fast as torchdistill |",
        "| --- | ---: | ---: | ---: |",
    ]
    rival = median.get("torchdistill")
    rows = {
        **({"torchdistill, one by one, per step": rival} if rival else {}),
        "kdsweep, one by one, per step": median["one by one"],
        "kdsweep, lockstep, per step": fp32,
        "kdsweep, lockstep, bf16 Teachers, per step": median["lockstep bf16"],
        "kdsweep, lockstep, Students and Teachers bf16, per step": median["lockstep all bf16"],
    }
    for name, seconds in rows.items():
        against_rival = f"{rival / seconds:.2f}" if rival else ""
        lines.append(f"| {name} | {seconds:.2f} | {fp32 / seconds:.2f} | {against_rival} |")
    commands = {name: median[f"command {name}"] for name in ("basic", "lockstep")}
    for name, seconds in commands.items():
        steps = settings["steps_per_epoch"]
        label = f"the whole command of {steps} steps with start, validation and test, hydra/launcher={name}"
        lines.append(f"| {label} | {seconds:.1f} | {commands['lockstep'] / seconds:.2f} | |")
    lines += [
        "",
        "| cells in the group | seconds per step | per cell | each further cell |",
        "| ---: | ---: | ---: | ---: |",
    ]
    before: tuple[int, float] | None = None
    for count in COUNTS:
        seconds = median[f"lockstep {count}"]
        further = f"{(seconds - before[1]) / (count - before[0]):.2f}" if before else ""
        lines.append(f"| {count} | {seconds:.2f} | {seconds / count:.2f} | {further} |")
        before = count, seconds
    lines += [
        f"| a Student alone, no Teacher | {median['student']:.2f} | {median['student']:.2f} | |",
        "",
        "| share of a step of 12 cells | Students | Teachers | data | rest | all but Students / Students |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, parts in figures["shares"].items():
        shown = " | ".join(f"{parts[name] / parts['total']:.1%}" for name in ("students", "teachers", "data", "rest"))
        over = (parts["total"] - parts["students"]) / parts["students"]
        students, teachers = LOCKSTEP[row]
        lines.append(f"| {students} Students, {teachers} Teachers | {shown} | {over:.2f} |")
    peak = figures["peak_gib"]
    lines += ["", f"Largest process: {peak['lockstep']:.2f} GiB in lockstep, {peak['basic']:.2f} GiB one by one."]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--teacher", default="resnext101", help="a file of conf/teacher")
    parser.add_argument("--student", default="mobilenetv3_small", help="a file of conf/student")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=2, help="steps of an epoch, the unit that is timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("multirun/bench.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    sys.stdout.write(report(figures) + "\n")


if __name__ == "__main__":
    main()
