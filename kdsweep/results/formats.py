"""Numbers as the tables show them; an unknown one is a dash."""

from __future__ import annotations

import pandas as pd

from kdsweep.results.stats import ALPHA

DASH = "\N{EN DASH}"
ONE_SEED = "not known, that takes several seeds"


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


def on_methods(row: pd.Series, what: str) -> str:
    """Return what a row of paired differences says of the methods, for a sentence."""
    bounds = interval(low=row["methods_low_points"], high=row["methods_high_points"])
    shown = "a difference is shown" if row["p_methods_holm"] < ALPHA else "no difference is shown"
    return f"{what}: {shown} (95 % interval {bounds} points, {after_holm(row['p_methods_holm'])})"


def interval(*, low: float, high: float) -> str:
    """Format an interval of differences, such as ``-0.30 to +2.70``."""
    return DASH if pd.isna(low) else f"{low:+.2f} to {high:+.2f}"


def or_gap(shown: str, gap: str) -> str:
    """Return the text shown, or a dash and the reason for the gap."""
    return f"{DASH} ({gap})" if gap else shown


def tested(table: pd.DataFrame, *, prefix: str = "") -> dict[str, list[str]]:
    """Return the last columns of a table of paired differences: intervals (points) and p of both questions, images.

    Columns on the methods stand there if the sweep can tell, with several seeds.
    """
    return {
        "networks: 95 % interval": _intervals(table, prefix),
        **p_values(table, prefix=prefix),
        **(
            {"methods: 95 % interval": _intervals(table, f"{prefix}methods_")}
            if table[f"{prefix}p_methods"].notna().any()
            else {}
        ),
        "n images": [number(n, "d") for n in table["n_images"]],
    }


def p_values(table: pd.DataFrame, *, prefix: str = "", of: str = "") -> dict[str, list[str]]:
    """Return the columns of p-values that a table has, by the question that each answers.

    Args:
        table: with columns p, p_holm, p_methods, p_methods_holm, p_runs behind the prefix.
        prefix: of the table's columns.
        of: what stands before the name of the test in a heading.
    """
    columns = {
        "networks: p": "p",
        "networks: p (Holm)": "p_holm",
        "methods: p": "p_methods",
        "methods: p (Holm)": "p_methods_holm",
        "methods: p (Nadeau-Bengio)": "p_runs",
    }
    return {
        of + heading: list(map(p, table[prefix + name]))
        for heading, name in columns.items()
        if name in ("p", "p_holm") or table[prefix + name].notna().any()
    }


def _intervals(table: pd.DataFrame, prefix: str) -> list[str]:
    bounds = zip(table[f"{prefix}low_points"], table[f"{prefix}high_points"], strict=True)
    return [interval(low=low, high=high) for low, high in bounds]
