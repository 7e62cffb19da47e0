"""Numbers as the tables show them; an unknown one is a dash."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pandas as pd

from kdsweep.results.stats import ALPHA

DASH = "\N{EN DASH}"


def number(value: float, form: str = ".2f") -> str:
    """Format a number, such as ``73.16``."""
    return DASH if pd.isna(value) else format(value, form)


def joined(*means: float) -> str:
    """Format numbers that are there together, such as ``73.16 / 74.00``."""
    return DASH if pd.isna(means[0]) else " / ".join(map(number, means))


def points(value: float) -> str:
    """Format a difference with its sign, such as ``+1.20``."""
    return number(value, "+.2f")


def p(value: float) -> str:
    """Format a p-value with four decimals."""
    return "<0.0001" if value < 0.0001 else number(value, ".4f")


def after_holm(value: float) -> str:
    """Format a corrected p-value for a sentence."""
    return f"p {'< 0.0001' if value < 0.0001 else '= ' + p(value)} after Holm"


def interval(low: float, high: float) -> str:
    """Format an interval of differences, such as ``-0.30 to +2.70``."""
    return DASH if pd.isna(low) else f"{low:+.2f} to {high:+.2f}"


def with_interval(mean: float, low: float, high: float) -> str:
    """Format a difference and its interval, such as ``+1.20 (-0.30 to +2.70)``."""
    return DASH if pd.isna(mean) else f"{points(mean)} ({interval(low, high)})"


def or_gap(show: Callable[..., str]) -> Callable[..., str]:
    """Return a format of values and a gap: shows the values, or a dash and the reason for the gap."""
    return lambda *values: f"{DASH} ({values[-1]})" if values[-1] else show(*values[:-1])


def on_methods(rows: pd.DataFrame, subjects: Iterable[str]) -> str:
    """Return what rows of paired differences say of the methods, for a sentence; subjects are the names of the rows."""
    parts = []
    for subject, (_, row) in zip(subjects, rows.iterrows(), strict=True):
        if pd.notna(row["p_methods"]):
            shown = "a difference is shown" if row["p_methods_holm"] < ALPHA else "no difference is shown"
            bounds = interval(row["methods_low_points"], row["methods_high_points"])
            parts.append(f"{subject}: {shown} (95 % interval {bounds} points, {after_holm(row['p_methods_holm'])})")
    return "; ".join(parts) or "unknown, that takes several seeds"
