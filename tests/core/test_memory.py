"""Memory that can be taken: the least of the machine, its control groups and the limit of address space."""

import resource
from pathlib import Path

import pytest

from kdsweep.core.memory import available_memory

GIB = 2**30
NO_LIMIT_V1 = 9223372036854771712


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a machine of which 8 GiB are available, without control groups or limits."""
    write(tmp_path, "proc/meminfo", f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {8 * GIB // 1024} kB")
    write(tmp_path, "proc/self/statm", f"{GIB // resource.getpagesize()} 2 3")  # 1 GiB of addresses are in use
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return tmp_path


def write(root: Path, name: str, content: object) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(f"{content}\n")


def group_v2(root: Path, folder: str, *, limit: object, used: int, cache: int = 0) -> None:
    write(root, f"sys/fs/cgroup{folder}/memory.max", limit)
    write(root, f"sys/fs/cgroup{folder}/memory.current", used)
    write(root, f"sys/fs/cgroup{folder}/memory.stat", f"anon {used - cache}\ninactive_file {cache}")


def group_v1(root: Path, folder: str, *, limit: int, used: int, cache: int = 0) -> None:
    write(root, f"sys/fs/cgroup/memory{folder}/memory.limit_in_bytes", limit)
    write(root, f"sys/fs/cgroup/memory{folder}/memory.usage_in_bytes", used)
    write(root, f"sys/fs/cgroup/memory{folder}/memory.stat", f"cache 7\ntotal_inactive_file {cache}")


def test_without_groups_and_limits_it_is_what_the_machine_has(machine: Path) -> None:
    assert available_memory(machine) == 8 * GIB


def test_a_container_of_version_2_leaves_its_limit_less_what_cannot_be_dropped(machine: Path) -> None:
    write(machine, "proc/self/cgroup", "0::/")
    group_v2(machine, "", limit=4 * GIB, used=3 * GIB, cache=GIB)
    assert available_memory(machine) == 2 * GIB


def test_the_tightest_group_above_the_process_counts(machine: Path) -> None:
    write(machine, "proc/self/cgroup", "0::/slurm/job_7/step_0")
    group_v2(machine, "/slurm/job_7/step_0", limit="max", used=GIB)
    group_v2(machine, "/slurm/job_7", limit=3 * GIB, used=GIB)
    group_v2(machine, "/slurm", limit=6 * GIB, used=GIB)
    assert available_memory(machine) == 2 * GIB


@pytest.mark.parametrize("path", ["/docker/abc", "/of/the/host/that/is/not/mounted/here"])
def test_a_container_of_version_1_has_its_limit_at_its_path_or_at_the_top(machine: Path, path: str) -> None:
    write(machine, "proc/self/cgroup", f"5:cpu,cpuacct:/docker/abc\n4:memory:{path}\n0::/docker/abc")
    group_v1(machine, "", limit=NO_LIMIT_V1, used=GIB)
    assert available_memory(machine) == 8 * GIB
    group_v1(machine, "/docker/abc" if path == "/docker/abc" else "", limit=2 * GIB, used=2 * GIB, cache=GIB // 2)
    assert available_memory(machine) == GIB // 2


def test_an_exhausted_group_leaves_nothing(machine: Path) -> None:
    write(machine, "proc/self/cgroup", "0::/")
    group_v2(machine, "", limit=GIB, used=2 * GIB)
    assert available_memory(machine) == 0


def test_a_limit_of_address_space_leaves_what_is_not_in_use(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (3 * GIB, resource.RLIM_INFINITY))
    assert available_memory(machine) == pytest.approx(2 * GIB, abs=resource.getpagesize())


def test_this_machine_has_some() -> None:
    assert available_memory() > 0
