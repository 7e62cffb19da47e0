"""A lockstep group: each cell is what it would be alone, and what ends one leaves the others as they are."""

import logging
import re
import shutil
from pathlib import Path

import pytest
from small import STUDENT, TEACHER

from kdsweep.config import composition, identity
from kdsweep.core.errors import InputError
from kdsweep.distill.paths import Hidden
from kdsweep.store import cell_folder
from kdsweep.sweep import plan, rehearsal
from kdsweep.tracking import reader, sync
from kdsweep.training import build, group

QUICK = [
    "profile=quick",
    "data=busi",
    "train.batch_size=8",
    "train.epochs=2",
    "device=cpu",
    "teacher_aug=weak",
    *TEACHER,
    *STUDENT,
]


@pytest.fixture
def compose(small_busi, empty_store, tmp_path):
    def make(*overrides):
        chosen = {override.partition("=")[0] for override in overrides}
        fixed = [
            override for override in (*QUICK, f"store={tmp_path / 'store'}") if override.partition("=")[0] not in chosen
        ]
        cfg = composition.compose([*fixed, f"data.root={small_busi}", *overrides])
        if not Path(cfg.store).exists():
            shutil.copytree(empty_store, cfg.store)
        return cfg

    return make


def run(*configs, checked=True):
    """Results by position, with the plan's checks before."""
    jobs = [plan.Job(settings, identity.cell(settings)) for settings in configs]
    plan.watch(jobs)
    if checked:
        rehearsal.check(jobs)
    try:
        return group.run_group(jobs)
    finally:
        sync.close_all()


def weights(cfg):
    return (identity.cell(cfg).folder / "student.safetensors").read_bytes()


def statuses(cfg):
    sweep = reader.read_sweep(store=identity.cell(cfg).store, uri=None, name=None)
    return dict(zip(sweep.runs["notation"], sweep.runs["status"], strict=True))


def broken(*, student, teacher, valid):
    if len(student) > 2:  # the check before the training passes
        raise RuntimeError("my loss broke")
    return (student - teacher).square().mean()


class Unbuildable(Hidden):
    def __init__(self):
        raise ValueError("no such path")


def test_a_broken_loss_ends_one_cell_and_leaves_the_others_bit_for_bit(compose, tmp_path, caplog):
    good = [compose("path=L"), compose("path=H", "loss=mse"), compose("path=none")]
    bad = compose("path=H", f"++loss.hidden._target_={__name__}.broken", "~loss.hidden.temperature")
    first, failure, *others = run(good[0], bad, *good[1:])
    assert str(failure) == "H_KLD_WAug split 0 seed 0: epoch 1, step 1, kd term: RuntimeError: my loss broke"
    assert all(isinstance(result, float) for result in (first, *others))
    assert statuses(bad)["H_KLD_WAug"] == "FAILED"
    assert cell_folder.read_finished(identity.cell(bad).folder) is None
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "H_KLD_WAug split 0 seed 0: epoch 1, step 1, kd term: RuntimeError: my loss" in record.getMessage()
    assert "in broken" in logging.Formatter().format(record)

    before = [weights(cfg) for cfg in good]
    again = [
        compose(*(overrides.split()), f"store={tmp_path / 'alone'}")
        for overrides in ("path=L", "path=H loss=mse", "path=none")
    ]
    run(*again)
    assert [weights(cfg) for cfg in again] == before


def test_a_launchers_device_that_is_none_is_refused(compose):
    with pytest.raises(InputError, match="device=gpu is not allowed: it must be auto, cpu, cuda or cuda:NUMBER"):
        rehearsal.preview([identity.job(compose("path=none"))], devices=["cpu", "gpu"])


def test_a_path_that_cannot_be_built_fails_alone_and_is_seen_as_failed(compose):
    bad = compose("path=H", f"path.kd_path._target_={__name__}.Unbuildable")
    with pytest.raises(InputError, match=r"^_target_=test_group\.Unbuildable: ValueError: no such path$"):
        build.distillation(bad, teacher="")
    results = run(bad, compose("path=none"), checked=False)  # as if the code broke after the check
    assert "no such path" in str(results[0])
    assert isinstance(results[1], float)
    assert statuses(bad) == {"H_KLD_WAug": "FAILED", "Student": "FINISHED", "Teacher_WAug": "FINISHED"}


def test_a_cell_or_teacher_that_diverges_fails_its_cells_and_no_others(compose):
    cells = (["path=L", "train.lr=1e30"], ["path=L", "teacher.lr=1e30"], ["path=L"], ["path=none"])
    diverged, untaught, *others = run(*(compose(*cell) for cell in cells))
    assert re.match(r"L_KLD_WAug split 0 seed 0: \S+ is (nan|inf) in epoch", str(diverged))
    assert "its Teacher could not be trained: Teacher_WAug split 0 seed 0: " in str(untaught)
    assert all(isinstance(result, float) for result in others)


def with_teachers_of(other, cfg):
    """The configuration, its store with the Teachers of another one's: they need not be trained again."""
    shutil.copytree(Path(other.store) / "teachers", Path(cfg.store) / "teachers", dirs_exist_ok=True)
    return cfg


def test_each_cell_chooses_the_precision_of_its_teacher(compose, tmp_path):
    both = [compose("path=L", f"kd.teacher_precision={precision}") for precision in ("fp32", "bf16")]
    assert len({identity.teacher_cell(cfg).fingerprint for cfg in both}) == 1
    run(*both)
    assert weights(both[0]) != weights(both[1])
    for precision, together in zip(("fp32", "bf16"), both, strict=True):
        overrides = ["path=L", f"kd.teacher_precision={precision}", f"store={tmp_path / precision}"]
        alone = with_teachers_of(together, compose(*overrides))
        run(alone)
        assert weights(alone) == weights(together)


def test_teachers_of_a_group_are_trained_together_and_equal_those_trained_alone(compose, tmp_path):
    run(compose("path=L"), compose("path=L", "teacher_aug=strong"))
    for view in ("weak", "strong"):
        alone = compose("path=L", f"teacher_aug={view}", f"store={tmp_path / view}")
        group.obtain_teachers([identity.job(alone)])
        together = identity.teacher_cell(compose("path=L", f"teacher_aug={view}"))
        for name in ("teacher.safetensors", "history.csv", "test_scores.csv"):
            assert (identity.teacher_cell(alone).folder / name).read_bytes() == (together.folder / name).read_bytes()


def test_workers_and_their_number_make_no_difference(compose, tmp_path):
    for workers in (0, 2):
        run(compose("path=HR", f"train.workers={workers}", f"store={tmp_path / str(workers)}"))
    trained = {weights(compose("path=HR", f"store={tmp_path / str(workers)}")) for workers in (0, 2)}
    assert len(trained) == 1
