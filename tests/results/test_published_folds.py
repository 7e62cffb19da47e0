"""The folds of the study in results/study are those that its runs recorded, and keep near-duplicates on one side."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from kdsweep.config import composition, grid, inputs
from kdsweep.results import published

STUDY = Path(__file__).parents[2] / "results" / "study"
REAL = os.environ.get("KDSWEEP_REAL_DATA")


@pytest.fixture(scope="module")
def folds():
    return json.loads((STUDY / "splits.json").read_text())


def test_they_are_the_splits_of_its_runs_and_of_its_scores(folds):
    sweep = published.read([STUDY / "seed0.json.gz"])
    groups = pd.read_csv(STUDY / "groups.csv").set_index("id")["group"]
    scored = sweep.scores.drop_duplicates("image").set_index("image")["group"]
    assert scored.to_dict() == groups.to_dict()
    for split, fold in enumerate(folds):
        runs = sweep.runs[sweep.runs["split"] == split]
        parts = {"train": fold["train"], "validation": fold["val"], "test": fold["test"]}
        assert set(runs["split_digest"]) == {grid.digest(parts)}
        tested = sweep.scores[sweep.scores["fingerprint"].isin(runs["fingerprint"])]
        assert set(tested["image"]) == set(fold["test"])
        sides = [set(groups[ids]) for ids in parts.values()]
        assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


@pytest.mark.skipif(REAL is None, reason="KDSWEEP_REAL_DATA is not set")
def test_split_file_draws_them_again(folds):
    data = ["data=busi", f"data.root={REAL}/busi573", "split=file", f"split.file={STUDY / 'splits.json'}"]
    for number, fold in enumerate(folds):
        ids = inputs.split_ids(composition.compose(["profile=study", *data, f"split.fold={number}"]))
        assert list(ids.values()) == list(fold.values())
