"""``make results``: each table of results/ is made again of its published scores and equals its file."""

from pathlib import Path

import pandas as pd
import pytest

from kdsweep import cli
from kdsweep.evaluation import costs

RESULTS = Path(__file__).parents[2] / "results"
# Not made of scores alone: Table 5 and int8 are measured, groups come from images, tuning's tables need its trials.
MEASURED = {"table5", "quantized", "tuned", "trials", "groups"}
FILES = [
    file
    for file in sorted(RESULTS.glob("*/*.csv"))
    if file.stem not in MEASURED and list(file.parent.glob("*.json.gz"))
]


def recorded_costs(network, **_):
    """What a network cost when the table of sizes was made."""
    table = pd.read_csv(RESULTS / "capacity" / "capacity.csv").set_index("encoder")
    columns = ["parameters", "macs", "cpu_1_thread_median_ms", "cpu_1_thread_p95_ms"]
    return table.loc[[network.name], columns].iloc[0].to_dict()


def test_the_tables_that_can_be_made_again_are_all_there():
    assert [f"{file.parent.name}/{file.stem}" for file in FILES] == [
        "capacity/capacity",
        *("habits/external", "habits/translation"),
        *("methods/seeds", "methods/table4"),
        *(f"study/{which}" for which in ("effects", "seeds", "strata", "table3", "table4")),
        *("teacher_size/settings", "teacher_size/table4"),
        "tuned/table4",
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_table_of_results_is_made_of_its_published_scores(file, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "measure", recorded_costs)
    assert cli.main(["tables", file.stem, "--published", str(file.parent), "--out", str(tmp_path)]) == 0
    made, kept = (pd.read_csv(folder / file.name) for folder in (tmp_path, file.parent))
    pd.testing.assert_frame_equal(made, kept, rtol=1e-14)  # processors differ in the last bit of a logarithm


def test_the_document_states_the_figures_of_the_habits_and_of_other_hospitals():
    text = " ".join((RESULTS.parent / "docs" / "results.md").read_text().split())
    row = pd.read_csv(RESULTS / "habits" / "translation.csv").iloc[0]
    for column in ("mean", "pooled", "chosen"):
        assert f"| {row[f'{column}_dice_percent']:.1f} |" in text
    outside = pd.read_csv(RESULTS / "habits" / "external.csv").set_index("data_set")
    clinics = outside.loc[["busbra36", "breast15"]]
    assert "{:.1f} % on 36 images of BUS-BRA and {:.1f} % on 15".format(*clinics["external_dice_percent"]) in text
    assert "drops of {:.1f} and {:.1f} points".format(*-clinics["drop_points"]) in text
    ends = clinics[["low_points", "high_points"]].to_numpy().ravel()
    assert "intervals {:+.1f} to {:+.1f} and {:+.1f} to {:+.1f};".format(*ends) in text
