"""Effects of the grid's factors: path, loss and teacher augmentation, paired over the paper's 12 cells."""

from __future__ import annotations

from itertools import combinations
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.core.errors import InputError, some
from kdsweep.results import notes
from kdsweep.results.formats import after_holm, on_methods, or_gap, points
from kdsweep.results.frame import Scores, each_variant
from kdsweep.results.paper import CELLS, LEVELS, cell_notations
from kdsweep.results.stats import ALPHA, EQUAL, OF_IMAGE, PLACE, adjusted, compare
from kdsweep.results.table import SETTINGS, Column, Options, Table, differences

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

HEADING = "Factor effects. Which choice mattered"
NAMED = 3  # how many of its missing cells a gap names
COLUMNS = [
    SETTINGS,
    Column("factor", "Factor"),
    Column("effect", "Effect", narrow=True),
    *differences(
        Column(("difference_points", "gap"), "DSC points", or_gap(points)), brief="DSC points (95 % interval)"
    ),
]


Contrast = tuple[str, str, str]  # factor, its level that counts as plus, the one that counts as minus
Effect = tuple[Contrast, ...]  # one contrast: a main effect; two of different factors: an interaction
CONTRASTS: list[Contrast] = [
    ("path", "H", "L"),
    ("path", "HReg", "L"),
    ("path", "HReg", "H"),
    ("loss", "KLD", "MSE"),
    ("teacher augmentation", "weak", "strong"),
]
FACTORS = tuple(dict.fromkeys(factor for factor, _, _ in CONTRASTS))
MAIN: list[Effect] = [(contrast,) for contrast in CONTRASTS]
INTERACTIONS: list[Effect] = sorted(
    ((one, other) for one, other in combinations(CONTRASTS, 2) if one[0] != other[0]),
    key=lambda effect: [factor for factor, _, _ in effect],
)


def applies(sweep: Sweep, store: Path) -> bool:
    """Return whether a sweep has cells of the paper; methods have no factors."""
    return cell_notations(sweep.runs["notation"])[0] in CELLS


def make(sweep: Sweep, options: Options) -> Table:
    """Make the table."""
    frame = numbers(sweep, test=options.test)
    below = [*notes.provenance(sweep), *footnotes(sweep, frame, test=options.test)]
    return Table(HEADING, frame.assign(test=options.test), COLUMNS, sentences(frame), below)


@each_variant
def numbers(scores: Scores, *, test: str = "ttest") -> pd.DataFrame:
    """Return main effects and two-way interactions in percentage points of Dice, each paired over the test images.

    For each image of each (split, seed): its mean Dice over the cells with a positive sign minus that over the cells
    with a negative one. A main effect's sign is that of its contrast, so the other factors are balanced. An
    interaction's sign is the product of two, which makes it half the difference of the two simple effects,
    ((a1 b1 - a0 b1) - (a1 b0 - a0 b0)) / 2. The estimate is the mean over the images.

    There is a row per effect with the columns of ``stats.compare``; Holm's family is its kind. A row that lacks a cell
    that it needs has no numbers, and its gap says why. Only the paper's 12 cells are used.

    Raises:
        InputError: the sweep is empty or mixed, or the cells were scored on different images.
    """
    why = scores.gaps(list(LEVELS))
    dice = _dice_of_cells(scores.complete(why))
    table = pd.DataFrame([_row(effect, dice=dice, why=why, test=test) for effect in MAIN + INTERACTIONS])
    return adjusted(table, family=table["kind"]).astype({"n_images": "Int64"})


def _dice_of_cells(images: pd.DataFrame) -> pd.DataFrame:
    """Return Dice with a row per (split, seed, image, group, test_to_train) and a column per cell without a gap."""
    dice = images.pivot(index=[*PLACE, "image", *OF_IMAGE], columns="notation", values="dice")
    alone = dice[dice.isna().any(axis=1)]
    if not alone.empty:
        first = alone.iloc[0]
        split, seed, image, *_ = alone.index[0]
        raise InputError(
            f"{first[first.isna()].index[0]} and {first.dropna().index[0]} were scored on different images: the first "
            f"is {image} of split {split} seed {seed}; run both on the same data"
        )
    return dice


