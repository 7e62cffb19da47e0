"""Notes below the tables: the runs behind the numbers, how differences are tested, gaps and their reasons."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.config import identity
from kdsweep.config.grid import RESULTS_VERSION
from kdsweep.config.inputs import RUN
from kdsweep.config.networks import UNSET
from kdsweep.results.formats import DASH
from kdsweep.results.frame import class_names, place_teachers, variants
from kdsweep.results.mixing import distinct_values
from kdsweep.results.paper import PROTOCOL, SOURCE
from kdsweep.results.stats import PLACE, RESAMPLES, TEST_NAMES

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

QUICK = "A check of the machinery, not a result."


def _params(runs: pd.DataFrame, key: str) -> list[str]:
    """Return the sorted distinct values of a param."""
    return sorted({str(params[key]) for params in runs["params"] if key in params})


def departures(runs: pd.DataFrame) -> list[str]:
    """List the Students' options that differ from the paper's, such as ``image_size 128 instead of 224``."""
    students = runs[runs["role"] != "teacher"]
    used = {key: _params(students, key) for key in PROTOCOL}
    teachers = (identity.architecture(params, "teacher") for params in students["params"])
    used["teacher.encoder"] = sorted({teacher.name for teacher in teachers if teacher is not None})
    return [
        f"{key} {' and '.join(values)} instead of {PROTOCOL[key]}"
        for key, values in used.items()
        if set(values) - {PROTOCOL[key]}
    ]


def provenance(sweep: Sweep) -> list[str]:
    """Return the notes on the runs behind the numbers: profile, data, weights, device, number of images."""
    runs = place_teachers(sweep.runs)
    finished = runs[runs["status"] == "FINISHED"]
    images = finished[["fingerprint", *PLACE]].merge(sweep.scores[["fingerprint", "image"]])
    images = images[[*PLACE, "image"]].drop_duplicates()
    profile, data = ("".join(distinct_values(runs, key)) or DASH for key in ("profile", "data"))
    device = ", ".join(distinct_values(finished, "device")) or DASH
    seeds = sorted(set(runs["seed"]))
    notes = [
        f"profile {profile}, data {data}, weights {weights(finished)}, device {device}{_precision(finished)}; "
        f"splits: {runs['split'].nunique()}, seeds: {len(seeds)} ({', '.join(map(str, seeds))}), "
        f"test images: {len(images)} over all of them, {images['image'].nunique()} different."
    ]
    divided = runs[runs["split_protocol"] != ""].drop_duplicates(["split_protocol", "split"]).sort_values("split")
    for protocol, rows in divided.groupby("split_protocol"):
        digests = zip(rows["split"], rows["split_digest"], strict=True)
        notes.append(f"Splits: {protocol}: {', '.join(f'{split} (digest {each[:8]})' for split, each in digests)}.")
    settings = list(variants(sweep))
    if len(settings) > 1:
        notes.append(f"Settings: {'; '.join(settings)}. Each has its rows; nothing is averaged over the settings.")
    version = "".join(distinct_values(runs, "results_version"))
    if version not in ("", str(RESULTS_VERSION)):
        notes.append(f"Computed by an earlier kdsweep, results version {version} (this one: {RESULTS_VERSION}).")
    if profile == "quick":
        notes.append(QUICK)
    elif other := departures(runs):
        notes.append(f"Not the protocol of the paper: {', '.join(other)}.")
    notes += trained_teachers(runs)
    classes = class_names(sweep)
    if classes:
        notes.append(f"DSC: mean over those of the classes {', '.join(classes)} that an image or its prediction shows.")
    if "trivial_dice" in finished and finished["trivial_dice"].notna().any():
        everywhere = finished.drop_duplicates(PLACE)["trivial_dice"].mean()
        predicted = "the best of the classes" if classes else "lesion"
        notes.append(f"For comparison: {predicted} predicted everywhere scores {100 * everywhere:.2f} on these images.")
    return notes


def trained_teachers(runs: pd.DataFrame) -> list[str]:
    """Return a note on Teachers that came trained, and on those that may have been trained on test images."""
    distilled = runs[runs["role"] == "distilled"]
    ensembles = [json.loads(text) for text in _params(distilled, "teacher.ensemble") if text not in UNSET]
    of_members = {str(node.get("trained")) for ensemble in ensembles for node in ensemble.values()}
    files = sorted({*_params(distilled, "teacher.trained"), *of_members} - {*UNSET})
    one_for_all = [file for file in files if "{split}" not in file and not file.startswith(RUN)]  # runs are checked
    leaks = (
        f"; {', '.join(one_for_all)} serves all splits: it may have been trained on test images" if one_for_all else ""
    )
    return [f"Teachers that came trained: {', '.join(files)}{leaks}."] if files else []


def _precision(runs: pd.DataFrame) -> str:
    """Return in which precision it was computed, such as ``, precision fp32 (Teacher's forward bf16)``."""
    student, teacher = (" and ".join(_params(runs, key)) for key in ("precision", "kd.teacher_precision"))
    of_teacher = f" (Teacher's forward {teacher})" if teacher not in ("", student) else ""
    return f", precision {student}{of_teacher}" if student else ""


def weights(runs: pd.DataFrame) -> str:
    """Return the weights that the networks began with, such as ``imagenet``, or by network where they differ."""
    network = (runs["role"] == "teacher").map({False: "Student", True: "Teacher"})
    names = {name: " and ".join(distinct_values(part, "weights")) for name, part in runs.groupby(network)}
    names = {name: values for name, values in names.items() if values}
    if len(set(names.values())) <= 1:
        return "".join(set(names.values())) or DASH
    return " and ".join(f"{values} ({name})" for name, values in names.items())


def gaps(table: pd.DataFrame, *, by: str = "notation", fewer: str = "runs") -> list[str]:
    """Return a note on the rows that have a gap, named by a column and their setting; none without such rows."""
    missing = table[table["gap"] != ""]
    names = missing[by] + (" with " + missing["settings"] if "settings" in missing else "")
    listed = "; ".join(dict.fromkeys(f"{name} ({gap})" for name, gap in zip(names, missing["gap"], strict=True)))
    return [f"Gaps, never averaged over fewer {fewer}: {listed}."] if listed else []


def paper(sweep: Sweep) -> str:
    """Return the note on the source of the paper's numbers."""
    data = "".join(distinct_values(sweep.runs, "data")) or DASH
    differ = "" if data == "udiat" else f" (its data are UDIAT, not {data}: the figures do not compare directly)"
    return f"Paper: {SOURCE}, Table 4{differ}."


def differences(table: pd.DataFrame, *, test: str, families: str, prefix: str = "") -> list[str]:
    """Return the notes of a table of paired differences: both questions, tests, families and power.

    Args:
        table: with the columns of ``stats.compare``.
        test: of TESTS.
        families: the members of each family of Holm's correction.
        prefix: of these columns.
    """
    notes = [
        f"Networks: do these networks, as trained, differ on other images? p: {TEST_NAMES[test]}. Seeds are averaged "
        "within each image of a split, and an image that several splits test is one cluster, as are the images of one "
        f"split.group. Interval: 95 % bootstrap over the clusters (BCa, {RESAMPLES} resamples, fixed seed), not "
        "widened for the number of comparisons. Without split.group images count as independent of each other.",
        "Methods: would newly trained networks differ too? Images and trainings are both random: variance components, "
        "t-test with Satterthwaite's degrees of freedom."
        if table[f"{prefix}p_methods"].notna().any()
        else "Methods: whether newly trained networks would differ too is unknown before several seeds are finished "
        "(seed=0,1,2).",
    ]
    if table[f"{prefix}p_runs"].notna().any():
        notes.append(
            "Nadeau-Bengio: their corrected t-test over the means of the trainings (split and seed); few of them show "
            "only large differences. Not corrected for the number of comparisons."
        )
    notes.append(f"Holm, within each kind of p: {families}.")
    columns = ("detectable_points", "methods_detectable_points", "images_detectable_points")
    networks, methods, images = (table[prefix + column].median() for column in columns)
    if pd.isna(networks):
        return notes
    text = f"Power: with 80 % this design shows differences from {networks:.1f} points between these networks"
    if pd.notna(methods):
        text += f" and from {methods:.1f} points between methods; these images and any number of seeds would show "
        text += f"{images:.1f}"
    return [*notes, f"{text} (medians over the rows, before Holm)."]
