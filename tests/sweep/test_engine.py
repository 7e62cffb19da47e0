"""What a failed device has ended goes on in fresh processes, without the cell that is to blame."""

import logging
import multiprocessing
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from kdsweep.config import composition, identity
from kdsweep.config.grid import Cell
from kdsweep.core.errors import CellError, DeviceError
from kdsweep.evaluation import latency
from kdsweep.runs import records
from kdsweep.sweep import preview
from kdsweep.sweep.engines import local, worker
from kdsweep.sweep.engines.engine import Unit, blocking, run_units
from kdsweep.sweep.estimate import Preview

LOST = DeviceError("the device failed (CUDA error: device-side assert triggered)")


class OneProcess:
    """An engine whose units each have a process in which the device fails with the cells named ``guilty``."""

    def __init__(self, *guilty, dies=False):
        self.guilty, self.dies, self.ran = set(guilty), dies, []

    def run(self, units, *, before=()):
        yield from ((unit, "done") for unit in before)
        for unit in units:
            names = [config.name for config in unit.make()]
            searching = isinstance(unit.call, partial) and unit.call.func is blocking
            self.ran.append((names, searching))
            broken = self.dies or self.guilty & set(names)
            first = next((name for name in names if name in self.guilty), "") if searching else ""
            yield unit, [CellError(first) if name == first else LOST if broken else f"{name} done" for name in names]


@pytest.fixture
def make_unit(tmp_path):
    def make(*names):
        cells = [
            Cell(role="baseline", notation=name, split=0, seed=0, settings={}, evidence={"of": name}, store=tmp_path)
            for name in names
        ]
        return Unit(print, lambda: [OmegaConf.create({"name": name}) for name in names], ["cuda:0"], cells=cells)

    return make


def test_the_guilty_cell_fails_and_the_others_go_on_without_it(make_unit, caplog):
    unit, other = make_unit("a", "b", "c"), make_unit("d")
    engine = OneProcess("b")
    with caplog.at_level(logging.WARNING):
        found = dict(run_units(engine, [unit, other], before=[teacher := make_unit("t")]))
    assert found[teacher] == "done"
    assert found[other] == ["d done"]
    assert [str(result) for result in found[unit]] == ["a done", "b", "c done"]
    assert engine.ran == [(["a", "b", "c"], False), (["d"], False), (["a", "b", "c"], True), (["a", "c"], False)]
    goes_on = "a device failed: going on in a fresh process with"
    assert [line.getMessage() for line in caplog.records] == [
        f"{goes_on} 3 cells, which wait for each kernel to find the one to blame",
        f"{goes_on} 2 cells, without the one to blame",
    ]


def test_two_that_are_guilty_are_found_one_after_the_other(make_unit):
    engine = OneProcess("a", "c")
    ((_, results),) = run_units(engine, [make_unit("a", "b", "c")])
    assert [str(result) for result in results] == ["a", "b done", "c"]
    assert [searching for _, searching in engine.ran] == [False, True, False, True, False]


def test_where_nobody_is_to_blame_all_fail_with_the_devices_error(make_unit):
    engine, unit = OneProcess(dies=True), make_unit("a", "b")
    ((_, results),) = run_units(engine, [unit])
    assert results == [LOST, LOST]
    assert len(engine.ran) == 2
    assert [records.read(cell.folder).error for cell in unit.cells] == [str(LOST)] * 2


def test_the_search_is_set_before_anything_uses_the_device(monkeypatch):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")  # and not at all after this test
    assert blocking(lambda _: os.environ["CUDA_LAUNCH_BLOCKING"], []) == "1"


class Process:
    """A process of a worker, which answers at once."""

    def __init__(self):
        self.sent, self.is_closed = [], False
        self.connection, self._theirs = multiprocessing.Pipe()

    def call(self, function, *args):
        return Preview({"auto": ["cuda:0", "cuda:1"]}, timed_on="cuda:0")

    def send(self, function, call, configs, device, share):
        self.sent.append(device)
        self._theirs.send(device)

    def outcome(self):
        return [self.connection.recv()]

    def close(self):
        self.is_closed = True


@pytest.mark.parametrize(("places", "is_used"), [(["cuda:0", "cuda:1"], True), (["cuda:1", "cuda:2"], False)])
def test_the_process_that_has_timed_steps_computes_on_that_device_or_ends(make_unit, monkeypatch, places, is_used):
    started = []
    monkeypatch.setattr(worker, "start", lambda _: started.append(Process()) or started[-1])
    engine = local.Devices()
    engine.open(OmegaConf.create())
    engine.preview([], times=False)
    units = [replace(make_unit(name), places=places) for name in "abc"]
    assert len(dict(engine.run(units))) == 3
    engine.close(None)
    assert sorted(device for process in started for device in process.sent) == sorted([*places, places[0]])
    assert started[0].sent == (["cuda:0"] if is_used else [])  # on another device it would keep memory of this one
    assert all(process.is_closed for process in started)


@pytest.mark.parametrize(("device", "images"), [("cpu", 4), ("cuda:1", 64)])
def test_a_plan_times_the_whole_batch_on_cuda_on_the_device_that_is_used(monkeypatch, device, images):
    timed = []

    def time_step_s(network, *, image_size, compute, images, forward_only=False):
        timed.append((str(compute.device), images))
        return latency.StepTime(0.1, 0.05)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(latency, "time_step_s", time_step_s)
    monkeypatch.setattr(preview, "check", lambda _: None)
    monkeypatch.setattr(preview, "rehearse", lambda *_: None)
    cfg = composition.compose(["profile=quick", "train.batch_size=64", f"device={device}", "path=none"])
    found = preview.preview_cells([identity.job(cfg)], [device] if device != "cpu" else [])
    assert (timed, found.timed_on) == ([(device, images)], device)
    assert (found.student_s, found.validation_s) == (0.1, 0.05)
    assert found.validation_images == len(identity.split_ids(cfg)["validation"]) > 0
