"""Servers of a test's own, all on 127.0.0.1: MLflow's, PostgreSQL below it, SLURM."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def until(happens: Callable[[], object], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(happens())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def serving(folder: Path, port: int, *, backend: str | None = None) -> Iterator[None]:
    """An MLflow server, up until the end of the context."""
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", backend or f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder)]
    with (folder / "server.log").open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        assert until(lambda: answers(port), 120), (folder / "server.log").read_text()[-2000:]
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of Debian's package with an empty database; gives its address for MLflow."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not versions:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    programs = versions[-1].parent
    user = "postgres" if getpass.getuser() == "root" else None  # it does not run as root
    folder, port = Path(tempfile.mkdtemp(prefix="kdsweep-postgres-")), free_port()
    if user:
        shutil.chown(folder, user, user)
    data = folder / "data"
    options = {"cwd": folder, "user": user, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(
        [programs / "initdb", "-D", data, "-A", "trust", "-U", "kdsweep", "--no-sync"], check=True, **options
    )
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", "", "-c", "fsync=off"]
    process = subprocess.Popen([programs / "postgres", "-D", data, *options], **options)
    try:
        assert until(lambda: answers(port), 60)
        yield f"postgresql+psycopg://kdsweep@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder)


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A SLURM of this machine alone, two CPUs, from Debian's packages; gives what its commands need around them."""
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: munge slurmctld slurmd slurm-client)")
    host, ports = socket.gethostname().partition(".")[0], (free_port(), free_port())
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf = {
        "ClusterName": "loopback",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": ports[0],
        "SlurmdPort": ports[1],
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket",
        "SlurmUser": getpass.getuser(),
        "SlurmdUser": getpass.getuser(),
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "ReturnToService": 2,
        "SchedulerParameters": "batch_sched_delay=1,sched_interval=2,requeue_delay=1",
        "MpiDefault": "none",
        "KillWait": 5,
        "NodeName": f"{host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN",
        "PartitionName": f"debug Nodes={host} Default=YES MaxTime=INFINITE State=UP",
    }
    (folder / "slurm.conf").write_text("".join(f"{key}={value}\n" for key, value in conf.items()))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    places = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *places],
        ["slurmctld", "-D", "-L", folder / "slurmctld.log"],
        ["slurmd", "-D", "-N", host, "-L", folder / "slurmd.log"],
    ]
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    processes = []
    try:
        for command in commands:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            processes.append(subprocess.Popen(command, env=environment, **quiet))
            assert until(lambda: (folder / "munge.socket").exists(), 20)
        question = ["sinfo", "--noheader", "--format=%T"]
        assert until(lambda: b"idle" in subprocess.run(question, env=environment, capture_output=True).stdout, 60)
        yield environment
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)
