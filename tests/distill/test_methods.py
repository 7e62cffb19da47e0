"""The literature's methods: their terms against other people's code or worked out by hand, and what holds for each."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchdistill.losses import mid_level

from kdsweep import conf_dir
from kdsweep.config import composition, identity, overrides
from kdsweep.config.grid import Cell
from kdsweep.core.errors import InputError
from kdsweep.distill import losses, methods, paths, relations
from kdsweep.distill.distillation import Distillation, TeacherForward, Term, ViewPair, warp
from kdsweep.models import networks
from kdsweep.models.networks import Outputs
from kdsweep.training import build

METHODS = sorted(file.stem for file in (conf_dir() / "method").glob("*.yaml") if file.stem != "none")
OF_MASKS = [relations.intra_class_variation, relations.region_affinity]
LOSSES: list[Callable[..., Tensor]] = [
    *(methods.attention, methods.importance, methods.standardized, methods.intra_class_relation, methods.squared_sum),
    *(methods.hierarchical_context, relations.pairwise, relations.cross_image, relations.batch_similarity, *OF_MASKS),
]
NAMES = [loss.__name__ for loss in LOSSES]


def draw(*shape: int, seed: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everywhere(maps: Tensor) -> Tensor:
    return torch.ones_like(maps[:, :1], dtype=torch.bool)


def arguments_of(loss: Callable[..., Tensor], *, count: int = 3, seed: int = 0) -> dict[str, Tensor]:
    channels = 1 if loss is methods.intra_class_relation else 4
    maps = {name: draw(count, channels, 6, 6, seed=seed + k) for k, name in enumerate(("student", "teacher"))}
    mask = torch.zeros(count, 1, 6, 6)
    mask[:, :, 1:4, 2:5] = 1
    masks = {"student_mask": mask, "teacher_mask": mask} if loss in OF_MASKS else {}
    return {**maps, "valid": everywhere(maps["student"]), **masks}


def distiller(kind: type, *, student: Tensor, teacher: Tensor, **arguments: Any) -> float:
    """The term as torchdistill computes it, of maps at one place of each network."""
    io = {"student_module_path": "m", "student_module_io": "output", "teacher_module_path": "m"}
    loss = kind(**io, teacher_module_io="output", **arguments)
    return float(loss({"m": {"output": student}}, {"m": {"output": teacher}}))


# ---- against other people's code -----------------------------------------------------------------------------------


def test_attention_is_torchdistills_of_the_authors_code() -> None:
    maps = arguments_of(methods.attention)
    pair = {"pair": {"teacher": {"path": "m", "io": "output"}, "student": {"path": "m", "io": "output"}}}
    reference = mid_level.ATLoss(pair, mode="code")
    expected = reference({"m": {"output": maps["student"]}}, {"m": {"output": maps["teacher"]}})
    assert methods.attention(**maps).item() == pytest.approx(expected.item(), rel=1e-5)


def test_importance_is_that_of_the_valid_positions_alone() -> None:
    student, teacher = draw(2, 3, 4, 6, seed=1), draw(2, 5, 4, 6, seed=2)
    valid = everywhere(student)
    valid[..., :2] = False
    value = methods.importance(student=student, teacher=teacher, valid=valid)
    parts = {"student": student[..., 2:], "teacher": teacher[..., 2:], "valid": valid[..., 2:]}
    torch.testing.assert_close(value, methods.importance(**parts))


def test_batch_similarity_is_torchdistills_but_for_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are divided by their L1 norm; the paper's equation and the authors' code have the L2 norm."""
    maps = arguments_of(relations.batch_similarity)
    reference = mid_level.SPKDLoss("m", "m", reduction="batchmean")
    io = [{"m": {"output": maps[name]}} for name in ("student", "teacher")]
    assert relations.batch_similarity(**maps).item() != pytest.approx(reference(*io).item(), rel=1e-3)
    monkeypatch.setattr(mid_level, "normalize", lambda gram, _: F.normalize(gram, p=2, dim=1))
    assert relations.batch_similarity(**maps).item() == pytest.approx(reference(*io).item(), rel=1e-5)


