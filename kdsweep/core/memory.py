"""Memory that this process may still take: of the machine, of its container, under its own limit."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that can still be taken, file caches included.

    That is the least of what the machine has, what each control group above the process leaves (containers, SLURM's
    jobs) and what its limit of address space leaves (``ulimit -v``).

    Args:
        root: folder of ``proc`` and ``sys``.
    """
    return max(0, min([_of_machine(root), *_of_groups(root), *_of_limit(root)]))


def _of_machine(root: Path) -> int:
    try:
        values = dict(line.split(":") for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines())
        return 1024 * int(values["MemAvailable"].split()[0])
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(root: Path) -> list[int]:
    """Return what the memory control groups of version 1 or 2 leave, from the process's group up to the first."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        folder = top / path.lstrip("/")  # in a container it may be the path outside, of which only the top exists
        left += [_left_of(level, *names) for level in (folder, *folder.parents) if level.is_relative_to(top)]
    return [bytes_left for bytes_left in left if bytes_left is not None]


def _left_of(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """Return the bytes that a control group leaves, or None if it has no limit."""
    try:
        most, used = (int((group / name).read_text(encoding="ascii")) for name in (limit, usage))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return most - used + int(stat.get(cache, 0))
    except (OSError, ValueError):  # no such group, or a limit of "max"
        return None


def _of_limit(root: Path) -> list[int]:
    """Return what RLIMIT_AS leaves, as a list that is empty without a limit."""
    try:
        import resource  # not on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int((root / "proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        return []
    return [] if limit == resource.RLIM_INFINITY else [limit - pages * resource.getpagesize()]
