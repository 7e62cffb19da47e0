"""What is said before a sweep runs: what it computes, the time at most, what changed, what has no effect."""

import itertools
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from kdsweep.config import composition, grid
from kdsweep.store import cell_folder
from kdsweep.sweep import estimate, launcher, plan, rehearsal
from kdsweep.sweep.executors import local
from kdsweep.sweep.executors.executor import Executor

EPOCHS = {"student_epoch_s": 16.0, "teacher_epoch_s": 160.0, "forward_epoch_s": 64.0}  # of 16 images
PREVIEW = estimate.Preview({"cpu": ["cpu"]}, timed_on="cpu", **EPOCHS)
TWO = {"devices": {"cpu": ["cpu", "cpu"]}}  # processes
SHORT = ["train.epochs=3"]


def describe(jobs, *groups, preview=PREVIEW, **changes):
    return estimate.describe(jobs, groups=groups, preview=preview and replace(preview, **changes))


def write_progress(cell, epochs, *, seconds=()):
    history = [{"epoch": float(epoch)} for epoch in range(epochs)]
    cell_folder.describe(cell, split={}, params={}, tags={})
    cell_folder.write_progress(cell.folder, epochs=10, history=history, times_ms=[0] * epochs, seconds=list(seconds))


def finish(cell):
    cell_folder.write_finished(cell.folder, values={"test/dice": 0.5}, files=[])


# ---- time ------------------------------------------------------------------------------------------------------------


def test_what_resumes_from_a_checkpoint_is_said_and_takes_less_time(jobs):
    words = ["path=L", "train.epochs=10"]
    (fresh,) = jobs(words)
    assert "1 cell: 1 to run, 0 finished; 1 lockstep group" in describe([fresh], [fresh])
    assert (estimate.group_s([fresh], PREVIEW), estimate.teachers_s([fresh], PREVIEW)) == (10 * (16 + 64), 10 * 160)
    write_progress(fresh.cell, 7)
    write_progress(fresh.cell.teacher, 4)
    (begun,) = jobs(words)
    assert "1 to run, 1 of them from a checkpoint, 0 finished" in describe([begun], [begun])
    assert (estimate.group_s([begun], PREVIEW), estimate.teachers_s([begun], PREVIEW)) == (3 * (16 + 64), 6 * 160)


def test_a_cell_that_was_begun_is_estimated_from_its_recorded_epochs(jobs):
    words = ["path=none", "train.epochs=10"], ["path=L", "train.epochs=10"]
    for job in jobs(*words):
        write_progress(job.cell, 2, seconds=[100.0, 200.0])
    begun = jobs(*words)
    assert estimate.group_s(begun[:1], PREVIEW) == 8 * 150.0
    assert estimate.group_s(begun, PREVIEW) == 8 * 150.0 + 8 * (150.0 - 64.0) + 8 * 64.0  # its forwards are shared


def test_the_estimate_counts_each_forward_of_a_teacher_once(jobs):
    cells = jobs(*([*SHORT, f"path={path}"] for path in ("none", "L", "H", "HR")))
    student, forward, teacher = 3 * 16.0, 3 * 64.0, 3 * 160.0
    strong = jobs([*SHORT, "path=L"], [*SHORT, "path=L", "teacher_aug=strong"])
    assert estimate.group_s(cells, PREVIEW) == 4 * student + forward
    for groups, seconds in (
        ([cells[:1]], student),
        ([cells], 4 * student + forward + teacher),
        ([cells[:2], cells[2:]], 4 * student + 2 * forward + teacher),
        ([strong], 2 * student + 2 * forward + 2 * teacher),
    ):
        assert estimate.longest_s(groups, PREVIEW) == seconds
    finish(cells[1].cell.teacher)
    assert estimate.longest_s([cells], PREVIEW) == 4 * student + forward


