"""Losses of K classes: against other people's code or by hand, and what holds for each that takes logits or regions."""

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from segmentation_models_pytorch.losses import MULTICLASS_MODE, DiceLoss
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchdistill.losses import mid_level

from kdsweep.core.errors import InputError
from kdsweep.distill import classes, losses, methods, paths, relations
from kdsweep.distill.distillation import Distillation, TeacherForward, Term, ViewPair
from kdsweep.evaluation import metrics
from kdsweep.models.networks import Outputs

K = 3
OF_LOGITS: list[Callable[..., Tensor]] = [
    *(losses.kld_pixels, losses.kld_positions, methods.intra_class_relation),
    *(classes.inter_class_relation, classes.kld_standardized, classes.decoupled),
]
LOSSES = [*OF_LOGITS, relations.intra_class_variation, relations.region_affinity]
NAMES = [loss.__name__ for loss in LOSSES]
OF_CLASSES = [classes.decoupled, classes.inter_class_relation, classes.kld_standardized]


def draw(*shape: int, seed: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def indices(*shape: int, seed: int) -> Tensor:
    """A mask (N, 1, h, w) of class indices."""
    return torch.randint(K + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def everywhere(maps: Tensor) -> Tensor:
    return torch.ones_like(maps[:, :1], dtype=torch.bool)


def arguments_of(loss: Callable[..., Tensor], *, count: int = 2, seed: int = 0) -> dict[str, Tensor]:
    maps = {name: draw(count, K + 1, 6, 6, seed=seed + k) for k, name in enumerate(("student", "teacher"))}
    mask = losses.one_hot(indices(count, 1, 6, 6, seed=seed + 2), channels=K + 1)[:, 1:]
    names = [name for name in ("student_mask", "teacher_mask") if name in inspect.signature(loss).parameters]
    return {**maps, "valid": everywhere(maps["student"]), **dict.fromkeys(names, mask)}


def by_pixel(maps: Tensor) -> np.ndarray:
    """Logits (N, C, h, w) as (N h w, C), in double precision."""
    return maps.double().movedim(1, -1).reshape(-1, maps.shape[1]).numpy()


def distiller(kind: type[nn.Module], maps: dict[str, Tensor], **arguments: float) -> float:
    """The term as torchdistill computes it, of logits with a row for each pixel."""
    io = {"student_module_path": "m", "student_module_io": "output", "teacher_module_path": "m"}
    loss = kind(**io, teacher_module_io="output", **arguments)
    rows = [{"m": {"output": torch.from_numpy(by_pixel(maps[name]))}} for name in ("student", "teacher")]
    return float(loss(*rows))


# ---- the supervised terms ------------------------------------------------------------------------------------------


def test_one_hot_is_the_mask_of_each_class() -> None:
    mask = indices(2, 1, 5, 4, seed=0)
    result = losses.one_hot(mask, channels=K + 1)
    assert result.shape == (2, K + 1, 5, 4)
    assert torch.equal(result.argmax(dim=1, keepdim=True), mask.long())
    assert torch.equal(result.sum(dim=1), torch.ones(2, 5, 4))


def test_cross_entropy_is_scipys_of_the_masks_class() -> None:
    logits, mask = draw(2, K + 1, 5, 4, seed=1), indices(2, 1, 5, 4, seed=2)
    rows = log_softmax(by_pixel(logits), axis=1)
    expected = -rows[np.arange(len(rows)), mask.flatten().numpy()].mean()
    assert losses.cross_entropy(logits=logits, mask=mask).item() == pytest.approx(expected, rel=1e-5)
    reference = nn.functional.cross_entropy(logits, mask[:, 0].long())
    assert losses.cross_entropy(logits=logits, mask=mask).item() == pytest.approx(reference.item(), rel=1e-6)


@pytest.mark.parametrize("absent", [[], [2], [1, 2], [1, 2, 3]])
def test_cross_entropy_and_dice_is_smps_mean_over_the_classes_that_the_batch_has(absent: list[int]) -> None:
    logits, mask = draw(2, K + 1, 5, 4, seed=3), indices(2, 1, 5, 4, seed=4)
    for index in absent:
        mask[mask == index] = 0
    if 3 not in absent:  # one pixel is enough
        mask[mask == 3] = 0
        mask[0, 0, 0, 0] = 3
    over_all = DiceLoss(MULTICLASS_MODE, classes=[1, 2, 3])(logits, mask[:, 0].long())  # absent ones add 0
    value = losses.cross_entropy_and_dice(logits=logits, mask=mask) - losses.cross_entropy(logits=logits, mask=mask)
    assert float(value) == pytest.approx(float(over_all) * K / max(K - len(absent), 1), abs=1e-6)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.cross_entropy_and_dice])
