"""Losses: values worked out by hand, direction, reduction, and that nothing flows into the Teacher."""

import doctest
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small import unet
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from kdsweep.distill import classes, losses, methods, paths, relations
from kdsweep.distill.distillation import Distillation, TeacherForward, Term, ViewPair
from kdsweep.models import networks
from kdsweep.models.unet import UNet
from kdsweep.training.learner import Learner
from kdsweep.training.loop import Compute, FrozenTeachers

KD_LOSSES = [losses.mse, losses.kld_pixels, losses.kld_positions]
KLD_LOSSES = [losses.kld_pixels, losses.kld_positions]


def draw(*shape: int, seed: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row(*values: float) -> Tensor:
    """A map of one image, one channel and one line of pixels."""
    return torch.tensor(values)[None, None, None]


def everywhere(maps: Tensor) -> Tensor:
    return torch.ones_like(maps[:, :1], dtype=torch.bool)


def left_half(maps: Tensor) -> Tensor:
    valid = everywhere(maps)
    valid[..., maps.shape[3] // 2 :] = False
    return valid


def maps_for(loss: Callable[..., Tensor], *, seed: int, size: int = 6) -> Tensor:
    return draw(3, 1 if loss is losses.kld_pixels else 4, size, size, seed=seed)


def gradient(loss: Callable[..., Tensor], *, student: Tensor, **arguments: Any) -> Tensor:
    leaf = student.clone().requires_grad_()
    loss(student=leaf, **arguments).backward()
    assert leaf.grad is not None
    return leaf.grad


# ---- values by hand ------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand() -> None:
    logits, mask = row(0.0, 2.0, -1.0, 3.0), row(1, 1, 0, 0).byte()
    terms = [math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))]
    assert losses.cross_entropy(logits=logits, mask=mask).item() == pytest.approx(sum(terms) / 4, rel=1e-6)


def test_cross_entropy_and_dice_by_hand() -> None:
    """Logits of 0 and of +-log 3 are probabilities of 1/2, 3/4 and 1/4."""
    logits = row(0.0, math.log(3), -math.log(3), math.log(3))
    mask = row(1, 1, 0, 0)
    dice = 2 * (0.5 + 0.75) / ((0.5 + 0.75 + 0.25 + 0.75) + 2)
    value = losses.cross_entropy_and_dice(logits=logits, mask=mask)
    assert float(value - losses.cross_entropy(logits=logits, mask=mask)) == pytest.approx(1 - dice, abs=1e-6)


def test_mse_by_hand_is_the_mean_over_channels_and_valid_pixels() -> None:
    student = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # two channels, two pixels
    teacher = torch.tensor([[[[0.0, 2.0]], [[1.0, 7.0]]]])
    valid = everywhere(student)
    assert losses.mse(student=student, teacher=teacher, valid=valid).item() == pytest.approx((1 + 0 + 4 + 9) / 4)
    valid[..., 1] = False
    assert losses.mse(student=student, teacher=teacher, valid=valid).item() == pytest.approx((1 + 4) / 2)


def test_kld_pixels_by_hand_is_teacher_against_student() -> None:
    teacher, student = row(math.log(0.9 / 0.1)), row(math.log(0.2 / 0.8))
    forward = 0.9 * math.log(0.9 / 0.2) + 0.1 * math.log(0.1 / 0.8)
    backward = 0.2 * math.log(0.2 / 0.9) + 0.8 * math.log(0.8 / 0.1)
    assert abs(forward - backward) > 0.1, "the case must distinguish the directions"
    valid = everywhere(teacher)
    assert losses.kld_pixels(student=student, teacher=teacher, valid=valid).item() == pytest.approx(forward, rel=1e-5)
    assert losses.kld_pixels(student=teacher, teacher=student, valid=valid).item() == pytest.approx(backward, rel=1e-5)


