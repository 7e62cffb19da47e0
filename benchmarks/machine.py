"""The machine of a measurement: hardware, versions, date."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine(*distributions: str) -> dict[str, Any]:
    """Return processor, cores, versions and date; the version of a distribution that is not installed is "absent"."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in distributions},
        "date": time.strftime("%Y-%m-%d"),
    }


def version_of(distribution: str) -> str:
    """Return the version of a distribution, or "absent"."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "absent"
