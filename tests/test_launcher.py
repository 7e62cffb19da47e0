"""What a sweep tells before and between its jobs, and errors in one line."""

import pytest

from kdsweep import build, launcher, timing
from kdsweep.errors import InputError
from kdsweep.progress import duration


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5300, "88 min"), (12600, "3.5 h")]
)
def test_durations_read_like_words(seconds, words):
    assert duration(seconds) == words


def test_the_estimate_counts_each_trainings_own_cost(monkeypatch, small_busi, tmp_path):
    # Each class of network gets a price per image: Student 1 s a step, Teacher 10 s a step and 4 s a forward.
    def priced(network, **_):
        return timing.StepTime(train=10.0, forward=4.0) if "resnet" in network.name else timing.StepTime(1.0, 0.5)

    monkeypatch.setattr(timing, "time_step_s", priced)
    small = ["profile=quick", "data=busi", f"data.root={small_busi}", f"store={tmp_path}", "train.epochs=3"]
    cell, student = build.compose([*small, "path=L"]), build.compose([*small, "path=none"])
    images = len(build.split_ids(cell)["train"])
    assert launcher.estimate_s(cells=[student], teachers=[]) == images * 3 * 1
    assert launcher.estimate_s(cells=[student, cell], teachers=[cell]) == images * 3 * (1 + (1 + 4) + 10)


def test_a_timed_step_is_a_positive_time_per_image():
    cfg = build.compose(["profile=quick", "device=cpu"])
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
