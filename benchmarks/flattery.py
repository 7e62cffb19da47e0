"""How much Dice a split flatters that ignores near-duplicates: the same images, folds by image and folds by group.

    python -m kdsweep audit data=busi data.root=BUSI --out AUDIT
    python -m kdsweep -m path=none split=kfold split.fold=0,1,2,3,4 split.group=null,AUDIT/groups.csv seed=0,1,2 \
      profile=quick data=busi data.root=BUSI sweep_name=flattery
    python benchmarks/flattery.py --groups AUDIT/groups.csv

In k folds each image is tested once, whatever the folds, so the scores are paired by image. Images of one group are one
cluster of the interval, seeds are averaged first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from kdsweep.results import stats
from kdsweep.tracking import reader


def paired(sweep: reader.Sweep) -> pd.DataFrame:
    """Return Dice (fractions) by image and by group, and points, the difference, per seed and image."""
    groups = sweep.runs["params"].map(lambda params: params.get("split.group", "None"))
    runs = sweep.runs.assign(by=groups.map(lambda name: "by_image" if name in ("None", "null") else "by_group"))
    scored = runs[["fingerprint", "seed", "by"]].merge(sweep.scores[["fingerprint", "image", "dice"]])
    dice = scored.pivot(index=["seed", "image"], columns="by", values="dice")
    if dice.isna().any(axis=None):
        raise SystemExit("not every image is tested once in both: run all folds and seeds of both first")
    return dice.assign(points=100 * (dice["by_image"] - dice["by_group"])).reset_index()


def measure(rows: pd.DataFrame, groups: pd.Series) -> dict[str, float]:
    """Return mean Dice (%) of both, the difference in points and half its 95 % interval, over these images."""
    split_rows = rows.assign(split=0, group=rows["image"].map(groups))
    averaged = stats.over_seeds(split_rows)
    spread = stats.networks_spread(averaged)
    return {
        "images": split_rows["image"].nunique(),
        "by_image": 100 * split_rows["by_image"].mean(),
        "by_group": 100 * split_rows["by_group"].mean(),
        "difference_points": averaged["points"].mean(),
        "half_width_points": spread.half_width(),
    }


def main() -> None:
    """Print the figures of a finished sweep as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=Path, required=True)
    parser.add_argument("--store", type=Path, default=Path("multirun"))
    parser.add_argument("--sweep", default="flattery")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    groups = pd.read_csv(options.groups).set_index("id")["group"]
    rows = paired(reader.read_sweep(store=options.store, uri=None, name=options.sweep))
    alone = rows["image"].map(groups).str.startswith("alone-")
    figures = {
        "all": measure(rows, groups),
        "with a near-duplicate": measure(rows[~alone], groups),
        "without": measure(rows[alone], groups),
        "by seed": {str(seed): of_seed["points"].mean() for seed, of_seed in rows.groupby("seed")},
    }
    text = json.dumps(figures, indent=1) + "\n"
    sys.stdout.write(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
