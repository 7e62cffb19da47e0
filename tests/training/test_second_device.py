"""A learner on a device that is not the host: where its tensors are, and when the host waits for them.

PyTorch's device ``meta`` refuses to combine its tensors with those of the host, as CUDA does.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from small import STUDENT, TEACHER
from torch import nn

from kdsweep.config import composition, identity
from kdsweep.core.device import Compute, Stopwatch
from kdsweep.core.files import write_json
from kdsweep.evaluation import latency
from kdsweep.models import networks
from kdsweep.training import build, loop, meter
from kdsweep.training.meter import EpochMeter

META, CPU, CUDA = torch.device("meta"), torch.device("cpu"), torch.device("cuda:0")
CELLS = [
    ["path=none"],
    ["path=HR", "loss=mse"],
    ["path=L", "loss=mse", "kd.weight=matched"],
    ["method=reviewkd", "kd.weight=matched"],
]


@pytest.fixture
def compose(small_busi, tmp_path):
    fixed = ["profile=quick", "data=busi", f"data.root={small_busi}", f"store={tmp_path}", "device=cpu"]
    return lambda *cell: composition.compose([*fixed, "train.batch_size=6", *cell, *STUDENT, *TEACHER])


def learner_on(where, cfg, folder):
    learner = build.learner(cfg, identity.cell(cfg))
    learner.folder = folder
    write_json(folder / "split.json", {})
    learner.trained.to(where, memory_format=torch.channels_last)
    learner.__post_init__()  # the optimizer holds the parameters of the device
    learner.trained.train()
    return learner


def step(learner, cfg, where):
    compute, size = Compute(where, "fp32"), cfg.image_size
    images = {view: torch.rand(6, 3, size, size, device=where) for view in ("strong", "weak")}
    masks = {f"{view}_mask": torch.ones(6, size, size, dtype=torch.uint8, device=where) for view in images}
    teacher = networks.freeze(build.teacher_network(cfg)).to(where)
    name = learner.distillation.forward.teacher if learner.distillation else ""
    forwards = loop.FrozenTeachers({name: teacher}, compute).teach([learner], images)
    loop._step(learner, {**masks, "theta": torch.eye(2, 3, device=where).repeat(6, 1, 1)}, images, forwards, compute)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # of what is restored on the host
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell[0])
def test_a_resume_in_mid_epoch_continues_on_the_learners_device(compose, tmp_path, monkeypatch, cell):
    cfg = compose(*cell)
    saved = learner_on(CPU, cfg, tmp_path / "cell")
    step(saved, cfg, CPU)
    saved.end_epoch({"val/loss": 1.0, "val/dice": 0.5})  # it has a best epoch
    saved.epoch = -1  # in which a matched weight is measured
    step(saved, cfg, CPU)
    saved.save()
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # this device has none
    resumed = learner_on(META, cfg, tmp_path / "cell")
    assert resumed.resume()
    resumed.optimizer.step = lambda: None  # its fused kernel needs a device that computes
    step(resumed, cfg, META)
    assert resumed.steps == 2
    columns = [resumed.columns(), *resumed.best.values()]
    assert {value.device for part in columns for value in part.values()} == {META}
    assert ("kd_weight" in resumed.columns()) == ("kd.weight=matched" in cell)


def test_values_of_all_types_reach_the_host_in_one_copy_and_unchanged(monkeypatch):
    meters = [EpochMeter() for _ in range(3)]
    values = {"loss": torch.tensor([0.1]), "kd": torch.tensor(1 / 3).bfloat16(), "dice": torch.tensor(0.7).double()}
    for position, each in enumerate(meters[:2]):
        for count in range(2 + position):
            each.add(values, count + 1)
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda each: copies.append(each.shape) or cpu(each))
    columns = meter.to_host([each.columns() for each in meters], CPU)
    assert len(copies) == 1
    assert [each.keys() for each in columns] == [values.keys(), values.keys(), {}.keys()]
    for each, read in zip(meters, columns, strict=True):
        for name, column in read.items():
            assert torch.equal(column, values[name].reshape(1).expand(len(each.counts)))
            assert column.dtype == values[name].dtype
    means = meter.weighted_means(columns[0], meters[0].counts, "val/")
    assert means == pytest.approx({f"val/{name}": float(value) for name, value in values.items()})
    assert meter.to_host([{}], CPU) == [{}]


class Event:
    """An event of CUDA's in a queue whose device is behind its host: the device's clock is set by the test."""

    device_s = 0.0
    waits = 0

    def __init__(self, *, enable_timing):
        assert enable_timing

    def record(self):
        self.at_s = Event.device_s

    def synchronize(self):
        Event.waits += 1

    def elapsed_time(self, end):
        return 1000 * (end.at_s - self.at_s)


def test_seconds_on_cuda_are_the_devices_and_nobody_waits_before_they_are_read(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "device_s", 0.0)
    monkeypatch.setattr(Event, "waits", 0)
    learner = learner_on(CPU, compose("path=none"), tmp_path)
    for seconds in (30.0, 12.0):
        watch = Stopwatch(CUDA)
        Event.device_s += seconds  # queued by the host within microseconds
        watch.stop()
        Event.device_s += 100.0  # work of another learner's
        learner.watches.append(watch)
    assert Event.waits == 0
    learner.means.add({"loss": torch.tensor(0.5)}, 6)
    learner.save()  # in mid-epoch
    assert learner.spent_s == 42.0
    again = learner_on(CPU, compose("path=none"), tmp_path)
    again.resume()
    again.end_epoch({"val/loss": 1.0, "val/dice": 0.5})
    assert (again.seconds, again.spent_s) == ([42.0], 0.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("where", [CPU, CUDA], ids=str)
def test_a_timed_step_is_that_of_a_training(monkeypatch, where, precision):
    network = nn.Conv2d(3, 1, 3)
    used, gradients, modes = [], [], []

    def forward(images, usual=network.forward):
        gradients.append(network.weight.grad)
        modes.append((network.training, torch.is_grad_enabled()))
        return SimpleNamespace(logits=usual(images))

    network.forward = forward
    network.weight.register_hook(lambda _: used.append(torch.is_autocast_enabled("cpu")))
    adam = torch.optim.Adam

    def optimizer(parameters, *, fused):
        used.append(fused)
        return adam(parameters)

    on = Compute(where, precision)
    monkeypatch.setattr(torch.optim, "Adam", optimizer)
    monkeypatch.setattr(latency, "_now_s", lambda _: 0.0)
    monkeypatch.setattr(latency, "placed", lambda *_: None)
    monkeypatch.setattr(torch, "randn", lambda *size, device: torch.ones(size))
    monkeypatch.setattr(Compute, "autocast", lambda *_: torch.autocast("cpu", torch.bfloat16, precision == "bf16"))
    latency.time_step_s(network, image_size=8, compute=on)
    assert used[0] == (True if where == CUDA else None)
    assert set(used[1:]) == {False}  # the backward pass runs outside of autocast
    assert gradients == [None] * len(gradients)
    assert set(modes) == {(False, False), (True, True)}


@pytest.fixture
def global_flags(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("where", "deterministic", "benchmark"), [(CUDA, False, True), (CUDA, True, False), (CPU, False, False)]
)
@pytest.mark.usefixtures("global_flags")
def test_algorithms_are_the_fastest_or_the_same_every_time(where, deterministic, benchmark):
    torch.backends.cudnn.benchmark = not benchmark
    Compute(where, "fp32", deterministic=deterministic).prepare()
    assert torch.backends.cudnn.benchmark == benchmark
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.utils.deterministic.fill_uninitialized_memory != deterministic  # only one of them reads it
