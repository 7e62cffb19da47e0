"""Footnotes of the tables: the runs behind the numbers, how they compare, which are missing and why."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.config.grid import RESULTS_VERSION
from kdsweep.results.formats import DASH
from kdsweep.results.frame import known_values, margin_of, placed_runs, scored_images, variants
from kdsweep.results.paper import PROTOCOL
from kdsweep.results.stats import PLACE, RESAMPLES, TEST_NAMES

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep


def _cut_off(runs: pd.DataFrame) -> list[str]:
    """Return a sentence on how many runs used all their epochs; none if early stopping ended them all."""
    if "epochs" not in runs:
        return []
    known = runs[(runs["status"] == "FINISHED") & runs["params"].map(bool)].drop_duplicates("fingerprint")
    most = [float(params.get("train.epochs", "nan")) for params in known["params"]]
    count = int((known["epochs"] >= pd.Series(most, index=known.index, dtype=float)).sum())
    told = (
        f"{count} of {len(known)} runs were ended by train.epochs, not by early stopping: they might have got better."
    )
    return [told] if count else []


def departures(runs: pd.DataFrame) -> list[str]:
    """List the students' options that differ from the paper's, such as ``image_size 128 instead of 224``."""
    known = [params for params, role in zip(runs["params"], runs["role"], strict=True) if role != "teacher"]
    used = {key: dict.fromkeys(str(params[key]) for params in known if key in params) for key in PROTOCOL}
    return [
        f"{key} {' and '.join(own)} instead of {PROTOCOL[key]}"
        for key, own in used.items()
        if set(own) - {PROTOCOL[key]}
    ]


def provenance(sweep: Sweep) -> list[str]:
    """Return the footnotes on the runs behind the numbers: profile, data, weights, device, number of images."""
    parts = variants(sweep)
    runs = pd.concat([placed_runs(part) for part in parts.values()]).drop_duplicates(["fingerprint", *PLACE])
    scored = scored_images(runs=runs, scores=sweep.scores)
    finished = runs[runs["status"] == "FINISHED"]
    device = ", ".join(known_values(finished, "device")) or DASH
    profile, data = ("".join(known_values(runs, key)) or DASH for key in ("profile", "data"))
    version = "".join(known_values(runs, "results_version"))
    images = scored[[*PLACE, "image"]].drop_duplicates()
    notes = [
        f"profile {profile}, data {data}, weights {weights(finished)}, device {device}{_precision(finished)}; "
        f"splits: {runs['split'].nunique()}, seeds: {_seeds(runs)}, "
        f"test images: {len(images)} over all of them, {images['image'].nunique()} different."
    ]
    notes += [f"Splits: {how}." for how in _splits(runs)]
    if len(parts) > 1:
        notes.append(
            f"Each of the {len(parts)} settings stands for itself: {'; '.join(parts)}. Nothing is averaged over."
        )
    if version not in ("", str(RESULTS_VERSION)):
        notes.append(f"Computed by an earlier kdsweep, results version {version} (this one: {RESULTS_VERSION}).")
    if profile == "quick":
        notes.append("A check of the machinery, not a result.")
    elif other := departures(runs):
        notes.append(f"A study of its own, not the paper's protocol: {', '.join(other)}.")
    if "trivial_dice" in finished and finished["trivial_dice"].notna().any():
        everywhere = finished.drop_duplicates(PLACE)["trivial_dice"].mean()
        notes.append(f"For comparison: lesion predicted everywhere scores {100 * everywhere:.2f} on these images.")
    return notes


def _seeds(runs: pd.DataFrame) -> str:
    """Count the seeds and name them: a table may be of some of a sweep's alone."""
    there = sorted(set(runs["seed"]))
    return f"{len(there)} ({', '.join(map(str, there))})"


def _splits(runs: pd.DataFrame) -> list[str]:
    """Return how the images are divided, with the numbers of the splits and the digests of their parts' ids."""
    known = runs[runs["split_protocol"] != ""].drop_duplicates(["split_protocol", "split"]).sort_values("split")
    return [
        f"{protocol}: " + ", ".join(f"{row['split']} (digest {row['split_digest'][:8]})" for _, row in own.iterrows())
        for protocol, own in known.groupby("split_protocol")
    ]


def _precision(runs: pd.DataFrame) -> str:
    """Return in which precision it was computed, such as ``, precision fp32 (Teacher's forward bf16)``."""
    keys = ("precision", "kd.teacher_precision")
    student, teacher = (sorted({str(params[key]) for params in runs["params"] if key in params}) for key in keys)
    if not student:
        return ""
    of_teacher = f" (Teacher's forward {' and '.join(teacher)})" if teacher and teacher != student else ""
    return f", precision {' and '.join(student)}{of_teacher}"


def weights(runs: pd.DataFrame) -> str:
    """Return what the networks began with, such as ``imagenet``, or by network where they differ."""
    is_teacher = runs["role"] == "teacher"
    parts = {
        "Student": known_values(runs[~is_teacher], "weights"),
        "Teacher": known_values(runs[is_teacher], "weights"),
    }
    known = {network: " and ".join(values) for network, values in parts.items() if values}
    if len(set(known.values())) <= 1:
        return "".join(set(known.values())) or DASH
    return " and ".join(f"{values} ({network})" for network, values in known.items())


