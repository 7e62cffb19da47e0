"""Table 3: the experiments by factor, their mean test Dice, the paper's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.results import notes
from kdsweep.results.formats import DASH, number
from kdsweep.results.frame import Scores, each_variant
from kdsweep.results.paper import LOSSES, PAPER, REPRESENTATIONS, cell_notations
from kdsweep.results.stats import NAN
from kdsweep.results.table import SETTINGS, Column, Options, Table, estimate

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

HEADING = "Table 3. The distillation experiments"
COLUMNS = [
    SETTINGS,
    Column("representation", "KD representation", narrow=True),
    Column("notation", "Notation", narrow=True),
    Column("loss", "KD loss", lambda loss: loss or DASH),
    Column("teacher_augmentation", "Teacher augmentation"),
    estimate("mean_dice_percent", "DSC % (ours)", narrow=True),
    Column("paper_mean_dice_percent", "DSC % (paper)", number, narrow=True),
]


def make(sweep: Sweep, options: Options) -> Table:
    """Make the table."""
    frame = numbers(sweep)
    below = [*notes.provenance(sweep), *notes.gaps(frame), notes.paper(sweep)]
    return Table(HEADING, frame, COLUMNS, notes=below)


@each_variant
def numbers(scores: Scores) -> pd.DataFrame:
    """Return a row per cell and setting: factors, mean Dice over the test images of all splits (%), the paper's."""
    why = scores.gaps(cell_notations(scores.notations))
    means = scores.complete(why).groupby("notation")["dice"].mean()
    parts = [notation.removesuffix("_WAug").partition("_") for notation in why]
    return pd.DataFrame(
        {
            "representation": [REPRESENTATIONS.get(path, path) for path, _, _ in parts],
            "notation": list(why),
            "loss": [LOSSES.get(loss, loss) for _, _, loss in parts],
            "teacher_augmentation": ["weak" if notation.endswith("_WAug") else "strong" for notation in why],
            "gap": list(why.values()),
            "mean_dice_percent": (100 * means.reindex(list(why))).to_numpy(),
            "paper_mean_dice_percent": [PAPER[notation][0] if notation in PAPER else NAN for notation in why],
        }
    )
