"""Keep MLflow up to date with the cells' folders during the training, which never waits for it.

The same pass over the folders logs a running training, the epochs that a server missed while it was down, and those
that an earlier, killed command had not logged.
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
from kdsweep.tracking import mirror
from kdsweep.tracking.database import DamageError, TrackingError, answering, exclusive, line, store_uri

log = logging.getLogger(__name__)

PASS_EVERY_S = 2.0
SELDOM_S = 30.0  # also after a pass that logged much
SERVER_WAIT_S = 4.0  # at the start and at the end: together less than 10 s
STOP_WAIT_S = 3.0  # after Ctrl-C or SIGTERM
DATABASE_WAIT_S = 60.0  # at the end: a file that another process locks is free again soon

_opened: list[Sync] = []


class Sync:
    """A thread that logs news of cells' folders to one experiment at ``uri``, for None in the store's SQLite file.

    ``sweeps`` holds by name the folders of the cells and Teachers that each sweep requests. If cells are trained
    (``trains``), the end of the command does not wait long. A store that cannot be opened, now or later, is an
    InputError.
    """

    def __init__(
        self, *, store: Path, uri: str | None, experiment: str, sweeps: Mapping[str, Sequence[Path]], trains: bool
    ) -> None:
        self.store, self.uri, self.where, self.sweeps = store, uri, store_uri(store, uri), sweeps
        self._experiment, self._trains, is_server = experiment, trains, self.where.startswith("http")
        self._waits_s = SERVER_WAIT_S if is_server else DATABASE_WAIT_S
        self.tracker: mirror.Tracker | None = None
        self._published: set[str] = set()
        self._logged: dict[Path, tuple[int, ...]] = {}
        self._answers = True
        self._closing, self._tried = threading.Event(), threading.Event()
        if not is_server:
            self._try(self._open)  # errors of a database are raised before anything is trained
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._tried.wait(SERVER_WAIT_S)
        _opened.append(self)

    def close(self) -> None:
        """Log what is left, and warn if that is not possible."""
        self._closing.set()
        self._thread.join(STOP_WAIT_S if signals.pending() else self._waits_s)
        if not self._trains and self._thread.is_alive() and not signals.pending():
            log.info("MLflow at %s is slow: %d cells are still to be logged there", self.where, self._left())
            self._thread.join()
        if left := self._left():
            why = f"their scores are safe in {self.store}: the same command logs them"
            log.warning("%d cells are not in MLflow at %s yet, %s", left, self.where, why)

    def _versions(self) -> dict[Path, tuple[int, ...]]:
        """Return the versions of the begun cells by folder."""
        folders = {folder for of_sweep in self.sweeps.values() for folder in of_sweep}
        return {folder: version for folder in folders if (version := cell_folder.version(folder))[0]}

    def _left(self) -> int:
        """Return how many folders hold more than was logged."""
        return sum(self._logged.get(folder) != version for folder, version in self._versions().items())

    def _work(self) -> None:
        wait_s = 0.0
        while True:
            closing = self._closing.wait(wait_s)
            start_s = time.monotonic()
            try:
                succeeded = self._try(self._pass)
            except Exception as error:  # no later pass would succeed, and a thread's traceback does not help
                log.error("nothing more is logged to MLflow at %s: %s", self.where, line(error))
                return
            finally:
                self._tried.set()
            if closing and (succeeded or not self._trains):
                return
            if closing:
                time.sleep(0.5)
            # A look at thousands of folders takes its time: at most a twentieth of a core is spent on it.
            wait_s = min(max(PASS_EVERY_S, 20 * (time.monotonic() - start_s)), SELDOM_S)

    def _try(self, work: Callable[[], object]) -> bool:
        """Call it and return whether the store answered; if not, warn once, and open the store again at the next."""
        try:
            with answering(self.store, self.uri):
                work()
        except TrackingError as error:
            if self._answers:
                status = "does not answer: training continues, the runs are logged when it does"
                log.warning("MLflow at %s %s (%s)", self.where, status, error.why)
            self.tracker, self._answers = None, False
            return False
        if not self._answers:
            log.info("MLflow at %s answers again", self.where)
        self._answers = True
        return True

    def _open(self) -> mirror.Tracker:
        if self.tracker is None:
            self.tracker = mirror.Tracker(store=self.store, uri=self.uri, experiment=self._experiment)
        return self.tracker

    def _pass(self) -> None:
        """Log what is new. A sweep without a begun cell is left out: its parent run would be empty."""
        tracker = self._open()
        with exclusive(self.store):
            versions = self._versions()
            begun = [(sweep, folder) for sweep, of in self.sweeps.items() for folder in of if folder in versions]
            for sweep, folder in begun:
                if sweep not in self._published:
                    self._log(sweep, partial(tracker.publish, sweep))
                    self._published.add(sweep)
                if self._logged.get(folder) != versions[folder]:
                    if (record := cell_folder.read(folder)).tags:  # else its description is damaged, and written again
                        self._log(folder, partial(tracker.sync, record, sweep=sweep))
                    self._logged[folder] = versions[folder]

    def _log(self, name: str | Path, call: Callable[[], object]) -> None:
        """Call it; log and skip an error that a later pass would meet again."""
        try:
            with answering(self.store, self.uri):
                call()
        except (TrackingError, DamageError):
            raise
        except Exception as error:
            log.warning("%s: MLflow refuses the entry: %s", name, line(error))


def close_all() -> None:
    """Close every Sync that is open; see ``Sync.close``."""
    while _opened:
        _opened.pop().close()


def run_id(folder: Path) -> str:
    """Return the run id of a cell in the stores that are open, or ``""``."""
    logged = mirror.read(folder)
    ids = (opened.tracker.id for opened in _opened if opened.tracker)
    return next((logged[of].run_id for of in ids if of in logged), "")