@pytest.mark.parametrize("size", [3, 6, 9])
def test_hierarchical_context_is_torchdistills(size: int) -> None:
    student, teacher = draw(2, 3, size, size, seed=1), draw(2, 3, size, size, seed=2)
    io = ("m", "output", "m", "output")
    reference = mid_level.HierarchicalContextLoss(*io, reduction="mean", output_sizes=[4, 2, 1])
    expected = reference({"m": {"output": (student, None)}}, {"m": {"output": teacher}})
    value = methods.hierarchical_context(student=student, teacher=teacher, valid=everywhere(student))
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_intra_class_relation_is_torchdistills_of_the_two_classes(temperature: float) -> None:
    maps = arguments_of(methods.intra_class_relation)
    # softmax of (0, z) is (1 - s(z), s(z)); a row for each pixel, as DIST's authors have it for segmentation
    pairs = [
        torch.stack([torch.zeros_like(maps[name]), maps[name]], dim=-1).reshape(-1, 2)
        for name in ("student", "teacher")
    ]
    expected = distiller(mid_level.DISTLoss, student=pairs[0], teacher=pairs[1], beta=0.0, gamma=1.0, tau=temperature)
    value = methods.intra_class_relation(**maps, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-4)


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_importance_by_hand() -> None:
    student, teacher = torch.tensor([[[[1.0, 2.0]], [[-1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]], [[0.0, 1.0]]]])
    # channel means of x^4: (1, 8) and (0, 1); norms sqrt(65) and 1
    expected = (1 / 65**0.5 - 0) ** 2 + (8 / 65**0.5 - 1) ** 2
    assert methods.importance(student=student, teacher=teacher, valid=everywhere(student)).item() == pytest.approx(
        expected
    )


def test_standardized_is_one_minus_pearson_for_many_positions() -> None:
    student, teacher = draw(4, 2, 20, 20, seed=3), draw(4, 2, 20, 20, seed=4) + 5
    rows = [maps.transpose(0, 1).reshape(2, -1) for maps in (student, teacher)]
    correlations = [torch.corrcoef(torch.stack([rows[0][c], rows[1][c]]))[0, 1] for c in range(2)]
    expected = 1 - float(torch.stack(correlations).mean())
    value = methods.standardized(student=student, teacher=teacher, valid=everywhere(student)).item()
    assert value == pytest.approx(expected * (4 * 400 - 1) / (4 * 400), rel=1e-4)
    scaled = methods.standardized(student=3 * student + 7, teacher=teacher, valid=everywhere(student)).item()
    assert scaled == pytest.approx(value, rel=1e-4)


def test_squared_sum_by_hand_is_over_all_but_images() -> None:
    student = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 0.0]]]])
    value = methods.squared_sum(student=student, teacher=torch.zeros(2, 1, 1, 2), valid=everywhere(student))
    assert value.item() == pytest.approx((1 + 4) / 2)


def test_pairwise_by_hand() -> None:
    # Nodes of 2 x 2: the Student's two are (3, 0) and (0, 2), cosine 0; the Teacher's are alike, cosine 1.
    student = torch.tensor([[[[3.0, 1, 0, 0], [0, 2, 0, 0]], [[0, 0, 1, 2], [0, 0, 0, 0]]]])
    teacher = torch.ones(1, 5, 2, 4)
    value = relations.pairwise(student=student, teacher=teacher, valid=everywhere(student))
    assert value.item() == pytest.approx((0 + 1 + 1 + 0) / 4)


def test_cross_image_is_the_mean_over_pairs_of_images_of_pytorchs_divergence() -> None:
    maps = arguments_of(relations.cross_image, count=2)
    units = {name: F.normalize(maps[name].flatten(2), dim=1) for name in ("student", "teacher")}
    terms = []
    for one in range(2):
        for other in range(2):
            q, p = (units[name][one].T @ units[name][other] / 0.1 for name in ("student", "teacher"))
            terms.append(F.kl_div(q.log_softmax(dim=1), p.softmax(dim=1), reduction="batchmean"))
    expected = torch.stack(terms).mean().item()
    assert relations.cross_image(**maps).item() == pytest.approx(expected, rel=1e-4)


def test_intra_class_variation_by_hand() -> None:
    # Lesion: the positions 0 and 1, background 2 and 3. The Teacher's positions are their classes' means: cosine 1.
    student = torch.tensor([[[[1.0, 0.0, 2.0, 2.0]], [[0.0, 1.0, 0.0, 0.0]]]])
    teacher = torch.tensor([[[[1.0, 1.0, 3.0, 3.0]], [[1.0, 1.0, 0.0, 0.0]]]])
    mask = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])
    value = relations.intra_class_variation(
        student=student, teacher=teacher, valid=everywhere(student), student_mask=mask, teacher_mask=mask
    )
    cosine = 1 / 2**0.5  # of (1, 0) and of (0, 1) to their mean (0.5, 0.5)
    assert value.item() == pytest.approx(2 * (1 - cosine) ** 2 / 4, rel=1e-5)


