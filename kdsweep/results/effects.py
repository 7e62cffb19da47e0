"""Effects of the grid's factors: path, loss and teacher augmentation, paired over the paper's 12 cells."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from kdsweep.core.errors import InputError
from kdsweep.results import formats
from kdsweep.results.footnotes import of_comparisons
from kdsweep.results.frame import each_variant, gaps, placed_runs, scored_images
from kdsweep.results.paper import LEVELS
from kdsweep.results.stats import ALPHA, OF_IMAGE, PLACE, adjusted, compare, unknown

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

NAMED = 3  # how many of its missing cells a gap names


class Contrast(NamedTuple):
    """One level of a factor against another; positive where plus has the higher Dice."""

    factor: str
    plus: str
    minus: str

    def sign(self, levels: tuple[str, ...]) -> int:
        """Return +1 for a cell at the level plus, -1 at minus, 0 at another level of the factor."""
        return (self.plus in levels) - (self.minus in levels)


Effect = tuple[Contrast, ...]  # one contrast: a main effect; two of different factors: an interaction

CONTRASTS = (
    Contrast("path", plus="H", minus="L"),
    Contrast("path", plus="HReg", minus="L"),
    Contrast("path", plus="HReg", minus="H"),
    Contrast("loss", plus="KLD", minus="MSE"),
    Contrast("teacher augmentation", plus="weak", minus="strong"),
)
FACTORS = tuple(dict.fromkeys(contrast.factor for contrast in CONTRASTS))
MAIN: list[Effect] = [(contrast,) for contrast in CONTRASTS]
INTERACTIONS: list[Effect] = sorted(
    ((one, other) for one, other in combinations(CONTRASTS, 2) if one.factor != other.factor),
    key=lambda effect: [contrast.factor for contrast in effect],
)


# ---- the numbers ---------------------------------------------------------------------------------------------------


def effects(sweep: Sweep, *, test: str = "ttest") -> pd.DataFrame:
    """Return main effects and two-way interactions in percentage points of Dice, each paired over the test images.

    For each image of each (split, seed): its mean Dice over the cells with a positive sign minus that over the cells
    with a negative one. A main effect's sign is that of its contrast, so the other factors are balanced. An
    interaction's sign is the product of two, which makes it half the difference of the two simple effects,
    ((a1 b1 - a0 b1) - (a1 b0 - a0 b0)) / 2. The estimate is the mean over the images.

    Args:
        sweep: The runs and scores; of its notations only the paper's 12 cells are used.
        test: A key of TESTS.

    Returns:
        One row per effect with its 95 % interval, p, and Holm's p within its kind; a row that lacks a cell that it
        needs has no numbers, and its gap says why. A sweep that varies further keys gives this for each of their
        values, below each other, column settings first.

    Raises:
        InputError: the sweep is empty or mixed, or the cells were scored on different images.
    """
    return each_variant(sweep, partial(_effects, test=test))


def _effects(sweep: Sweep, *, test: str) -> pd.DataFrame:
    runs = placed_runs(sweep)
    scored = scored_images(runs=runs, scores=sweep.scores)
    why = gaps(runs=runs, scored=scored, notations=list(LEVELS))
    dice = _dice_of_cells(scored[scored["notation"].map(why) == ""])
    table = pd.DataFrame([_row(effect, dice=dice, why=why, test=test) for effect in MAIN + INTERACTIONS])
    return adjusted(table, family=table["kind"]).astype({"n_images": "Int64"})


def _dice_of_cells(whole: pd.DataFrame) -> pd.DataFrame:
    """Return Dice with a row per (split, seed, image, group, test_to_train) and a column per cell without a gap."""
    dice = whole.pivot(index=[*PLACE, "image", *OF_IMAGE], columns="notation", values="dice")
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
    signs = {cell: prod(contrast.sign(levels) for contrast in effect) for cell, levels in LEVELS.items()}
    names = [f"{contrast.plus} - {contrast.minus}" for contrast in effect]
    missing: dict[str, list[str]] = {}
    for cell in (cell for cell, sign in signs.items() if sign and why[cell]):
        missing.setdefault(why[cell], []).append(cell)
    row: dict[str, object] = {
        "effect": names[0] if len(names) == 1 else " x ".join(f"({name})" for name in names),
        "kind": "main" if len(names) == 1 else "interaction",
        "factor": " x ".join(contrast.factor for contrast in effect),
    }
    if missing:
        needs = "; ".join(f"{_some(cells)} ({reason})" for reason, cells in missing.items())
        return row | unknown(gap=f"needs {needs}")
    plus, minus = (dice[[cell for cell in LEVELS if signs[cell] == sign]].mean(axis=1) for sign in (1, -1))
    return row | compare((100 * (plus - minus)).rename("points").reset_index(), test=test) | {"gap": ""}


def _some(cells: list[str]) -> str:
    more = len(cells) - NAMED
    return ", ".join(cells[:NAMED]) + (f" and {more} more" if more > 0 else "")


# ---- text ----------------------------------------------------------------------------------------------------------


def format_effects(table: pd.DataFrame) -> pd.DataFrame:
    """Return the strings of the table of effects."""
    estimates = zip(table["difference_points"], table["gap"], strict=True)
    columns = {
        **({"Settings": table["settings"]} if "settings" in table else {}),
        "Factor": table["factor"],
        "Effect": table["effect"],
        "DSC points": [formats.or_gap(formats.points(points), gap) for points, gap in estimates],
        **formats.tested(table),
    }
    return pd.DataFrame(columns)


def sentences(table: pd.DataFrame) -> list[str]:
    """Return what the data support at 5 % after Holm: a sentence per factor and question."""
    if "settings" in table:
        parts = table.groupby("settings", sort=False)
        return [f"With {label}: {line}" for label, part in parts for line in sentences(part.drop(columns="settings"))]
    shown = []
    for factor in FACTORS:
        mine = table[[factor in name.split(" x ") for name in table["factor"]]]
        main = mine[mine["kind"] == "main"]
        clauses = [_on_networks(row) for _, row in main.iterrows()]
        interactions = mine[(mine["kind"] == "interaction") & (mine["p_holm"] < ALPHA)]
        for name, rows in interactions.groupby("factor", sort=False):
            (other,) = set(str(name).split(" x ")) - {factor}
            which = ", ".join(f"{row['effect']} {formats.after_holm(row['p_holm'])}" for _, row in rows.iterrows())
            clauses.append(f"the effect depends on the {other} ({which})")
        shown.append(f"{factor.capitalize()}, these networks: {'; '.join(clauses)}.")
        known = [row for _, row in main.iterrows() if pd.notna(row["p_methods"])]
        on_methods = "; ".join(formats.on_methods(row, row["effect"]) for row in known)
        shown.append(f"{factor.capitalize()}, these methods: {on_methods or formats.ONE_SEED}.")
    return shown


def _on_networks(row: pd.Series) -> str:
    plus, minus = row["effect"].split(" - ")
    points, low, high = row["difference_points"], row["low_points"], row["high_points"]
    interval = f"95 % interval of {plus} minus {minus}, {low:+.2f} to {high:+.2f} points,"
    if row["gap"]:
        return f"{plus} against {minus} is not known, it {row['gap']}"
    if pd.isna(row["p_holm"]) or pd.isna(low):
        return f"{plus} minus {minus} is {points:+.2f} points, but these scores allow no test"
    if max(abs(low), abs(high)) < 1e-9:
        return f"no difference between {plus} and {minus} is shown, their means are equal in each image"
    is_open = low <= 0 <= high
    if row["p_holm"] < ALPHA and is_open:  # the two need not agree, above all for a test of ranks
        differ = f"{plus} and {minus} differ by the test ({formats.after_holm(row['p_holm'])})"
        return f"{differ}, but the {interval} leaves open which is better"
    if row["p_holm"] < ALPHA:
        better, worse, near, far = (plus, minus, low, high) if low > 0 else (minus, plus, -high, -low)
        number = f"{abs(points):.2f} points higher than {worse} on average"
        return f"{better} scores {number} (95 % interval {near:.2f} to {far:.2f}, {formats.after_holm(row['p_holm'])})"
    leaves = "leaves room for either" if is_open else "is of this comparison alone and leaves out 0"
    shown = f"no difference between {plus} and {minus} is shown ({formats.after_holm(row['p_holm'])})"
    return f"{shown}; the {interval} {leaves}"


def notes(*, sweep: Sweep, table: pd.DataFrame, test: str) -> list[str]:
    """Return the footnotes: what the numbers are, what they treat as independent, runs left out, gaps."""
    some = table[table["settings"] == table["settings"].iloc[0]] if "settings" in table else table
    tested = some.dropna(subset="p")["kind"].value_counts()
    main, interaction = tested.get("main", 0), tested.get("interaction", 0)
    lines = [
        *of_comparisons(
            table,
            test=test,
            families=f"over the {main} main effects and, apart from them, the {interaction} interactions that have a p",
        ),
        "Main effect: mean over the cells at the first level minus that at the second (weak: the cells named _WAug), "
        "so it is positive where the first has the higher Dice. Interaction: half the "
        "difference of the two simple effects. One that is not significant is not shown to be absent.",
    ]
    others = sorted(set(sweep.runs["notation"]).difference(LEVELS))
    if others:
        lines.append(f"Left out, not of the 12 cells: {', '.join(others)}.")
    missing = table[table["gap"] != ""]
    if not missing.empty:
        where = missing["effect"] + (" with " + missing["settings"] if "settings" in missing else "")
        listed = "; ".join(f"{name}: {gap}" for name, gap in zip(where, missing["gap"], strict=True))
        lines.append(f"Gaps, never averaged over fewer cells: {listed}.")
    return lines
