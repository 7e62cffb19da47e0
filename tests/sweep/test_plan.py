"""The plan of a sweep: what is trained together, on how many devices, and for how long at most."""

import itertools
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf, open_dict
from PIL import Image

from kdsweep.config import composition, grid, identity
from kdsweep.core import progress
from kdsweep.core.errors import InputError
from kdsweep.evaluation import latency
from kdsweep.store import cell_folder, sweep_file
from kdsweep.sweep import estimate, launcher, plan, preview
from kdsweep.sweep.executors import local

EPOCHS = {"student_epoch_s": 16.0, "teacher_epoch_s": 160.0, "forward_epoch_s": 64.0}  # of 16 images
PREVIEW = estimate.Preview({"cpu": ["cpu"]}, timed_on="cpu", **EPOCHS)


@pytest.fixture
def jobs(small_busi, tmp_path):
    """Makes the jobs of configurations given as lists of overrides."""

    def make(*each: list[str]) -> list[plan.Job]:
        fixed = ["profile=quick", "data=busi", f"data.root={small_busi}", "device=cpu", f"store={tmp_path}"]
        return plan.read_jobs(
            [composition.compose_config([*fixed, "train.batch_size=8", *overrides]) for overrides in each]
        )

    return make


@pytest.fixture
def command(small_busi, tmp_path):
    """Jobs of one command line, which Hydra tells each job with its own overrides."""

    def make(*each: list[str]) -> list[plan.Job]:
        fixed = ["profile=quick", "data=busi", f"data.root={small_busi}", "device=cpu", f"store={tmp_path}"]
        configs = []
        for overrides in each:
            cfg = composition.compose_config([*fixed, *overrides])
            choices = {"teacher": "resnet18"} | dict(word.split("=") for word in overrides)
            with open_dict(cfg):
                cfg.hydra = {"overrides": {"task": [*fixed, *overrides]}, "runtime": {"choices": choices}}
            configs.append(cfg)
        return plan.read_jobs(configs)

    return make


def asked(own: list[plan.Job]) -> None:
    """As plan.watch writes it down."""
    swept = plan.swept_keys([job.overrides for job in own], [job.settings for job in own])
    sweep_file.add(own[0].cell.store, "busi-quick", cells=[job.cell for job in own], teachers=[], swept=swept)


def test_a_swept_key_tells_cells_apart_where_the_role_uses_it(command):
    own = command(*([f"path={path}", f"kd.weight={weight}"] for path in ("none", "L") for weight in ("0.50", "0.9")))
    assert [job.cell.title for job in own] == [
        "Student split 0 seed 0",
        "Student split 0 seed 0",
        "L_KLD_WAug split 0 seed 0 (kd.weight=0.5)",
        "L_KLD_WAug split 0 seed 0 (kd.weight=0.9)",
    ]
    assert [job.cell.teacher.variant for job in own[2:]] == [{}, {}]


