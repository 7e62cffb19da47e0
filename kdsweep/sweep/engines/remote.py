"""Run a group on another machine of a cluster that shares folders, code and data with the submitting one."""

from __future__ import annotations

import os
import signal
import socket
import sys
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
from hydra.core.singleton import Singleton
from omegaconf import DictConfig

from kdsweep.core.errors import CellError, InputError, one_line
from kdsweep.core.files import write_json
from kdsweep.sweep.engines import worker
from kdsweep.sweep.engines.engine import Unit
from kdsweep.tracking import database, sync

if TYPE_CHECKING:
    from kdsweep.config.schema import Settings
    from kdsweep.sweep.estimate import Preview

IDENTITY = ".identity"
REMEDY = "put store, data and environment on a file system that all machines share, under the same name"


class RemoteTask:
    """A unit to be called on another machine; the call returns the unit's result, or its error as a value.

    The store, the images, the code and the Python environment must have the same paths on both machines, on a shared
    file system. The other machine checks that by the store's identity and by the cells' fingerprints, which depend on
    images and code.

    Args:
        unit: the unit to run.
        config: of the sweep.
        threads: number of CPU threads; another number gives other sums, so the machine must not choose it.
    """

    def __init__(self, unit: Unit, *, config: DictConfig, threads: int) -> None:
        self.cells, self.is_asked, self.threads = unit.cells, unit.is_asked, threads
        self.identities = {cell.store: identify(cell.store) for cell in unit.cells}
        self.folder, self.path = str(Path.cwd()), list(sys.path)
        # Loaded only where the modules of ``path`` are found.
        self.payload = cloudpickle.dumps((unit.call, unit.make(), config, Singleton.get_state()))
        self._process: worker.Worker | None = None

    def __call__(self) -> Any:
        """Run the unit in a process of its own and keep MLflow in step with the cells' folders."""
        try:
            os.chdir(self.folder)
        except OSError as error:
            return InputError(f"{self.folder} cannot be entered on {socket.gethostname()}: {one_line(error)}; {REMEDY}")
        sys.path[:] = [*self.path, *(entry for entry in sys.path if entry not in self.path)]
        os.environ |= {"OMP_NUM_THREADS": str(self.threads), "MPLBACKEND": "Agg"}
        call, configs, config, singletons = cloudpickle.loads(self.payload)
        worker.set_up(config, singletons)
        try:
            self._check(configs)
            self._process = worker.start(config)
            self._process.send(worker.pin, call, configs, "")
            outcome = self._process.outcome()
        except (InputError, CellError) as error:
            outcome = error
        except BaseException:
            self.stop(signal.SIGTERM)
            raise
        sync.close_all()
        if self._process is not None:
            self._process.close()
        return outcome

    def stop(self, number: int) -> None:
        """Make the process save its state and end, and update MLflow.

        Args:
            number: of the signal to send.
        """
        process, self._process = self._process, None
        if process is not None:
            worker.stop([process], number)
        sync.close_all()

    def _check(self, configs: list[DictConfig]) -> None:
        """Raise InputError if this machine sees other files than the submitting one; else start to log to MLflow."""
        from kdsweep.sweep import plan

        for store, identity in self.identities.items():
            if _read_identity(store) != identity:
                host = socket.gethostname()
                raise InputError(f"store={store}: on {host} it is not the folder of the machine that submits; {REMEDY}")
        if self.cells:
            jobs = plan.read_jobs(configs)
            there = {job.cell.fingerprint for job in jobs} | {job.cell.evidence.get("teacher", "") for job in jobs}
            for cell in self.cells:
                if cell.fingerprint not in there:
                    raise InputError(
                        f"{cell.title}: on {socket.gethostname()} the images or the code are not those of the machine "
                        f"that submits; {REMEDY}"
                    )
            if self.is_asked:
                plan.watch(jobs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_process": None}


def identify(store: Path) -> str:
    """Return a store's identity, written at the first call: machines that read the same one share the folder."""
    found = _read_identity(store)
    if not found:
        store.mkdir(parents=True, exist_ok=True)
        found = uuid.uuid4().hex
        write_json(store / IDENTITY, found)
    return found


def _read_identity(store: Path) -> str:
    try:
        return (store / IDENTITY).read_text(encoding="utf-8").strip('"\n ')
    except OSError:
        return ""


def preview(configs: list[DictConfig], place: str, *, config: DictConfig, times: bool) -> Preview:
    """Check cells that other machines are to train, in a process with torch.

    Args:
        configs: of the cells.
        place: name of these machines.
        config: of the sweep.
        times: whether to time a step on this machine all the same.

    Raises:
        InputError: one of them could not be trained.
    """
    process = worker.start(config)
    try:
        found: Preview = process.call(partial(worker.preview_remote, times=times), configs, place)
    finally:
        process.close()
    return found


def check_tracking(settings: Settings) -> None:
    """Raise InputError unless several machines can write to MLflow at once: SQLite cannot.

    Args:
        settings: a cell's configuration.
    """
    uri = settings.tracking.uri
    where = database.store_uri(Path(settings.store), uri)
    if where.startswith("sqlite"):
        raise InputError(
            f"tracking.uri={uri}: workers on several machines cannot share the SQLite file {where[10:]}; "
            "start an MLflow server that all reach and name it, tracking.uri=http://HOST:5000"
        )
