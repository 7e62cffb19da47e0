"""Numbers as the tables show them; an unknown one is a dash."""

from __future__ import annotations

import pandas as pd

DASH = "\N{EN DASH}"


def number(value: float, form: str = ".2f") -> str:
    """Format a number, such as ``73.16``."""
    return DASH if pd.isna(value) else format(value, form)


def points(value: float) -> str:
    """Format a difference with its sign, such as ``+1.20``."""
    return number(value, "+.2f")


def p(value: float) -> str:
    """Format a p-value with four decimals."""
    return "<0.0001" if value < 0.0001 else number(value, ".4f")


def after_holm(value: float) -> str:
    """Format a corrected p-value for a sentence."""
    shown = p(value)
    return f"p {shown.replace('<', '< ') if shown.startswith('<') else '= ' + shown} after Holm"


def interval(*, low: float, high: float) -> str:
    """Format an interval of differences, such as ``-0.30 to +2.70``."""
    return DASH if pd.isna(low) else f"{low:+.2f} to {high:+.2f}"


def or_gap(shown: str, gap: str) -> str:
    """Return the text shown, or a dash and the reason for the gap."""
    return f"{DASH} ({gap})" if gap else shown


def tested(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return the last columns of a table of paired differences: interval (points), p, Holm's p, number of images."""
    bounds = zip(table["low_points"], table["high_points"], strict=True)
    return {
        "95 % interval": [interval(low=low, high=high) for low, high in bounds],
        "p": list(map(p, table["p"])),
        "p (Holm)": list(map(p, table["p_holm"])),
        "n images": [number(n, "d") for n in table["n_images"]],
    }