def test_the_first_line_divides_the_time_among_devices_and_processes(jobs):
    cells = jobs([*SHORT, "path=none"], [*SHORT, "path=none", "split=s1"])  # 48 s each
    for changes, seconds in (
        ({}, "2 min"),
        (TWO | {"threads": 1}, "48 s"),
        (TWO | {"threads": 2}, "2 min"),  # each process has half the threads of the timed step
        ({"devices": {"auto": ["cuda:0", "cuda:1"]}, "timed_on": "cuda:0"}, "48 s"),
    ):
        assert f"at most about {seconds} if" in describe(cells, cells[:1], cells[1:], **changes), changes
    assert "at most about 2 min if" in describe(cells, cells[:1], **TWO, threads=2)


@pytest.mark.parametrize(
    ("places", "minutes", "left"),
    [
        (1, [10, 20, 30, 40], ["about 30 min left", "about 20 min left", "about 10 min left"]),
        (2, [10, 10, 20, 20], ["about 10 min left", "the others are running", "the others are running"]),
        (3, [60, 60, 61, 90], ["the others are running"] * 3),
        (3, [60, 60, 61, 120, 120, 121, 122, 180], [*["about 2.0 h left"] * 3, "about 60 min left"]),
    ],
)
def test_the_time_left_is_that_of_groups_that_run_at_the_same_time(caplog, places, minutes, left):
    """The groups were estimated at half of what they take."""
    caplog.set_level("INFO")
    all_s = [30.0 * minutes[0]] * len(minutes)
    for count, minute in enumerate(minutes[: len(left)], start=1):
        estimate.log_progress(all_s[:count], all_s, places=places, passed_s=60.0 * minute)
    estimate.log_progress(all_s, all_s, places=places, passed_s=60.0 * minutes[-1])  # none is left
    assert caplog.messages == [f"{number} of {len(all_s)} groups done, {each}" for number, each in enumerate(left, 1)]


# ---- text ------------------------------------------------------------------------------------------------------------


def test_the_first_line_says_what_runs_and_on_what(jobs):
    grid_of = ["path=none", "loss=mse"], ["path=none", "loss=kld"], ["path=L"], ["path=H"]
    finish(jobs(*grid_of)[2].cell)
    cells = jobs(*grid_of)
    line = describe(cells, plan.waiting(cells))
    for part in (
        "3 cells (1 repeated jobs are the same cell): 2 to run, 1 finished; 1 lockstep group, 1 shared Teacher, ",
        "1 Teacher to train; data=busi with 25 images (16 benign, 9 malignant) at 64 pixels; device cpu; ",
    ):
        assert part in line
    for changes, part in (
        ({}, "; device cpu with 2 threads; "),
        (TWO, "; device cpu with 1 thread in each of 2 processes; "),
        ({"devices": {"cpu": ["SLURM"]}}, "; device SLURM; "),  # timed here, trained there
    ):
        assert part in describe(cells, cells, **{"threads": 2} | changes)


def test_the_overview_has_each_group_and_the_hours(jobs):
    cells = jobs(*([*SHORT, f"path={path}"] for path in ("none", "L", "H")), [*SHORT, "path=none", "split=s1"])
    groups = [cells[:3], cells[3:]]
    first, *rest = estimate.overview(cells, groups=groups, preview=PREVIEW).splitlines()
    assert first == describe(cells, *groups)
    assert rest == [
        "group 1: 3 cells, split 0 seed 0 on cpu, 6 min: Student, L_KLD_WAug, H_KLD_WAug",  # 48 s x 3 + 192 s
        "group 2: 1 cell, split 1 seed 0 on cpu, 48 s: Student",
        "Teachers first, 8 min: Teacher_WAug split 0 seed 0",  # 480 s
        "at most 0.24 device hours from one timed step on cpu; nothing was started",  # 864 s
    ]
    assert estimate.overview(cells, groups=groups, preview=replace(PREVIEW, **TWO)).splitlines()[1:] == rest
    assert estimate.overview(cells, groups=[], preview=None) == describe(cells, preview=None)


