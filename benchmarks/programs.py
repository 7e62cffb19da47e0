"""Programs that a benchmark starts: any, for its memory, and torchdistill's side of the comparison."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench import Bench

# Linux counts the memory of the process that starts a program as the program's own: a small one has to start it.
PEAK = (
    "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode; "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)


def run(command: list[str]) -> float:
    """Run a program to its end; GiB of the largest of its processes at its peak."""
    done = subprocess.run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return int(done.stdout) / 2**20


def torchdistill_step_s(
    bench: Bench, out: Path, *, precision: str = "fp32", limit_s: float | None = None
) -> dict[str, float]:
    """Return the median seconds per step of each cell as torchdistill trains it.

    The first step, a warm-up, is left out. Images, sizes, precision and device are those of ``bench``. With ``limit_s``
    the cells for which the time is too short are left out.
    """
    script = str(Path(__file__).with_name("torchdistill_cells.py"))
    arguments = ["--steps", str(bench.options.steps + 1), "--out", str(out)]
    if limit_s is not None:
        arguments += ["--limit", f"{limit_s:.0f}"]
    run([sys.executable, script, *arguments, *bench.overrides, f"precision={precision}"])
    timed = json.loads(out.read_text())["cells"]
    return {name: statistics.median(cell["step_seconds"][1:]) for name, cell in timed.items()}
