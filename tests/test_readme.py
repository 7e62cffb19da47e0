"""The recipes and figures of README and docs, run and compared as they are written."""

import itertools
import json
import re
import runpy
import shlex
import shutil
import sys
from math import sqrt
from pathlib import Path

import pandas as pd
import pytest
from commands import kdsweep
from small import TEACHER

from kdsweep import cli
from kdsweep.config import composition
from kdsweep.config.schema import Settings
from kdsweep.results import formats, paper, published, stats
from kdsweep.results.tables import effects, table4
from kdsweep.results.tables.seeds import repeatability_points
from kdsweep.store import cell_folder

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RECIPES = "".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("extending", "networks"))


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, small_busi, empty_store):
    """A folder with every file of docs/extending.md and docs/networks.md, and its images under the clinic's names."""
    folder = tmp_path_factory.mktemp("recipes")
    for _, name, body in re.findall(r"```(python|yaml)\n# (\S+)\n(.*?)```", RECIPES, flags=re.DOTALL):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body)
    (folder / "scans").mkdir()
    for mask in small_busi.rglob("*_mask.png"):
        stem = mask.name.removesuffix("_mask.png")
        shutil.copy(mask, folder / "scans" / f"{stem}.mask.png")
        shutil.copy(mask.with_name(f"{stem}.png"), folder / "scans" / f"{stem}.png")
    return folder


COMMANDS = [line for line in RECIPES.splitlines() if line.startswith("python -m kdsweep --config-dir")]


def test_there_is_a_recipe_for_loss_path_method_data_set_and_network():
    assert len(COMMANDS) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "notation"),
    [
        ("loss=mae", "L_MAE_WAug"),
        ("path=AT", "AT_MSE_WAug"),
        ("method=both", "Both_WAug"),
        ("data=clinic", "L_KLD_WAug"),
        ("teacher=two_stage", "H_MSE_WAug"),
    ],
)
def test_a_recipe_works_as_written(recipes, small_busi, word, notation):
    (command,) = [line for line in COMMANDS if word in line]
    small = ["train.epochs=1", "train.batch_size=8", f"store=store-{notation}"]
    small += [] if "teacher=" in command else TEACHER
    small += [] if "data=" in command else ["data=busi", f"data.root={small_busi}"]
    done = kdsweep(*command.removeprefix("python -m kdsweep ").split(), *small, cwd=recipes)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (recipes / f"store-{notation}" / "cells").iterdir()
    assert folder.name.startswith(f"{notation}-split0-seed0-")
    assert 0 <= cell_folder.read_finished(folder)["test/dice"] <= 1


def settings_of(page: str, key: str) -> list[Settings]:
    """The settings of each command of a page in docs/ that has this text, the first of those that it sweeps."""
    lines = re.findall(r"^python -m kdsweep (.*)$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)
    words = [shlex.split(line.partition("  #")[0]) for line in lines if key in line]
    overrides = [[word for word in each if word not in ("-m", "data")] for each in words]
    return [composition.compose([re.sub(r"^(\w+=\w+),[\w,]+$", r"\1", word) for word in each]) for each in overrides]


def test_the_commands_of_several_classes_and_of_trained_teachers_compose() -> None:
    named = settings_of("classes.md", "data.classes")
    assert [settings.logits for settings in named] == [3] * 7
    assert {str(code) for settings in named for code in settings.data.classes.values()} >= {"1", "[0, 255, 0]", "cyst"}
    teachers = [settings.teacher.trained for settings in settings_of("networks.md", "teacher.trained")]
    assert teachers == ["resnet18.pt", "resnet18_{split}.pt", "run:Student/split{split}"]
    assert [list(settings.members) for settings in settings_of("networks.md", "teacher=[")] == [
        ["teacher", "segformer"],
        ["teacher", "resnet18"],
    ]


def test_the_map_names_every_package() -> None:
    shown = re.findall(r"^  (\w+)/ ", README.split("## How it is made")[1], flags=re.MULTILINE)
    packages = [file.parent.name for file in (ROOT / "kdsweep").glob("*/__init__.py")]
    assert sorted(shown) == sorted([*packages, "plugins"])


def test_the_readme_is_one_that_is_read() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200
    assert [line for line in README.splitlines() if len(line) > 100] == []


def test_no_page_is_longer_than_150_lines_and_each_says_for_whom_it_is() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        lines = page.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 150, page.name
        assert lines[2].startswith(("For ", "You ")) or page.name == "index.md", f"{page.name}: for whom is it?"


def test_the_reference_of_keys_is_that_of_the_configuration() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "reference.py"), run_name="reference")["page"]()
    assert made == (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"), "python docs/reference.py"


def test_the_pictures_of_the_readme_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs" / "pictures.py"), run_name="__main__")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["grid.png", "lockstep.png"]


def test_the_five_rows_of_the_readme_are_those_of_the_results() -> None:
    rows = [
        line.split(" | ") for line in README.splitlines() if re.match(r"\| (Teacher|Student|HReg)[^|]* \| \d", line)
    ]
    assert len(rows) == 5
    for name, dice, *others in rows:
        notation = name.removeprefix("| ").partition(",")[0]
        (full,) = [line for line in RESULTS.splitlines() if line.startswith(f"| {notation} | ")]
        for part in (dice, *(others[:2] if "HReg" in notation else ())):
            assert part.strip() in full, f"{notation}: {part}"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "README.md"])
