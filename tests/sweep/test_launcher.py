"""The launcher as Hydra's own tests see it, processes that die, folders, devices, and errors in one line."""

import os
import signal
from functools import partial
from types import SimpleNamespace

import pytest
from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobReturn, JobStatus
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite
from hydra.types import HydraContext
from hydra.version import VersionBase
from omegaconf import OmegaConf
from packaging.version import Version

from kdsweep.config import composition
from kdsweep.core.errors import CellError, InputError
from kdsweep.core.progress import duration
from kdsweep.evaluation import latency
from kdsweep.sweep import callback, launcher
from kdsweep.sweep.engines import local
from kdsweep.sweep.engines.engine import Unit
from kdsweep.training import factory


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5300, "88 min"), (12600, "3.5 h")]
)
def test_durations_read_like_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("places", "minutes", "told"),
    [
        (1, [10, 20, 30, 40], ["about 30 min left", "about 20 min left", "about 10 min left"]),
        (2, [10, 10, 20, 20], ["about 10 min left", "the others are running", "the others are running"]),
        (3, [60, 60, 61, 90], ["the others are running"] * 3),
        (3, [60, 60, 61, 120, 120, 121, 122, 180], [*["about 2.0 h left"] * 3, "about 60 min left"]),
    ],
)
def test_the_time_left_is_that_of_groups_that_run_beside_each_other(monkeypatch, caplog, places, minutes, told):
    caplog.set_level("INFO")
    clock = iter([0.0, *(60.0 * minute for minute in minutes)])
    monkeypatch.setattr(launcher.time, "monotonic", lambda: next(clock))
    groups = [[SimpleNamespace(cell=SimpleNamespace(fingerprint=str(number)))] for number in range(len(minutes))]
    report = launcher.Report(groups, places=places)
    for group in groups[: len(told)]:
        report.add(group, [0.5])
    words = [f"{number} of {len(groups)} groups done, {left}" for number, left in enumerate(told, start=1)]
    assert caplog.messages == words


def test_a_timed_step_is_a_positive_time_per_image():
    cfg = composition.compose(["profile=quick", "device=cpu"])
    step = latency.time_step_s(factory.student_network(cfg), image_size=64, compute=factory.compute(cfg))
    assert 0 < step.forward < step.train < 60


def test_the_users_error_is_found_below_what_hydra_wraps_around_it():
    try:
        try:
            raise InputError("data.root=/x: no such folder")
        except InputError as error:
            raise RuntimeError("while resolving\nan interpolation") from error
    except RuntimeError as wrapped:
        assert callback.user_message(wrapped) == "data.root=/x: no such folder"


def test_any_other_error_keeps_its_class_and_loses_its_line_breaks():
    assert callback.user_message(ValueError("a\n  b")) == "ValueError: a b"


def test_a_kept_command_can_be_typed_again_and_tells_no_password():
    hydra = {
        "overrides": {
            "hydra": ["hydra.launcher.n_jobs=2", "hydra.mode=MULTIRUN"],
            "task": ["path=L,H", "store=/my scans", "tracking.uri=postgresql://me:se@cret@host:5432/db"],
        },
        "runtime": {
            "config_sources": [
                {"path": "/pkg/conf", "provider": "main"},
                {"path": "/mine", "provider": "command-line"},
            ]
        },
    }
    assert callback.command_line(OmegaConf.create({"hydra": hydra})) == (
        "python -m kdsweep -m --config-dir /mine hydra.launcher.n_jobs=2 path=L,H 'store=/my scans' "
        "tracking.uri=postgresql://USER:PASSWORD@host:5432/db"
    )


# --- what Hydra asks of every launcher


@pytest.fixture
def plain_hydra(hydra_restore_singletons, tmp_path, monkeypatch):
    """Hydra's tests expect the behavior of version_base 1.1, which other tests of this process have changed."""
    VersionBase.instance().setbase(Version("1.1"))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("plain_hydra")
@pytest.mark.parametrize(("launcher_name", "overrides"), [("lockstep", [])])
class TestLauncher(LauncherTestSuite):
    """Hydra's own tests of a launcher."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("plain_hydra")
@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=lockstep"])])
class TestLauncherIntegration(IntegrationTestSuite):
    """Hydra's own tests of whole programs with a launcher."""


# --- jobs that are not cells, as another program's


def dying():
    """A task function whose process is killed in one job."""

    def task(cfg):
        if cfg.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return cfg.number * 10

    return task


