"""Groups as Ray tasks: what is refused before anything is handed over."""

import signal
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from hydra_plugins.kdsweep_lockstep import RayConf
from test_mirror import make_cell

from kdsweep.core import signals
from kdsweep.core.errors import InputError
from kdsweep.sweep.executors.executor import Work, run
from kdsweep.sweep.executors.ray import OnRay

DEFAULTS = {key: value for key, value in vars(RayConf()).items() if key not in ("_target_", "executor", "plan")}


def cluster_of(*machines: tuple[str, dict[str, float]]):
    """A stand-in for ray that knows these machines' resources."""
    nodes = [
        {"Alive": True, "NodeManagerHostname": name, "Resources": {"CPU": 4.0, **resources}}
        for name, resources in machines
    ]
    return lambda: SimpleNamespace(nodes=lambda: nodes)


def test_options_out_of_range_are_refused():
    for name, value in {"gpus": -1, "cpus": 0, "memory_gb": -1, "retries": -1, "largest": 0}.items():
        with pytest.raises(InputError, match=rf"hydra\.launcher\.{name}={value} is not allowed: it must be at least"):
            OnRay(**DEFAULTS | {name: value})


def test_sqlite_is_refused_if_the_machines_are_several(tmp_path, monkeypatch):
    job = SimpleNamespace(settings=SimpleNamespace(store=str(tmp_path), tracking=SimpleNamespace(uri=None)))
    engine = OnRay(**DEFAULTS | {"gpus": 0})
    monkeypatch.setattr(engine, "_connect", cluster_of(("one", {}), ("one", {})))
    engine.check([job])
    monkeypatch.setattr(engine, "_connect", cluster_of(("one", {}), ("other", {})))
    with pytest.raises(InputError, match="workers on several machines cannot share the SQLite file"):
        engine.check([job])


def test_what_no_machine_has_is_named_and_not_waited_for(monkeypatch):
    engine = OnRay(**DEFAULTS | {"gpus": 1, "cpus": 2})
    monkeypatch.setattr(engine, "_connect", cluster_of(("one", {"GPU": 1.0})))
    engine.check([])
    monkeypatch.setattr(engine, "_connect", cluster_of(("one", {}), ("one", {"GPU": 0.5})))
    with pytest.raises(InputError, match=r"hydra\.launcher\.gpus=1: the largest machine of the Ray cluster has 0\.5"):
        engine.check([])


def test_the_extra_is_named_where_ray_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"needs Ray: pip install 'kdsweep\[ray\]'"):
        OnRay(**DEFAULTS).check([SimpleNamespace(cell=make_cell())])


def test_a_cluster_that_does_not_answer_is_named_with_what_may_be_missing(monkeypatch):
    def refuse(**_):
        raise ConnectionError("Failed to connect\nto Ray cluster at host:1")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=refuse))
    message = r"^hydra\.launcher\.address=host:1: no Ray cluster answers: Failed .*; if it asks for a token, set"
    with pytest.raises(InputError, match=message):
        OnRay(**DEFAULTS | {"address": "host:1"}).check([])


class Reference:
    """A stand-in for what Ray returns for a task."""

    def __init__(self, remote_work) -> None:
        self.remote_work = remote_work

    def future(self):
        future = Future()
        future.set_exception(ActorDiedError("the machine\nis gone"))
        return future


class ActorDiedError(Exception):
    """A stand-in for an error of Ray's."""


@pytest.fixture
def ray(monkeypatch):
    """A stand-in for Ray whose tasks are lost, and the calls of it."""
    calls = SimpleNamespace(tasks=[], cancelled=[], ended=False)

    def submit(remote_work):
        calls.tasks.append(Reference(remote_work))
        return calls.tasks[-1]

    ray = SimpleNamespace(
        remote=lambda **_: lambda _: SimpleNamespace(remote=submit),
        is_initialized=lambda: True,
        cancel=calls.cancelled.append,
        wait=lambda tasks, **_: (tasks[1:], tasks[:1]),
        shutdown=lambda: setattr(calls, "ended", True),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    return calls


def test_a_task_that_ray_has_abandoned_resumes_in_halves(ray, tmp_path):
    cells = [make_cell(store=tmp_path, lr=number) for number in range(2)]
    work = Work(len, [None, None], [], cells)
    ((_, results),) = run(OnRay(**DEFAULTS | {"gpus": 0}), [work])
    assert [str(result) for result in results] == ["its process was lost: ActorDiedError: the machine is gone"] * 2
    assert [len(task.remote_work.work.jobs) for task in ray.tasks] == [2, 1, 1]


def test_a_stop_cancels_the_tasks_and_counts_those_that_do_not_end(ray, tmp_path):
    engine, stop = OnRay(**DEFAULTS | {"gpus": 0}), signals.Stopped(signal.SIGTERM)
    for _ in range(2):
        engine.submit(Work(len, [None], [], [make_cell(store=tmp_path)]))
    engine.close(stop)
    assert ray.cancelled == ray.tasks
    assert (stop.killed, ray.ended) == (1, True)
