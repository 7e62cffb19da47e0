"""Kills a sweep at random moments, starts it again until it is finished, and compares it with an unbroken one.

    make chaos                                                   # 20 kills, about 15 minutes on two CPU cores
    python tests/chaos.py --kills 3 --seed 7 path=none,HR profile=quick
    python tests/chaos.py --kills 40 --longest 9                 # kills during the start alone

The seed gives the kinds and moments of the kills. Moments are seconds on the clock: a seed repeats a run as closely as
the machine repeats its own pace, not to the step.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlflow.entities import Run, ViewType

from kdsweep import cli
from kdsweep.core.files import file_digest
from kdsweep.tracking import mirror

GRID = ["path=none,L,H,HR", "loss=mse,kld", "teacher_aug=weak,strong", "profile=quick", "device=cpu"]
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
KINDS = ("launcher", "child", "all", *SIGNALS)  # the first three by SIGKILL
BIRTH = (
    "birth"  # of all, by SIGKILL, while the database comes into being: once per store, so drawn moments seldom meet it
)
COMPARED = ("student.safetensors", "teacher.safetensors", "history.csv", "test_scores.csv", "test_predictions.npz")
LEFTOVERS = (".*.part", ".making-*", "checkpoint.previous.pt", "failed.json")

EARLIEST_S = 1.0
BIRTH_S = 1.0
FINISHED_S = 3.0  # what the command takes that finds everything finished
RESUME_S = 8.0  # after the death of a child, whose cells resume in halves; then the command is stopped
END_WITHIN_S = 60.0  # after a signal
RUN_WITHIN_S = 7200.0
SHOWN = 20  # differences

Contents = dict[str, str]


class DifferenceError(Exception):
    """The killed sweep does not do what an unbroken one does: one line."""


@dataclass(frozen=True)
class Kill:
    """One of those to come.

    Attributes:
        number: from 1.
        kind: BIRTH or one of KINDS.
        moment: share of the time in which it may happen, 0 to 1.
    """

    number: int
    kind: str
    moment: float


def draw(count: int, *, seed: int) -> list[Kill]:
    """One at the birth of the store, then kills of all kinds in turn, each turn in an order of its own."""
    rng = random.Random(seed)
    kinds = [BIRTH, *(kind for _ in range(0, count, len(KINDS)) for kind in rng.sample(KINDS, len(KINDS)))]
    return [Kill(number, kind, rng.random()) for number, kind in enumerate(kinds[:count], start=1)]


@dataclass(frozen=True)
class Sweep:
    """A command and the store that it fills.

    Attributes:
        overrides: of the sweep, without the store.
        store: a folder; the command's output goes to ``logs`` beside it.
        started: process ids of the commands so far, each of which leads a session.
        saved: epochs that each folder was seen to hold.
    """

    overrides: list[str]
    store: Path
    started: list[int] = field(default_factory=list)
    saved: Counter[str] = field(default_factory=Counter)

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Type the command once more."""
        command = [sys.executable, "-m", "kdsweep", "-m", *self.overrides, f"store={self.store}"]
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.started.append(process.pid)
        return process

    def run(self, name: str, *, look: Callable[[], None] = lambda: None) -> float:
        """Type the command and let it run to its end; the seconds that it took."""
        process, start_s = self.start(name), time.monotonic()
        while ends_within(process, 0.2) is None:
            look()
            if time.monotonic() - start_s > RUN_WITHIN_S:
                raise DifferenceError(f"{name}: the command did not end within {RUN_WITHIN_S:.0f} s")
        self.expect(process.returncode, {0}, name)
        return time.monotonic() - start_s

    def expect(self, code: int, allowed: set[int], name: str) -> None:
        """Raise DifferenceError for an exit code that is not allowed."""
        if code not in allowed:
            lines = self._log(name).read_text(errors="replace").strip().splitlines() or ["(no output)"]
            expected = " or ".join(map(str, sorted(allowed)))
            raise DifferenceError(
                f"{name}: exit code {code} instead of {expected}; {self._log(name)}: {lines[-1][:300]}"
            )

    def _log(self, name: str) -> Path:
        folder = self.store.parent / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"

    def begun(self) -> bool:
        """Whether training has begun."""
        return any(self.store.glob("*/*/cell.json"))

    def finished(self) -> int:
        """How many cells and Teachers are finished."""
        return len(list(self.store.glob("*/*/finished.json")))

    def state(self) -> str:
        """What the store holds, in words."""
        cells, teachers = (len(list(self.store.glob(f"{part}/*/finished.json"))) for part in ("cells", "teachers"))
        return f"{cells} cells and {teachers} Teachers finished, {self.saved.total()} epochs saved"

    def check_saved(self, name: str) -> None:
        """Raise DifferenceError if a folder holds fewer epochs than before."""
        for file in self.store.glob("*/*/progress.json"):
            folder, epochs = str(file.parent), len(json.loads(file.read_text())["history"])
            if epochs < self.saved[folder]:
                raise DifferenceError(f"{name}: {folder}: {self.saved[folder]} epochs were saved, now it has {epochs}")
            self.saved[folder] = epochs

    def left(self) -> list[int]:
        """Processes of all commands so far that are still there."""
        return [pid for session in self.started for pid in members(session)]

    def end(self) -> None:
        """Kill what is left of the commands."""
        for session in self.started:
            if members(session):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(session, signal.SIGKILL)