def test_supervised_terms_have_finite_gradients_in_bf16_without_lesion_and_for_sure_and_wrong_logits(
    loss: Callable[..., Tensor],
) -> None:
    for mask in (indices(2, 1, 4, 4, seed=5), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)):
        for spread in (2.0, 200.0):
            logits = draw(2, K + 1, 4, 4, seed=6, spread=spread).bfloat16().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = loss(logits=logits, mask=mask)
            value.backward()
            assert value.dtype == torch.float32
            assert value.isfinite()
            assert logits.grad is not None
            assert logits.grad.isfinite().all()
            assert torch.equal(value, loss(logits=logits.float(), mask=mask))


def test_a_class_of_probability_zero_that_the_batch_lacks_has_no_dice() -> None:
    logits, mask = draw(2, K + 1, 4, 4, seed=7), indices(2, 1, 4, 4, seed=8)
    mask[mask == 2] = 0
    logits[:, 2] = -1e4
    rest = [0, 1, 3]
    expected = losses.cross_entropy_and_dice(logits=logits[:, rest], mask=mask.clamp(max=2))
    assert losses.cross_entropy_and_dice(logits=logits, mask=mask).item() == pytest.approx(expected.item(), rel=1e-5)


# ---- the KD terms: second sources ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kld_pixels_is_scipys_divergence_of_each_pixels_softmax(temperature: float) -> None:
    maps = arguments_of(losses.kld_pixels)
    q, p = (softmax(by_pixel(maps[name]) / temperature, axis=1) for name in ("student", "teacher"))
    expected = temperature**2 * rel_entr(p, q).sum(axis=1).mean()
    assert losses.kld_pixels(**maps, temperature=temperature).item() == pytest.approx(expected, rel=1e-5)