def test_the_store_is_absolute_from_the_start_and_recorded_as_it_is_typed(small_busi, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = composition.compose_config(["data=busi", f"data.root={small_busi}", "store=rel"])
    (job,) = plan.read_jobs([cfg])
    absolute = composition.compose(["data=busi", f"data.root={small_busi}", f"store={tmp_path}/rel"])
    monkeypatch.chdir(small_busi)  # as code of the user may
    assert job.cell.folder == tmp_path / "rel" / "cells" / job.cell.folder.name
    assert job.cell.teacher.folder.is_relative_to(tmp_path / "rel")
    assert identity.params(job.settings)["store"] == "rel"
    assert job.cell.fingerprint == identity.cell(absolute).fingerprint


def test_the_folder_of_a_job_as_working_directory_is_refused(small_busi, tmp_path):
    cfg = composition.compose_config(["data=busi", f"data.root={small_busi}", f"store={tmp_path}"])
    with open_dict(cfg):
        cfg.hydra = {"job": {"chdir": True}, "overrides": {"task": []}, "runtime": {"choices": {}}}
    with pytest.raises(InputError, match=r"^hydra\.job\.chdir=true is not allowed: relative paths count from"):
        plan.read_jobs([cfg])


def test_what_cannot_matter_makes_no_further_cell(command):
    """Both views are the same with a strong Teacher: nothing to align. The mean squared error has no temperature."""
    grid_of = itertools.product(("weak", "strong"), ("warp", "none"), ("1", "2"))
    own = command(
        *(
            ["path=L", "loss=mse", f"teacher_aug={aug}", f"kd.align={align}", f"kd.temperature={temperature}"]
            for aug, align, temperature in grid_of
        )
    )
    assert [job.cell.title for job in plan.unique(own)] == [
        "L_MSE_WAug split 0 seed 0 (kd.align=warp)",
        "L_MSE_WAug split 0 seed 0 (kd.align=none)",
        "L_MSE split 0 seed 0",
    ]
    warm = command(*(["path=L", "loss=kld", f"kd.temperature={temperature}"] for temperature in ("1", "2")))
    assert [job.cell.variant for job in warm] == [{"kd.temperature": "1.0"}, {"kd.temperature": "2.0"}]


@pytest.mark.parametrize("key", ["teacher.seed", "data.root", "student.weights", "teacher.weights", "weights"])
def test_cells_of_one_command_that_the_fingerprint_tells_apart_have_places_of_their_own(command, small_busi, key):
    values = ["0", "1"]
    if key == "data.root":
        values = [str(small_busi), shutil.copytree(small_busi, small_busi.parent / "site-b", dirs_exist_ok=True)]
        mask = next((small_busi.parent / "site-b").rglob("*_mask.png"))
        Image.fromarray(~np.array(Image.open(mask))).save(mask)
    elif key.endswith("weights"):
        values = ["none", "imagenet"]
    own = command(*([f"{key}={value}"] for value in values))
    assert len({job.cell.fingerprint for job in own}) == 2
    assert [job.cell.variant for job in own] == [{key: str(value)} for value in values]
    asked(own)
    assert sweep_file.folders(own[0].cell.store) == {job.cell.folder for job in own}


def test_values_that_give_one_cell_are_no_variants_of_it(command, small_busi, tmp_path):
    copy = shutil.copytree(small_busi, tmp_path / "copy")
    own = command(*([f"data.root={root}", f"train.lr={lr}"] for root in (small_busi, copy) for lr in ("0.1", "0.2")))
    assert len({job.cell.fingerprint for job in own}) == 2
    assert [job.cell.variant for job in own] == [{"train.lr": "0.1"}, {"train.lr": "0.2"}] * 2


def test_a_replaced_image_takes_the_seat_of_the_old_one_and_a_moved_folder_too(command, small_busi, tmp_path):
    first, moved = tmp_path / "first", tmp_path / "moved"
    shutil.copytree(small_busi, first)
    (old,) = command([f"data.root={first}"])
    asked([old])
    first.rename(moved)
    (same,) = command([f"data.root={moved}"])
    asked([same])
    assert (same.cell.fingerprint, same.cell.key == old.cell.key) == (old.cell.fingerprint, False)
    assert list(sweep_file.read(tmp_path, "busi-quick").requests) == [same.cell.key]
    image = next(moved.rglob("*(1).png"))
    Image.fromarray(~np.array(Image.open(image))).save(image)
    identity._listing.cache_clear()
    (changed,) = command([f"data.root={moved}"])
    asked([changed])
    assert changed.cell.fingerprint != same.cell.fingerprint
    ((key, request),) = sweep_file.read(tmp_path, "busi-quick").requests.items()
    assert (key, request.folder(tmp_path)) == (changed.cell.key, changed.cell.folder)


def test_factors_folders_and_devices_tell_nothing_apart(command):
    for key in (
        "loss=mse",
        "split=s1",
        "seed=1",
        "device=auto",
        "sweep_name=x",
        "train.workers=1",
        "retry_failed=true",
    ):
        assert [job.cell.variant for job in command([], [key])] == [{}, {}]


def test_a_swept_group_is_told_by_the_name_of_the_choice(command):
    one, other = command(["teacher=resnet18", "train.lr=0.01"], ["teacher=resnet34", "train.lr=0.01"])
    assert [one.cell.variant, other.cell.variant] == [{"teacher": "resnet18"}, {"teacher": "resnet34"}]
    assert other.cell.teacher.title == "Teacher_WAug split 0 seed 0 (teacher=resnet34)"


def test_a_value_added_later_is_told_apart_too_and_results_stay_the_same_cells(command):
    own = command(["train.lr=0.01"], ["train.lr=0.02"])
    asked(own)
    (later,) = command(["train.lr=0.03"])
    assert later.cell.variant == {"train.lr": "0.03"}
    asked([later])  # whose command line sweeps nothing
    (again,) = command(["train.lr=1e-2"])
    assert again.cell.fingerprint == own[0].cell.fingerprint
    assert again.cell.variant == own[0].cell.variant
    assert "variant" not in identity.params(again.settings)


def groups_of(own: list[plan.Job], devices: tuple[str, ...] = ("cpu",)) -> list[list[str]]:
    found = plan.form_groups(own, devices={"cpu": list(devices)})
    return [[job.cell.notation for job in group] for group in found]


@pytest.mark.parametrize(
    "override",
    [
        *("path=HR", "path=none", "loss=mse", "teacher_aug=strong", "kd.weight=0.7", "kd.temperature=2"),
        *("kd.align=none", "kd.teacher_precision=bf16", "train.lr=3e-4", "train.epochs=3", "train.patience=2"),
        "train.monitor=dice",
        *("student.decoder_channels=[16,16,8,8,8]", "teacher=resnet34", "teacher.lr=1e-2", "sweep_name=other"),
    ],
)
def test_what_batches_do_not_depend_on_may_differ_inside_a_group(jobs, override):
    one, other = jobs([], [override])
    assert one.cell.fingerprint != other.cell.fingerprint or override.startswith("sweep_name")
    assert len(plan.form_groups([one, other], devices={"cpu": ["cpu"]})) == 1


@pytest.mark.parametrize(
    "override",
    [
        *("split=s1", "seed=1", "train.batch_size=4", "views.rotate_deg=10", "precision=bf16", "data.load_size=70"),
        *("deterministic=true", "train.workers=2", "store=elsewhere"),
    ],
)
def test_what_batches_or_their_computation_depend_on_makes_another_group(jobs, override):
    assert len(plan.form_groups(jobs([], [override]), devices={"cpu": ["cpu"]})) == 2


def test_what_goes_on_from_a_checkpoint_is_told_and_takes_less_time(jobs):
    fixed = ["path=none", "train.epochs=10"]
    (fresh,) = jobs(fixed)
    assert "; profile" in estimate.describe([fresh], groups=[[fresh]], preview=PREVIEW)
    assert "1 to run, 0 finished" in estimate.describe([fresh], groups=[[fresh]], preview=PREVIEW)
    assert estimate.group_s([fresh], PREVIEW) == 10 * 16
    history = [{"epoch": float(epoch)} for epoch in range(7)]
    cell_folder.write_progress(fresh.cell.folder, epochs=10, history=history, times_ms=list(range(7)), seconds=[])
    (begun,) = jobs(fixed)
    assert "1 to run, 1 of them from a checkpoint, 0 finished" in estimate.describe(
        [begun], groups=[[begun]], preview=PREVIEW
    )
    assert estimate.group_s([begun], PREVIEW) == 3 * 16


def test_a_teacher_that_goes_on_from_a_checkpoint_takes_less_time(jobs):
    (own,) = jobs(["path=L", "train.epochs=10"])
    assert estimate.teachers_s([own], PREVIEW) == 10 * 16 * 10
    cell_folder.write_progress(
        own.cell.teacher.folder, epochs=10, history=[{"epoch": 0.0}] * 4, times_ms=[1, 2, 3, 4], seconds=[]
    )
    assert estimate.teachers_s([own], PREVIEW) == 6 * 16 * 10


def test_a_time_from_a_busy_machine_is_called_that(jobs):
    own = jobs([])
    assert "other programs" not in estimate.describe(own, groups=[own], preview=PREVIEW)
    line = estimate.describe(own, groups=[own], preview=replace(PREVIEW, load=3.21))
    assert "ends a cell sooner (timed while other programs were at work, load 3.2: without them it is less)" in line


@pytest.mark.parametrize(("load", "shown"), [(0.9, 0.0), (1.0, 0.0), (1.1, 1.1), (7.0, 7.0)])
def test_a_machine_is_busy_from_half_its_processors_on(monkeypatch, load, shown):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    assert latency.load_of_others() == shown


def test_the_papers_grid_on_three_splits_is_three_groups_of_thirteen(jobs):
    grids = [
        [f"path={path}", f"loss={loss}", f"teacher_aug={view}", f"split=s{split}"]
        for split in range(3)
        for path in ("none", "L", "H", "HR")
        for loss in ("mse", "kld")
        for view in ("weak", "strong")
    ]
    own = plan.waiting(jobs(*grids))
    assert [len(group) for group in groups_of(own)] == [13, 13, 13]
    assert len(plan.missing_teachers(own)) == 6


def test_two_devices_share_a_group_and_each_part_has_one_teacher(jobs):
    own = jobs(*([f"path={path}", f"teacher_aug={view}"] for path in ("L", "H", "HR") for view in ("weak", "strong")))
    first, second = plan.form_groups(own, devices={"cpu": ["one", "two"]})
    assert {len(first), len(second)} == {3}
    for group in (first, second):
        assert len({job.cell.evidence["teacher"] for job in group}) == 1
    assert {job.cell.fingerprint for job in first + second} == {job.cell.fingerprint for job in own}


def test_groups_that_keep_all_devices_busy_are_not_divided(jobs):
    own = jobs(*([f"path={path}", f"split=s{split}"] for split in (0, 1) for path in ("L", "H", "HR")))
    assert [len(group) for group in groups_of(own, ("one", "two"))] == [3, 3]


def test_division_gives_nearly_equal_parts_and_loses_nobody():
    parts = grid.divide(list(range(13)), largest=5, likeness=["b", "a"] * 6 + ["a"])
    assert sorted(map(len, parts)) == [4, 4, 5]
    assert sorted(itertools.chain(*parts)) == list(range(13))


def test_repeated_and_finished_jobs_do_not_wait(jobs):
    own = jobs(["path=none", "loss=mse"], ["path=none", "loss=kld"], ["path=L"], ["path=H"])
    assert [job.cell.notation for job in plan.unique(own)] == ["Student", "L_KLD_WAug", "H_KLD_WAug"]
    cell_folder.write_finished(own[2].cell.folder, values={"test/dice": 0.5}, files=[])
    own = jobs(["path=none", "loss=mse"], ["path=none", "loss=kld"], ["path=L"], ["path=H"])
    assert [job.cell.notation for job in plan.waiting(own)] == ["Student", "H_KLD_WAug"]
    line = estimate.describe(own, groups=[plan.waiting(own)], preview=PREVIEW)
    for part in (
        "3 cells (1 repeated jobs are the same cell): 2 to run, 1 finished; 1 lockstep group, 1 shared Teacher, ",
        "1 Teacher to train",
        "data=busi with 25 images (16 benign, 9 malignant) at 64 pixels; ",
        "device cpu; ",
    ):
        assert part in line
    two = replace(PREVIEW, threads=2, cores=2)
    assert "; device cpu with 2 threads; " in estimate.describe(own, groups=[own], preview=two)
    processes = replace(two, devices={"cpu": ["cpu", "cpu"]})
    line = estimate.describe(own, groups=[own], preview=processes)
    assert "; device cpu with 1 thread in each of 2 processes; " in line
    afar = replace(PREVIEW, threads=2, devices={"cpu": ["SLURM"]})  # timed here, trained there
    assert "; device SLURM; " in estimate.describe(own, groups=[own], preview=afar)


class LeavingQueue:
    """An executor with one cell in its queue, and one that left it, finished, after the jobs were read."""

    largest = None

    def __init__(self, left: plan.Job, queued: plan.Job) -> None:
        self.left, self.in_queue = left, queued.cell.folder

    def queued(self, own):
        cell_folder.write_finished(self.left.cell.folder, values={"test/dice": 0.5}, files=[])
        return {self.in_queue}

    def preview(self, jobs, *, times):
        self.previewed = [job.settings.path.name for job in jobs]
        return PREVIEW

    def close(self, error):
        assert error is None


def test_a_cell_that_leaves_the_queue_while_the_sweep_is_planned_is_not_submitted_again(jobs, capsys, monkeypatch):
    own = jobs(["path=none"], ["path=L"], ["path=H"])
    executor = LeavingQueue(own[1], own[2])
    planned = launcher.LockstepLauncher(executor, plan=True)
    planned.config = OmegaConf.create({"hydra": {"hydra_logging": None, "verbose": False}})
    planned.hydra_context = SimpleNamespace(config_loader=None)
    monkeypatch.setattr(launcher, "configure_log", lambda *_: None)
    monkeypatch.setattr(plan, "read_jobs", lambda configs: own)
    assert len(planned.launch([], 0)) == 3
    assert executor.previewed == ["none", "H"]
    assert "3 cells: 2 to run, 1 finished; 2 lockstep groups" in capsys.readouterr().out


def test_the_estimate_counts_each_forward_of_a_teacher_once(jobs):
    small = ["train.epochs=3"]
    own = jobs(*([*small, f"path={path}"] for path in ("none", "L", "H", "HR")))
    student, forward, teacher = 16 * 3 * 1.0, 16 * 3 * 4.0, 16 * 3 * 10.0
    assert estimate.group_s(own, PREVIEW) == 4 * student + forward
    assert estimate.device_s([own[:1]], PREVIEW) == student
    assert estimate.device_s([own], PREVIEW) == 4 * student + forward + teacher
    assert estimate.device_s([own[:2], own[2:]], PREVIEW) == 4 * student + 2 * forward + teacher
    strong = jobs([*small, "path=L"], [*small, "path=L", "teacher_aug=strong"])
    assert estimate.device_s([strong], PREVIEW) == 2 * student + 2 * forward + 2 * teacher
    cell = identity.teacher_cell(own[1].settings)
    cell_folder.write_finished(cell.folder, values={"test/dice": 0.5}, files=[])
    assert estimate.device_s([own], PREVIEW) == 4 * student + forward


def test_a_cell_that_was_begun_is_estimated_from_its_recorded_epochs(jobs):
    cells = [job.cell for job in jobs(["path=none"], ["path=L"])]
    for cell in cells:
        cell_folder.describe(cell, split={}, params={}, tags={})
        history = [{"epoch": 0, "val/dice": 0.5}, {"epoch": 1, "val/dice": 0.5}]
        cell_folder.write_progress(cell.folder, epochs=10, history=history, times_ms=[0, 1], seconds=[100.0, 200.0])
    baseline, distilled = jobs(["path=none", "train.epochs=10"], ["path=L", "train.epochs=10"])
    begun = [replace(job, begun=2, cell=cell) for job, cell in zip((baseline, distilled), cells, strict=True)]
    assert estimate.group_s(begun[:1], PREVIEW) == 8 * 150.0
    assert estimate.group_s(begun, PREVIEW) == 8 * 150.0 + 8 * (150.0 - 64.0) + 8 * 64.0  # its forwards are shared


@pytest.mark.parametrize(
    ("threads", "cores", "processes", "groups", "speed"),
    [
        (2, 2, 1, 3, 1.0),
        (1, 2, 3, 3, 2.0),  # three processes of one thread share two cores
        (1, 8, 3, 9, 3.0),
        (1, 8, 3, 1, 1.0),
        (2, 2, 2, 2, 1.0),  # each has half the threads of the timed step
        (2, 2, 2, 1, 0.5),
        (4, 2, 1, 1, 1.0),  # more threads than cores were timed so
    ],
)
def test_processes_on_the_cpu_are_as_fast_as_its_cores_allow(threads, cores, processes, groups, speed):
    preview = replace(PREVIEW, devices={"cpu": ["cpu"] * processes}, threads=threads, cores=cores)
    assert preview.slowdown(groups) == min(processes, groups) / speed


def test_devices_are_as_fast_as_there_are_groups_for_them():
    preview = replace(PREVIEW, devices={"auto": ["cuda:0", "cuda:1"]}, timed_on="cuda:0", cores=2)
    assert [preview.slowdown(groups) for groups in (1, 2, 3)] == [1, 1, 1]
    assert progress.left_s([[(1, 60.0)]] * 3, places=preview.places) == 120.0


def test_the_first_line_divides_the_time_among_processes(jobs):
    own = jobs(["train.epochs=3", "path=none"], ["train.epochs=3", "path=none", "split=s1"])
    groups = [own[:1], own[1:]]
    assert "at most about 2 min if" in estimate.describe(own, groups=groups, preview=PREVIEW)
    beside = replace(PREVIEW, devices={"cpu": ["cpu", "cpu"]}, threads=1, cores=2)
    assert "at most about 48 s if" in estimate.describe(own, groups=groups, preview=beside)


def test_the_overview_tells_each_group_and_the_hours(jobs):
    small = ["train.epochs=3"]
    own = jobs(*([*small, f"path={path}"] for path in ("none", "L", "H")), [*small, "path=none", "split=s1"])
    groups = [own[:3], own[3:]]
    first, *rest = estimate.overview(own, groups=groups, preview=PREVIEW).splitlines()
    assert first == estimate.describe(own, groups=groups, preview=PREVIEW)
    assert rest == [
        "group 1: 3 cells, split 0 seed 0 on cpu, 6 min: Student, L_KLD_WAug, H_KLD_WAug",  # 48 s x 3 + 192 s
        "group 2: 1 cell, split 1 seed 0 on cpu, 48 s: Student",
        "Teachers first, 8 min: Teacher_WAug split 0 seed 0",  # 480 s
        "at most 0.24 device hours from one timed step on cpu; nothing was started",  # 864 s
    ]
    several = replace(PREVIEW, devices={"cpu": ["cpu", "cpu"]})  # processes on the one CPU
    assert estimate.overview(own, groups=groups, preview=several).splitlines()[1:] == rest
    assert estimate.overview(own, groups=[], preview=None) == estimate.describe(own, groups=[], preview=None)


def test_what_is_ignored_is_counted_in_the_first_line_and_named_once(small_busi, tmp_path, caplog):
    root = shutil.copytree(small_busi, tmp_path / "busi")
    shutil.copytree(root / "benign", root / "cyst")
    (root / "manifest.csv").write_text("file\n")
    rows = "".join(f"{file.stem},{file.stem}\n" for file in small_busi.glob("*/*).png"))
    (tmp_path / "groups.csv").write_text(f"id,group\n{rows}absent,x\n")
    words = ["profile=quick", "data=busi", f"data.root={root}", f"store={tmp_path}", "split=holdout", "device=cpu"]
    words += [f"split.group={tmp_path / 'groups.csv'}"]
    configs = [composition.compose_config([*words, f"path={path}"]) for path in ("none", "L")]
    own = plan.read_jobs(configs)
    line = estimate.describe(own, groups=[], preview=None)
    assert "; data=busi with 25 images (16 benign, 9 malignant) at 64 pixels, 33 ignored; " in line
    names = "cyst/benign (11).png, cyst/benign (11)_mask.png, cyst/benign (12).png, ..."
    group = f"rows of split.group={tmp_path / 'groups.csv'} without an image: 1 (absent)"
    expected = f"data=busi, ignored: images in other folders: 32 ({names}); {group}"
    assert estimate.overview(own, groups=[], preview=None).splitlines()[1:] == [expected]
    estimate.log_ignored(own)
    assert caplog.messages.count(expected) == 1


def test_jobs_that_run_one_after_the_other_are_told_of_one_device(jobs, monkeypatch):
    two = replace(PREVIEW, devices={"cpu": ["cuda:0", "cuda:1"]}, timed_on="cuda:0")
    monkeypatch.setattr(preview, "preview_cells", lambda jobs, devices: two)
    small = ["train.epochs=3", "path=none"]
    own = jobs(small, [*small, "split=s1"])
    line = estimate.describe(own, groups=[own[:1], own[1:]], preview=local.InProcess().preview(own, times=False))
    assert "; device cuda:0; at most about 2 min if" in line  # 48 s each


CHANGED = "the store holds results of that name, but since then this has changed: "


def begun(job: plan.Job) -> None:
    cell_folder.describe(job.cell, split={}, params={}, tags={})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr=0.5", "train.lr (0.001 -> 0.5)"),
        ("kd.weight=0.9", "kd.weight (0.5 -> 0.9)"),
        ("teacher.lr=0.5", "teacher.lr (0.001 -> 0.5)"),
    ],
)
def test_a_new_cell_beside_an_old_one_of_its_name_says_what_changed(jobs, caplog, override, words):
    caplog.set_level("INFO")
    (old,) = jobs(["path=L"])
    begun(old)
    plan.tell_changes(jobs(["path=L"]))
    assert caplog.messages == []  # it goes on, nothing has changed
    plan.tell_changes(jobs(["path=L", override], ["path=none"]))
    (line,) = caplog.messages
    assert line.startswith("1 cell is new (L_KLD_WAug split 0 seed 0): ")
    assert line.endswith(f"{CHANGED}{words}")
    caplog.clear()
    plan.tell_changes(jobs(["path=L"], ["path=L", override]))
    assert caplog.messages == []  # both are asked for


