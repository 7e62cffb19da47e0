"""Memory that this process may still take: of the machine, of its container, and under its limit of address space."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that can still be taken, file caches included.

    That is the least of what the machine has, what each control group above the process leaves (containers, SLURM's
    jobs) and what its limit of address space leaves (``ulimit -v``). ``root`` has the folders ``proc`` and ``sys``.
    """
    try:
        of_machine = 1024 * int(_table(root / "proc/meminfo")["MemAvailable:"])
        used = int((root / "proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    of_limit = [] if limit == resource.RLIM_INFINITY else [limit - used]
    return max(0, min([of_machine, *of_limit, *_of_groups(root)]))


def _table(file: Path) -> dict[str, str]:
    return {fields[0]: fields[1] for line in file.read_text().splitlines() if len(fields := line.split()) > 1}


def _of_groups(root: Path) -> Iterator[int]:
    """Yield what the memory control groups of version 1 or 2 leave, from the process's group up to the first."""
    file = root / "proc/self/cgroup"
    for line in file.read_text().splitlines() if file.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, usage, cache = V1 if controllers else V2
        folder = top / path.lstrip("/")  # in a container it may be the path outside, of which only the top exists
        for group in (level for level in (folder, *folder.parents) if level.is_relative_to(top)):
            try:
                most, taken = int((group / limit).read_text()), int((group / usage).read_text())
                yield most - taken + int(_table(group / "memory.stat").get(cache, 0))
            except (OSError, ValueError):  # the group is absent, or its limit is "max"
                continue