def test_kld_pixels_of_two_channels_is_that_of_their_difference() -> None:
    student, teacher = draw(2, 2, 5, 5, seed=7), draw(2, 2, 5, 5, seed=8)
    two = losses.kld_pixels(student=student, teacher=teacher, valid=everywhere(student), temperature=2.0)
    logits = [maps[:, 1:] - maps[:, :1] for maps in (student, teacher)]
    one = losses.kld_pixels(student=logits[0], teacher=logits[1], valid=everywhere(student), temperature=2.0)
    assert two.item() == pytest.approx(one.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_both_terms_of_dist_are_torchdistills(temperature: float) -> None:
    maps = arguments_of(classes.inter_class_relation)
    for loss, weights in (
        (classes.inter_class_relation, {"beta": 1.0, "gamma": 0.0}),
        (methods.intra_class_relation, {"beta": 0.0, "gamma": 1.0}),
    ):
        expected = distiller(mid_level.DISTLoss, maps, tau=temperature, **weights)
        assert loss(**maps, temperature=temperature).item() == pytest.approx(expected, rel=1e-4), loss


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_kld_standardized_is_torchdistills_times_the_squared_temperature(temperature: float) -> None:
    maps = arguments_of(classes.kld_standardized)
    divergence = distiller(mid_level.LogitStdKDLoss, maps, temperature=temperature, alpha=0.0)
    value = classes.kld_standardized(**maps, temperature=temperature).item()
    assert value == pytest.approx(temperature**2 * divergence, rel=1e-4)
    moved = {**maps, "student": 5 * maps["student"] + 3}
    assert classes.kld_standardized(**moved, temperature=temperature).item() == pytest.approx(value, rel=1e-4)


def test_decoupled_is_the_published_formula() -> None:
    """Zhao et al. 2022, Eq. 7: TCKD of (p_t, 1 - p_t) and NCKD of p_i / (1 - p_t), here of softmax(z / T)."""
    maps, temperature, alpha, beta = arguments_of(classes.decoupled), 3.0, 0.5, 6.0
    target = np.concatenate(
        [by_pixel(1 - maps["student_mask"].sum(1, keepdim=True)), by_pixel(maps["student_mask"])], 1
    )
    q, p = (softmax(by_pixel(maps[name]) / temperature, axis=1) for name in ("student", "teacher"))
    q_target, p_target = ((shares * target).sum(axis=1) for shares in (q, p))
    tckd = rel_entr(p_target, q_target) + rel_entr(1 - p_target, 1 - q_target)
    others = ((shares * (1 - target)) / (1 - of)[:, None] for shares, of in ((p, p_target), (q, q_target)))
    nckd = rel_entr(*others).sum(axis=1)
    expected = temperature**2 * (alpha * tckd + beta * nckd).mean()
    value = classes.decoupled(**maps, alpha=alpha, beta=beta, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    # Eq. 8: KL is TCKD + (1 - p_t) NCKD
    kl = losses.kld_pixels(**{name: maps[name] for name in ("student", "teacher", "valid")}, temperature=temperature)
    assert kl.item() == pytest.approx(temperature**2 * (tckd + (1 - p_target) * nckd).mean(), rel=1e-5)


def test_intra_class_variation_of_a_class_without_pixels_is_that_of_one_class() -> None:
    maps = arguments_of(relations.intra_class_variation)
    one = {name: value[:, :1] if name.endswith("mask") else value for name, value in maps.items()}
    more = {
        name: torch.cat([value, 0 * maps["student_mask"][:, :1]], 1) if name.endswith("mask") else value
        for name, value in one.items()
    }
    expected = relations.intra_class_variation(**one)
    torch.testing.assert_close(relations.intra_class_variation(**more), expected)
    assert relations.intra_class_variation(**maps).item() != pytest.approx(expected.item(), rel=1e-2)


def test_region_affinity_is_the_mean_over_the_pairs_of_regions_that_are_present() -> None:
    maps = arguments_of(relations.region_affinity)
    mask = maps["student_mask"].clone()
    mask[1, 1] = 0  # the second image lacks a class
    maps |= {"student_mask": mask, "teacher_mask": mask}
    squared = []
    for image in range(2):
        means = []
        for of in ("student", "teacher"):
            values = maps[of][image].double().numpy()
            regions = [mask[image, k].numpy() > 0 for k in range(K)] + [mask[image].sum(0).numpy() == 0]
            means.append([values[:, region].mean(axis=1) for region in regions if region.any()])
        for one in range(len(means[0])):
            for other in range(one):
                cosines = [m[one] @ m[other] / np.linalg.norm(m[one]) / np.linalg.norm(m[other]) for m in means]
                squared.append((cosines[0] - cosines[1]) ** 2)
    assert len(squared) == 6 + 3
    assert relations.region_affinity(**maps).item() == pytest.approx(np.mean(squared), rel=1e-4)


def test_a_region_outside_the_valid_positions_alone_has_no_affinity() -> None:
    maps = arguments_of(relations.region_affinity)
    mask = maps["student_mask"].clone()
    mask[:, 0, :, :4], mask[:, 1:, :, 4:] = 0, 0  # the first class is where nothing is valid
    valid = maps["valid"].clone()
    valid[..., 4:] = False
    maps |= {"valid": valid, "student_mask": mask, "teacher_mask": mask}
    without = {name: value[:, 1:] if name.endswith("mask") else value for name, value in maps.items()}
    assert mask[:, 0].any()
    torch.testing.assert_close(relations.region_affinity(**maps), relations.region_affinity(**without))


# ---- what holds for each -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_it_is_zero_at_equality_and_above_elsewhere(loss: Callable[..., Tensor]) -> None:
    arguments = arguments_of(loss)
    assert loss(**arguments).item() > 1e-4
    assert loss(**{**arguments, "student": arguments["teacher"]}).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_the_gradient_is_that_of_finite_differences(
    loss: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        name: value.double() if value.is_floating_point() else value for name, value in arguments_of(loss).items()
    }
    monkeypatch.setattr(Tensor, "float", lambda maps: maps)  # as the losses call it: in double precision
    student, bare = arguments.pop("student").requires_grad_(), inspect.unwrap(loss)
    assert torch.autograd.gradcheck(lambda maps: bare(student=maps, **arguments), (student,), atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_positions_outside_the_valid_region_change_nothing(loss: Callable[..., Tensor]) -> None:
    arguments = arguments_of(loss)
    valid = arguments["valid"].clone()
    valid[..., 4:] = False
    clean = loss(**{**arguments, "valid": valid})
    spoilt = {
        name: torch.where(valid, arguments[name], 50 * draw(2, K + 1, 6, 6, seed=9)) for name in ("student", "teacher")
    }
    assert loss(**{**arguments, **spoilt, "valid": valid}).item() == pytest.approx(clean.item(), rel=1e-5)
    assert clean.item() != pytest.approx(loss(**arguments).item(), rel=1e-3), "the region must matter"


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
@pytest.mark.parametrize("images", ["all", "one", "none"])
@pytest.mark.parametrize("spread", [0.0, 2.0, 200.0])
def test_bf16_gradients_are_finite_whatever_is_valid(loss: Callable[..., Tensor], images: str, spread: float) -> None:
    """Also of logits that are all alike (spread 0) and of sure ones."""
    arguments = arguments_of(loss)
    arguments["valid"][{"all": [], "one": [0], "none": [0, 1]}[images]] = False
    arguments |= {name: (spread / 2 * arguments[name]).bfloat16() for name in ("student", "teacher")}
    student = arguments["student"].requires_grad_()
    with torch.autograd.set_detect_anomaly(True), torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(**arguments)
        value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[~arguments["valid"].expand_as(student)].any()


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_the_order_of_classes_does_not_matter(loss: Callable[..., Tensor]) -> None:
    arguments = arguments_of(loss)
    order = [0, 3, 1, 2]
    if loss in OF_LOGITS:
        turned = {name: arguments[name][:, order] for name in ("student", "teacher")}
    else:
        turned = {name: arguments[name] for name in ("student", "teacher")}
    turned |= {name: arguments[name][:, [2, 0, 1]] for name in arguments if name.endswith("mask")}
    assert loss(**{**arguments, **turned}).item() == pytest.approx(loss(**arguments).item(), rel=1e-4)


@pytest.mark.parametrize("loss", OF_CLASSES, ids=[loss.__name__ for loss in OF_CLASSES])
def test_one_logit_per_pixel_is_refused_in_one_line(loss: Callable[..., Tensor]) -> None:
    arguments = {name: value[:, :1] for name, value in arguments_of(loss).items()}
    with pytest.raises(InputError, match=r"^loss \w+ compares several classes, .*; set data\.classes") as caught:
        loss(**arguments)
    assert "\n" not in str(caught.value)


def test_nothing_waits_for_the_device() -> None:
    """Tensors of FakeTensorMode have a device but no values: reading one on the host raises."""
    with FakeTensorMode():
        logits = torch.empty(2, K + 1, 6, 6, device="cuda:0", dtype=torch.bfloat16)
        mask = torch.empty(2, 1, 6, 6, device="cuda:0", dtype=torch.uint8)
        theta = torch.empty(2, 2, 3, device="cuda:0")
        values = [losses.cross_entropy_and_dice(logits=logits, mask=mask), metrics.mean_dice(logits=logits, mask=mask)]
        maps = Outputs({"logits": logits})
        for loss in LOSSES:
            values += term(loss, count=K).values(student=maps, teacher=maps, views=ViewPair(theta, mask, mask)).values()
    assert {(value.device.type, value.dtype, value.shape) for value in values} == {("cuda", torch.float32, ())}


# ---- masks ---------------------------------------------------------------------------------------------------------


def term(loss: Callable[..., Tensor], *, count: int) -> Distillation:
    path = paths.Logits()
    terms = {"kd": Term(path, loss, path.stages, classes=count)}
    return Distillation(terms, 0.5, TeacherForward("T", view="weak", precision="fp32"), align=True)


def test_a_loss_gets_the_mask_of_each_class_warped_like_that_of_one() -> None:
    seen: dict[str, Tensor] = {}

    def loss(*, student: Tensor, teacher: Tensor, valid: Tensor, student_mask: Tensor, teacher_mask: Tensor) -> Tensor:
        seen.update(student_mask=student_mask, teacher_mask=teacher_mask)
        return student.sum()

    maps = Outputs({"logits": draw(2, K + 1, 16, 16, seed=1)})
    strong, weak = torch.zeros(2, 1, 64, 64, dtype=torch.uint8), torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    for index in range(1, K + 1):
        strong[..., 16 * index - 8 : 16 * index + 4, 20:50] = index
        weak[..., 10:40, 16 * index - 8 : 16 * index + 4] = index
    theta = torch.tensor([[[0.8, 0.3, 0.1], [-0.2, 0.9, 0.0]]]).repeat(2, 1, 1)
    term(loss, count=K).values(student=maps, teacher=maps, views=ViewPair(theta, strong, weak))
    several = dict(seen)
    assert several["student_mask"].shape == several["teacher_mask"].shape == (2, K, 16, 16)
    for index in range(1, K + 1):
        views = ViewPair(theta, (strong == index).byte(), (weak == index).byte())
        term(loss, count=1).values(student=maps, teacher=maps, views=views)
        for name, mask in several.items():
            assert mask[:, index - 1 : index].any()
            assert torch.equal(mask[:, index - 1 : index], seen[name]), name


def test_of_two_classes_with_half_a_pixel_each_the_first_has_it() -> None:
    seen: dict[str, Tensor] = {}

    def loss(*, student: Tensor, teacher: Tensor, valid: Tensor, teacher_mask: Tensor) -> Tensor:
        seen.update(teacher_mask=teacher_mask)
        return student.sum()

    maps = Outputs({"logits": draw(1, K + 1, 1, 4, seed=1)})
    weak = torch.tensor([[[[1, 2, 0, 3]]]], dtype=torch.uint8)
    theta = torch.tensor([[[1.0, 0.0, 0.25], [0.0, 1.0, 0.0]]])  # half a pixel
    term(loss, count=K).values(student=maps, teacher=maps, views=ViewPair(theta, weak, weak))
    assert seen["teacher_mask"][0, :, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]


def test_the_target_of_decoupled_is_the_students() -> None:
    strong, weak = indices(1, 1, 4, 4, seed=1), indices(1, 1, 4, 4, seed=2)
    student, teacher = (
        Outputs({"logits": draw(1, K + 1, 4, 4, seed=3)}),
        Outputs({"logits": draw(1, K + 1, 4, 4, seed=4)}),
    )
    values = term(classes.decoupled, count=K).values(
        student=student, teacher=teacher, views=ViewPair(None, strong, weak)
    )
    mask = losses.one_hot(strong, channels=K + 1)[:, 1:]
    maps = {"student": student.logits, "teacher": teacher.logits, "valid": everywhere(student.logits)}
    assert values["kd"].item() == pytest.approx(classes.decoupled(**maps, student_mask=mask).item())
    assert math.isfinite(values["kd"].item())