def test_a_later_results_version_is_told_with_what_still_can_be_done(jobs, caplog, monkeypatch):
    caplog.set_level("INFO")
    for job in jobs(["path=L"], ["path=H"]):
        begun(job)
    monkeypatch.setattr(grid, "RESULTS_VERSION", grid.RESULTS_VERSION + 1)
    later = jobs(["path=L"], ["path=H"])
    plan.tell_changes(later)
    (line,) = caplog.messages
    assert line == (
        "2 cells are new (L_KLD_WAug split 0 seed 0, H_KLD_WAug split 0 seed 0): the store holds results of that name, "
        f"but they are of results version {grid.RESULTS_VERSION - 1}, this is version {grid.RESULTS_VERSION}; their "
        "tables, report and predictions can still be made"
    )


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("user_code", "your own code"),
        ("split", "the images of the split's parts"),
        ("groups", "the groups of split.group"),
        ("teacher", "its Teacher"),
    ],
)
def test_what_changed_beside_the_settings_is_named(jobs, caplog, key, words):
    caplog.set_level("INFO")
    (old,) = jobs(["path=L"])
    begun(old)
    changed = replace(old.cell, evidence={**old.cell.evidence, key: "another"})
    plan.tell_changes([replace(old, cell=changed)])
    assert caplog.messages[0].endswith(f"{CHANGED}{words}")
