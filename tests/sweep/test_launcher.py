"""The launcher: commands without -m, the time left, and errors in one line."""

import re
import subprocess
import sys

import pytest
import torch
from commands import kdsweep
from hydra.core.utils import JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf
from small import STUDENT

from kdsweep.__main__ import user_message
from kdsweep.config import composition, identity, inputs
from kdsweep.core.errors import CellError, InputError
from kdsweep.core.progress import duration
from kdsweep.evaluation import latency
from kdsweep.sweep import launcher, rehearsal
from kdsweep.training import build


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5300, "88 min"), (12600, "3.5 h")]
)
def test_durations_read_like_words(seconds, words):
    assert duration(seconds) == words


def test_a_timed_step_is_a_positive_time_per_image():
    cfg = composition.compose(["profile=quick", "device=cpu"])
    step = latency.time_step_s(build.student_network(cfg), image_size=64, compute=build.compute(cfg))
    assert 0 < step.forward < step.train < 60


@pytest.mark.parametrize(
    ("device", "images", "each_epoch"), [("cpu", 4, "false"), ("cuda:1", 64, "false"), ("cpu", 4, "true")]
)
def test_a_plan_times_the_complete_batch_on_cuda_on_the_device_that_is_used(monkeypatch, device, images, each_epoch):
    timed = []

    def time_step_s(network, *, image_size, compute, images, forward_only=False):
        timed.append((str(compute.device), images))
        return latency.StepTime(0.1, 0.05)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(latency, "time_step_s", time_step_s)
    monkeypatch.setattr(rehearsal, "check", lambda _: None)
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: None)
    words = ["profile=quick", "train.batch_size=64", f"device={device}", "path=none"]
    cfg = composition.compose([*words, f"scores.each_epoch={each_epoch}"])
    preview = rehearsal.preview([identity.job(cfg)], devices=[device] if device != "cpu" else [])
    assert (timed, preview.timed_on) == ([(device, images)], device)
    ids = inputs.split_ids(cfg)
    measured = len(ids["validation"]) + (len(ids["test"]) if each_epoch == "true" else 0)
    assert preview.student_epoch_s == pytest.approx(0.1 * len(ids["train"]) + 0.05 * measured)


def test_the_users_error_is_taken_from_below_what_hydra_wraps_around_it():
    try:
        try:
            raise InputError("data.root=/x: no such folder")
        except InputError as error:
            raise RuntimeError("while resolving\nan interpolation") from error
    except RuntimeError as wrapped:
        assert user_message(wrapped) == "data.root=/x: no such folder"


def test_any_other_error_keeps_its_class_and_loses_its_line_breaks():
    assert user_message(ValueError("a\n  b")) == "ValueError: a b"


def test_a_kept_command_names_no_folder_and_no_password(monkeypatch):
    typed = [
        "-m",
        "path=L,H",
        "store=/my runs",
        "data.root=/my scans",
        "tracking.uri=postgresql://me:se@cret@host:5432/db",
        "--plan",
    ]
    monkeypatch.setattr(launcher, "arguments", typed)
    assert launcher.command_line() == (
        "python -m kdsweep -m path=L,H store=STORE 'data.root=my scans' "
        "tracking.uri=postgresql://USER:PASSWORD@host:5432/db --plan"
    )


# --- commands without -m

ALONE = ["hydra/launcher=one_by_one", "hydra.sweeper.is_one_cell=true"]


@pytest.mark.parametrize(
    ("options", "words", "expected"),
    [
        ([], ["path=L"], ["-m", "path=L", *ALONE]),
        (["--run", "--config-dir", "/x"], [], ["--config-dir", "/x", "-m", *ALONE]),
        (["-m"], ["path=L,H", "hydra/launcher=basic"], ["-m", "path=L,H", "hydra/launcher=one_by_one"]),
        ([], ["hydra/launcher=lockstep"], ["-m", "hydra/launcher=lockstep", "hydra.sweeper.is_one_cell=true"]),
        ([], ["hydra.mode=MULTIRUN"], ["hydra.mode=MULTIRUN"]),
        (["--cfg", "job"], ["path=L"], ["--cfg", "job", "path=L"]),
        (["--info"], [], ["--info"]),
    ],
)
def test_a_command_without_m_is_a_sweep_of_one_cell_in_this_process(options, words, expected):
    assert launcher.as_sweep(options, words) == expected