def _row(effect: Effect, *, dice: pd.DataFrame, why: dict[str, str], test: str) -> dict[str, object]:
    signs = pd.Series(
        {cell: prod((plus in at) - (minus in at) for _, plus, minus in effect) for cell, at in LEVELS.items()}
    )
    names = [f"{plus} - {minus}" for _, plus, minus in effect]
    reasons = pd.Series(why)[signs != 0].loc[lambda reason: reason != ""]
    needs = "; ".join(
        f"{some(list(part.index), most=NAMED)} ({gap})" for gap, part in reasons.groupby(reasons, sort=False)
    )
    rows = pd.DataFrame()
    if not needs:
        plus, minus = (dice[signs.index[signs == sign]].mean(axis=1) for sign in (1, -1))
        rows = (100 * (plus - minus)).rename("points").reset_index()
    return {
        "effect": names[0] if len(names) == 1 else " x ".join(f"({name})" for name in names),
        "kind": "main" if len(names) == 1 else "interaction",
        "factor": " x ".join(factor for factor, _, _ in effect),
        **compare(rows, test=test),
        "gap": f"needs {needs}" if needs else "",
    }


def sentences(table: pd.DataFrame) -> list[str]:
    """Return what the data support at 5 % after Holm: a sentence per factor and question."""
    if "settings" in table:
        parts = table.groupby("settings", sort=False)
        return [f"With {label}: {line}" for label, part in parts for line in sentences(part.drop(columns="settings"))]
    shown = []
    for factor in FACTORS:
        of_factor = table[[factor in name.split(" x ") for name in table["factor"]]]
        main = of_factor[of_factor["kind"] == "main"]
        clauses = [_on_networks(row) for _, row in main.iterrows()]
        interactions = of_factor[(of_factor["kind"] == "interaction") & (of_factor["p_holm"] < ALPHA)]
        for name, rows in interactions.groupby("factor", sort=False):
            (other,) = set(str(name).split(" x ")) - {factor}
            which = ", ".join(f"{row['effect']} {after_holm(row['p_holm'])}" for _, row in rows.iterrows())
            clauses.append(f"the effect depends on the {other} ({which})")
        shown.append(f"{factor.capitalize()}, these networks: {'; '.join(clauses)}.")
        shown.append(f"{factor.capitalize()}, these methods: {on_methods(main, main['effect'])}.")
    return shown


def _on_networks(row: pd.Series) -> str:
    plus, minus = row["effect"].split(" - ")
    points, low, high = row["difference_points"], row["low_points"], row["high_points"]
    interval = f"95 % interval of {plus} minus {minus}, {low:+.2f} to {high:+.2f} points,"
    if row["gap"]:
        return f"{plus} against {minus} is unknown, it {row['gap']}"
    if pd.isna(row["p_holm"]) or pd.isna(low):
        return f"{plus} minus {minus} is {points:+.2f} points, but these scores allow no test"
    if max(abs(low), abs(high)) < EQUAL:
        return f"no difference between {plus} and {minus} is shown, their means are equal in each image"
    is_open = low <= 0 <= high
    if row["p_holm"] < ALPHA and is_open:  # the two need not agree, above all for a test of ranks
        differ = f"{plus} and {minus} differ by the test ({after_holm(row['p_holm'])})"
        return f"{differ}, but the {interval} leaves open which is better"
    if row["p_holm"] < ALPHA:
        better, worse, near, far = (plus, minus, low, high) if low > 0 else (minus, plus, -high, -low)
        number = f"{abs(points):.2f} points higher than {worse} on average"
        return f"{better} scores {number} (95 % interval {near:.2f} to {far:.2f}, {after_holm(row['p_holm'])})"
    leaves = "leaves room for either" if is_open else "is of this comparison alone and leaves out 0"
    shown = f"no difference between {plus} and {minus} is shown ({after_holm(row['p_holm'])})"
    return f"{shown}; the {interval} {leaves}"


def footnotes(sweep: Sweep, table: pd.DataFrame, *, test: str) -> list[str]:
    """Return the notes on the numbers, on cells that are left out, on gaps."""
    some = table[table["settings"] == table["settings"].iloc[0]] if "settings" in table else table
    tested = some.dropna(subset="p")["kind"].value_counts()
    families = (
        f"over the {tested.get('main', 0)} main effects and, apart from them, the {tested.get('interaction', 0)} "
        "interactions that have a p"
    )
    others = sorted(set(sweep.runs["notation"]).difference(LEVELS))
    return [
        *notes.differences(table, test=test, families=families),
        "Main effect: mean over the cells at the first level minus that at the second (weak: the cells named _WAug), "
        "so it is positive where the first has the higher Dice. Interaction: half the "
        "difference of the two simple effects. One that is not significant is not shown to be absent.",
        *([f"Left out, not of the 12 cells: {', '.join(others)}."] if others else []),
        *notes.gaps(table, by="effect", fewer="cells"),
    ]
