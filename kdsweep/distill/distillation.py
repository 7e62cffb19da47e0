"""The distillation of a Student: from a Teacher's forward, by terms of a KD path and a loss each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsweep.core.errors import InputError
from kdsweep.distill.losses import one_hot
from kdsweep.distill.paths import KDPath
from kdsweep.models.networks import Outputs


class TeacherForward(NamedTuple):
    """A Teacher's forward pass, which several Students can share.

    Attributes:
        teacher: name of the Teacher in the group.
        view: what the Teacher sees, ``weak`` or ``strong``.
        precision: of its forward, ``fp32`` or ``bf16``.
    """

    teacher: str
    view: str
    precision: str


class ViewPair(NamedTuple):
    """Relate the Student's view of a batch to the Teacher's.

    Attributes:
        theta: (N, 2, 3), see ``sampling_theta``; None where both saw the same view.
        student_mask: (N, 1, H, W), the index of each pixel's class in the Student's view, 0 for background.
        teacher_mask: (N, 1, H, W), in the Teacher's.
    """

    theta: Tensor | None
    student_mask: Tensor
    teacher_mask: Tensor


@dataclass
class Term:
    """One comparison of a Student with its Teacher.

    Attributes:
        kd_path: selects the tensors to compare.
        loss: of the compared maps, see losses.py. One with arguments ``student_mask`` or ``teacher_mask`` gets these
            masks in the frame and at the size of the maps: (N, classes, h, w), in {0, 1}.
        stages: of the Student, that the path takes; of the Teacher too unless the path says others.
        share: of the KD term, which is the sum of share times loss.
        resize: bring the Student's map to the size of the Teacher's, bilinearly, as if the path said so.
        classes: of lesions, without background.
    """

    kd_path: KDPath
    loss: Callable[..., Tensor]
    stages: tuple[str, ...]
    share: float = 1.0
    resize: bool = False
    classes: int = 1

    def __post_init__(self) -> None:
        self.teacher_stages = self.kd_path.teacher_stages or self.stages
        self.masks = inspect.signature(self.loss).parameters.keys() & {"student_mask", "teacher_mask"}

    def value(self, *, student: Outputs, teacher: Outputs, views: ViewPair, align: bool) -> Tensor:
        """Return the loss of one batch; ``align``: warp the Teacher's maps into the Student's frame.

        The Teacher's outputs are copied first (about 1 ms): the originals serve other learners too, and tensors made
        under inference mode cannot take part in autograd, which a user's loss or path may need.
        """
        copies = Outputs({stage: teacher[stage].clone() for stage in self.teacher_stages})
        teacher_map = self.kd_path.teacher_map(copies)
        valid = torch.ones_like(teacher_map[:, :1], dtype=torch.bool)
        theta = views.theta if align else None
        if theta is not None:
            teacher_map, valid = warp(teacher_map, theta=theta)
        masks: dict[str, Tensor] = {}
        for name in self.masks:
            mask = one_hot(getattr(views, name), channels=self.classes + 1)[:, 1:]
            if name == "teacher_mask" and theta is not None:
                mask = _warped_mask(mask, theta=theta)
            masks[name] = F.interpolate(mask, teacher_map.shape[2:], mode="nearest")
        student_map = self._of_size(self.kd_path.student_map(student), teacher_map)
        return self.loss(student=student_map, teacher=teacher_map, valid=valid, **masks)

    def _of_size(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        """Return the Student's map at the size of the Teacher's."""
        size = teacher_map.shape[2:]
        if student_map.shape[2:] == size:
            return student_map
        if not (self.resize or self.kd_path.resize):
            sides = [" x ".join(str(side) for side in each.shape[2:]) for each in (student_map, teacher_map)]
            stages = [", ".join(each) for each in (self.stages, self.teacher_stages)]
            raise InputError(
                f"maps of the Student ({stages[0]}: {sides[0]}) and of the Teacher ({stages[1]}: {sides[1]}) have "
                "unequal sizes; kd.resize=true brings the Student's to the Teacher's"
            )
        return F.interpolate(student_map.float(), size, mode="bilinear", align_corners=False)


@dataclass
class Distillation:
    """The KD term of one Student.

    Attributes:
        terms: its comparisons by name; the paper's cells have one.
        weight: of the KD term; the supervised term has 1 - weight (PAPER, Eq. I: 0.5 and 0.5). None finds it in the
            first epoch, see ``matched_weight``.
        ratio: of the gradients of the two terms that a weight of None aims at.
        forward: the Teacher's forward that it learns from.
        align: warp the maps of a weak view into the Student's frame; else compare them as they are.
    """

    terms: dict[str, Term]
    weight: float | None
    forward: TeacherForward
    align: bool
    ratio: float = 1.0

    @property
    def stages(self) -> set[str]:
        """Return the stages of the Student that its terms take."""
        return {stage for term in self.terms.values() for stage in term.stages}

    @property
    def teacher_stages(self) -> set[str]:
        """Return the stages of the Teacher that its terms take."""
        return {stage for term in self.terms.values() for stage in term.teacher_stages}

    def values(self, *, student: Outputs, teacher: Outputs, views: ViewPair) -> dict[str, Tensor]:
        """Return the KD term ``kd`` of one batch and, if it has several, its comparisons ``kd.NAME``."""
        values = {
            name: term.value(student=student, teacher=teacher, views=views, align=self.align)
            for name, term in self.terms.items()
        }
        if len(values) == 1:
            return {"kd": next(iter(values.values()))}
        total = torch.stack([term.share * values[name] for name, term in self.terms.items()]).sum()
        return {"kd": total, **{f"kd.{name}": value for name, value in values.items()}}


def gradient_ratio(kd: Tensor, *, weight: float | Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Return the norm of the KD term's gradient over that of the supervised term, each without its weight.

    Takes one more backward pass, of the KD term alone, and reads what the pass of the weighted sum has left:
    (total - weight * of KD) / (1 - weight) is the supervised term's. The gradients themselves are not changed.

    Args:
        kd: the KD term, its graph retained.
        weight: of the KD term, below 1.
        parameters: over which the norms are taken; ``grad`` is that of the weighted sum.

    Returns:
        0-d, on the device of the parameters, kept within 1e-6 and 1e6.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    of_kd = torch.autograd.grad(kd, trained, allow_unused=True, materialize_grads=True)
    both = [parameter.grad for parameter in trained if parameter.grad is not None]
    supervised = [(total - weight * kd) / (1 - weight) for total, kd in zip(both, of_kd, strict=True)]
    norms = [torch.stack([part.norm() for part in parts]).norm() for parts in (of_kd, supervised)]
    return (norms[0] / norms[1].clamp_min(1e-12)).clamp(1e-6, 1e6)


def matched_weight(ratios: Tensor, *, ratio: float) -> Tensor:
    """Return the weight w of the KD term at which w x (KD gradient) is ``ratio`` times (1 - w) x (supervised gradient).

    With g the geometric mean of the ratios (n,) that ``gradient_ratio`` measured: w = ratio / (ratio + g).
    """
    return ratio / (ratio + ratios.log().mean().exp())


def warp(maps: Tensor, *, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Render the Teacher's maps of the weak view in the Student's strong frame.

    Args:
        maps: (N, C, h, w), over the weak frame.
        theta: (N, 2, 3), see ``sampling_theta``.

    Returns:
        The warped maps (N, C, h, w) by bilinear sampling, and where they are valid: (N, 1, h, w) bool, False where
        a position's center is outside the weak frame.
    """
    with torch.autocast(maps.device.type, enabled=False):  # bf16 coordinates would miss by up to a pixel
        grid = F.affine_grid(theta, [len(maps), 1, *maps.shape[2:]], align_corners=False)
    # "border": the half cell between the outermost centers and the frame's edge has no second neighbor to blend with.
    warped = F.grid_sample(maps.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return warped, (grid.abs() <= 1).all(dim=-1).unsqueeze(1)


def _warped_mask(mask: Tensor, *, theta: Tensor) -> Tensor:
    """Return masks (N, K, h, w) in {0, 1} of the weak view in the strong frame: the class that has half of a pixel."""
    shares = warp(mask, theta=theta)[0] >= 0.5
    return (shares & (shares.int().cumsum(dim=1) == 1)).float()  # of two that have a half each, the first
