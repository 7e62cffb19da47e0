"""The launcher as Hydra's own tests see it, processes that die, folders, devices, and errors in one line."""

import pytest
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite
from hydra.version import VersionBase
from packaging.version import Version

from kdsweep import build, cells, launcher, timing
from kdsweep.errors import InputError
from kdsweep.progress import duration


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5300, "88 min"), (12600, "3.5 h")]
)
def test_durations_read_like_words(seconds, words):
    assert duration(seconds) == words


def test_a_timed_step_is_a_positive_time_per_image():
    cfg = cells.compose(["profile=quick", "device=cpu"])
    step = timing.time_step_s(build.student_network(cfg), image_size=64, compute=build.compute(cfg))
    assert 0 < step.forward < step.train < 60


def test_the_users_error_is_found_below_what_hydra_wraps_around_it():
    try:
        try:
            raise InputError("data.root=/x: no such folder")
        except InputError as error:
            raise RuntimeError("while resolving\nan interpolation") from error
    except RuntimeError as wrapped:
        assert launcher.one_line(wrapped) == "data.root=/x: no such folder"


def test_any_other_error_keeps_its_class_and_loses_its_line_breaks():
    assert launcher.one_line(ValueError("a\n  b")) == "ValueError: a b"


# --- what Hydra asks of every launcher


@pytest.fixture
def plain_hydra(hydra_restore_singletons, tmp_path, monkeypatch):
    """Hydra's tests expect the behaviour of version_base 1.1, which other tests of this process have changed."""
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