def test_kld_pixels_at_temperature_two_by_hand() -> None:
    # odds 9 and 1/4 become their roots: P = 3/4, Q = 1/3
    teacher, student = row(math.log(9)), row(math.log(1 / 4))
    expected = 2**2 * (3 / 4 * math.log((3 / 4) / (1 / 3)) + 1 / 4 * math.log((1 / 4) / (2 / 3)))
    value = losses.kld_pixels(student=student, teacher=teacher, valid=everywhere(teacher), temperature=2.0)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_kld_positions_by_hand_is_teacher_against_student() -> None:
    teacher, student = row(*map(math.log, (0.7, 0.1, 0.1, 0.1))), row(5.0, 5.0, 5.0, 5.0)  # the student is uniform
    forward = 0.7 * math.log(0.7 / 0.25) + 3 * 0.1 * math.log(0.1 / 0.25)
    backward = 0.25 * math.log(0.25 / 0.7) + 3 * 0.25 * math.log(0.25 / 0.1)
    assert abs(forward - backward) > 0.01, "the case must distinguish the directions"
    valid = everywhere(teacher)
    value = losses.kld_positions(student=student, teacher=teacher, valid=valid).item()
    swapped = losses.kld_positions(student=teacher, teacher=student, valid=valid).item()
    assert value == pytest.approx(forward, rel=1e-5)
    assert swapped == pytest.approx(backward, rel=1e-5)


def test_kld_positions_at_temperature_two_by_hand() -> None:
    # weights 16, 1, 1, 1 become their roots: P = 4/7, 1/7, 1/7, 1/7
    teacher, student = row(math.log(16), 0, 0, 0), row(0, 0, 0, 0)
    expected = 2**2 * (4 / 7 * math.log((4 / 7) / (1 / 4)) + 3 / 7 * math.log((1 / 7) / (1 / 4)))
    value = losses.kld_positions(student=student.float(), teacher=teacher, valid=everywhere(teacher), temperature=2.0)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_every_public_loss_has_an_example_that_holds() -> None:
    functions = [
        (function, vars(module))
        for module in (losses, methods, relations, classes)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_") and name != "in_single_precision"
        if "__mutmut_" not in name  # copies that `make mutants` adds
    ]
    assert len(functions) == 20
    for function, module_globals in functions:
        (example,) = doctest.DocTestFinder().find(function, globs=module_globals)
        assert example.examples, function
        assert doctest.DocTestRunner().run(example).failed == 0, function