def of_scores(*, sweep: Sweep, table: pd.DataFrame) -> list[str]:
    """Return the footnotes on the runs, the gaps and the source of the paper's figures."""
    notes = provenance(sweep)
    missing = table[table["gap"] != ""]
    if not missing.empty:
        names = missing["notation"]
        if "settings" in missing:
            names += " with " + missing["settings"]
        listed = "; ".join(f"{name} ({gap})" for name, gap in zip(names, missing["gap"], strict=True))
        notes.append(f"Gaps, never averaged over fewer runs: {listed}.")
    source = "Paper: Behboodi, Brooks, Rivaz 2025, Table 4, doi 10.36922/aih.3509"
    data = "".join(known_values(sweep.runs, "data")) or DASH
    differ = "" if data == "udiat" else f" (its data are UDIAT, not {data}: the figures do not compare directly)"
    return [*notes, f"{source}{differ}."]


def of_comparisons(table: pd.DataFrame, *, test: str, families: str, prefix: str = "") -> list[str]:
    """Return the footnotes of a table of paired differences: what each question's numbers are, and their power.

    Args:
        table: with the columns of ``stats.compare``.
        test: of TESTS.
        families: what is in each family of Holm's correction.
        prefix: of these columns.
    """
    notes = [
        f"Networks: do these networks, as trained, differ on other images? p: {TEST_NAMES[test]}. Seeds are averaged "
        "within each image of a split, and an image that several splits test is one cluster, as are the images of one "
        f"split.group. Interval: 95 % bootstrap over the clusters (BCa, {RESAMPLES} resamples, fixed seed), not "
        "widened for the number of comparisons. Without split.group images count as independent of each other.",
    ]
    if table[f"{prefix}p_methods"].notna().any():
        notes.append(
            "Methods: would networks trained anew differ too? Images and trainings are both random: variance "
            "components, t-test with Satterthwaite's degrees of freedom."
        )
    else:
        notes.append(
            "Methods: whether networks trained anew would differ too is not known before several seeds are finished "
            "(seed=0,1,2)."
        )
    if table[f"{prefix}p_runs"].notna().any():
        notes.append(
            "Nadeau-Bengio: their corrected t-test over the means of the trainings (split and seed); few of them show "
            "only large differences. Not corrected for the number of comparisons."
        )
    return [*notes, f"Holm, within each kind of p: {families}.", *_power(table, prefix)]


def _power(table: pd.DataFrame, prefix: str) -> list[str]:
    """Return a line on the smallest differences that a design can show, medians over the rows; none without rows."""
    columns = ("detectable_points", "methods_detectable_points", "images_detectable_points")
    networks, methods, images = (table[prefix + column].median() for column in columns)
    if pd.isna(networks):
        return []
    text = f"With 80 % power this design shows differences from {networks:.1f} points between these networks"
    if pd.notna(methods):
        text += (
            f" and from {methods:.1f} points between methods; these images and any number of seeds would show "
            f"{images:.1f}"
        )
    return [f"{text} (medians over the rows, before Holm)."]


def of_table4(*, sweep: Sweep, table: pd.DataFrame, test: str) -> list[str]:
    """Return the further footnotes of Table 4: how it compares, and how to run a missing Student baseline."""
    margin = table["margin_points"].iloc[0]
    chosen = "" if margin == margin_of(sweep) else ", chosen for this table and not by the sweep's stats.margin_points"
    notes = [
        *of_comparisons(
            table,
            test=test,
            prefix="student_",
            families="over the KD cells, against Student and, apart from that, against Teacher",
        ),
        "Teacher is the one that the cell learnt from, for Student it is the row Teacher.",
        f"Non-inferior: at most {margin:g} points worse than its Teacher{chosen}; one-sided t-test at 5 % for these "
        "networks, after Holm over the KD cells; inferior: worse by more than that, tested alike; open: neither. "
        "Lower bound: of the one-sided 95 % interval of the difference, percentage points.",
    ]
    if (ratios := table["kd_gradient_ratio"].dropna()).size:
        notes.append(
            "KD to supervised gradient: ratio of the norms at the Student's encoder, weights included, of the first "
            "batch of each epoch that measures it, geometric mean up to the best epoch; "
            f"{ratios.min():.2g} to {ratios.max():.2g} here. Cells of unlike strength compare path and strength at "
            "once; kd.weight=matched begins all at the ratio kd.ratio."
        )
    notes += _cut_off(sweep.runs)
    if sweep.runs["split"].nunique() == 1:
        notes.append("One split: how much the scores spread between splits is not known.")
    student = table.loc[table["notation"] == "Student", "gap"]
    if student.empty or (student != "").any():
        is_asked = "Student" in set(sweep.runs["notation"])
        remedy = "the command of the sweep goes on with it" if is_asked else f"run it with `{student_command(sweep)}`"
        notes.append(f"No p against Student before its baseline is finished: {remedy}.")
    return notes


def student_command(sweep: Sweep) -> str:
    """Return the command that runs the Student baseline on every split and seed of this sweep."""
    command = sweep.commands[-1] if sweep.commands else "python -m kdsweep -m"
    words = [word for word in shlex.split(command) if word.partition("=")[0] not in ("path", "sweep_name")]
    return shlex.join([*words, "path=none", f"sweep_name={sweep.name}"])