def test_an_overview_counts_the_teachers_beyond_the_first(jobs):
    groups = [[cell] for cell in jobs(*([*SHORT, "path=L", f"seed={seed}"] for seed in range(15)))]
    *_, teachers, _ = estimate.overview(list(itertools.chain(*groups)), groups=groups, preview=PREVIEW).splitlines()
    assert teachers.endswith("Teacher_WAug split 0 seed 10, Teacher_WAug split 0 seed 11 and 3 more")


def test_what_is_ignored_is_counted_in_the_first_line_and_named_once(small_busi, tmp_path):
    root = shutil.copytree(small_busi, tmp_path / "busi")
    shutil.copytree(root / "benign", root / "cyst")
    (root / "manifest.csv").write_text("file\n")
    rows = "".join(f"{file.stem},{file.stem}\n" for file in small_busi.glob("*/*).png"))
    (tmp_path / "groups.csv").write_text(f"id,group\n{rows}absent,x\n")
    words = ["profile=quick", "data=busi", f"data.root={root}", f"store={tmp_path}", "split=holdout", "device=cpu"]
    words += [f"split.group={tmp_path / 'groups.csv'}"]
    cells = plan.read_jobs([composition.compose_config([*words, f"path={path}"]) for path in ("none", "L")])
    assert "; data=busi with 25 images (16 benign, 9 malignant) at 64 pixels, 33 ignored; " in describe(cells)
    names = "cyst/benign (11).png, cyst/benign (11)_mask.png, cyst/benign (12).png, ..."
    group = f"rows of split.group={tmp_path / 'groups.csv'} without an image: 1 (absent)"
    expected = [f"data=busi, ignored: images in other folders: 32 ({names}); {group}"]
    assert estimate.overview(cells, groups=[], preview=None).splitlines()[1:] == expected
    assert estimate.ignored_lines(cells) == expected


def test_jobs_that_run_one_after_the_other_run_on_one_device(jobs, monkeypatch):
    two = replace(PREVIEW, devices={"cpu": ["cuda:0", "cuda:1"]}, timed_on="cuda:0")
    monkeypatch.setattr(rehearsal, "preview", lambda jobs: two)
    cells = jobs([*SHORT, "path=none"], [*SHORT, "path=none", "split=s1"])
    preview = local.InProcess().preview(cells, times=False)
    assert "; device cuda:0; at most about 2 min if" in describe(cells, cells[:1], cells[1:], preview=preview)


class LeavingQueue(Executor):
    """An executor with one cell in its queue, and one that left it, finished, after the jobs were read."""

    def __init__(self, left: plan.Job, queued: plan.Job) -> None:
        self.left, self.in_queue = left, queued.cell.folder

    def queued(self, jobs):
        finish(self.left.cell)
        return {self.in_queue}

    def preview(self, jobs, *, times):
        self.previewed = [job.settings.path.name for job in jobs]
        return PREVIEW

    def close(self, error):
        assert error is None


def test_a_cell_that_leaves_the_queue_while_the_sweep_is_planned_is_not_submitted_again(jobs, capsys, monkeypatch):
    cells = jobs(["path=none"], ["path=L"], ["path=H"])
    executor = LeavingQueue(cells[1], cells[2])
    planned = launcher.LockstepLauncher(executor, plan=True)
    planned.config = OmegaConf.create({"hydra": {"hydra_logging": None, "verbose": False}})
    planned.hydra_context = SimpleNamespace(config_loader=None)
    monkeypatch.setattr(launcher, "configure_log", lambda *_: None)
    monkeypatch.setattr(plan, "read_jobs", lambda configs: cells)
    assert len(planned.launch([], 0)) == 3
    assert executor.previewed == ["none", "H"]
    assert "3 cells: 2 to run, 1 finished; 2 lockstep groups" in capsys.readouterr().out


# ---- changes and overrides without effect ----------------------------------------------------------------------------

CHANGED = "1 cell is new (L_KLD_WAug split 0 seed 0): the store holds results of that name, but since then this has "


