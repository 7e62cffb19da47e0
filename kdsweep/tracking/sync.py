"""Keep MLflow up to date with the cells' folders during the training, which never waits for it.

The same pass over the folders logs a running training, what a server missed while it was down, and what an earlier,
killed command had not logged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from kdsweep.core import signals
from kdsweep.store import cell_folder
from kdsweep.tracking import database, mirror

log = logging.getLogger(__name__)

PASS_EVERY_S = 2.0
SELDOM_S = 30.0  # also after a pass that logged much
SERVER_WAIT_S = 4.0  # at the start and at the end: together less than 10 s
STOP_WAIT_S = 3.0  # after Ctrl-C or SIGTERM
DATABASE_WAIT_S = 60.0  # at the end: a file that another process locks is free again soon

_opened: list[Sync] = []


class Sync:
    """A thread that reads the folders of cells every two seconds and logs new values to one MLflow store.

    Args:
        store: folder of the runs.
        uri: of an MLflow server or database, or None for the SQLite file in the store.
        experiment: name of the MLflow experiment.
        sweeps: by name the folders of the cells and Teachers that each sweep requests.
        trains: whether cells are to be trained; the command must then not wait long at its end.

    Raises:
        InputError: the store cannot be opened, now or later.
    """

    def __init__(
        self, *, store: Path, uri: str | None, experiment: str, sweeps: Mapping[str, Sequence[Path]], trains: bool
    ) -> None:
        self.store, self.sweeps, self.where = store, sweeps, database.store_uri(store, uri)
        self._uri, self._experiment, self._trains = uri, experiment, trains
        self._waits_s = SERVER_WAIT_S if self.where.startswith("http") else DATABASE_WAIT_S
        self._tracker: mirror.Tracker | None = None
        self._published: set[str] = set()
        self._logged: dict[Path, tuple[int, ...]] = {}
        self._complains = False
        self._wake, self._closing, self._tried = threading.Event(), threading.Event(), threading.Event()
        if not self.where.startswith("http"):
            self._attempt(self._open)  # errors of a database are raised before anything is trained
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._tried.wait(SERVER_WAIT_S)
        _opened.append(self)

    def run_id(self, folder: Path) -> str:
        """Return the run id of a cell, or ``""`` as long as there is none."""
        return self._tracker.run_id(folder) if self._tracker else ""

    def close(self) -> None:
        """Log what is left, and warn if that is not possible."""
        self._closing.set()
        self._wake.set()
        self._thread.join(STOP_WAIT_S if signals.pending() else self._waits_s)
        if not self._trains and self._thread.is_alive() and not signals.pending():
            log.info("MLflow at %s is slow: %d cells are still to be logged there", self.where, self._left())
            self._thread.join()
        if left := self._left():
            log.warning(
                "%d cells are not in MLflow at %s yet, their scores are safe in %s: the same command logs them",
                left,
                self.where,
                self.store,
            )

    def _versions(self) -> dict[Path, tuple[int, ...]]:
        """Return the versions of the begun cells by folder."""
        folders = {folder for of_sweep in self.sweeps.values() for folder in of_sweep}
        return {folder: version for folder in folders if (version := cell_folder.version(folder))[0]}

    def _left(self) -> int:
        """Return how many folders hold more than was logged."""
        return sum(self._logged.get(folder) != version for folder, version in self._versions().items())

    def _work(self) -> None:
        while True:
            closing = self._closing.is_set()
            start_s = time.monotonic()
            try:
                succeeded = self._attempt(self._pass)
            except Exception as error:  # no later pass would succeed, and a thread's traceback does not help
                log.error("nothing more is logged to MLflow at %s: %s", self.where, database.line(error))
                self._tried.set()
                return
            pass_s = time.monotonic() - start_s
            self._tried.set()
            if closing and (succeeded or not self._trains):
                return
            if closing:
                time.sleep(0.5)
            else:
                # A look at thousands of folders takes its time: at most a twentieth of a core is spent on it.
                self._wake.wait(min(max(PASS_EVERY_S, 20 * pass_s), SELDOM_S))

    def _attempt(self, work: Callable[[], object]) -> bool:
        """Call it and return whether the store answered; warn once if not, it is tried again later."""
        try:
            work()
        except Exception as error:
            if database.is_damage(error, self._uri):
                raise database.damaged(self.store, error) from error
            if not database.passes(error, self.where):
                raise
            if not self._complains:
                log.warning(
                    "MLflow at %s does not answer: training goes on, the runs are logged when it does (%s)",
                    self.where,
                    database.line(error),
                )
            self._complains = True
            return False
        if self._complains:
            log.info("MLflow at %s answers again", self.where)
        self._complains = False
        return True

    def _open(self) -> mirror.Tracker:
        if self._tracker is None:
            self._tracker = mirror.Tracker(store=self.store, uri=self._uri, experiment=self._experiment)
        return self._tracker

    def _pass(self) -> None:
        """Log what is new. A sweep without a begun cell is left out: its parent run would be empty."""
        tracker = self._open()
        with database.exclusive(self.store):
            versions = self._versions()
            for sweep, folders in self.sweeps.items():
                begun = [folder for folder in folders if folder in versions]
                if begun and sweep not in self._published:
                    self._log(sweep, partial(tracker.publish, sweep))
                    self._published.add(sweep)
                for folder in begun:
                    if self._logged.get(folder) == versions[folder]:
                        continue
                    if (record := cell_folder.read(folder)).tags:  # else its description is damaged, and written again
                        self._log(folder, partial(tracker.sync, record, sweep=sweep))
                    self._logged[folder] = versions[folder]

    def _log(self, what: str | Path, call: Callable[[], object]) -> None:
        """Call it; report and skip what MLflow will never take."""
        try:
            call()
        except Exception as error:
            if database.passes(error, self.where) or database.is_damage(error, self._uri):
                raise
            log.warning("%s: MLflow refuses what is to be logged: %s", what, database.line(error))


def close_all() -> None:
    """Close every Sync that is open; see ``Sync.close``."""
    while _opened:
        _opened.pop().close()


def run_id(folder: Path) -> str:
    """Return the run id of a cell in the stores that are open, or ``""``."""
    return next((run_id for opened in _opened if (run_id := opened.run_id(folder))), "")