def test_region_affinity_by_hand_and_an_image_without_lesion_does_not_count() -> None:
    student = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]]]])  # the regions' means are orthogonal
    teacher = torch.ones(1, 3, 1, 4)  # and the Teacher's are alike
    mask = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])
    masks = {"student_mask": mask, "teacher_mask": mask}
    one = relations.region_affinity(student=student, teacher=teacher, valid=everywhere(student), **masks)
    assert one.item() == pytest.approx(1.0)
    both = {name: torch.cat([each, torch.zeros_like(each)]) for name, each in masks.items()}
    student, teacher = torch.cat([student, student]), torch.cat([teacher, teacher])
    two = relations.region_affinity(student=student, teacher=teacher, valid=everywhere(student), **both)
    assert two.item() == pytest.approx(1.0)


@pytest.mark.parametrize("loss", OF_MASKS)
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_a_batch_of_one_class_alone_is_defined(loss: Callable[..., Tensor], fill: float) -> None:
    arguments = arguments_of(loss)
    arguments["student"].requires_grad_()
    arguments |= {name: torch.full((3, 1, 6, 6), fill) for name in ("student_mask", "teacher_mask")}
    value = loss(**arguments)
    value.backward()
    assert value.isfinite()
    assert arguments["student"].grad is not None
    assert arguments["student"].grad.isfinite().all()
    if loss is relations.region_affinity:
        assert value == 0