def sweep(choice="one_by_one", **sweeper):
    hydra = {"mode": RunMode.MULTIRUN, "sweeper": sweeper, "overrides": {"task": ["seed=1"], "hydra": []}}
    choices = {"hydra/launcher": choice, "experiment": "table4"}
    return OmegaConf.create({"hydra": {**hydra, "runtime": {"choices": choices}}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (sweep(choice="lockstep_ray"), r"^hydra/launcher=lockstep_ray runs sweeps: add -m, or leave it out$"),
        (sweep(search={"train.lr": [1, 2]}), r"^hydra\.sweeper\.search tunes sweeps: add -m"),
        (sweep(params={"path": "L,H", "seed": "0,1"}), r"^\+experiment=table4 has a grid \(path\): add -m to run it"),
    ],
)
def test_what_only_a_sweep_can_do_needs_m(config, message):
    launcher.check_sweep(config, is_one_cell=False)
    with pytest.raises(InputError, match=message):
        launcher.check_sweep(config, is_one_cell=True)


@pytest.mark.parametrize(
    "word", ["hydra.run.dir=x", "hydra/job_logging=none", "+hydra.job.env_set.A=1", "hydra.job.chdir=true"]
)
def test_options_of_hydras_jobs_are_refused(word):
    config = sweep()
    config.hydra.overrides.hydra = ["hydra.verbose=true", word]
    with pytest.raises(InputError, match=f"^{re.escape(word)} has no effect: a cell has its folder in the store"):
        launcher.check_sweep(config, is_one_cell=False)


@pytest.mark.slow
def test_the_experiment_of_a_user_is_planned_with_options_in_any_order(small_busi, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ntrain: {batch_size: 4}\nhydra: {sweeper: {params: {path: 'none,L', loss: mse}}}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
    words = ["+experiment=mine", "--multirun", "--plan", "data=busi", "--config-dir", str(tmp_path / "conf")]
    words += [f"data.root={small_busi}", "profile=quick", "kd.temperature=3", "device=cpu"]
    done = kdsweep(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[HYDRA] kd.temperature=3: used by no cell of this command (Student, L_MSE_WAug), so without" in done.stdout
    assert "2 cells: 2 to run" in done.stdout
    alone = kdsweep(*(word for word in words if word != "--multirun"), cwd=tmp_path)
    assert alone.returncode == 1
    assert "kdsweep: error: +experiment=mine has a grid (path, loss): add -m to run it" in alone.stderr


# --- what Hydra sees


def test_another_programs_jobs_are_refused_in_one_line():
    message = "^hydra/launcher=lockstep trains kdsweep's cells alone; this program needs another launcher$"
    with pytest.raises(InputError, match=message):
        launcher.LockstepLauncher(None).setup(hydra_context=None, task_function=print, config=sweep("lockstep"))
    with pytest.raises(InputError, match=r"^hydra/launcher=joblib trains no cells: it must be lockstep, "):
        launcher.train_cell(sweep("joblib"))


def test_a_result_is_a_value_or_raises_its_error():
    done, failed = launcher.job_return(["a=1"], 0.5), launcher.job_return(["a=2"], CellError("a cell failed"))
    assert (done.status, done.return_value, done.overrides) == (JobStatus.COMPLETED, 0.5, ["a=1"])
    with pytest.raises(CellError, match="a cell failed"):
        _ = failed.return_value


@pytest.mark.slow
def test_a_users_callbacks_see_each_job(small_busi, tmp_path):
    (tmp_path / "listener.py").write_text(
        "from hydra.experimental.callback import Callback\n"
        "class Listener(Callback):\n"
        "    def on_job_start(self, config, *, task_function, **_):\n"
        "        print('start', config.seed, task_function.__name__)\n"
        "    def on_job_end(self, config, job_return, **_):\n"
        "        print('end', config.seed, job_return.status.name, job_return.return_value > 0)\n"
    )
    words = ["-m", "path=none", "seed=0,1", "profile=quick", "data=busi", f"data.root={small_busi}", "device=cpu"]
    words += ["train.batch_size=8", "train.epochs=1", "+hydra.callbacks.listener._target_=listener.Listener", *STUDENT]
    done = kdsweep(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("start", "end"))]
    assert lines == [
        *(f"start {seed} train_cell" for seed in (0, 1)),
        *(f"end {seed} COMPLETED True" for seed in (0, 1)),
    ]


def test_help_is_quick():
    """It loads none of what computes, plans or logs."""
    code = "import sys; from kdsweep import __main__; from kdsweep.sweep import launcher; "
    code += "print(sorted({mods} & sys.modules.keys()))"
    code = code.replace("{mods}", "{'torch', 'mlflow', 'pandas', 'optuna', 'submitit', 'ray'}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
