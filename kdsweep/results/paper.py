"""Figures, protocol and notations that the paper and other publications state. Nothing here is measured by us."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

NAN = float("nan")

# Table 4 of the paper: DSC mean and standard deviation (%), p against Teacher, p against Student.
PAPER: dict[str, tuple[float, float, float, float]] = {
    "Teacher": (81.50, 18.40, NAN, 0.0048),
    "Student": (73.16, 23.78, 0.0048, NAN),
    "L_MSE": (77.75, 22.55, 0.1414, 0.0227),
    "L_MSE_WAug": (77.52, 17.61, 0.1565, 0.0948),
    "L_KLD": (78.00, 22.05, 0.0950, 0.0037),
    "L_KLD_WAug": (80.00, 18.86, 0.2075, 0.0012),
    "H_MSE": (77.50, 21.49, 0.0645, 0.0215),
    "H_MSE_WAug": (77.85, 20.06, 0.0341, 0.0125),
    "H_KLD": (79.00, 20.45, 0.1320, 0.0067),
    "H_KLD_WAug": (78.50, 19.83, 0.1417, 0.0316),
    "HReg_MSE": (78.06, 19.25, 0.0325, 0.0201),
    "HReg_MSE_WAug": (77.63, 19.97, 0.0402, 0.0269),
    "HReg_KLD": (79.00, 20.37, 0.2132, 0.0021),
    "HReg_KLD_WAug": (79.31, 19.33, 0.1247, 0.0068),
}
PAPER_COLUMNS = ["paper_mean_dice_percent", "paper_std_dice_percent", "paper_p_teacher", "paper_p_student"]
BASELINES = ("Teacher", "Teacher_WAug", "Student")
# The levels of each of the 12 cells, in the paper's order; no two factors share the name of a level.
LEVELS = {
    f"{path}_{loss}{'_WAug' if aug == 'weak' else ''}": (path, loss, aug)
    for path, loss, aug in product(("L", "H", "HReg"), ("MSE", "KLD"), ("strong", "weak"))
}
CELLS = tuple(LEVELS)


def in_order(notations: Iterable[str]) -> list[str]:
    """Return the different notations in the order of all tables: baselines, the paper's cells, others by name."""
    listed = (*BASELINES, *CELLS)
    return sorted(set(notations), key=lambda name: (listed.index(name), "") if name in listed else (len(listed), name))


def cell_notations(notations: Iterable[str]) -> list[str]:
    """Return a table's distilled Students: the paper's 12 unless others alone were requested, then the others."""
    others = in_order(set(notations).difference(BASELINES, CELLS))
    return others if others and set(notations).isdisjoint(CELLS) else [*CELLS, *others]


def students(notations: Iterable[str]) -> list[str]:
    """Return distilled Students in order, the baseline Student last."""
    return sorted(in_order(set(notations) - {"Teacher", "Teacher_WAug"}), key=lambda name: name == "Student")


REPRESENTATIONS = {"L": "Logits", "H": "Hidden", "HReg": "Hidden-Regressor"}
LOSSES = {"MSE": "mean squared error", "KLD": "Kullback-Leibler divergence"}
# The setting of the paper's experiments (conf/profile/paper.yaml), by the params of our runs.
PROTOCOL = {
    "teacher.encoder": "resnext101_32x8d",
    "weights": "imagenet",
    "image_size": "224",
    "train.epochs": "500",
    "train.patience": "50",
    "train.batch_size": "64",
    "train.lr": "0.0001",
    "train.supervised": "bce",
    "train.schedule": "constant",
    "teacher.lr": "0.0001",
}


class Published(NamedTuple):
    """A network's figures as published, in the publication's units (FLOPs, not MACs); NaN if not stated."""

    parameters_millions: float
    gflops: float
    dice_percent: float
    source: str


DUAL_TEACHER = "doi 10.7507/1001-5515.202311054"
SOURCE = "Behboodi, Brooks, Rivaz 2025, doi 10.36922/aih.3509"
PAPER_PARAMETERS_MILLIONS = {"teacher": 96.0, "student": 0.82, "cell": 0.82}  # the text: "about 96 M", 0.82 M in all
PUBLISHED = {
    "Behboodi et al., L_KLD_WAug": Published(0.82, NAN, 80, f"{SOURCE}, Table 5"),
    "Liang et al.": Published(20.5, NAN, 84, f"{SOURCE}, Table 5"),
    "Gao et al.": Published(2.34, NAN, 85, f"{SOURCE}, Table 5"),
    "Lou et al.": Published(26.63, NAN, 90, f"{SOURCE}, Table 5"),
    "Lee et al.": Published(7.7, NAN, 89, f"{SOURCE}, Table 5"),
    "dual-teacher Attention U-Net": Published(2.2, 16.59, 88.40, DUAL_TEACHER),
}