# ---- what holds for each -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_it_is_zero_at_equality_and_above_elsewhere(loss: Callable[..., Tensor]) -> None:
    arguments = arguments_of(loss)
    assert loss(**arguments).item() > 1e-4
    assert loss(**{**arguments, "student": arguments["teacher"]}).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_the_gradient_is_that_of_finite_differences_and_none_goes_to_the_teacher(loss: Callable[..., Tensor]) -> None:
    bare = inspect.unwrap(loss)  # in double precision
    maps = arguments_of(loss, count=2)
    arguments = {name: value.double() if value.is_floating_point() else value for name, value in maps.items()}
    student = arguments.pop("student").requires_grad_()
    assert torch.autograd.gradcheck(lambda maps: bare(student=maps, **arguments), (student,), atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_what_lies_outside_the_valid_region_makes_no_difference(loss: Callable[..., Tensor]) -> None:
    arguments = arguments_of(loss)
    valid = arguments["valid"].clone()
    valid[..., 4:] = False
    clean = loss(**{**arguments, "valid": valid})
    spoilt = {}
    for name in ("student", "teacher"):
        spoilt[name] = torch.where(valid, arguments[name], 100 * draw(*arguments[name].shape, seed=9))
    value = loss(**{**arguments, **spoilt, "valid": valid})
    assert value.item() == pytest.approx(clean.item(), rel=1e-5)
    assert clean.item() != pytest.approx(loss(**arguments).item(), rel=1e-3), "the region must matter"


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_without_a_valid_position_it_is_finite(loss: Callable[..., Tensor]) -> None:
    arguments = arguments_of(loss)
    student = arguments["student"].requires_grad_()
    value = loss(**{**arguments, "valid": torch.zeros_like(arguments["valid"])})
    value.backward()
    assert value.isfinite()
    assert student.grad is None or student.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_a_batch_of_one_is_defined(loss: Callable[..., Tensor]) -> None:
    value = loss(**arguments_of(loss, count=1))
    assert value.isfinite()
    assert value.item() == pytest.approx(0, abs=1e-9) if loss is relations.batch_similarity else value.item() > 0


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_under_autocast_it_is_computed_in_single_precision(loss: Callable[..., Tensor]) -> None:
    arguments = arguments_of(loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(**arguments)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(**arguments))


# ---- paths ---------------------------------------------------------------------------------------------------------


def test_a_stage_is_taken_as_it_is_and_adapted_and_resized_as_configured() -> None:
    outputs = Outputs({"encoder.4": draw(2, 6, 8, 8, seed=1), "encoder.5": draw(2, 12, 4, 4, seed=2)})
    plain = paths.Stage(student_channels=6, teacher_channels=6, stage="encoder.4")
    assert plain.stages == ("encoder.4",)
    assert torch.equal(plain.student_map(outputs), outputs["encoder.4"])
    assert not (list(plain.parameters()) or plain.resize)
    both = paths.Stage(
        student_channels=6, teacher_channels=12, stage="encoder.4", teacher_stage="encoder.5", adapter=True, resize=True
    )
    assert (both.stages, both.teacher_stages) == (("encoder.4",), ("encoder.5",))
    weight = both.adapter.weight[:, :, 0, 0]
    adapted = torch.einsum("oi,nihw->nohw", weight, outputs["encoder.4"])
    halved = F.interpolate(adapted, (4, 4), mode="bilinear", align_corners=False)
    mask, seen = torch.zeros(2, 1, 8, 8), dict[str, Tensor]()

    def loss(**arguments: Tensor) -> Tensor:
        seen.update(arguments)
        return torch.zeros(())

    views = ViewPair(theta=None, student_mask=mask, teacher_mask=mask)
    Term(both, loss, both.stages).value(student=outputs, teacher=outputs, views=views, align=True)
    assert seen["student"].shape == seen["teacher"].shape == (2, 12, 4, 4)
    torch.testing.assert_close(seen["student"], halved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kd_path", [paths.Hidden(stage="map"), paths.HiddenRegressor(student_channels=3, teacher_channels=4, stage="map")]
)
def test_maps_of_unequal_size_are_refused_or_resized_to_the_teachers(kd_path: paths.KDPath) -> None:
    student, teacher = Outputs({"map": draw(2, 3, 8, 8, seed=1)}), Outputs({"map": draw(2, 4, 6, 6, seed=2)})
    mask = torch.zeros(2, 1, 8, 8)
    views = ViewPair(theta=None, student_mask=mask, teacher_mask=mask)
    arguments = {"student": student, "teacher": teacher, "views": views, "align": True}
    with pytest.raises(
        InputError, match=r"Student \(map: 8 x 8\) and of the Teacher \(map: 6 x 6\) have unequal sizes"
    ):
        Term(kd_path, losses.mse, kd_path.stages).value(**arguments)
    value = Term(kd_path, losses.mse, kd_path.stages, resize=True).value(**arguments)
    resized = F.interpolate(kd_path.student_map(student), (6, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(value, F.mse_loss(resized, kd_path.teacher_map(teacher)))


def test_the_generator_sees_a_quarter_of_the_positions_and_in_evaluation_always_the_same() -> None:
    kd_path = paths.MaskedGeneration(student_channels=3, teacher_channels=5, stage="decoder.3", erased=0.75)
    seen: list[Tensor] = []
    kd_path.generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    outputs = Outputs({"decoder.3": draw(4, 3, 32, 32, seed=1)})
    torch.manual_seed(0)
    assert kd_path.train().student_map(outputs).shape == (4, 5, 32, 32)
    kd_path.student_map(outputs)
    for _ in range(2):
        made = kd_path.eval().student_map(outputs)
    first, _, last = kd_path.generator
    torch.testing.assert_close(made, last(F.relu(first(seen[-1]))))
    kept = [(maps != 0).any(dim=1) for maps in seen]
    assert [float(each.float().mean()) for each in kept] == pytest.approx([0.25] * 4, abs=0.03)
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[2], kept[3])
    weights = 2 * (9 * 5 * 5 + 5) + 3 * 5
    assert networks.count_parameters(kd_path) == weights


# ---- terms ---------------------------------------------------------------------------------------------------------


def test_masks_come_in_the_frame_and_at_the_size_of_the_maps() -> None:
    seen: dict[str, Tensor] = {}

    def loss(*, student: Tensor, teacher: Tensor, valid: Tensor, student_mask: Tensor, teacher_mask: Tensor) -> Tensor:
        seen.update(student_mask=student_mask, teacher_mask=teacher_mask, teacher=teacher)
        return student.sum()

    maps = Outputs({"decoder.3": draw(1, 4, 16, 16, seed=1)})
    weak = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    weak[..., 32:, :32] = 1
    theta = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]])  # a quarter of the frame to the left
    path = paths.Stage(student_channels=4, teacher_channels=4, stage="decoder.3")
    for align in (True, False):
        distillation = Distillation(
            {"kd": Term(path, loss, path.stages)}, 0.5, TeacherForward("T", view="weak", precision="fp32"), align
        )
        strong = torch.roll(weak, -16, dims=3)
        distillation.values(student=maps, teacher=maps, views=ViewPair(theta, strong, weak))
        expected = (warp(weak.float(), theta=theta)[0] >= 0.5).float() if align else weak.float()
        assert torch.equal(seen["teacher_mask"], expected[..., ::4, ::4])
        assert torch.equal(seen["student_mask"], strong.float()[..., ::4, ::4])
    assert seen["teacher"].shape[2:] == seen["teacher_mask"].shape[2:]


