"""Compute a group on another machine of a cluster that shares folders, code and data with the submitting one."""

from __future__ import annotations

import logging
import os
import socket
import sys
import uuid
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdsweep.config import identity
from kdsweep.core import logs
from kdsweep.core.errors import CellError, InputError, one_line
from kdsweep.core.files import write_json
from kdsweep.sweep.executors import worker
from kdsweep.sweep.executors.executor import Result, Work
from kdsweep.tracking import database, sync

if TYPE_CHECKING:
    from kdsweep.config.schema import Settings
    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.plan import Job

IDENTITY = ".identity"
REMEDY = "put store, data and environment on a file system that all machines share, under the same name"


class RemoteWork:
    """A work to be done on another machine; the call returns its results, or its error for each of its jobs.

    The store, the images, the code and the Python environment must have the same paths on both machines, on a shared
    file system. The other machine checks that by the store's identity and by the cells' fingerprints, which depend on
    images and code.

    Args:
        work: what to compute.
        threads: number of CPU threads; another number gives other sums, so the machine must not choose it.
    """

    def __init__(self, work: Work, *, threads: int) -> None:
        self.work, self.threads = replace(work, waits=bool), threads
        self.identities = {cell.store: identify(cell.store) for cell in work.cells}
        self.folder, self.path, self.level = str(Path.cwd()), list(sys.path), logging.getLogger().level
        self._process: worker.Process | None = None

    def __call__(self) -> list[Result]:
        """Compute the group in a fresh process and keep MLflow in step with the cells' folders."""
        logs.to_screen(self.level)
        try:
            self._check()
            self._process = worker.Process(worker.compute, self.work)
            results: list[Result] = self._process.result()
        except (InputError, CellError) as error:
            results = [error] * len(self.work.jobs)
        except BaseException:
            self.stop()
            raise
        sync.close_all()
        return results

    def stop(self) -> None:
        """Make the process save its state and end, and update MLflow."""
        process, self._process = self._process, None
        if process is not None:
            worker.stop([process])
        sync.close_all()

    def _check(self) -> None:
        """Raise InputError if this machine sees other files than the submitting one; else start to log to MLflow."""
        from kdsweep.sweep import plan

        host = socket.gethostname()
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be entered on {host}: {one_line(error)}; {REMEDY}") from error
        sys.path[:] = [*self.path, *(entry for entry in sys.path if entry not in self.path)]
        os.environ |= {"OMP_NUM_THREADS": str(self.threads), "MPLBACKEND": "Agg"}
        for store, here in self.identities.items():
            if _read_identity(store) != here:
                raise InputError(f"store={store}: on {host} it is not the folder of the machine that submits; {REMEDY}")
        for job, cell in zip(self.work.jobs, self.work.cells, strict=True):
            of = identity.teacher_cell if cell.role == "teacher" else identity.cell
            if of(job.settings).fingerprint != cell.fingerprint:
                why = "the images or the code are not those of the machine that submits"
                raise InputError(f"{cell.title}: on {host} {why}; {REMEDY}")
        if self.work.is_requested:
            plan.watch(self.work.jobs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_process": None}


def identify(store: Path) -> str:
    """Return a store's identity, written at the first call: machines that read the same one share the folder."""
    if not (name := _read_identity(store)):
        store.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        write_json(store / IDENTITY, name)
    return name


def _read_identity(store: Path) -> str:
    try:
        return (store / IDENTITY).read_text(encoding="utf-8").strip('"\n ')
    except OSError:
        return ""


def preview_remote(jobs: list[Job], place: str, *, times: bool) -> Preview:
    """Check cells that other machines are to train, in a process with torch.

    Args:
        jobs: that stand for all that wait.
        place: name of these machines.
        times: whether to time a step on this machine all the same.

    Raises:
        InputError: one of them could not be trained.
    """
    from kdsweep.sweep import preview

    result: Preview = worker.Process(partial(preview.preview_remote, times=times), jobs, place).result()
    return result


def check_tracking(settings: Settings) -> None:
    """Raise InputError unless several machines can write to MLflow at once: SQLite cannot.

    Args:
        settings: of a cell.
    """
    uri = settings.tracking.uri
    where = database.store_uri(Path(settings.store), uri)
    if where.startswith("sqlite"):
        raise InputError(
            f"tracking.uri={uri}: workers on several machines cannot share the SQLite file {where[10:]}; "
            "start an MLflow server that all reach and name it, tracking.uri=http://HOST:5000"
        )


def check_least(options: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Raise InputError for the first option of the launcher that is below its least value."""
    for name, lowest in least.items():
        if options[name] is not None and options[name] < lowest:
            raise InputError(f"hydra.launcher.{name}={options[name]} is not allowed: it must be at least {lowest}")
