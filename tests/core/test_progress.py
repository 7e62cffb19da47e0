"""Long work shows its progress, on a terminal and without one."""

import sys

import pytest

from kdsweep.core import progress


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock is 25 s later."""
    seconds = iter(range(0, 10_000, 25))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))


@pytest.mark.usefixtures("clock")
def test_without_a_terminal_there_is_a_line_a_minute_with_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert list(progress.track(iter("abcdefgh"), what="scoring", unit="network", total=8)) == list("abcdefgh")
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 3 of 8 networks, about 2 min left",  # 75 s for three
        "scoring: 6 of 8 networks, about 50 s left",  # 150 s for six
    ]


@pytest.mark.usefixtures("clock")
def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress.track("ab", what="scoring", unit="network", total=2)) == ["a", "b"]
    printed = capsys.readouterr().err
    assert "scoring:" in printed
    assert "left" not in printed


def test_groups_begin_where_one_has_ended_first():
    groups = [[(10, 6.0)], [(1, 10.0), (2, 5.0)], [(1, 30.0)], [(1, 5.0)]]  # 60, 20, 30 and 5 s
    assert progress.left_s(groups) == 115.0
    assert progress.left_s(groups, places=2) == 60.0  # 60 while 20 + 30 + 5
    assert progress.left_s(groups[::-1], places=2) == 85.0  # 5 + 20 + 60 while 30
    assert progress.left_s([], places=3) == 0.0


def test_the_pace_is_the_median_of_the_last_epochs():
    assert progress.epoch_s([0]) is None
    assert progress.epoch_s([0, 2000]) == 2.0
    night = 8 * 3600 * 1000
    assert progress.epoch_s([0, 2000, night, night + 2000]) == 2.0
    assert progress.epoch_s([*range(0, 10_000, 1000), *range(10_000, 60_000, 5000)]) == 5.0
