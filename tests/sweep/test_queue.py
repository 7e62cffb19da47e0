"""What a store has in SLURM's queue, by a stand-in for squeue."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from servers import until

from kdsweep.sweep.engines import queue
from kdsweep.sweep.engines.queue import QueueError, Task


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Puts a squeue on the path that prints rows and ends with a code."""

    def make(rows: str, *, code: int = 0, error: str = "") -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        script = folder / "squeue"
        script.write_text(
            f"#!/bin/sh\necho \"$@\" >> '{folder}/asked'\nprintf '{rows}'\necho '{error}' >&2\nexit {code}\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return folder / "asked"

    return make


TASKS = {"7_0": ["cells/a", "cells/b"], "7_1": ["cells/c"], "7_2": ["cells/d"], "7_3": ["cells/e"]}
ROWS = r"7_0 RUNNING\n7_1 PENDING\n7_2 COMPLETED\n7_3 TIMEOUT\n"


def test_cells_are_queued_until_their_job_has_ended_for_good(tmp_path, squeue):
    asked = squeue(ROWS)
    queue.write(tmp_path, cluster="slurm", tasks=TASKS)
    running, pending = Task("7_0", "RUNNING"), Task("7_1", "PENDING")
    assert queue.queued(tmp_path) == {"cells/a": running, "cells/b": running, "cells/c": pending}
    assert asked.read_text().split("\n")[:-1] == ["--noheader --array --states=all --jobs=7 --format=%i %T"]


def test_a_requeued_job_is_still_queued(tmp_path, squeue):
    squeue(r"9 REQUEUED\n")
    assert queue.states(["9"], cluster="slurm") == {"9": "REQUEUED"}


def test_a_job_that_slurm_has_forgotten_has_ended(tmp_path, squeue):
    squeue("", code=1, error="slurm_load_jobs error: Invalid job id specified")
    queue.write(tmp_path, cluster="slurm", tasks=TASKS)
    assert queue.queued(tmp_path) == {}
    queue.forget_ended(tmp_path)
    assert not list((tmp_path / "slurm").glob("*.json"))


def test_notes_of_what_is_still_queued_are_kept(tmp_path, squeue):
    squeue(ROWS)
    queue.write(tmp_path, cluster="slurm", tasks=TASKS)
    queue.write(tmp_path, cluster="slurm", tasks={"8": ["cells/f"]})
    queue.forget_ended(tmp_path)
    assert [file.name for file in (tmp_path / "slurm").glob("*.json")] == ["7.json"]


def test_a_queue_that_does_not_answer_is_no_empty_queue(tmp_path, squeue):
    squeue("", code=1, error="slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    queue.write(tmp_path, cluster="slurm", tasks=TASKS)
    with pytest.raises(QueueError, match=r"^squeue: Unable to contact slurm controller \(connect failure\)$"):
        queue.queued(tmp_path)


def test_without_squeue_the_queue_is_not_known(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(QueueError, match=r"squeue: .*No such file"):
        queue.states(["1"], cluster="slurm")


def test_without_notes_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert queue.queued(tmp_path) == {}


def test_a_local_job_lives_as_long_as_its_process(tmp_path):
    waits = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", waits, "submitit"], stdin=subprocess.PIPE) as process:
        job_id = str(process.pid)
        assert until(lambda: queue.states([job_id, str(os.getpid())], cluster="local") == {job_id: "RUNNING"}, 5)
        process.communicate()
    assert queue.states([job_id], cluster="local") == {}