def test_the_kd_term_is_the_weighted_sum_of_its_comparisons() -> None:
    maps = [Outputs({"logits": draw(2, 1, 8, 8, seed=seed)}) for seed in (1, 2)]
    mask = torch.zeros(2, 1, 8, 8)
    terms = {
        "near": Term(paths.Logits(), losses.mse, ("logits",), share=0.75),
        "far": Term(paths.Logits(), losses.kld_pixels, ("logits",), share=0.25),
    }
    distillation = Distillation(terms, 0.5, TeacherForward("T", view="strong", precision="fp32"), align=True)
    values = distillation.values(student=maps[0], teacher=maps[1], views=ViewPair(None, mask, mask))
    alone = {"student": maps[0].logits, "teacher": maps[1].logits, "valid": everywhere(mask)}
    assert values["kd.near"].item() == pytest.approx(losses.mse(**alone).item())
    assert values["kd.far"].item() == pytest.approx(losses.kld_pixels(**alone).item())
    assert values["kd"].item() == pytest.approx(0.75 * values["kd.near"].item() + 0.25 * values["kd.far"].item())


# ---- configurations ------------------------------------------------------------------------------------------------


def cell(*typed: str) -> Cell:
    return identity.cell(composition.compose([*typed, "profile=quick", "data.count=8"]))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_its_source_and_can_be_built(name: str) -> None:
    file = conf_dir() / "method" / f"{name}.yaml"
    head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert "eight" in " ".join(head), "the source of the weight"
    assert any(year in head[0] for year in map(str, range(2014, 2026)))
    cfg = composition.compose([f"method={name}", "profile=quick", "train.batch_size=4"])
    distillation = build.distillation(cfg, teacher="T")
    assert distillation is not None
    assert sum(term.share for term in distillation.terms.values()) == pytest.approx(1)
    assert "_" not in cfg.method.notation  # path and loss of the paper's cells are recognized by it


def test_there_are_the_methods_that_the_documentation_lists() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"`{name}`" not in text] == []
    assert len({cell(f"method={name}").notation for name in METHODS}) == len(METHODS) >= 13


def test_the_weights_are_those_published_beside_a_supervised_one() -> None:
    weights = {name: cell(f"method={name}").settings["kd.weight"] for name in METHODS}
    assert weights["cwd"] == 3 / 4
    assert weights["cwd_feature"] == 50 / 51
    assert weights["at"] == 2000 / 2001
    assert weights["emkd"] == pytest.approx(3.7 / 4.7)
    assert cell("method=cwd", "kd.weight=0.75") == cell("method=cwd", "kd.lambda=3") == cell("method=cwd")
    assert cell("method=cwd", "method.terms.logits.weight=9") == cell("method=cwd", "kd.weight=0.9")
    assert cell("path=L", "kd.lambda=1") == cell("path=L")


def test_a_method_has_another_name_and_another_cell() -> None:
    assert [cell("method=cwd", f"teacher_aug={view}").notation for view in ("weak", "strong")] == ["CWD_WAug", "CWD"]
    assert cell("method=cwd", "path=none") == cell("method=cwd") == cell("method=cwd", "kd.temperature=7")
    assert cell("method=cwd") != cell("method=cwd", "method.terms.logits.loss.temperature=1")
    assert cell("method=none", "path=none").notation == "Student"
    assert cell("path=H", "+path.kd_path.stage=encoder.5") == cell("path=H")
    assert cell("path=H", "+path.kd_path.stage=encoder.4").fingerprint != cell("path=H").fingerprint


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["method=at", "path=L"], "method=at brings its paths and losses: leave path out"),
        (["method=at", "loss=mse"], "method=at brings its paths and losses: leave loss out"),
        (["kd.weight=0.9", "kd.lambda=3"], "kd.weight=0.9 and kd.lambda=3 are two spellings of one weight: give one"),
        (["kd.weight=published"], "kd.weight=published is not allowed: path and loss have none"),
        (["method=at", "method.terms.group2.weight=-1"], "method.terms.group2.weight=-1 is not allowed"),
        (
            ["method=at", "method.terms.group2.path.stage=encoder.9"],
            "stage=encoder.9 is not allowed: it must be one of those of student=mobilenetv3_small_trimmed: encoder.1",
        ),
    ],
)
def test_an_impossible_method_is_one_line(typed: list[str], line: str) -> None:
    with pytest.raises(InputError) as caught:
        cell(*typed)
    assert line in str(caught.value)


def test_a_sweep_may_have_methods_beside_the_papers_cells() -> None:
    overrides.check(["method=none,cwd", "path=L", "loss=mse"], multirun=True)
    with pytest.raises(InputError, match="method=at,cwd brings"):
        overrides.check(["method=at,cwd", "path=L"], multirun=True)