@pytest.fixture
def launch(job_config, plain_hydra):
    """Runs jobs of a task function with the launcher, without Hydra around it."""

    def with_overrides(config, overrides):  # in here: it reaches the jobs' processes without this module's imports
        own = config.copy()
        own.number = int(overrides[0].removeprefix("number="))
        OmegaConf.set_readonly(own.hydra, False)
        own.hydra.overrides.task = overrides
        return own

    def run(task_function, numbers, subdir="${hydra.job.num}"):
        own = launcher.LockstepLauncher(local.Devices())
        config = job_config(0, subdir=subdir)
        loader = SimpleNamespace(load_sweep_config=with_overrides)
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        own.setup(hydra_context=context, task_function=task_function, config=config)
        return own.launch([[f"number={number}"] for number in numbers], initial_job_idx=0)

    return run


@pytest.mark.slow
def test_a_killed_job_takes_no_other_with_it(launch):
    returns = launch(dying(), [0, 1, 2])
    assert [job.status for job in returns] == [JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.COMPLETED]
    assert [returns[0].return_value, returns[2].return_value] == [0, 20]
    with pytest.raises(CellError, match="its process ended early, killed by SIGKILL"):
        _ = returns[1].return_value
    assert returns[1].overrides == ["number=1"]


def test_two_jobs_of_one_folder_are_refused(launch):
    with pytest.raises(InputError, match="jobs 0 and 1 would write to one folder; name every swept key in it"):
        launch(dying(), [0, 2], subdir="same")


def test_a_folder_may_be_named_by_any_key_and_is_settled_before_the_jobs_start(job_config, plain_hydra):
    configs = [job_config(number, subdir="x${number}") for number in (1, 2, 1)]
    assert launcher.settle_folders(configs, names=["one", "two", "one"]) == ["x1", "x2", "x1"]
    with pytest.raises(InputError):
        launcher.settle_folders(configs, names=["one", "two", "three"])


# --- several devices

GONE = "cuda:99"  # no machine has it: what is lost does not compute in a fresh process either


@pytest.fixture
def run_units(job_config, plain_hydra):
    """Runs units of the names of their devices; each gives its name, its device and its share of the threads."""

    def make(*each: list[str], places: list[str], fails: str = GONE):
        def call(configs):
            import torch

            if configs[0].device == fails:
                raise RuntimeError("CUDA error: the device is lost")
            value = f"{configs[0].name} on {configs[0].device}", torch.get_num_threads()
            return [JobReturn(status=JobStatus.COMPLETED, _return_value=value)]

        own = local.Devices()
        own.open(job_config(0, subdir="x"))
        configs = [OmegaConf.create({"name": f"unit{number}", "device": "auto"}) for number in range(len(each))]
        units = {
            Unit(call, partial(list, [config]), list(names)): config.name
            for config, names in zip(configs, each, strict=True)
        }
        return {
            units[unit]: outcome if isinstance(outcome, Exception) else outcome[0].return_value
            for unit, outcome in own._run(list(units), places)
        }

    return make


@pytest.mark.slow
def test_a_group_whose_device_is_lost_moves_to_another_and_fails_if_there_is_none(run_units, caplog):
    outcomes = run_units([GONE, "cpu"], [GONE, "cpu"], [GONE], places=[GONE, "cpu"])
    assert [outcomes[name][0] for name in ("unit0", "unit1")] == ["unit0 on cpu", "unit1 on cpu"]
    assert caplog.text.count(f"{GONE} does not compute any more: its group moves to another device") == 1
    assert str(outcomes["unit2"]) == f"{GONE} does not compute any more"


@pytest.mark.slow
def test_a_group_that_fails_on_a_device_that_computes_is_not_tried_elsewhere(run_units):
    outcomes = run_units(["cpu", "meta"], places=["cpu", "meta"], fails="cpu")
    assert "the device is lost" in str(outcomes["unit0"])


@pytest.mark.slow
def test_processes_on_the_cpu_share_its_threads(run_units, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    ((_, threads),) = run_units(["cpu"], places=["cpu"]).values()
    assert threads == 2
    outcomes = run_units(["cpu"], ["cpu"], places=["cpu", "cpu"])
    assert sorted(outcomes.values()) == [("unit0 on cpu", 1), ("unit1 on cpu", 1)]
    assert local.Devices(processes=3).names == ["cpu"] * 3
    with pytest.raises(InputError, match=r"hydra\.launcher\.processes=0 is not allowed"):
        local.Devices(processes=0)
