"""The plan of a sweep: which cells it has, how they are named, and which are trained together."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdsweep.config import composition, grid, identity, inputs
from kdsweep.core.errors import InputError
from kdsweep.store import cell_folder, sweep_file
from kdsweep.sweep import plan


def request(jobs: list[plan.Job]) -> None:
    """As plan.watch writes it down."""
    cells = [job.cell for job in jobs]
    sweep_file.add(cells[0].store, "busi-quick", cells=cells, teachers=[], swept=plan.swept_keys(jobs))


def variants(jobs: list[plan.Job]) -> list[dict[str, str]]:
    return [job.cell.variant for job in jobs]


# ---- names -----------------------------------------------------------------------------------------------------------


def test_a_swept_key_distinguishes_cells_where_the_role_uses_it(jobs):
    cells = jobs(*([f"path={path}", f"kd.weight={weight}"] for path in ("none", "L") for weight in ("0.50", "0.9")))
    assert [job.cell.title for job in cells] == [
        "Student split 0 seed 0",
        "Student split 0 seed 0",
        "L_KLD_WAug split 0 seed 0 (kd.weight=0.5)",
        "L_KLD_WAug split 0 seed 0 (kd.weight=0.9)",
    ]
    assert [job.cell.teacher.variant for job in cells[2:]] == [{}, {}]


def test_the_store_is_absolute_from_the_start_and_recorded_as_it_is_typed(small_busi, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (job,) = plan.read_jobs([composition.compose_config(["data=busi", f"data.root={small_busi}", "store=rel"])])
    absolute = composition.compose(["data=busi", f"data.root={small_busi}", f"store={tmp_path}/rel"])
    monkeypatch.chdir(small_busi)  # as code of the user may
    assert job.cell.folder == tmp_path / "rel" / "cells" / job.cell.folder.name
    assert job.cell.teacher.folder.is_relative_to(tmp_path / "rel")
    assert identity.params(job.settings)["store"] == "rel"
    assert job.cell.fingerprint == identity.cell(absolute).fingerprint


def test_what_cannot_matter_makes_no_further_cell(jobs):
    """Both views are the same with a strong Teacher: nothing to align. The mean squared error has no temperature."""
    grid_of = itertools.product(("weak", "strong"), ("warp", "none"), ("1", "2"))
    cells = jobs(
        *(
            ["path=L", "loss=mse", f"teacher_aug={aug}", f"kd.align={align}", f"kd.temperature={temperature}"]
            for aug, align, temperature in grid_of
        )
    )
    assert [job.cell.title for job in plan.unique(cells)] == [
        "L_MSE_WAug split 0 seed 0 (kd.align=warp)",
        "L_MSE_WAug split 0 seed 0 (kd.align=none)",
        "L_MSE split 0 seed 0",
    ]
    rows = [{"data.root": "/a/BUSI"}, {"data.root": "/b/BUSI"}, {"data.root": "/b/UDIAT"}]
    assert plan._with_last_names(rows) == [*rows[:2], {"data.root": "UDIAT"}]
    warm = jobs(*(["path=L", "loss=kld", f"kd.temperature={temperature}"] for temperature in ("1", "2")))
    assert variants(warm) == [{"kd.temperature": "1.0"}, {"kd.temperature": "2.0"}]


@pytest.mark.parametrize("key", ["teacher.seed", "data.root", "student.weights", "teacher.weights", "weights"])
def test_cells_of_one_command_with_different_fingerprints_have_different_variants(jobs, small_busi, tmp_path, key):
    values = ["0", "1"]
    if key == "data.root":
        values = [str(small_busi), str(shutil.copytree(small_busi, tmp_path / "site-b"))]
        mask = next((tmp_path / "site-b").rglob("*_mask.png"))
        Image.fromarray(~np.array(Image.open(mask))).save(mask)
    elif key.endswith("weights"):
        values = ["none", "imagenet"]
    cells = jobs(*([f"{key}={value}"] for value in values))
    assert len({job.cell.fingerprint for job in cells}) == 2
    assert variants(cells) == [{key: Path(value).name} for value in values]
    request(cells)
    assert sweep_file.folders(tmp_path) == {job.cell.folder for job in cells}


def test_values_that_give_one_cell_are_no_variants_of_it(jobs, small_busi, tmp_path):
    copy = shutil.copytree(small_busi, tmp_path / "copy")
    cells = jobs(*([f"data.root={root}", f"train.lr={lr}"] for root in (small_busi, copy) for lr in ("0.1", "0.2")))
    assert len({job.cell.fingerprint for job in cells}) == 2
    assert variants(cells) == [{"train.lr": "0.1"}, {"train.lr": "0.2"}] * 2


def test_cells_of_a_replaced_image_and_of_a_moved_folder_replace_the_earlier_ones(jobs, small_busi, tmp_path):
    first, moved = tmp_path / "first", tmp_path / "moved"
    shutil.copytree(small_busi, first)
    (old,) = jobs([f"data.root={first}"])
    request([old])
    first.rename(moved)
    (same,) = jobs([f"data.root={moved}"])
    request([same])
    assert (same.cell.fingerprint, same.cell.key == old.cell.key) == (old.cell.fingerprint, False)
    assert list(sweep_file.read(tmp_path, "busi-quick").requests) == [same.cell.key]
    image = next(moved.rglob("*(1).png"))
    Image.fromarray(~np.array(Image.open(image))).save(image)
    inputs._listing.cache_clear()
    (changed,) = jobs([f"data.root={moved}"])
    request([changed])
    assert changed.cell.fingerprint != same.cell.fingerprint
    ((key, row),) = sweep_file.read(tmp_path, "busi-quick").requests.items()
    assert (key, row.folder(tmp_path)) == (changed.cell.key, changed.cell.folder)


def test_factors_folders_and_devices_are_no_variants(jobs):
    keys = ["loss=mse", "split=s1", "seed=1", "device=auto", "sweep_name=x", "train.workers=1", "retry_failed=true"]
    for key in keys:
        assert variants(jobs([], [key])) == [{}, {}], key


def test_the_variant_of_a_swept_group_is_the_name_of_its_option(jobs):
    one, other = jobs(["teacher=resnet18", "train.lr=0.01"], ["teacher=resnet34", "train.lr=0.01"])
    assert variants([one, other]) == [{"teacher": "resnet18"}, {"teacher": "resnet34"}]
    assert other.cell.teacher.title == "Teacher_WAug split 0 seed 0 (teacher=resnet34)"


def test_a_value_added_later_is_a_variant_too_and_results_stay_the_same_cells(jobs):
    cells = jobs(["train.lr=0.01"], ["train.lr=0.02"])
    request(cells)
    (later,) = jobs(["train.lr=0.03"])
    assert later.cell.variant == {"train.lr": "0.03"}
    request([later])  # whose command line sweeps nothing
    (again,) = jobs(["train.lr=1e-2"])
    assert again.cell.fingerprint == cells[0].cell.fingerprint
    assert again.cell.variant == cells[0].cell.variant
    assert "variant" not in identity.params(again.settings)


def test_a_grid_whose_keys_are_not_typed_would_be_dropped(configs):
    with pytest.raises(InputError, match=r"^\+experiment=mine has a grid \(seed\): run one "):
        plan.read_jobs(configs(["path=L"], ["path=H"], grid=("seed",)))
    assert len(plan.read_jobs(configs(["path=L", "seed=0"], ["path=H", "seed=0"], grid=("path", "seed")))) == 2


# ---- groups ----------------------------------------------------------------------------------------------------------


def sizes(jobs: list[plan.Job], *devices: str) -> list[int]:
    return [len(group) for group in plan.form_groups(jobs, devices={"cpu": list(devices or ["cpu"])})]


def test_what_batches_do_not_depend_on_may_differ_inside_a_group(jobs):
    overrides = ["path=HR", "path=none", "loss=mse", "teacher_aug=strong", "kd.weight=0.7", "kd.temperature=2"]
    overrides += ["kd.align=none", "kd.teacher_precision=bf16", "train.lr=3e-4", "train.epochs=3", "train.patience=2"]
    overrides += ["train.monitor=dice", "student.decoder_channels=[16,16,8,8,8]", "teacher=resnet34", "teacher.lr=1e-2"]
    cells = jobs([], *([override] for override in overrides))
    assert len({job.cell.fingerprint for job in cells}) == len(cells)
    assert sizes([*cells, *jobs(["sweep_name=other"])]) == [len(cells) + 1]


@pytest.mark.parametrize(
    "override",
    [
        *("split=s1", "seed=1", "train.batch_size=4", "views.rotate_deg=10", "precision=bf16", "data.load_size=70"),
        *("deterministic=true", "train.workers=2", "store=elsewhere"),
    ],
)
def test_what_batches_or_their_computation_depend_on_makes_another_group(jobs, override):
    assert sizes(jobs([], [override])) == [1, 1]


def test_the_papers_grid_on_three_splits_is_three_groups_of_thirteen(jobs):
    grids = [
        [f"path={path}", f"loss={loss}", f"teacher_aug={view}", f"split=s{split}"]
        for split in range(3)
        for path in ("none", "L", "H", "HR")
        for loss in ("mse", "kld")
        for view in ("weak", "strong")
    ]
    cells = plan.waiting(jobs(*grids))
    assert sizes(cells) == [13, 13, 13]
    assert len(plan.missing_teachers(cells)) == 6


def test_two_devices_share_a_group_and_each_part_has_one_teacher(jobs):
    cells = jobs(*([f"path={path}", f"teacher_aug={view}"] for path in ("L", "H", "HR") for view in ("weak", "strong")))
    first, second = plan.form_groups(cells, devices={"cpu": ["one", "two"]})
    assert {len(first), len(second)} == {3}
    for group in (first, second):
        assert len({job.cell.input_digests["teacher"] for job in group}) == 1
    assert {job.cell.fingerprint for job in first + second} == {job.cell.fingerprint for job in cells}
    splits = jobs(*([f"path={path}", f"split=s{split}"] for split in (0, 1) for path in ("L", "H", "HR")))
    assert sizes(splits, "one", "two") == [3, 3]  # they keep both devices busy, undivided


def test_division_gives_nearly_equal_parts_of_all_members():
    parts = grid.divide(list(range(13)), largest=5, likeness=["b", "a"] * 6 + ["a"])
    assert sorted(map(len, parts)) == [4, 4, 5]
    assert sorted(itertools.chain(*parts)) == list(range(13))


def test_repeated_and_finished_jobs_do_not_wait(jobs):
    grid_of = ["path=none", "loss=mse"], ["path=none", "loss=kld"], ["path=L"], ["path=H"]
    cells = jobs(*grid_of)
    assert [job.cell.notation for job in plan.unique(cells)] == ["Student", "L_KLD_WAug", "H_KLD_WAug"]
    cell_folder.write_finished(cells[2].cell.folder, values={"test/dice": 0.5}, files=[])
    assert [job.cell.notation for job in plan.waiting(jobs(*grid_of))] == ["Student", "H_KLD_WAug"]
