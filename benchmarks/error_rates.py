"""Simulate how often the tables' tests err: type I error and power of both questions, with known answers.

Usage: `python benchmarks/error_rates.py [--trials N] [--out FILE]` (10 minutes for 1000 trials on one core).
Differences of two methods are drawn from the model of ``results/stats.py``, for the paper's design: three random splits
of 163 images, 33 of them for test. Every rate is of the shipped functions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from kdsweep.results import stats

IMAGES, TESTED, SPLITS = 163, 33, 3
TOTAL_SD = 22.0  # points, of one image's difference: as that of HReg_MSE_WAug to Student on 163 BUSI images
EFFECT = 8.0  # points, for power


def draw(
    rng: np.random.Generator, *, seeds: int, run_sd: float, icc: float, split_sd: float = 0.0
) -> tuple[pd.DataFrame, float]:
    """Draw differences (points) with the true mean 0 of the methods; return them and the true mean of these networks.

    Args:
        rng: the source of chance.
        seeds: trainings of each split.
        run_sd: standard deviation between trainings (points).
        icc: share of the variance of a difference that an image keeps in every training.
        split_sd: standard deviation between splits beyond that of trainings, which the tests do not model.
    """
    kept = rng.normal(0, TOTAL_SD * np.sqrt(icc), IMAGES)
    parts, truths = [], []
    for split in range(SPLITS):
        tested, of_split = rng.permutation(IMAGES)[:TESTED], rng.normal(0, split_sd)
        for seed in range(seeds):
            truths.append(of_split + rng.normal(0, run_sd))
            points = kept[tested] + truths[-1] + rng.normal(0, TOTAL_SD * np.sqrt(1 - icc), TESTED)
            place = {"split": split, "seed": seed, "test_to_train": 0.20 / 0.64}
            parts.append(pd.DataFrame(place | {"image": tested, "group": tested, "points": points}))
    return pd.concat(parts, ignore_index=True), float(np.mean(truths))


def rates(trials: int, **design: float) -> dict[str, float]:
    """Return shares of trials, by name; NaN where one seed cannot tell."""
    rng = np.random.default_rng(0)
    rejections = []
    for _ in range(trials):
        rows, truth = draw(rng, **design)
        of_networks = stats.compare(rows.assign(points=rows["points"] - truth), test="ttest")
        shifted = rows.assign(points=rows["points"] + EFFECT)
        mean, spread = rows["points"].mean(), stats.components(rows).spread()
        naive = stats.Spread(float(rows["points"].std() / np.sqrt(len(rows))), len(rows) - 1)
        rejections.append(
            {
                "networks": of_networks["p"] < stats.ALPHA,
                "networks, interval": not of_networks["low_points"] <= 0 <= of_networks["high_points"],
                "networks, power": stats.networks_spread(stats.over_seeds(rows)).p(mean - truth + EFFECT) < stats.ALPHA,
                "methods": spread.p(mean) < stats.ALPHA if spread.error > 0 else np.nan,
                "methods, power": spread.p(mean + EFFECT) < stats.ALPHA if spread.error > 0 else np.nan,
                "Nadeau-Bengio": stats.corrected_p(rows) < stats.ALPHA,
                "Nadeau-Bengio, power": stats.corrected_p(shifted) < stats.ALPHA,
                "all scores as if independent": naive.p(mean) < stats.ALPHA,
            }
        )
    return {name: float(rate) for name, rate in pd.DataFrame(rejections).astype(float).mean(skipna=False).items()}


def main() -> None:
    """Print the table as Markdown and write all rates as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("error_rates.json"))
    options = parser.parse_args()
    designs = [
        {"seeds": seeds, "run_sd": run_sd, "icc": icc, "split_sd": split_sd}
        for split_sd, seeds, run_sd, icc in itertools.product((0.0, 3.0), (1, 3), (0.0, 3.0, 6.4), (0.0, 0.3, 0.6))
        if not split_sd or icc == 0.3
    ]
    table = pd.DataFrame([design | rates(options.trials, **design) for design in tqdm(designs)])
    options.out.write_text(json.dumps({"trials": options.trials, "rows": table.to_dict("records")}, indent=1) + "\n")
    sys.stdout.write(f"{markdown(table)}\n")


def markdown(table: pd.DataFrame) -> str:
    """Return the table as docs/statistics.md has it: percent, a dash where one seed cannot tell."""
    shown = table[["seeds", "run_sd", "icc", "split_sd"]].map(lambda value: f"{value:g}")
    for name in table.columns[4:]:
        shown[name] = ["\N{EN DASH}" if pd.isna(rate) else f"{100 * rate:.1f}" for rate in table[name]]
    return str(shown.to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()
