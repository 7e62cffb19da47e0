"""The checks before a sweep: which cells represent others, and the rehearsal of all that a training does."""

import os
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from small import STUDENT, TEACHER

from kdsweep import __main__
from kdsweep.config import composition, identity
from kdsweep.core.errors import InputError
from kdsweep.distill.paths import Hidden
from kdsweep.evaluation import metrics
from kdsweep.store import cell_folder, checkpoint
from kdsweep.sweep import plan, rehearsal
from kdsweep.training import guard, loop, outcome


def loss_of(name, kind="hidden"):
    return [f"++loss.{kind}._target_={__name__}.{name}", f"~loss.{kind}.temperature"]


@pytest.fixture
def compose(small_busi, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    def make(*overrides):
        quick = ["profile=quick", "data=busi", "device=cpu", "train.batch_size=6", f"data.root={small_busi}"]
        settings = composition.compose([*quick, f"store={tmp_path / 'store'}", *STUDENT, *TEACHER, *overrides])
        return plan.Job(settings, identity.cell(settings))

    return make


def rehearse(*jobs):
    rehearsal.check(jobs)
    rehearsal.rehearse(jobs, "cpu")


# ---- kinds -----------------------------------------------------------------------------------------------------------

ONE_EACH = {
    "method": ["method=kd", "method=cwd", "method=skd", "method=at"],
    "path and loss": [f"path={path} loss={loss}" for path in ("L", "HR") for loss in ("mse", "kld")],
    "KD weight": ["kd.weight=0", "kd.weight=0.5", "kd.weight=1", "kd.weight=matched", "kd.lambda=3"],
    "precision": ["kd.teacher_precision=fp32", "kd.teacher_precision=bf16", "precision=bf16"],
    "batch of one": ["train.batch_size=6", "train.batch_size=1"],
    "loss of a recipe": ["train.supervised=bce", "train.supervised=bce_dice", "train.schedule=poly"],
    "Student": ["student.decoder_channels=[16,8,8,4,4]", "student.decoder_channels=[16,8,8,4,8]"],
    "split": ["split=s0", "split=s1", "split=s2"],
}
ONE_FOR_ALL = {
    "seeds": [f"seed={seed}" for seed in range(8)],
    "rates": ["train.lr=1e-3", "train.lr=1e-4", "train.lr=3e-4", "teacher.lr=1e-2"],
    "KD weights": ["kd.weight=0.1", "kd.weight=0.5", "kd.weight=0.9"],
    "temperatures": ["kd.temperature=2.5", "kd.temperature=3.5"],
    "lengths": ["train.epochs=3", "train.epochs=4", "train.patience=2", "teacher.epochs=5", "teacher.seed=9"],
}


@pytest.mark.parametrize("options", ONE_EACH.values(), ids=ONE_EACH.keys())
def test_each_of_these_is_checked(compose, options):
    of = [] if options[0].startswith(("method", "path")) else ["path=H"]
    jobs = [compose(*of, *option.split()) for option in options]
    assert plan.kinds(jobs) == jobs


@pytest.mark.parametrize("options", ONE_FOR_ALL.values(), ids=ONE_FOR_ALL.keys())
def test_the_first_of_these_represents_all(compose, options):
    jobs = [compose("path=H", *option.split()) for option in options]
    assert plan.kinds(jobs) == jobs[:1]


def test_splits_and_methods_are_added_up_and_not_multiplied(compose):
    cells = [("method=at", "split=s0"), ("method=kd", "split=s0"), ("method=at", "split=s1"), ("method=kd", "split=s1")]
    jobs = [compose(*cell) for cell in cells]
    assert plan.kinds(jobs) == jobs[:3]


# ---- the rehearsal ---------------------------------------------------------------------------------------------------


def test_a_rehearsal_passes_and_leaves_nothing_behind(compose, tmp_path):
    cells = [["path=L", "loss=kld"], ["path=HR", "kd.weight=matched"], ["path=H", "kd.weight=0"], ["path=none"]]
    cells += [["method=mgd", "precision=bf16"], ["path=L", "train.batch_size=1", "kd.weight=1"], ["method=reviewkd"]]
    rehearse(*[compose(*cell) for cell in cells])
    assert not (tmp_path / "store").exists()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert torch.is_grad_enabled()


FAULTS = {
    "scoring": (metrics, "hd95_px", "ValueError: broken"),
    "weights": (checkpoint, "save_network", "ValueError: broken"),
    "predictions": (checkpoint, "save_predictions", "ValueError: broken"),
    "marker": (cell_folder, "write_finished", "ValueError: broken"),
    "predicting": (outcome, "predict", "ValueError: broken"),
    "reading the checkpoint": (checkpoint, "load_state", "ValueError: broken"),
    "reading weights": (checkpoint, "load_network", "ValueError: broken"),
    "reading predictions": (checkpoint, "load_predictions", "ValueError: broken"),
    "validation": (metrics, "mean_dice", "epoch 1, validation, supervised term: ValueError: broken"),
}


@pytest.mark.parametrize(("owner", "name", "expected"), FAULTS.values(), ids=FAULTS.keys())
def test_what_would_fail_after_the_training_fails_before_it(compose, monkeypatch, caplog, owner, name, expected):
    def broken(*_, **__):
        raise ValueError("broken")

    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(InputError, match=r"^the rehearsal before the training fails: ") as caught:
        rehearse(compose("path=none"), compose("path=HR", "loss=mse"))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caplog.records == []  # the line is raised, and the folder that another would name is gone


def of_numpy(*, student, teacher, valid):
    """Takes the maps of the check, but not those of a forward in bf16, which NumPy does not have."""
    return (student - teacher).square().mean() / (1 + float(teacher.numpy(force=True).std()))


class Keeping(Hidden):
    """A path whose state cannot be read without running code from the file."""

    def get_extra_state(self):
        return Path("x")

    def set_extra_state(self, _):
        pass


def of_trained(*, student, teacher, valid):
    """Is not finite for networks that have not learned yet."""
    return (student - teacher).square().mean() * float("nan")


def two_numbers(*, student, teacher, valid):
    return torch.stack([student.mean(), teacher.mean()])


def no_tensor(*, student, teacher, valid):
    return float(student.detach().mean())


def no_student(*, student, teacher, valid):
    return teacher.mean()


def wrong_names(*, ours, others):
    return ours.mean()


BAD = {
    "H_KLD_WAug split 0 seed 0: epoch 1, step 1, kd term: TypeError: kd: the loss must return a tensor of one number": [
        ["path=H", *loss_of(name)] for name in ("two_numbers", "no_tensor", "no_student")
    ],
    "unexpected keyword argument": [["path=H", *loss_of("wrong_names")]],
    f"_target_={__name__}.absent: module {__name__} has no absent": [["path=H", *loss_of("absent")]],
    "SPKD_WAug split 0 seed 0: its KD term has no gradient in batches of 1 (train.batch_size)": [
        ["method=spkd", "train.batch_size=1"]
    ],
}


@pytest.mark.parametrize(("expected", "cells"), BAD.items())
def test_a_loss_that_gives_no_term_is_refused(compose, expected, cells):
    for cell in cells:
        with pytest.raises(InputError) as caught:
            rehearse(compose("path=H", "loss=mse"), compose(*cell))
        assert expected in str(caught.value), cell
        assert "\n" not in str(caught.value)


def test_a_path_whose_state_cannot_be_read_back_is_refused(compose):
    bad = compose("path=H", "loss=mse", f"path.kd_path._target_={__name__}.Keeping")
    with pytest.raises(InputError, match=r"^the rehearsal before the training fails: H_MSE_WAug split 0 seed 0: "):
        rehearse(compose("path=none"), bad)


def test_a_loss_that_fails_with_the_maps_of_real_networks_is_refused(compose):
    cfg = compose("path=L", "precision=bf16", "kd.teacher_precision=bf16", *loss_of("of_numpy", "logits"))
    rehearsal.check([cfg])
    with pytest.raises(InputError, match="L_KLD_WAug split 0 seed 0: epoch 1, validation, kd term: TypeError: "):
        rehearse(cfg)


@pytest.mark.parametrize("options", [loss_of("of_trained"), ["train.lr=1e30"]])
def test_values_that_are_not_finite_are_left_to_the_training(compose, options):
    cfg = compose("path=H", "loss=kld", *options)
    rehearsal.rehearse([cfg, compose("path=none")], "cpu")


def test_too_little_memory_for_all_kinds_at_once_rehearses_them_in_halves(compose, monkeypatch):
    train_epoch, sizes = loop.train_epoch, []

    def limited(learners, *args, **kwargs):
        sizes.append(len(learners))
        if len(learners) > 1 or "HReg" in learners[0].title:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_epoch(learners, *args, **kwargs)

    monkeypatch.setattr(loop, "train_epoch", limited)
    rehearse(compose("path=L"), compose("path=HR"), compose("path=none"))
    assert sizes == [3, 1, 2, 1, 1]  # the one that does not fit alone is left to its training


# ---- code of the user's that is checked before the training ----------------------------------------------------------

LOSS = """
    import sys
    import numpy as np
    import torch
    {at_import}

    def loss(*, student, teacher, valid):
        {at_call}
        return (student - teacher).square().mean()
"""


@pytest.mark.parametrize(
    ("at_import", "at_call", "expected"),
    [
        ("torch.set_num_threads(torch.get_num_threads() + 1)", "pass", "its code changes torch.set_num_threads"),
        ("torch.set_default_dtype(torch.float64)", "pass", "its code changes torch.set_default_dtype"),
        ("np.seterr(all='raise')", "pass", "its code changes numpy.seterr"),
        ("", "torch.set_default_dtype(torch.float64)", "its code changes torch.set_default_dtype"),
        ("", "torch.autograd.set_detect_anomaly(True)", "its code changes torch.autograd.set_detect_anomaly"),
        ("sys.exit(2)", "pass", "its code raises SystemExit(2), which ends a program: raise an error instead"),
        ("", "sys.exit()", "its code raises SystemExit("),
    ],
)
def test_code_that_changes_what_all_cells_share_is_refused(
    compose, tmp_path, monkeypatch, at_import, at_call, expected
):
    (tmp_path / f"{tmp_path.name}.py").write_text(textwrap.dedent(LOSS).format(at_import=at_import, at_call=at_call))
    monkeypatch.syspath_prepend(tmp_path)
    before = {name: read() for name, (read, _) in guard.SETTINGS.items()}
    cfg = compose("path=H", f"++loss.hidden._target_={tmp_path.name}.loss", "~loss.hidden.temperature")
    with pytest.raises(InputError) as caught:
        rehearse(compose("path=none"), cfg)
    where = (
        "path=H loss=kld" if at_call == "pass" else "the rehearsal before the training fails: H_KLD_WAug split 0 seed 0"
    )
    assert str(caught.value).startswith(f"{where}: ")
    assert f": {expected}" in str(caught.value)
    assert {name: read() for name, (read, _) in guard.SETTINGS.items()} == before


def test_the_backend_that_a_notebook_passes_on_is_replaced(monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setattr(sys, "argv", ["kdsweep", "models", "--help"])
    assert __main__.main() == 0
    assert os.environ["MPLBACKEND"] == "Agg"