# ---- processes ------------------------------------------------------------------------------------------------------


def ends_within(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code of a process that ends within this time, else None."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


def members(session: int) -> list[int]:
    """Processes of a session, without those that have ended and were not asked for their exit code."""
    pids = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session_of, *_ = file.read_text().rpartition(")")[2].split()
            if state != "Z" and int(session_of) == session:
                pids.append(int(file.parent.name))
    return pids


def workers(pid: int) -> list[int]:
    """Processes of a launcher that compute: the children of its server."""
    computing = []
    for server in children(pid):
        with contextlib.suppress(OSError):
            if b"forkserver" in Path(f"/proc/{server}/cmdline").read_bytes():
                computing += children(server)
    return computing


def children(pid: int) -> list[int]:
    """Children of all threads of a process."""
    numbers = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            numbers += [int(number) for number in file.read_text().split()]
    return numbers


def catches_signals(pid: int) -> bool:
    """Whether the program has said by now what SIGTERM does."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def strike(kind: str, process: subprocess.Popen[bytes]) -> None:
    """Kill what the kind says; a child is waited for if there is none yet."""
    if kind == "launcher":
        process.kill()
    elif kind in ("all", BIRTH):
        os.killpg(process.pid, signal.SIGKILL)
    elif kind == "child":
        while not (processes := workers(process.pid)) and ends_within(process, 0.05) is None:
            pass
        for pid in processes[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    else:
        process.send_signal(SIGNALS[kind])


# ---- killing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """Of an unbroken sweep.

    Attributes:
        start_s: until training begins.
        whole_s: until all is finished.
        folders: finished cells and Teachers.
    """

    start_s: float
    total_s: float
    folders: int

    def longest_s(self, kills: Sequence[Kill]) -> float:
        """The latest moment of a kill for which so many starts, ended in [EARLIEST_S, this], train as long in all.

        With s the start, m the training per start and 1 the earliest: (D - s)^2 = 2 m (D - 1), D >= s.
        """
        resumed_s = RESUME_S * sum(kill.kind == "child" for kill in kills)
        share = max(self.total_s - self.start_s - resumed_s, 0.0) / len(kills)
        root = math.sqrt(share**2 + 2 * share * max(self.start_s - EARLIEST_S, 0.0))
        return min(self.start_s + share + root, self.total_s)


def unbroken(sweep: Sweep) -> Pace:
    """Run a sweep without interruption."""
    begun_s, start_s = [], time.monotonic()

    def look() -> None:
        if not begun_s and sweep.begun():
            begun_s.append(time.monotonic() - start_s)

    total_s = sweep.run("unbroken", look=look)
    return Pace(begun_s[0] if begun_s else total_s, total_s, sweep.finished())


def perform(sweep: Sweep, kill: Kill, *, longest_s: float, folders: int) -> tuple[str, str]:
    """Start the sweep and kill it; the kind that it came to, and a line about it.

    A command that ends by itself before is repeated: now everything is finished, and the kill comes sooner.
    """
    name, latest_s = f"{kill.number:02d}-{kill.kind}", FINISHED_S
    while True:
        kind, delay_s = kill.kind, EARLIEST_S + kill.moment * (longest_s - EARLIEST_S)
        if complete := sweep.finished() == folders:
            kind = "all" if kind == "child" else kind  # nothing is computed, so there is none
            latest_s, delay_s = 0.8 * latest_s, kill.moment * latest_s
        process, start_s = sweep.start(name), time.monotonic()
        if kind == BIRTH:
            delay_s = until_birth_s(process, sweep.store) + kill.moment * BIRTH_S
        code = ends_within(process, start_s + delay_s - time.monotonic())
        if code is None:
            break
        sweep.expect(code, {0}, name)
        if not complete and sweep.finished() != folders:
            raise DifferenceError(f"{name}: exit code 0, but {sweep.state()}")
    allowed = exit_codes(kind, caught=catches_signals(process.pid))
    strike(kind, process)
    struck_s = time.monotonic()
    code = ends_within(process, RESUME_S if kind == "child" else END_WITHIN_S)
    if code is None and kind == "child":
        allowed |= exit_codes("SIGTERM", caught=True)
        strike("SIGTERM", process)
        code = ends_within(process, END_WITHIN_S)
    if code is None:
        raise DifferenceError(f"{name}: the command did not end within {END_WITHIN_S:.0f} s")
    allowed |= {0} if kind == "child" and sweep.finished() == folders else set()
    sweep.expect(code, allowed, name)
    sweep.check_saved(name)
    took_s, after_s = time.monotonic() - struck_s, struck_s - start_s
    line = f"{kill.number:3d}  {kind:8s} after {after_s:5.1f} s: {sweep.state()}; exit code {code} {took_s:.1f} s later"
    return kind, line


def until_birth_s(process: subprocess.Popen[bytes], store: Path) -> float:
    """Seconds until the database of the store, or what becomes it, is there."""
    start_s = time.monotonic()
    while not any(store.glob("*mlflow.db*")) and ends_within(process, 0.01) is None:
        pass
    return time.monotonic() - start_s


def exit_codes(kind: str, *, caught: bool) -> set[int]:
    """Those that are allowed after a kill.

    Args:
        kind: of it.
        caught: whether the program had its handlers of signals in place: not in its first moments, nor in its last.
    """
    if kind == "child":
        return {1}
    if kind in SIGNALS:
        return {128 + SIGNALS[kind]} if caught else {128 + SIGNALS[kind], -SIGNALS[kind]}
    return {-signal.SIGKILL}


# ---- comparing ------------------------------------------------------------------------------------------------------


def contents(store: Path) -> Contents:
    """All of a store that an interruption must not change, by name: files, tables, MLflow."""
    values = dict(_tables(store))
    for file in sorted(store.rglob("*")):
        name = file.relative_to(store)
        if file.is_file() and name.parts[0] not in ("artifacts", "tables"):
            values[f"file {name}"] = file_digest(file) if file.name in COMPARED else "there"
    return values | dict(_runs(store))


def _tables(store: Path) -> Iterator[tuple[str, str]]:
    for which in ("table3", "table4"):
        with contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(["tables", which, "--store", str(store)])
        file = store / "tables" / f"{which}.csv"
        yield f"{which}.csv", file_digest(file) if code == 0 else f"exit code {code}"


def _runs(store: Path) -> Iterator[tuple[str, str]]:
    client = mirror.MlflowClient(tracking_uri=mirror.store_uri(store, None))
    experiment = client.get_experiment_by_name(mirror.EXPERIMENT)
    everything = client.search_runs([experiment.experiment_id], "", ViewType.ALL, max_results=10_000)
    runs = [run for run in everything if run.info.lifecycle_stage == "active"]  # what a kill left behind is deleted
    runs.sort(key=lambda run: run.info.start_time)
    names = [f"run {run.info.run_name} {run.data.tags.get('kdsweep.fingerprint', '')[:10]}".strip() for run in runs]
    for name, count in Counter(names).items():
        yield f"{name}, how many", str(count)
    seen: Counter[str] = Counter()
    for name, run in zip(names, runs, strict=True):
        seen[name] += 1
        label = name if seen[name] == 1 else f"{name} again"
        for key, value in _run(client, run, store):
            yield f"{label}, {key}", value
    strays = {folder.name for folder in store.glob("artifacts/*")} - {run.info.run_id for run in everything}
    yield "artifacts of no run", ", ".join(sorted(strays))


def _run(client: mirror.MlflowClient, run: Run, store: Path) -> Iterator[tuple[str, str]]:
    yield "status", f"{run.info.status}, {run.info.lifecycle_stage}"
    for key, value in run.data.params.items():
        if key != "store":  # its last name, by which the two stores differ
            yield f"param {key}", value
    for key, value in run.data.tags.items():
        if key.startswith("kdsweep."):
            yield f"tag {key}", value.replace(str(store), "STORE")
    for key in run.data.metrics:
        steps: dict[int, list[str]] = {}
        for point in client.get_metric_history(run.info.run_id, key):
            steps.setdefault(point.step, []).append(repr(point.value))
        for step, values in steps.items():
            yield f"metric {key}, step {step}", " and ".join(values)
    for artifact in client.list_artifacts(run.info.run_id):
        file = store / "artifacts" / run.info.run_id / "artifacts" / artifact.path
        if artifact.path == mirror.SWEEP_FILE:  # with the commands, which name the store
            yield f"artifact {artifact.path}", file.read_text().replace(str(store), "STORE")
        else:
            yield f"artifact {artifact.path}", file_digest(file)


def faults(contents: Contents) -> Iterator[str]:
    """What no store may hold, killed or not."""
    for name, value in contents.items():
        if name.startswith("file ") and any(part.match(mark) for part in _parts(name) for mark in LEFTOVERS):
            yield f"{name}: left over"
        if name.endswith(", status") and value != "FINISHED, active":
            yield f"{name}: {value}"
        if name.endswith(", how many") and value != "1":
            yield f"{name}: {value} instead of 1"
        if ", metric " in name and " and " in value:
            yield f"{name}: more than once, {value}"


def _parts(name: str) -> list[Path]:
    return [Path(part) for part in Path(name.removeprefix("file ")).parts]


def differences(before: Contents, after: Contents) -> Iterator[str]:
    """What two stores do not have in common, a line each."""
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name, "missing"), after.get(name, "missing")
        if one != other:
            yield f"{name}: {one[:80]} in the unbroken store, {other[:80]} in the killed one"


# ---- the whole ------------------------------------------------------------------------------------------------------


def tell(line: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def compare(calm: Sweep, killed: Sweep) -> list[str]:
    """All that is wrong in the end, a line each."""
    deadline_s = time.monotonic() + END_WITHIN_S
    while (left := [*calm.left(), *killed.left()]) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    wrong = [f"process {pid} is still there" for pid in left]
    before, after = contents(calm.store), contents(killed.store)
    wrong += [f"unbroken store: {fault}" for fault in faults(before)]
    wrong += [f"killed store: {fault}" for fault in faults(after)]
    return wrong + list(differences(before, after))


def chaos(calm: Sweep, killed: Sweep, *, kills: list[Kill], longest_s: float | None) -> tuple[Counter[str], list[str]]:
    """Run both sweeps; kills by kind, and all that is wrong in the end."""
    pace = unbroken(calm)
    calm.check_saved("unbroken")
    longest_s = longest_s or pace.longest_s(kills)
    tell(
        f"unbroken: {calm.state()} in {pace.total_s:.0f} s, training from {pace.start_s:.0f} s on; "
        f"kills after {EARLIEST_S:.0f} to {longest_s:.0f} s"
    )
    kinds: Counter[str] = Counter()
    for kill in kills:
        kind, line = perform(killed, kill, longest_s=longest_s, folders=pace.folders)
        kinds[kind] += 1
        tell(line)
    for name in ("to-the-end", "once-more"):
        took_s = killed.run(name)
        killed.check_saved(name)
        tell(f"{name}: {took_s:.0f} s, {killed.state()}")
    return kinds, compare(calm, killed)


def read_options(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and the sweep's overrides."""
    parser = argparse.ArgumentParser(
        usage="python tests/chaos.py [options] [overrides of the sweep]",
        description="Kill a sweep again and again; in the end it must equal an unbroken one.",
        epilog=f"overrides: {' '.join(GRID)} unless given",
        allow_abbrev=False,
    )
    parser.add_argument("--kills", type=int, default=20, help="how many (20)")
    parser.add_argument("--seed", type=int, help="of kinds and moments (drawn)")
    parser.add_argument("--longest", type=float, help="seconds until the latest kill (so that the kills fill a sweep)")
    parser.add_argument("--folder", type=Path, help="empty or new, for stores and logs; it is kept (a temporary one)")
    options, overrides = parser.parse_known_args(argv)
    if options.folder is not None and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"--folder {options.folder}: not empty")
    if options.kills < 1:
        parser.error(f"--kills {options.kills}: it must be 1 or more")
    return options, [part for part in overrides if part not in ("-m", "--multirun")] or GRID


def main(argv: list[str] | None = None) -> int:
    """0 if the killed sweep equals the unbroken one, else 1."""
    options, overrides = read_options(argv)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    tell(f"seed {seed}, {options.kills} kills: {' '.join(overrides)}")
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdsweep-chaos-")))
        calm, killed = (Sweep(overrides, folder.resolve() / name) for name in ("unbroken", "killed"))
        stack.callback(calm.end)
        stack.callback(killed.end)
        start_s, kills = time.monotonic(), draw(options.kills, seed=seed)
        try:
            kinds, wrong = chaos(calm, killed, kills=kills, longest_s=options.longest)
        except DifferenceError as error:
            tell(f"seed {seed}: {error}")
            return 1
    for line in wrong[:SHOWN]:
        tell(f"seed {seed}: {line}")
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    outcome = f"{len(wrong)} differences to" if wrong else "equal to"
    tell(f"{kinds.total()} kills ({counts}) in {time.monotonic() - start_s:.0f} s: {outcome} the unbroken sweep")
    return 1 if wrong else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # else the sweep would outlive it
    raise SystemExit(main())