def test_files_that_a_page_names_are_there(name):
    for path in re.findall(r"`((?:[a-z_]+/)+\w+\.py)`", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / "kdsweep" / path).is_file() or (ROOT / path).is_file(), path


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert anchor in {head.lower().replace(" ", "-") for head in heads}, f"{page.name}: {link}"


def test_every_configuration_option_named_in_the_tables_exists():
    for name in ("resnext50", "resnet101", "resnet34", "resnet18"):
        assert name in (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
        assert (ROOT / "conf" / "teacher" / f"{name}.yaml").is_file()


@pytest.mark.parametrize(
    ("word", "option"),
    [
        ("tables", "--sweep"),
        ("figures", "--models"),
        ("status", "--sweep"),
        ("predict", "--run"),
        ("export", "--out"),
        ("report", "--with-images"),
        ("quantize", "--calibrate"),
        ("publish", "--out"),
        ("models", "OVERRIDES"),
    ],
)
def test_the_tools_print_help_that_names_their_options(word, option, capsys):
    """In this process: a start takes seconds, and tests/test_install.py starts the command as its user does."""
    assert cli.main([word, "--help"]) == 0
    assert option in capsys.readouterr().out


def test_the_benchmarks_figures_are_those_of_its_file() -> None:
    figures = json.loads((ROOT / "benchmarks" / "cpu.json").read_text())
    median = figures["median"]
    names = ("torchdistill", "one by one", "lockstep 12", "lockstep bf16", "lockstep all bf16")
    shown = [f"| {median[name]:.1f} | {median['torchdistill'] / median[name]:.1f} |" for name in names]
    shown += [" | ".join(f"{median[f'lockstep {n}'] / n:.2f}" for n in (1, 2, 4, 8, 12))]
    shown += [f"{median['one by one'] / median['lockstep 12']:.1f} times", f"{figures['peak_gib']['lockstep']:.1f} GiB"]
    parts = figures["shares"]["bf16"]
    shown += [f"{(parts['total'] - parts['students']) / parts['students']:.2f} of the Students' own time"]
    shown += [f"{median['command lockstep']:.0f} s instead of {median['command basic']:.0f} s"]
    pair = json.loads((ROOT / "benchmarks" / "study_pair.json").read_text())["median"]
    shown += [
        f"{pair['lockstep 12']:.1f} s in fp32, {pair['lockstep all bf16']:.1f} s all in bf16, and "
        f"{pair['one by one']:.1f} s one by one"
    ]
    text = " ".join((ROOT / "docs" / "lockstep.md").read_text(encoding="utf-8").split())
    assert [figure for figure in shown if figure not in text] == []
    parts = [f"{median['lockstep 12']:.1f} s instead of {median['one by one']:.1f} s one by one"]
    parts += [f"{median['torchdistill'] / median['lockstep 12']:.1f} times as fast as torchdistill"]
    assert [figure for figure in parts if figure not in " ".join(README.split())] == []


def result(name: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "results" / "cpu_study" / f"{name}.csv", dtype={"gap": str}).fillna({"gap": ""})


def results() -> str:
    """The page on the study from scratch; a sentence may run over several lines."""
    return (ROOT / "docs" / "cpu_study.md").read_text(encoding="utf-8")


def test_the_table_of_the_results_is_that_of_their_file() -> None:
    table = result("table4")
    expected = []
    for _, row in table.iterrows():
        splits = " / ".join(f"{row[f'mean_dice_percent_split{split}']:.2f}" for split in range(3))
        difference, p = f"{row['student_difference_points']:+.2f}", f"{row['student_p_runs']:.2f}"
        difference, p = (difference, p) if row["notation"] != "Student" else ("", "")
        dice = f"{row['mean_dice_percent']:.2f} ± {row['std_dice_percent']:.2f}"
        epochs = f"{row['mean_best_epoch']:.0f} of {row['mean_epochs']:.0f}"
        expected.append(" | ".join((f"| {row['notation']}", dice, splits, difference, p, f"{epochs} |")))
    shown = [line for line in results().splitlines() if re.match(r"\| [A-Z]", line)]
    assert shown == expected
    assert len(shown) == 15


def test_the_sentences_of_the_results_are_those_of_their_files() -> None:
    seeds, cells = result("seeds"), result("table4").set_index("notation")
    limit = repeatability_points(seeds)
    expected = [f"less than {limit:.2f} points in 95 % of cases"]
    expected.append(f"{limit / sqrt(6):.2f} points for the mean of six cells")
    for _, row in seeds.iterrows():
        means = " / ".join(f"{row[f'mean_dice_percent_seed{seed}']:.2f}" for seed in range(3))
        expected.append(f"{means} ({row['notation']})")
    epochs = cells["mean_epochs"].round().astype(int)
    of_cells = epochs[list(paper.CELLS)]
    expected.append(f"after {epochs['Student']} epochs on average")
    expected.append(f"after {of_cells.min()} to {of_cells.max()}")
    of_effects = result("effects").set_index("effect")
    for effect in ("HReg - L", "HReg - H", "H - L", "KLD - MSE", "weak - strong"):
        points, p = of_effects.loc[effect, ["difference_points", "p_runs"]]
        expected.append(f"{effect} {points:+.2f} points (p = {p:.2f})".replace("HReg - L ", "HReg - L is "))
    of_settings = result("settings").set_index("notation")
    expected.append(f"{of_settings.loc['all cells', 'difference_points']:+.2f} points over the six cells")
    text = " ".join(results().split())
    assert [line for line in expected if line not in text] == []
    assert cells.loc[list(paper.CELLS), "mean_dice_percent"].idxmin() == "L_KLD_WAug"
    assert (
        seeds["mean_dice_percent_seed0"] > seeds[["mean_dice_percent_seed1", "mean_dice_percent_seed2"]].max(axis=1)
    ).all()
    pairs = list(itertools.combinations(cells.loc[list(paper.CELLS), "mean_dice_percent"], 2))
    assert sum(abs(one - other) <= limit for one, other in pairs) > len(pairs) / 2


def test_p_values_of_the_results_are_those_of_the_means_of_their_splits() -> None:
    cells = result("table4").set_index("notation")
    means = cells[[f"mean_dice_percent_split{split}" for split in range(3)]]

    def p(points: pd.Series) -> float:
        runs = {"split": range(3), "seed": 0, "test_to_train": 0.20 / 0.64, "points": points.to_numpy(dtype=float)}
        return stats.corrected_p(pd.DataFrame(runs))

    others = cells.index.drop("Student")
    p_values = [p(means.loc[name] - means.loc["Student"]) for name in others]
    assert p_values == pytest.approx(cells.loc[others, "student_p_runs"].tolist())
    assert min(p_values) > 0.05, "the page says that no method is shown to be better"
    for effect, expected in result("effects").set_index("effect")["p_runs"].items():
        signs = dict.fromkeys(paper.LEVELS, 1)
        for plus, minus in re.findall(r"(\w+) - (\w+)", str(effect)):
            signs = {
                cell: sign * ((plus in paper.LEVELS[cell]) - (minus in paper.LEVELS[cell]))
                for cell, sign in signs.items()
            }
        sides = [means.loc[[cell for cell, sign in signs.items() if sign == side]].mean() for side in (1, -1)]
        assert p(sides[0] - sides[1]) == pytest.approx(expected)


# ---- the study -----------------------------------------------------------------------------------------------------


def study(name: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "results" / "study" / f"{name}.csv")


def points(row: pd.Series, of: str, kind: str = "") -> str:
    """A difference with its interval, of these networks or (kind="methods_") of methods."""
    mean, low, high = (row[f"{of}{key}_points"] for key in ("difference", f"{kind}low", f"{kind}high"))
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def rows_of(table: pd.DataFrame) -> list[str]:
    """The lines of a page's table of DSC, means of folds, differences to Student and Teacher, and verdicts."""
    several = table["student_p_methods"].notna().any()
    kind, ps = ("methods_", ["student_p_holm", "student_p_methods_holm"]) if several else ("", ["student_p_holm"])
    lines = []
    for _, row in table.iterrows():
        folds = " / ".join(f"{row[f'mean_dice_percent_split{fold}']:.2f}" for fold in range(3))
        others = [points(row, "student_", kind), *(formats.p(row[name]) for name in ps)]
        others += [points(row, "teacher_", kind), str(row["teacher_verdict"])]
        others = [""] * len(others) if row["notation"] in paper.BASELINES else others
        lines.append(" | ".join([f"| {row['notation']}", f"{row['mean_dice_percent']:.2f}", folds, *others]) + " |")
    return lines


def of_seed_0() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Table 4 and the effects of the study with its first seed alone."""
    sweep = published.read([ROOT / "results" / "study" / "seed0.json.gz"])
    return table4.numbers(sweep).set_index("notation"), effects.numbers(sweep).set_index("effect")


def test_the_studys_table_is_that_of_its_file() -> None:
    expected = rows_of(study("table4"))
    assert [line for line in RESULTS.splitlines() if re.match(r"\| [A-Z]\w", line)] == expected
    assert len(expected) == 15


def test_the_studys_sentences_are_those_of_its_files() -> None:
    cells, effects = study("table4").set_index("notation"), study("effects").set_index("effect")
    distilled, teacher, main = cells.loc[list(paper.CELLS)], cells.loc["Teacher"], effects[effects["kind"] == "main"]
    best = cells.loc["HReg_MSE"]
    limit = repeatability_points(study("seeds"))
    seeds = study("seeds").set_index("notation")
    by_seed, gain = seeds.loc["H_MSE_WAug"], seeds.loc["HReg_MSE"]
    gains = [gain[f"mean_dice_percent_seed{n}"] - seeds.loc["Student", f"mean_dice_percent_seed{n}"] for n in range(3)]
    folds = [best[name := f"mean_dice_percent_split{n}"] - cells.loc["Student", name] for n in range(3)]
    detectable = distilled[["student_methods_detectable_points", "student_images_detectable_points"]].median()
    expected = [
        points(teacher, "student_", "methods_").lstrip("+").replace(" (", " points (").rstrip(")"),
        f"p = {formats.p(teacher['student_p_methods'])}), as a method",
        f"{best['student_difference_points']:+.2f} points (p = {formats.p(best['student_p_methods_holm'])} after Holm)",
        f"with single seeds {min(gains):+.2f} to {max(gains):+.2f}",
        f"on single folds {min(folds):+.2f} to {max(folds):+.2f}",
        f"Nadeau and Bengio's p, which only large differences pass, is {best['student_p_runs']:.2f}",
        *(f"{effect} {points(effects.loc[effect], '', 'methods_')}" for effect in ("HReg - L", "HReg - H")),
        *(f"{effect} {effects.loc[effect, 'difference_points']:+.2f}" for effect in ("H - L", "KLD - MSE")),
        f"strong than weak (p = {formats.p(effects.loc['weak - strong', 'p_holm'])})",
        f"weak - strong {points(effects.loc['weak - strong'], '', 'methods_')}",
        "{:.2f} with seed 0, {:.2f} with seed 1 and {:.2f} with seed 2".format(
            *(by_seed[f"mean_dice_percent_seed{seed}"] for seed in range(3))
        ),
        f"differ by less than {limit:.2f} points in 95 % of cases",
        f"these seeds show {detectable.iloc[0]:.1f} points, any number of seeds {detectable.iloc[1]:.1f})",
    ]
    sizes = study("strata").query("kind == 'lesion size'")
    shown = sizes[sizes["notation"].isin(paper.CELLS) & (sizes["p_holm"] < 0.05)]
    assert shown[["stratum", "notation"]].to_numpy().tolist() == [["small (44 to 560 px)", "HReg_MSE"]]
    expected.append(
        f"{shown['difference_points'].item():+.2f} points there (p = {formats.p(shown['p_methods_holm'].item())} after"
    )
    text = " ".join(RESULTS.split())
    assert [line for line in expected if line not in text] == []
    assert distilled.index[distilled["student_p_methods_holm"] < 0.05].tolist() == ["HReg_MSE"]
    assert (distilled["teacher_verdict"] == "inferior").sum() == 5
    assert not (distilled["teacher_verdict"] == "non-inferior").any()
    assert not (main["p_methods_holm"] < 0.05).any()
    assert main.index[main["p_holm"] < 0.0001].tolist() == ["HReg - L", "HReg - H"]
    assert main.index[main["p_holm"] < 0.05].tolist() == ["HReg - L", "HReg - H", "weak - strong"]
    assert (distilled["student_difference_points"].abs() < limit).all()


def test_what_one_seed_had_shown_is_that_of_its_scores() -> None:
    cells, effects_of = of_seed_0()
    better = cells.index[cells["student_p_holm"] < 0.05]
    assert better.tolist() == ["H_MSE_WAug", "HReg_MSE", "HReg_KLD"]
    assert effects_of[effects_of["p_holm"] < 0.0001].index.tolist() == ["(HReg - H) x (weak - strong)"]


def test_the_strengths_of_the_studys_cells_are_those_of_their_file() -> None:
    page = " ".join((ROOT / "docs" / "study.md").read_text(encoding="utf-8").split())
    ratios = study("table4").set_index("notation")["kd_gradient_ratio"]
    least, most = ratios.idxmin(), ratios.idxmax()
    assert f"{ratios[least]:.2f} ({least}) to {ratios[most]:.1f} ({most})" in page


def test_the_trials_of_the_recipe_are_those_of_their_file() -> None:
    page = " ".join((ROOT / "docs" / "study.md").read_text(encoding="utf-8").split())
    trials = pd.read_csv(ROOT / "results" / "recipe" / "trials.csv")
    losses = {"bce": "BCE", "bce_dice": "BCE + Dice"}

    def words(row: pd.Series, of: str) -> str:
        rate = f"{row[f'{of}.lr']:.1e}".replace("e-0", "e-")
        return f"{losses[row[f'{of}.supervised']]}, {row[f'{of}.schedule']}, {rate}"

    ended = trials[trials["state"] == "COMPLETE"].sort_values("val_dice_percent", ascending=False)
    best, second = (row for _, row in ended[ended["notation"] == "Student"].iterrows())
    (of_teacher,) = (row for _, row in ended[ended["notation"] == "Teacher_WAug"].iterrows())
    next_best = f"{words(second, 'train')}: {second['val_dice_percent']:.1f}"
    assert f"| Student | {words(best, 'train')} | {best['val_dice_percent']:.1f} | {next_best} |" in page
    assert f"| {words(of_teacher, 'teacher')}: {of_teacher['val_dice_percent']:.1f} |" in page
    far = trials[trials["epochs"] > 7]
    longest = far[far["state"] == "PRUNED"].sort_values("val_dice_percent").iloc[-1]
    sentence = f"pruned after {longest['epochs']} epochs ({words(longest, 'teacher')}), had reached"
    assert f"{sentence} {longest['val_dice_percent']:.1f}" in page
    losses_of = far["train.supervised"].fillna(far["teacher.supervised"])
    assert (losses_of != "bce_dice").sum() == 1  # "in all but one of the trials that got far"


def test_the_table_of_the_tuned_cells_is_that_of_its_files() -> None:
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    tuned, cells = (pd.read_csv(ROOT / "results" / "tuned" / f"{name}.csv") for name in ("tuned", "table4"))
    lines = []
    for _, row in tuned[tuned["trials"].notna()].iterrows():
        means = [f"{row[f'{side}_dice_percent']:.2f}" for side in ("configured", "chosen")]
        changed = "0" if pd.isna(row["p"]) else points(row, "", "methods_")
        cell = cells[cells["notation"] == row["notation"]].iloc[0]
        other = [points(cell, "student_", "methods_"), formats.p(cell["student_p_methods_holm"])]
        other = ["", ""] if row["notation"] == "Student" else other
        lines.append(" | ".join([f"| {row['notation']}", *means, changed, *other]) + " |")
    assert [line for line in lines if line not in page.splitlines()] == []
    best = cells.set_index("notation").loc["HReg_MSE"]
    sentence = points(best, "student_", "methods_").replace(" (", " points (").rstrip(")")
    assert f"{sentence}, p = {formats.p(best['student_p_methods_holm'])} after Holm over three cells)" in RESULTS
    sentence = (
        f"shown of these networks (p = {formats.p(best['student_p_holm'])} after Holm), as a method only before Holm"
    )
    assert f"{sentence} (p = {formats.p(best['student_p_methods'])})" in " ".join(page.split())
    trials = pd.read_csv(ROOT / "results" / "tuned" / "trials.csv")
    chosen = trials[trials["is_chosen"]].set_index(["notation", "split"])
    assert (chosen.loc["HReg_MSE", "number"] == 0).all()  # "stays as configured on all folds"
    assert [f"{rate:.1e}" for rate in chosen.loc["Student", "train.lr"]] == ["2.1e-03", "2.5e-03", "2.1e-03"]


def test_the_strength_of_the_views_is_that_of_its_file() -> None:
    page = " ".join((ROOT / "docs" / "study.md").read_text(encoding="utf-8").split())
    row = pd.read_csv(ROOT / "results" / "recipe" / "views.csv").iloc[0]
    chosen = dict(re.findall(r"views\.(\w+)=([\d.]+)", row["chosen"]))
    sentence = (
        f"(probability {chosen['probability']}, rotation up to {chosen['rotate_deg']} degrees, scale {chosen['scale']})"
    )
    assert f"{sentence} {row['val_dice_percent']:.2f} %" in page
    sentence = f"{row['chosen_dice_percent']:.2f} % and as configured {row['configured_dice_percent']:.2f} %"
    assert f"on the test images {sentence}, a difference of {points(row, '')}".replace(" (", " points (") in page


def test_the_table_of_int8_is_that_of_its_file() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    for row in study("quantized").to_dict("records"):
        differences = [
            f"{row[f'{of}_difference_points']:+.2f} ({row[f'{of}_low_points']:+.2f} to {row[f'{of}_high_points']:+.2f})"
            if row[f"{of}_difference_points"] == row[f"{of}_difference_points"]
            else ""
            for of in ("int8", "student_fp32", "student_int8")
        ]
        dice = [f"{row[f'{of}_dice_percent']:.2f}" for of in ("fp32", "int8")]
        cost = [f"{row[f'fp32_{unit}']:.2f} to {row[f'int8_{unit}']:.2f}" for unit in ("mb", "ms")]
        assert re.sub(" +", " ", f"| {' | '.join([row['notation'], *dice, *differences, *cost])} |") in page


def test_the_table_of_sizes_is_that_of_its_file() -> None:
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    table = pd.read_csv(ROOT / "results" / "capacity" / "capacity.csv")
    for _, of_size in table.groupby("parameters"):
        plain, distilled = (of_size[of_size["notation"] == name].iloc[0] for name in ("Student", "HReg_MSE_WAug"))
        mean, low, high = (distilled[f"{key}_points"] for key in ("difference", "low", "high"))
        columns = [
            f"{plain['parameters']:,}",
            f"{plain['macs'] / 1e6:.0f}",
            f"{plain['cpu_1_thread_median_ms']:.2f}",
            *(f"{row['mean_dice_percent']:.2f}" for row in (plain, distilled)),
            f"{mean:+.2f} ({low:+.2f} to {high:+.2f})",
            formats.p(distilled["p_holm"]),
        ]
        assert f"| {' | '.join(columns)} |" in page
    assert table["parameters"].nunique() == 5


def test_the_sizes_of_the_teacher_are_those_of_their_files() -> None:
    page = " ".join((ROOT / "docs" / "study.md").read_text(encoding="utf-8").split())
    folder = ROOT / "results" / "teacher_size"
    table = table4.numbers(published.read([folder / "scores.json.gz"]))
    table = table.set_index(["settings", "notation"])["mean_dice_percent"]
    for name, millions in (("efficientnet_lite0", "5.20"), ("efficientnet_lite2", "6.70")):
        teacher, cell = (table[f"teacher={name}", model] for model in ("Teacher_WAug", "HReg_MSE_WAug"))
        assert f"| {name} | {millions} | {teacher:.2f} | {cell:.2f} |" in page
    row = pd.read_csv(folder / "settings.csv").iloc[0]
    mean, low, high = (row[f"{key}_points"] for key in ("difference", "low", "high"))
    assert f"{mean:+.2f} points ({low:+.2f} to {high:+.2f}, p = {formats.p(row['p_holm'])})" in page
    assert f"corrected p is {row['p_runs']:.2f}" in page


def test_the_scores_of_sizes_are_those_published() -> None:
    made = table4.numbers(published.read([ROOT / "results" / "capacity" / "scores.json.gz"]))
    key = ["settings", "notation"]
    table = pd.read_csv(ROOT / "results" / "capacity" / "capacity.csv").set_index(key).sort_index()
    made = made[~made["notation"].str.startswith("Teacher")].set_index(key).sort_index()
    for name in ("mean_dice_percent", "student_difference_points", "student_low_points", "student_p_holm"):
        pd.testing.assert_series_equal(made[name], table[name.removeprefix("student_")], check_names=False)


def of_methods(name: str) -> pd.DataFrame:
    table = pd.read_csv(ROOT / "results" / "methods" / f"{name}.csv")
    return table.set_index(table["notation"].str.removesuffix("_WAug")).dropna(subset="mean_dice_percent")


def test_the_table_of_the_methods_is_that_of_its_file() -> None:
    lines = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    table, seeds = of_methods("table4"), of_methods("seeds")
    expected = rows_of(table)
    assert [line for line in lines if line in expected] == expected
    assert len(expected) == 17
    distilled = table.drop(["Teacher", "Student"])
    best = distilled.loc[distilled["student_difference_points"].idxmax()]
    ratios = distilled["kd_gradient_ratio"]
    p_methods, p_networks = (formats.p(best[f"student_p_{kind}"]) for kind in ("methods_holm", "holm"))
    sentence = (
        f"{best.name} comes nearest, {best['student_difference_points']:+.2f} points, p = {p_methods} as a method"
    )
    assert f"({sentence})" in " ".join(RESULTS.split())
    sentences = [
        f"{best.name} {points(best, 'student_', 'methods_')}: as a method p = {p_methods} after Holm, "
        f"{formats.p(best['student_p_methods'])} before, of these networks {p_networks}.",
        f"{ratios.min():.2f} ({ratios.idxmin()}) to {ratios.max():.0f} ({ratios.idxmax()})",
        f"corrected p against the Student is {distilled['student_p_runs'].min():.2f} or more",
        *(
            f"{name} {' / '.join(f'{dice:.2f}' for dice in seeds.loc[name].filter(regex='seed[0-9]'))}"
            for name in ("FitNet", "PKD", "SKD", "Student")
        ),
    ]
    assert [line for line in sentences if line not in " ".join(" ".join(lines).split())] == []
    assert not (distilled[["student_p_holm", "student_p_methods_holm"]] < 0.05).any(axis=None)
    assert not (distilled["teacher_verdict"] == "non-inferior").any()
    assert distilled.index[distilled["teacher_verdict"] == "inferior"].tolist() == ["AT", "KD", "SPKD"]
    same = table.loc["KD-T1"], study("table4").set_index("notation").loc["L_KLD_WAug"]
    assert same[0]["mean_dice_percent"] == same[1]["mean_dice_percent"], "the same method by two names"


def test_what_one_seed_had_shown_of_the_methods_is_that_of_its_scores() -> None:
    alone = table4.numbers(published.read([ROOT / "results" / "methods" / "seed0.json.gz"]))
    better = alone[alone["student_p_holm"] < 0.05].sort_values("student_difference_points", ascending=False)
    named = [
        f"{row['notation'].removesuffix('_WAug')} {row['student_difference_points']:+.2f}"
        for _, row in better.iterrows()
    ]
    page = " ".join((ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split())
    assert f"{', '.join(named[:-1])} and {named[-1]} points" in page


def test_the_table_of_error_rates_is_that_of_its_file() -> None:
    simulated = json.loads((ROOT / "benchmarks" / "error_rates.json").read_text())
    rows = pd.DataFrame(simulated["rows"])
    text = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    for row in rows.to_dict("records"):
        numbers = ["\N{EN DASH}" if pd.isna(rate) else f"{100 * rate:.1f}" for rate in list(row.values())[4:]]
        cells = [f"{value:g}" for value in list(row.values())[:4]] + numbers
        assert re.search(" *\\| *".join(map(re.escape, cells)), text), cells
    modelled = rows[rows["split_sd"] == 0]
    assert modelled["networks"].between(0.03, 0.07).all()
    of_methods = modelled.loc[modelled["seeds"] == 3, "methods"]
    noise_alone = (modelled["run_sd"] == 0) & (
        modelled["icc"] == 0
    )  # the estimate of the trainings' variance is cut at 0
    assert of_methods[~noise_alone].between(0.03, 0.06).all()
    assert of_methods[noise_alone].between(0.02, 0.03).all()
    assert f"errs in {100 * of_methods.min():.1f} to {100 * of_methods.max():.1f} %" in text
    assert f"grows to {100 * rows['methods'].max():.0f} %" in text


def test_the_strengths_are_those_of_their_file() -> None:
    ratios = pd.read_csv(ROOT / "results" / "strength" / "table4.csv").set_index("notation")["kd_gradient_ratio"]
    least, most = ratios.idxmin(), ratios.idxmax()
    assert f"{ratios[least]:.2f} ({least}) to {ratios[most]:.1f} ({most})" in " ".join(results().split())
    page = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    for cell in ratios.index[~ratios.index.str.endswith("_WAug")]:
        assert f"| {cell} | {ratios[cell]:.2f} | {ratios[f'{cell}_WAug']:.2f} |" in page


def test_what_duplicates_are_worth_is_in_its_file() -> None:
    flattery = json.loads((ROOT / "results" / "flattery" / "flattery.json").read_text())
    page = " ".join((ROOT / "docs" / "data.md").read_text(encoding="utf-8").split())
    everything, half = flattery["all"], flattery["all"]["half_width_points"]
    difference = everything["difference_points"]
    expected = [
        f"{difference:+.2f} points higher ({everything['by_image']:.2f} instead of {everything['by_group']:.2f}",
        f"{difference - half:.2f} to {difference + half:.2f}",
        f"{flattery['with a near-duplicate']['difference_points']:+.2f} on the 261 images",
        f"{flattery['without']['difference_points']:+.2f} on the others",
        "{:+.2f}, {:+.2f} and {:+.2f}".format(*flattery["by seed"].values()),
    ]
    assert [line for line in expected if line not in page] == []
