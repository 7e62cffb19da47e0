"""Keep MLflow in step with the cells' folders, beside the training, which never waits for it.

The same pass over the folders logs a running training, what a server missed while it was down, and what an earlier,
killed command had not logged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdsweep.config.grid import Cell
from kdsweep.core import signals
from kdsweep.runs import records
from kdsweep.tracking import database, writer

log = logging.getLogger(__name__)

PASS_EVERY_S = 2.0
SELDOM_S = 30.0  # also after a pass that logged much
SERVER_WAIT_S = 4.0  # at the start and at the end: together less than 10 s
STOP_WAIT_S = 3.0  # after Ctrl-C or SIGTERM
DATABASE_WAIT_S = 60.0  # at the end: a file that another process locks is free again soon

_opened: list[Sync] = []


class Sync:
    """A thread that reads the folders of cells every two seconds and logs what is new to one MLflow store.

    Args:
        store: folder of the runs.
        uri: of an MLflow server or database, or None for the SQLite file in the store.
        experiment: name of the MLflow experiment.
        asked: cells by the sweep that asks for them.
        teachers: those that the cells learn from.
        varied: by sweep, the keys beyond the factors in which its cells differ.
        tuned: by sweep, the keys whose values tuning has set, for each method and split its own.
        command: the one that asked for the cells, as it can be typed again.
        trains: whether cells are to be trained; the command must then not wait long at its end.

    Raises:
        InputError: the store cannot be opened, now or later.
    """

    def __init__(
        self,
        *,
        store: Path,
        uri: str | None,
        experiment: str,
        asked: dict[str, list[Cell]],
        teachers: list[Cell],
        varied: dict[str, list[str]] | None = None,
        tuned: dict[str, list[str]] | None = None,
        command: str = "",
        trains: bool = True,
    ) -> None:
        self.store, self.asked, self._varied, self._command = store, asked, varied or {}, command
        self.where = database.store_uri(store, uri)
        self._tuned = tuned or {}
        self._uri, self._experiment = uri, experiment
        first = next(iter(asked))
        self._sweeps = {cell.folder: first for cell in teachers}
        self._sweeps |= {cell.folder: sweep for sweep, cells in asked.items() for cell in cells}
        self._trains = trains
        self._waits_s = SERVER_WAIT_S if self.where.startswith("http") else DATABASE_WAIT_S
        self._tracker: writer.Tracker | None = None
        self._unasked = list(asked)
        self._logged: dict[Path, tuple[object, ...]] = {}
        self._run_ids: dict[Path, str] = {}
        self._complains = False
        self._wake, self._closing, self._tried = threading.Event(), threading.Event(), threading.Event()
        if not self.where.startswith("http"):
            self._attempt(self._open)  # what is wrong with a database is told before anything is trained
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._tried.wait(SERVER_WAIT_S)
        _opened.append(self)

    def run_id(self, folder: Path) -> str:
        """Return the run id of a cell, or ``""`` if it is not known yet."""
        return self._run_ids.get(folder, "")

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

    def _left(self) -> int:
        """Return how many folders hold more than was logged."""
        return sum(
            self._logged.get(folder) != now
            for folder in self._sweeps
            if (now := records.version(folder))[0]  # begun
        )

    def _work(self) -> None:
        while True:
            closing = self._closing.is_set()
            start_s = time.monotonic()
            try:
                succeeded = self._attempt(self._pass)
            except Exception as error:  # no later pass would succeed; a thread's traceback helps nobody
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

    def _attempt(self, work: Callable[[], None]) -> bool:
        """Call it and return whether the store answered; warn once if not, it is tried again later."""
        try:
            work()
        except Exception as error:
            if database.is_damage(error, self._uri):
                raise database.damaged(self.store, error) from error
            if not self._passes(error):
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

    def _passes(self, error: Exception) -> bool:
        return isinstance(error, database.TrackingError) or database.passes(error, self.where)

    def _open(self) -> None:
        if self._tracker is None:
            self._tracker = writer.Tracker(store=self.store, uri=self._uri, experiment=self._experiment)

    def _pass(self) -> None:
        self._open()
        with database.exclusive(self.store):
            while self._unasked:
                self._tell(self._ask, self._unasked[0])
                del self._unasked[0]
            for folder in self._sweeps:
                if self._logged.get(folder) != (now := records.version(folder)):
                    self._tell(self._sync_folder, folder)
                    self._logged[folder] = now

    def _tell(self, call: Callable[[Any], None], about: Any) -> None:
        """Call it; report and skip what MLflow will never take."""
        try:
            call(about)
        except Exception as error:
            if self._passes(error) or database.is_damage(error, self._uri):
                raise
            log.warning("%s: MLflow refuses what is to be logged: %s", about, database.line(error))

    def _ask(self, sweep: str) -> None:
        if self._tracker is not None:
            keys = {"varied": self._varied.get(sweep, []), "tuned": self._tuned.get(sweep, [])}
            self._tracker.ask(sweep, self.asked[sweep], command=self._command, **keys)

    def _sync_folder(self, folder: Path) -> None:
        record = records.read(folder)
        if self._tracker is not None and record.tags:  # else it was never begun, or failed before
            self._run_ids[folder] = self._tracker.sync(record, sweep=self._sweeps[folder])


def close_all() -> None:
    """Close every Sync that is open; see ``Sync.close``."""
    while _opened:
        _opened.pop().close()


def run_id(folder: Path) -> str:
    """Return the run id of a cell in the stores that are open, or ``""``."""
    return next((found for opened in _opened if (found := opened.run_id(folder))), "")
