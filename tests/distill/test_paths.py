"""KD paths: which tensors are compared, their shapes, and what a path owns."""

from typing import Any

import pytest
import torch
from small import unet
from torch import Tensor

from kdsweep.distill import paths
from kdsweep.distill.distillation import Distillation, TeacherForward, Term, ViewPair, warp
from kdsweep.models import networks
from kdsweep.models.networks import Outputs

MASK = torch.zeros(2, 1, 64, 64)


def outputs(channels: int, *, seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 1, 64, 64, generator=generator)
    return Outputs({"logits": logits, networks.HIDDEN: torch.randn(2, channels, 2, 2, generator=generator)})


@pytest.fixture
def student() -> Outputs:
    return outputs(96, seed=0)


@pytest.fixture
def teacher() -> Outputs:
    return outputs(2048, seed=1)


def make_path(name: str) -> paths.KDPath:
    if name == "HR":
        return paths.HiddenRegressor(student_channels=96, teacher_channels=2048)
    return {"L": paths.Logits, "H": paths.Hidden}[name]()


@pytest.mark.parametrize(("name", "shape"), [("L", (2, 1, 64, 64)), ("H", (2, 1, 2, 2)), ("HR", (2, 2048, 2, 2))])
def test_both_maps_have_the_paths_shape(student: Outputs, teacher: Outputs, name: str, shape: tuple[int, ...]) -> None:
    kd_path = make_path(name)
    assert kd_path.student_map(student).shape == kd_path.teacher_map(teacher).shape == shape


def test_l_compares_the_logits_before_any_activation(student: Outputs, teacher: Outputs) -> None:
    assert torch.equal(paths.Logits().student_map(student), student.logits)
    assert torch.equal(paths.Logits().teacher_map(teacher), teacher.logits)
    assert student.logits.min() < 0


def test_h_is_the_mean_over_channels(student: Outputs, teacher: Outputs) -> None:
    for mean, outputs_of in (
        (paths.Hidden().student_map(student), student),
        (paths.Hidden().teacher_map(teacher), teacher),
    ):
        total = sum(outputs_of.hidden[:, channel] for channel in range(outputs_of.hidden.shape[1]))
        torch.testing.assert_close(mean[:, 0], total / outputs_of.hidden.shape[1], rtol=1e-4, atol=1e-6)


def test_hr_leaves_the_teachers_map_as_it_is(teacher: Outputs) -> None:
    assert make_path("HR").teacher_map(teacher) is teacher.hidden


def test_hr_is_two_convolutions_each_followed_by_a_relu(student: Outputs) -> None:
    kd_path = paths.HiddenRegressor(student_channels=96, teacher_channels=32, inner_channels=16)
    first, second = (module for module in kd_path.modules() if isinstance(module, torch.nn.Conv2d))
    inner = torch.einsum("oi,nihw->nohw", first.weight[:, :, 0, 0], student.hidden) + first.bias[:, None, None]
    outer = torch.einsum("oi,nihw->nohw", second.weight[:, :, 0, 0], inner.relu()) + second.bias[:, None, None]
    mapped = kd_path.student_map(student)
    torch.testing.assert_close(mapped, outer.relu(), rtol=1e-4, atol=1e-5)
    assert mapped.min() == 0
    assert outer.min() < 0, "the last ReLU must have something to do"
    assert (inner < 0).any(), "the first ReLU must have something to do"


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_hr_keeps_the_maps_size_with_any_odd_kernel(student: Outputs, kernel_size: int) -> None:
    kd_path = paths.HiddenRegressor(student_channels=96, teacher_channels=12, inner_channels=8, kernel_size=kernel_size)
    assert kd_path.student_map(student).shape == (2, 12, 2, 2)


@pytest.mark.parametrize(("name", "count"), [("L", 0), ("H", 0), ("HR", (96 * 512 + 512) + (512 * 2048 + 2048))])
def test_only_hr_owns_parameters(name: str, count: int) -> None:
    kd_path = make_path(name)
    assert networks.count_parameters(kd_path) == count
    assert all(parameter.requires_grad for parameter in kd_path.parameters())
    assert name != "HR" or count == 1_100_288


def test_the_regressor_is_trained_through_the_students_map(student: Outputs) -> None:
    kd_path = paths.HiddenRegressor(student_channels=96, teacher_channels=32, inner_channels=16)
    hidden = student.hidden.clone().requires_grad_()
    kd_path.student_map(Outputs({networks.HIDDEN: hidden})).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.any()
    for parameter in kd_path.parameters():
        assert parameter.grad is not None
        assert parameter.grad.any()


def test_a_regressor_changes_neither_the_student_built_before_nor_after_it() -> None:
    def student_weights() -> dict[str, Tensor]:
        network = unet(encoder="mobilenetv3_small_trimmed", decoder_channels=[16, 16, 8, 8, 8], weights="none", seed=5)
        return {key: value.clone() for key, value in network.state_dict().items()}

    alone = student_weights()
    first = student_weights()
    make_path("HR")
    second = student_weights()
    for key, value in alone.items():
        assert torch.equal(value, first[key])
        assert torch.equal(value, second[key])


@pytest.mark.parametrize("name", ["L", "H", "HR"])
def test_the_loss_gets_each_networks_map_by_name(student: Outputs, teacher: Outputs, name: str) -> None:
    kd_path, seen = make_path(name), {}

    def loss(**arguments: Any) -> Tensor:
        seen.update(arguments)
        return torch.zeros(())

    forward = TeacherForward("Teacher", view="strong", precision="fp32")
    distillation = Distillation({"kd": Term(kd_path, loss, kd_path.stages)}, weight=0.5, forward=forward, align=True)
    distillation.values(student=student, teacher=teacher, views=ViewPair(None, MASK, MASK))
    assert torch.equal(seen["student"], kd_path.student_map(student))
    assert torch.equal(seen["teacher"], kd_path.teacher_map(teacher))
    assert seen["valid"].shape == (2, 1, *seen["teacher"].shape[2:])
    assert seen["valid"].all()


@pytest.mark.parametrize("align", [True, False])
def test_a_weak_teachers_map_is_warped_if_and_only_if_it_shall_be(
    student: Outputs, teacher: Outputs, align: bool
) -> None:
    seen: dict[str, Tensor] = {}

    def loss(**arguments: Any) -> Tensor:
        seen.update(arguments)
        return torch.zeros(())

    theta = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]).expand(2, 2, 3)
    forward = TeacherForward("Teacher", view="weak", precision="fp32")
    terms = {"kd": Term(paths.Logits(), loss, ("logits",))}
    distillation = Distillation(terms, weight=0.5, forward=forward, align=align)
    distillation.values(student=student, teacher=teacher, views=ViewPair(theta, MASK, MASK))
    warped, valid = warp(teacher.logits, theta=theta)
    assert torch.equal(seen["teacher"], warped if align else teacher.logits)
    assert torch.equal(seen["valid"], valid if align else torch.ones_like(valid))
    assert not torch.equal(warped, teacher.logits)
    assert valid[..., :48].all()  # a shift by a quarter of the frame, half of the unit
    assert not valid[..., 48:].any()


def test_a_path_that_lacks_a_method_is_refused_when_it_is_built() -> None:
    class Half(paths.KDPath):
        def teacher_map(self, outputs):
            return outputs.hidden

    with pytest.raises(TypeError, match="student_map"):
        Half()
