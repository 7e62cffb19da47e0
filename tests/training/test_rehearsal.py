"""A rehearsal of training on CUDA without a device: what tensors would be where, of which type, and who would wait.

PyTorch's FakeTensorMode runs every operation on tensors that have a device, a type and a layout but no values. An
operation on tensors of different devices fails there, and so does whatever must know a value: on a device the host
would wait for it. Only autograd's engine refuses to run without a device, so ``gradients`` walks its graph instead.
"""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from small import STUDENT, TEACHER
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdsweep.config import composition
from kdsweep.core.device import Compute
from kdsweep.data import views
from kdsweep.data.loaders import EvalPart, Feed
from kdsweep.distill import methods
from kdsweep.evaluation import scoring
from kdsweep.models import networks
from kdsweep.training import build, loop
from kdsweep.training.learner import Learner

CUDA = torch.device("cuda:0")
SIZE, BATCH = 64, 4
METHODS = [  # of one class
    file.stem for file in sorted(Path("conf/method").glob("*.yaml")) if "distill.classes." not in file.read_text()
]
CELLS = [
    *([f"path={path}", f"loss={loss}"] for path in ("L", "H", "HR") for loss in ("mse", "kld")),
    *([f"method={name}"] for name in METHODS if name != "none"),
    ["path=none"],
]


WITH_STUDENT = [CELLS[5], CELLS[-1]]  # the others have a Student of a tenth of the operations
SMALL = [*STUDENT, "student.weights=none"]


