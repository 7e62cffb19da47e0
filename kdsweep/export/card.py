"""The model card of an exported network: what it is, from what it comes, how well it does, what it is not for.

After Mitchell et al., Model cards for model reporting, FAT* 2019 (arXiv 1810.03993). All numbers are read from the
run's folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from kdsweep import __version__
from kdsweep.config import identity
from kdsweep.config.networks import UNSET
from kdsweep.core.errors import InputError
from kdsweep.export import predict
from kdsweep.export.model import Model
from kdsweep.models.networks import count_macs, count_parameters
from kdsweep.store import cell_folder

# Of data sets with a publication: whoever passes a model on passes the source on too.
SOURCES = {
    "busi": "BUSI, Al-Dhabyani et al., Data in Brief 28, 2020, doi 10.1016/j.dib.2019.104863",
    "udiat": "UDIAT, Dataset B, Yap et al., IEEE J. Biomed. Health Inform. 22, 2018, doi 10.1109/JBHI.2017.2731873",
    "phantom": "synthetic phantoms of kdsweep, no patients",
}
WEIGHTS = {"imagenet": "ImageNet weights", "none": "random weights"}
SCORES = {"dice": "DSC %", "iou": "IoU %", "nsd": "NSD %", "precision": "precision %", "sensitivity": "sensitivity %"}
LOW = 0.5  # Dice below which the card counts an image


def card(model: Model, content: bytes, *, name: str) -> str:
    """Return the model card of a network in Markdown; content and name are those of its ONNX file.

    Raises:
        InputError: the run's record is damaged.
    """
    record, split, params = cell_folder.read(model.folder), cell_folder.read_split(model.folder), model.params
    group = "teacher" if model.tags["role"] == "teacher" else "student"
    is_trained = group == "teacher" and str(params.get("teacher.trained")) not in UNSET
    weights = str(params.get("teacher.trained" if is_trained else f"{group}.weights"))
    data = str(params.get("data.name"))
    try:
        scores = pd.read_csv(model.folder / "test_scores.csv", dtype={"image": str, "label": str})
    except (OSError, ValueError) as error:
        raise InputError(f"--run {model.folder}: test_scores.csv is damaged") from error
    text = resources.files("kdsweep.export").joinpath("card.md.j2").read_text(encoding="utf-8")
    template = jinja2.Template(text, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return template.render(
        **model.tags | {"fingerprint": model.tags["fingerprint"][:16]},
        parameters=count_parameters(model.network),
        macs=count_macs(model.network, image_size=model.image_size),
        network=_described(params, group),
        teacher=_described(params, "teacher"),
        version=__version__,
        name=name,
        digest=hashlib.sha256(content).hexdigest(),
        size=model.image_size,
        threshold=predict.THRESHOLD,
        class_names=model.class_names,
        source=SOURCES.get(data, data),
        counts=", ".join(f"{len(ids)} images for {part}" for part, ids in split.items()),
        protocol=record.tags["kdsweep.split_protocol"],
        data_digest=record.tags["kdsweep.data"][:16],
        is_trained=is_trained,
        weights=WEIGHTS.get(weights, Path(weights).name),
        params=params,
        best_epoch=record.values.get("best_epoch", float("nan")),
        val_dice=record.values.get("best/val_dice", float("nan")),
        scores=_table(scores, model.class_names),
        dice=scores["dice"],
        limit=LOW,
    )


def _described(params: dict[str, Any], group: str) -> str:
    network = identity.architecture(params, group)
    if network is None:
        return "network"
    return f"U-Net with the encoder {network.encoder}" if network.network is None else f"network {network.name}"


def _table(scores: pd.DataFrame, class_names: Sequence[str]) -> str:
    """Return test scores in Markdown: of all images, then by label where they have one, then of each class."""
    groups = {"all test images": scores}
    if "label" in scores:
        groups |= {str(label): part for label, part in scores.groupby("label")}
    for name in class_names:
        columns = {f"{key}_{name}": key for key in (*SCORES, "hd95_px")}
        of_class = scores.filter(list(columns)).rename(columns=columns)
        groups[f"class {name}"] = of_class.dropna(subset=["dice"])
    rows = []
    for name, part in groups.items():
        row = {"images": name, "n": str(len(part))}
        for key, title in SCORES.items():
            if key in part:
                row[title] = f"{100 * part[key].mean():.2f} ± {100 * part[key].std():.2f}"
        rows.append(row | ({"HD95 (pixels)": f"{part['hd95_px'].mean():.1f}"} if "hd95_px" in part else {}))
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
