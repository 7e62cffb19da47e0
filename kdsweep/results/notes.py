"""Notes below the tables: the runs behind the numbers, how differences are tested, gaps and their reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.config.grid import RESULTS_VERSION
from kdsweep.results.formats import DASH
from kdsweep.results.frame import Scores, variants
from kdsweep.results.mixing import known_values
from kdsweep.results.paper import PROTOCOL
from kdsweep.results.stats import PLACE, RESAMPLES, TEST_NAMES

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

QUICK = "A check of the machinery, not a result."


def departures(runs: pd.DataFrame) -> list[str]:
    """List the Students' options that differ from the paper's, such as ``image_size 128 instead of 224``."""
    params = runs.loc[runs["role"] != "teacher", "params"]
    used = {key: dict.fromkeys(str(each[key]) for each in params if key in each) for key in PROTOCOL}
    return [
        f"{key} {' and '.join(values)} instead of {PROTOCOL[key]}"
        for key, values in used.items()
        if set(values) - {PROTOCOL[key]}
    ]


def provenance(sweep: Sweep) -> list[str]:
    """Return the notes on the runs behind the numbers: profile, data, weights, device, number of images."""
    settings = variants(sweep)
    parts = [Scores.of(part) for part in settings.values()]
    runs = pd.concat([part.runs for part in parts]).drop_duplicates(["fingerprint", *PLACE])
    images = pd.concat([part.images for part in parts])[[*PLACE, "image"]].drop_duplicates()
    finished = runs[runs["status"] == "FINISHED"]
    device = ", ".join(known_values(finished, "device")) or DASH
    profile, data = ("".join(known_values(runs, key)) or DASH for key in ("profile", "data"))
    version = "".join(known_values(runs, "results_version"))
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
    if len(parts) > 1:
        listed = "; ".join(settings)
        notes.append(f"Each of the {len(parts)} settings stands for itself: {listed}. Nothing is averaged over.")
    if version not in ("", str(RESULTS_VERSION)):
        notes.append(f"Computed by an earlier kdsweep, results version {version} (this one: {RESULTS_VERSION}).")
    if profile == "quick":
        notes.append(QUICK)
    elif other := departures(runs):
        notes.append(f"A study of its own, not the paper's protocol: {', '.join(other)}.")
    if "trivial_dice" in finished and finished["trivial_dice"].notna().any():
        everywhere = finished.drop_duplicates(PLACE)["trivial_dice"].mean()
        notes.append(f"For comparison: lesion predicted everywhere scores {100 * everywhere:.2f} on these images.")
    return notes


def _precision(runs: pd.DataFrame) -> str:
    """Return in which precision it was computed, such as ``, precision fp32 (Teacher's forward bf16)``."""
    keys = ("precision", "kd.teacher_precision")
    student, teacher = (sorted({str(params[key]) for params in runs["params"] if key in params}) for key in keys)
    if not student:
        return ""
    of_teacher = f" (Teacher's forward {' and '.join(teacher)})" if teacher and teacher != student else ""
    return f", precision {' and '.join(student)}{of_teacher}"


def weights(runs: pd.DataFrame) -> str:
    """Return the weights that the networks began with, such as ``imagenet``, or by network where they differ."""
    is_teacher = runs["role"] == "teacher"
    parts = {"Student": runs[~is_teacher], "Teacher": runs[is_teacher]}
    known = {network: " and ".join(known_values(part, "weights")) for network, part in parts.items()}
    known = {network: names for network, names in known.items() if names}
    if len(set(known.values())) <= 1:
        return "".join(set(known.values())) or DASH
    return " and ".join(f"{names} ({network})" for network, names in known.items())


def gaps(table: pd.DataFrame, *, by: str = "notation", fewer: str = "runs") -> list[str]:
    """Return a note on the rows that have a gap, named by a column and their setting; none without such rows."""
    missing = table[table["gap"] != ""]
    names = missing[by] + (" with " + missing["settings"] if "settings" in missing else "")
    form = "{} ({})" if by == "notation" else "{}: {}"
    listed = "; ".join(form.format(name, gap) for name, gap in zip(names, missing["gap"], strict=True))
    return [f"Gaps, never averaged over fewer {fewer}: {listed}."] if len(missing) else []


def paper(sweep: Sweep) -> str:
    """Return the note on the source of the paper's numbers."""
    data = "".join(known_values(sweep.runs, "data")) or DASH
    differ = "" if data == "udiat" else f" (its data are UDIAT, not {data}: the figures do not compare directly)"
    return f"Paper: Behboodi, Brooks, Rivaz 2025, Table 4, doi 10.36922/aih.3509{differ}."


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
    ]
    if table[f"{prefix}p_methods"].notna().any():
        notes.append(
            "Methods: would newly trained networks differ too? Images and trainings are both random: variance "
            "components, t-test with Satterthwaite's degrees of freedom."
        )
    else:
        notes.append(
            "Methods: whether newly trained networks would differ too is unknown before several seeds are finished "
            "(seed=0,1,2)."
        )
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
        text += (
            f" and from {methods:.1f} points between methods; these images and any number of seeds would show "
            f"{images:.1f}"
        )
    return [*notes, f"{text} (medians over the rows, before Holm)."]