def gradients(root):
    """What autograd's engine would leave in the leaves below a 0-d tensor: (leaf, gradient) by its id."""
    order, seen, stack = [], set(), [(root.grad_fn, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack += [(node, True), *((other, False) for other, _ in node.next_functions if other is not None)]
    held, by_leaf = {root.grad_fn: {0: torch.ones_like(root)}}, {}
    for node in reversed(order):
        incoming = held.pop(node, {})
        if hasattr(node, "variable"):
            by_leaf[id(node.variable)] = (node.variable, incoming[0])
            continue
        made = node(*(incoming.get(position) for position in range(len(node._input_metadata))))
        for (other, position), gradient in zip(
            node.next_functions, made if isinstance(made, tuple) else (made,), strict=True
        ):
            if other is not None and gradient is not None:
                sums = held.setdefault(other, {})
                sums[position] = sums[position] + gradient if position in sums else gradient
    return by_leaf


def backward(root, retain_graph=False):
    with torch.no_grad():
        for leaf, gradient in gradients(root).values():
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def grad(root, parameters, **_):
    with torch.no_grad():
        by_leaf = gradients(root)
        return tuple(by_leaf[id(each)][1] if id(each) in by_leaf else torch.zeros_like(each) for each in parameters)


class Watch(TorchDispatchMode):
    """Notes the convolutions, and refuses copies between host and device while ``strict``: the host would wait."""

    def __init__(self):
        super().__init__()
        self.strict, self.types, self.layouts, self.copied, self.to_host = False, set(), [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("convolution", "conv2d"):  # the second in inference mode, where it is not taken apart before
            maps, weight = args[:2]
            self.types |= {maps.dtype, weight.dtype}
            if maps.shape[1] > 1 and maps.shape[2] > 1 and not maps.is_contiguous(memory_format=torch.channels_last):
                self.layouts.append(tuple(maps.shape))
        if name in ("_to_copy", "to") and result is not args[0]:
            self.copied.append(args[0])
        if name in ("_to_copy", "copy_"):
            ends = {tensor.device.type for tensor in (*args[:2], result) if isinstance(tensor, torch.Tensor)}
            if len(ends) > 1 and result.device.type == "cpu":
                self.to_host.append(tuple(result.shape))
            if len(ends) > 1 and self.strict:
                raise AssertionError(f"{name} of {tuple(result.shape)} between {ends}: the host waits")
        return result


def on_device(module):
    """Replace a module's tensors, as ``device.placed`` would: ``Module.to`` does not take fake ones."""
    for each in module.modules():
        for kind in (each._parameters, each._buffers):
            for name, old in kind.items():
                if old is None:
                    continue
                layout = {"memory_format": torch.channels_last} if old.ndim == 4 else {}
                new = torch.empty(tuple(old.shape), dtype=old.dtype, device=CUDA, **layout)
                kind[name] = (
                    nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
                )
    return module


class Event:
    """An event of CUDA's, as far as it is queued: who reads it waits."""

    def __init__(self, *, enable_timing):
        assert enable_timing

    def record(self):
        pass


class Epoch:
    """One batch, as a ``TrainLoader`` yields it."""

    def __len__(self):
        return 1

    def epoch(self, number, *, first=0):
        images = {view: torch.zeros(BATCH, SIZE, SIZE, 3, dtype=torch.uint8) for view in ("strong", "weak")}
        masks = {f"{view}_mask": torch.zeros(BATCH, SIZE, SIZE, dtype=torch.uint8) for view in images}
        yield {**images, **masks, "theta": torch.zeros(BATCH, 2, 3)}

    def step_seed(self, epoch, number):
        return 0


@contextmanager
def no_device():
    """A machine with one CUDA device, as far as tensors without values need it."""
    views._gray_statistics.cache_clear()
    methods._parts.cache_clear()
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.Event", Event),
        mock.patch.object(torch.Tensor, "backward", backward),
        mock.patch("torch.autograd.grad", grad),
        mock.patch("torch.Generator", lambda _: SimpleNamespace(manual_seed=lambda _: None)),  # there is none of CUDA's
        FakeTensorMode(),
        Watch() as watch,
    ):
        views.normalize(torch.zeros(1, 2, 2, 3, dtype=torch.uint8, device=CUDA))  # its constants are copied once
        yield watch
    views._gray_statistics.cache_clear()
    methods._parts.cache_clear()


@pytest.fixture(scope="module")
def configs():
    quick = ["profile=quick", "device=cpu", f"image_size={SIZE}", f"train.batch_size={BATCH}", *TEACHER]
    cells = [
        composition.compose([*quick, *cell, "teacher_aug=weak", *([] if cell in WITH_STUDENT else SMALL)])
        for cell in CELLS
    ]
    strong = {"teacher_aug": composition.compose([*quick, "path=L", "loss=mse", "teacher_aug=strong"]).teacher_aug}
    kinds = {(position, "weak"): cfg for position, cfg in enumerate(cells)}
    return kinds | {(position, "strong"): cfg.model_copy(update=strong) for position, cfg in enumerate(cells)}


def learner_of(network, kd, folder):
    """A learner on the device that there is not."""
    role, trained = "distilled" if kd else "baseline", {"lr": 1e-3, "epochs": 2, "patience": 2, "fused": True}
    title = f"learner {folder.name}"
    for module in (network, *(term.kd_path for term in (kd.terms.values() if kd else ()))):
        on_device(module)
    learner = Learner(title, role, network, view="strong", distillation=kd, folder=folder, **trained)
    learner.trained.train()
    return learner


def rehearse(chosen, folder, precision):
    """Train a group for one step on CUDA, validate and predict; return its learners and what was watched."""
    teacher = build.teacher_network(chosen[0])
    students = [(build.student_network(cfg), build.distillation(cfg, teacher="Teacher")) for cfg in chosen]
    for _, kd in students:
        if kd is not None:
            kd.forward = kd.forward._replace(precision=precision)
    with no_device() as watch:
        compute = Compute(CUDA, precision)
        learners = [learner_of(*student, folder / str(number)) for number, student in enumerate(students)]
        teacher = networks.freeze(on_device(teacher))
        frozen = loop.FrozenTeachers({"Teacher": teacher}, compute)
        images, masks = torch.zeros(3, SIZE, SIZE, 3, dtype=torch.uint8), torch.zeros(3, 1, SIZE, SIZE)
        part = EvalPart(["a", "b", "c"], ["x"] * 3, images, masks)
        validation = list(scoring.eval_batches(part, compute))
        forwards = [frozen.teach(learners, views) for views, _ in validation]
        watch.copied.clear()

        def strict(function):
            def call(*args):
                watch.strict = True
                try:
                    return function(*args)
                finally:
                    watch.strict = False

            return call

        with (
            mock.patch.multiple(loop, _step=strict(loop._step), validation_values=strict(loop.validation_values)),
            mock.patch.multiple(Learner, values=mock.DEFAULT, end_epoch=mock.DEFAULT),  # host tensors without values
        ):
            feed = Feed(Epoch(), part, part)
            loop.train_epoch(learners, 0, frozen=frozen, feed=feed, compute=compute)
            watch.to_host.clear()
            loop.validate(learners, validation, forwards, seed=0, compute=compute)
            waits = list(watch.to_host)
        predicted = scoring.predict(learners[0].network, part, compute=compute)
        assert (tuple(predicted.shape), predicted.device.type) == ((3, 1, SIZE, SIZE), "cpu")
        frozen_ids = {
            id(parameter) for network in (teacher, *frozen._rounded.values()) for parameter in network.parameters()
        }
        recast = [tensor for tensor in watch.copied if id(tensor) in frozen_ids]
    return SimpleNamespace(learners=learners, watch=watch, recast=recast, waits=waits)


@pytest.mark.parametrize(
    ("precision", "first", "each"),
    [("fp32", 0, 1), ("bf16", 1, 5), pytest.param("bf16", 1, 1, marks=pytest.mark.slow)],  # a fifth, and all in 30 s
)
def test_every_comparison_trains_on_cuda_without_waiting(configs, tmp_path, precision, first, each):
    order = ("weak", "strong", "weak")[first:]
    chosen = [configs[number, order[number % 2]] for number in range(0, len(CELLS), each)]
    rehearsed = rehearse(chosen, tmp_path, precision)
    assert [str(learner.failure) for learner in rehearsed.learners if learner.failure is not None] == []
    assert rehearsed.watch.types == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}
    if precision == "fp32":  # in bf16 PyTorch asks the device whether cuDNN takes it, and hears no
        assert rehearsed.watch.layouts == []  # all convolutions in channels-last memory
    assert rehearsed.recast == []  # Teachers are kept in the precision that they compute in
    assert len(rehearsed.waits) == 1  # in validation, for the values of all learners
    for learner in rehearsed.learners:
        assert learner.steps == 1
        assert len(learner.watches) == (3 if learner.distillation else 2)  # step, validation, Teacher: not read yet
        terms = learner.means.columns()
        assert {(value.dtype, value.device) for value in terms.values()} == {(torch.float32, CUDA)}
        assert {parameter.dtype for parameter in learner.trained.parameters()} == {torch.float32}
        state = learner.optimizer.state_dict()["state"]
        assert state  # Adam has stepped
        assert {value.device for moments in state.values() for value in moments.values()} == {CUDA}


def reads_a_value(*, student, teacher, valid):
    return (student - teacher).square().mean() if valid.sum().item() > 0 else student.sum()


def makes_a_host_tensor(*, student, teacher, valid):
    return (student - teacher).square().mean() * torch.tensor([1.0, 2.0], device=student.device).sum()


def uses_a_host_tensor(*, student, teacher, valid):
    return ((student - teacher).square() * torch.ones(student.shape[2])).mean()


@pytest.mark.parametrize(
    ("loss", "line"),
    [(reads_a_value, "DataDependent"), (makes_a_host_tensor, "the host waits"), (uses_a_host_tensor, "device")],
)
def test_the_rehearsal_names_a_loss_that_waits_or_is_on_the_wrong_device(configs, tmp_path, loss, line):
    with mock.patch("kdsweep.distill.losses.mse", loss):
        failure = str(rehearse([configs[0, "weak"]], tmp_path, "fp32").learners[0].failure)
    assert line in failure