def changes(caplog, jobs) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        estimate.log_changes(jobs)
    return caplog.messages


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("train.lr=0.5", "train.lr (0.001 -> 0.5)"),
        ("kd.weight=0.9", "kd.weight (0.5 -> 0.9)"),
        ("teacher.lr=0.5", "teacher.lr (0.001 -> 0.5)"),
    ],
)
def test_a_new_cell_next_to_an_old_one_of_its_name_says_what_changed(jobs, caplog, override, change):
    (old,) = jobs(["path=L"])
    write_progress(old.cell, 0)
    assert changes(caplog, jobs(["path=L"])) == []  # it resumes, nothing has changed
    assert changes(caplog, [*jobs(["path=L", override]), *jobs(["path=none"])]) == [f"{CHANGED}changed: {change}"]
    assert changes(caplog, jobs(["path=L"], ["path=L", override])) == []  # both are requested


def test_a_later_results_version_is_said_with_what_can_still_be_done(jobs, caplog, monkeypatch):
    for job in jobs(["path=L"], ["path=H"]):
        write_progress(job.cell, 0)
    old, new = grid.RESULTS_VERSION, grid.RESULTS_VERSION + 1
    monkeypatch.setattr(grid, "RESULTS_VERSION", new)
    assert changes(caplog, jobs(["path=L"], ["path=H"])) == [
        "2 cells are new (L_KLD_WAug split 0 seed 0, H_KLD_WAug split 0 seed 0): the store holds results of that name, "
        f"but they are of results version {old}, this is version {new}; their tables, report and predictions can still "
        "be made"
    ]


def test_what_changed_outside_the_settings_is_named(jobs, caplog):
    (old,) = jobs(["path=L"])
    write_progress(old.cell, 0)
    for key, name in (
        ("user_code", "your own code"),
        ("split", "the images of the split's parts"),
        ("groups", "the groups of split.group"),
        ("teacher", "its Teacher"),
    ):
        changed = replace(old.cell, input_digests={**old.cell.input_digests, key: "another"})
        assert changes(caplog, [replace(old, cell=changed)]) == [f"{CHANGED}changed: {name}"]


@pytest.mark.parametrize(
    ("typed", "idle"),
    [
        ("loss=mse kd.temperature=7", "kd.temperature=7"),
        ("+experiment=recipe loss=mse kd.temperature=7", "kd.temperature=7"),
        ("loss=mse,kld kd.temperature=7", ""),
        ("path=none kd.weight=0.9 train.lr=0.01", "kd.weight=0.9"),
        ("path=none,L teacher.lr=0.01 kd.weight=0.9", ""),
        ("path=none teacher.lr=0.01 teacher=resnet34", "teacher.lr=0.01, teacher=resnet34"),
        ("path=L loss.hidden.temperature=3", "loss.hidden.temperature=3"),
        ("path=L,H loss.hidden.temperature=3", ""),
        ("kd.ratio=2", "kd.ratio=2"),
        ("kd.weight=matched kd.ratio=2", ""),
        ("method=kd kd.temperature=2", "kd.temperature=2"),
        ("method=none,kd path=none kd.ratio=3", "kd.ratio=3"),
        ("teacher_aug=strong kd.align=none", "kd.align=none"),
        ("+path.stage=encoder.4", "+path.stage=encoder.4"),
        ("+loss.depth=3 loss.logits.temperature=${loss.depth}", ""),
        ("+split.group=patients.csv split=s0", "+split.group=patients.csv"),
        ("device=cpu seed=1 data.allow_empty_masks=true data.load_size=96 stats.margin_points=1 weights=none", ""),
    ],
)
def test_a_key_that_no_cell_uses_is_named_once(configs, caplog, typed, idle):
    values = [(override.partition("=")[0], override.partition("=")[2].split(",")) for override in typed.split()]
    made = configs(*itertools.product(*([f"{key}={value}" for value in several] for key, several in values)))
    with caplog.at_level(logging.WARNING):
        estimate.log_idle(plan.read_jobs(made))
    lines = [line.partition(": used by no cell of this command (")[0] for line in caplog.messages]
    assert lines == ([idle] if idle else [])
