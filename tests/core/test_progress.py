"""Long work says how far it is, also where there is no terminal."""

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
        "scoring: 2 of 8 networks, about 4 min left",  # 75 s for two
        "scoring: 5 of 8 networks, about 2 min left",  # 150 s for five, so 90
    ]


@pytest.mark.usefixtures("clock")
def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress.track("ab", what="scoring", unit="network", total=2)) == ["a", "b"]
    told = capsys.readouterr().err
    assert "scoring:" in told
    assert "left" not in told