# ---- against other definitions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kld_pixels_is_torch_distributions_bernoulli_divergence(temperature: float) -> None:
    student, teacher = draw(2, 1, 8, 8, seed=0), draw(2, 1, 8, 8, seed=1)
    p, q = Bernoulli(logits=teacher / temperature), Bernoulli(logits=student / temperature)
    value = losses.kld_pixels(student=student, teacher=teacher, valid=everywhere(student), temperature=temperature)
    assert value.item() == pytest.approx(temperature**2 * kl_divergence(p, q).mean().item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kld_positions_is_channel_wise_distillation(temperature: float) -> None:
    """Shu et al. 2021, Eq. 4-5: T^2 / C sum_c sum_i P log(P / Q), P and Q softmax over the positions; batch mean."""
    student, teacher = draw(2, 5, 4, 6, seed=2), draw(2, 5, 4, 6, seed=3)
    p, q = (np.exp(maps.double().numpy().reshape(2 * 5, 24) / temperature) for maps in (teacher, student))
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    expected = temperature**2 * (p * np.log(p / q)).sum() / (2 * 5)
    value = losses.kld_positions(student=student, teacher=teacher, valid=everywhere(student), temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_kld_positions_ignores_a_channels_offset_but_kld_pixels_and_mse_do_not() -> None:
    student, teacher = draw(2, 1, 4, 4, seed=4), draw(2, 1, 4, 4, seed=5)
    values = {
        loss: [loss(student=student + shift, teacher=teacher, valid=everywhere(student)).item() for shift in (0, 3)]
        for loss in KD_LOSSES
    }
    assert values[losses.kld_positions][0] == pytest.approx(values[losses.kld_positions][1], rel=1e-4)
    for loss in (losses.mse, losses.kld_pixels):
        assert values[loss][1] != pytest.approx(values[loss][0], rel=0.1)


# ---- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", KD_LOSSES)
def test_equal_maps_cost_nothing_and_different_ones_something(loss: Callable[..., Tensor]) -> None:
    maps = maps_for(loss, seed=6)
    assert loss(student=maps, teacher=maps.clone(), valid=everywhere(maps)).item() == pytest.approx(0, abs=1e-6)
    assert gradient(loss, student=maps, teacher=maps.clone(), valid=everywhere(maps)).abs().max() < 1e-6
    assert loss(student=maps, teacher=maps_for(loss, seed=7), valid=everywhere(maps)).item() > 0.1


@pytest.mark.parametrize("loss", KD_LOSSES)
def test_descending_the_gradient_brings_the_student_to_the_teacher(loss: Callable[..., Tensor]) -> None:
    student, teacher = maps_for(loss, seed=8), maps_for(loss, seed=9)
    arguments = {"teacher": teacher, "valid": everywhere(teacher)}
    before = loss(student=student, **arguments)
    after = loss(student=student - gradient(loss, student=student, **arguments), **arguments)
    assert after < before


def test_large_temperatures_leave_the_gradient_of_kld_pixels_as_it_is() -> None:
    student, teacher = draw(2, 1, 4, 4, seed=10), draw(2, 1, 4, 4, seed=11)
    limit = (student - teacher) / 4 / student.numel()  # T (s(z/T) - s(t/T)) goes to (z - t) / 4
    for temperature in (50.0, 500.0):
        slope = gradient(
            losses.kld_pixels, student=student, teacher=teacher, valid=everywhere(student), temperature=temperature
        )
        torch.testing.assert_close(slope, limit, rtol=0.01, atol=1e-4 * limit.abs().max().item())


def test_large_temperatures_leave_the_gradient_of_kld_positions_as_it_is() -> None:
    student, teacher = draw(2, 3, 4, 4, seed=12), draw(2, 3, 4, 4, seed=13)
    difference = student - teacher
    limit = (difference - difference.mean(dim=(2, 3), keepdim=True)) / 16 / (2 * 3)
    for temperature in (200.0, 1000.0):
        slope = gradient(
            losses.kld_positions, student=student, teacher=teacher, valid=everywhere(student), temperature=temperature
        )
        torch.testing.assert_close(slope, limit, rtol=0.05, atol=0.03 * limit.abs().max().item())


@pytest.mark.parametrize("loss", KD_LOSSES)
def test_the_same_picture_at_twice_the_size_costs_the_same(loss: Callable[..., Tensor]) -> None:
    student, teacher = maps_for(loss, seed=14), maps_for(loss, seed=15)
    small = loss(student=student, teacher=teacher, valid=everywhere(student))
    student, teacher = (maps.repeat(1, 1, 2, 2) for maps in (student, teacher))
    large = loss(student=student, teacher=teacher, valid=everywhere(student))
    assert large.item() == pytest.approx(small.item(), rel=1e-5)


@pytest.mark.parametrize("loss", KD_LOSSES)
def test_a_repeated_batch_costs_the_same(loss: Callable[..., Tensor]) -> None:
    student, teacher = maps_for(loss, seed=16), maps_for(loss, seed=17)
    once = loss(student=student, teacher=teacher, valid=everywhere(student))
    student, teacher = (maps.repeat(2, 1, 1, 1) for maps in (student, teacher))
    assert loss(student=student, teacher=teacher, valid=everywhere(student)).item() == pytest.approx(once.item())


# ---- positions that are not compared -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", KD_LOSSES)
def test_invalid_positions_change_nothing_and_get_no_gradient(loss: Callable[..., Tensor]) -> None:
    student, teacher = maps_for(loss, seed=18), maps_for(loss, seed=19)
    valid = left_half(student)
    before = loss(student=student, teacher=teacher, valid=valid)
    other_student = torch.where(valid, student, 1e4)
    other_teacher = torch.where(valid, teacher, -1e4)
    assert torch.equal(before, loss(student=other_student, teacher=other_teacher, valid=valid))
    slope = gradient(loss, student=student, teacher=teacher, valid=valid)
    assert not slope[~valid.expand_as(slope)].any()
    assert slope[valid.expand_as(slope)].any()


@pytest.mark.parametrize("loss", KD_LOSSES)
def test_the_mean_is_that_of_the_valid_part_alone(loss: Callable[..., Tensor]) -> None:
    student, teacher = maps_for(loss, seed=20), maps_for(loss, seed=21)
    masked = loss(student=student, teacher=teacher, valid=left_half(student))
    student, teacher = (maps[..., : maps.shape[3] // 2] for maps in (student, teacher))
    alone = loss(student=student, teacher=teacher, valid=everywhere(student))
    assert masked.item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("loss", KD_LOSSES)
@pytest.mark.parametrize("images", ["one", "all"])
def test_images_without_a_valid_position_give_finite_values(loss: Callable[..., Tensor], images: str) -> None:
    student, teacher = maps_for(loss, seed=22), maps_for(loss, seed=23)
    valid = everywhere(student)
    valid[0 if images == "one" else slice(None)] = False
    value = loss(student=student, teacher=teacher, valid=valid)
    with torch.autograd.set_detect_anomaly(True):  # not a NaN on the way either, which a zero would hide
        slope = gradient(loss, student=student, teacher=teacher, valid=valid)
    assert torch.isfinite(slope).all()
    assert not slope[0].any()
    assert math.isfinite(value.item())
    assert (value.item() > 0.1) == (images == "one")


# ---- numbers at the edge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_extreme_logits_stay_finite(temperature: float) -> None:
    teacher, student = row(80.0, -80.0, 80.0, -80.0), row(-80.0, 80.0, 80.0, -80.0)
    arguments = {"teacher": teacher, "valid": everywhere(teacher), "temperature": temperature}
    # two of four pixels are sure and wrong: each costs the difference of the logits
    value = losses.kld_pixels(student=student, **arguments)
    assert value.item() == pytest.approx(temperature**2 * (2 * 80 / temperature) / 4, rel=1e-5)
    # both agree on the third position; the teacher's other half of the mass is where the student has none
    value = losses.kld_positions(student=student, **arguments)
    assert value.item() == pytest.approx(temperature**2 * 0.5 * 160 / temperature, rel=1e-5)
    for loss in KLD_LOSSES:
        assert torch.isfinite(gradient(loss, student=student, **arguments)).all()


def test_cross_entropy_of_a_sure_and_wrong_logit_is_its_size() -> None:
    logits = row(-80.0, 80.0, 80.0, -80.0).requires_grad_()
    value = losses.cross_entropy(logits=logits, mask=row(1, 0, 1, 0).byte())
    value.backward()
    assert value.item() == pytest.approx((80 + 80) / 4)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", KD_LOSSES)
def test_bf16_maps_are_compared_in_fp32(loss: Callable[..., Tensor]) -> None:
    student, teacher = (maps_for(loss, seed=seed).bfloat16() for seed in (24, 25))
    valid = everywhere(student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student=student, teacher=teacher, valid=valid)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(student=student.float(), teacher=teacher.float(), valid=valid))


def test_bf16_logits_are_supervised_in_fp32() -> None:
    logits, mask = draw(2, 1, 4, 4, seed=26).bfloat16(), draw(2, 1, 4, 4, seed=27) > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = losses.cross_entropy(logits=logits, mask=mask)
    assert value.dtype == torch.float32
    assert torch.equal(value, losses.cross_entropy(logits=logits.float(), mask=mask))


# ---- the Teacher is only read --------------------------------------------------------------------------------------


def small_student(seed: int) -> UNet:
    return unet(encoder="mobilenetv3_small_trimmed", decoder_channels=[16, 16, 8, 8, 8], weights="none", seed=seed)


def small_path(name: str) -> paths.KDPath:
    if name == "HR":
        return paths.HiddenRegressor(student_channels=96, teacher_channels=512, inner_channels=8)
    return {"L": paths.Logits, "H": paths.Hidden}[name]()


WEAK = TeacherForward("Teacher", view="weak", precision="fp32")


@pytest.fixture(scope="module")
def frozen() -> FrozenTeachers:
    teacher = unet(encoder="resnet18", decoder_channels=[16, 16, 8, 8, 8], weights="none", seed=1)
    return FrozenTeachers({"Teacher": networks.freeze(teacher)}, Compute(device=torch.device("cpu"), precision="fp32"))


@pytest.mark.parametrize("name", ["L", "H", "HR"])
@pytest.mark.parametrize("loss", ["mse", "kld"])
def test_a_training_step_moves_the_student_and_leaves_the_teacher(
    frozen: FrozenTeachers, tmp_path: Path, name: str, loss: str
) -> None:
    kd_path = small_path(name)
    kld = losses.kld_pixels if name == "L" else losses.kld_positions
    distillation = Distillation(
        {"kd": Term(kd_path, losses.mse if loss == "mse" else kld, kd_path.stages)},
        weight=1.0,  # the KD term alone: what moves, moves through it
        forward=WEAK,
        align=True,
    )
    learner = Learner(
        title="cell",
        role="distilled",
        network=small_student(seed=0),
        view="strong",
        distillation=distillation,
        lr=1e-3,
        epochs=1,
        patience=1,
        folder=tmp_path,
    )
    teacher = frozen.teachers["Teacher"]
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    stem = learner.network.encoder.conv_stem.weight.clone()
    images = {view: draw(2, 3, 64, 64, seed=seed, spread=1.0) for view, seed in (("weak", 28), ("strong", 29))}

    teacher_outputs = frozen.teach([learner], images)[WEAK]
    assert not kd_path.teacher_map(teacher_outputs).requires_grad
    theta = torch.tensor([[[0.9, 0.1, 0.05], [-0.1, 0.9, 0.0]]]).repeat(2, 1, 1)
    mask = torch.zeros(2, 1, 64, 64)
    terms = learner.terms(learner.network(images["strong"]), teacher_outputs, ViewPair(theta, mask, mask))
    assert set(terms) == {"loss", "kd", "supervised"}
    terms["loss"].backward()
    learner.optimizer.step()

    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not torch.equal(stem, learner.network.encoder.conv_stem.weight)
    assert all(parameter.grad is not None for parameter in kd_path.parameters())


def test_a_teachers_outputs_have_no_graph_even_where_its_input_has_one(frozen: FrozenTeachers) -> None:
    images = {"strong": draw(1, 3, 64, 64, seed=30, spread=1.0).requires_grad_()}
    for name in ("L", "H"):
        kd_path = small_path(name)
        forward = TeacherForward("Teacher", view="strong", precision="fp32")
        distillation = SimpleNamespace(teacher_stages=kd_path.stages, forward=forward)
        forwards = frozen.teach([SimpleNamespace(distillation=distillation)], images)
        assert not kd_path.teacher_map(forwards[forward]).requires_grad


def test_a_teacher_that_is_not_frozen_is_refused(frozen: FrozenTeachers) -> None:
    network = small_student(seed=0)
    with pytest.raises(ValueError, match="not frozen"):
        FrozenTeachers({"Teacher": network.eval()}, frozen.compute)
    with pytest.raises(ValueError, match="not frozen"):
        FrozenTeachers({"Teacher": networks.freeze(network).train()}, frozen.compute)
