"""Predict masks of a user's images with the network of a finished run.

Usage: ``python -m kdsweep predict --run RUN --images FOLDER --out FOLDER [--store DIR] [--device cpu]
[--overwrite]``. RUN is a cell's name as in the tables (``HReg_KLD_WAug/split0``), its folder, or the id of its MLflow
run.
"""

from __future__ import annotations

import argparse
import errno
import glob
import io
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from kdsweep.config.grid import run_folder
from kdsweep.core.device import Compute, find_device, is_device_error, placed, usable_precision
from kdsweep.core.errors import InputError, command
from kdsweep.core.files import write_bytes, write_text
from kdsweep.core.options import add_store
from kdsweep.core.progress import track
from kdsweep.data import folders
from kdsweep.data.images import resize_image
from kdsweep.data.pixels import FileError, naming, read_gray_or_color
from kdsweep.data.views import normalize
from kdsweep.models import unet
from kdsweep.models.unet import UNet
from kdsweep.results.stats import PLACE
from kdsweep.store import cell_folder, checkpoint

BEST = "best"  # the name of a sweep's best distilled student
THRESHOLD = 0.5  # a pixel is lesion if its probability is above: as in testing
TAGS = ("notation", "split", "seed", "role", "fingerprint")
CONTOUR = (0xFF, 0x17, 0x44)  # RGB; the red of predictions in figures
TABLE = "predictions.csv"
COLUMNS = ["image", "width", "height", "area_px", "area_percent", "mean_probability", "max_probability"]


@dataclass(frozen=True)
class Model:
    """The network of a finished run, and what its folder records about it.

    Attributes:
        network: frozen, with the weights that were tested, on the CPU.
        folder: of the run.
        tags: of the run, by TAGS.
        encoder: its name.
        image_size: S, side in pixels of the images that it takes.
        precision: ``fp32``, ``tf32`` or ``bf16``, as in its test; on a CPU fp32 stands for tf32.
    """

    network: UNet
    folder: Path
    tags: dict[str, str]
    encoder: str
    image_size: int
    precision: str

    @property
    def title(self) -> str:
        """Return the name for messages, such as ``Student split 0 seed 0 (mobilenetv3_small_trimmed, 224 x 224)``."""
        notation, split, seed = (self.tags[key] for key in TAGS[:3])
        return f"{notation} split {split} seed {seed} ({self.encoder}, {self.image_size} x {self.image_size})"


# ---- the run -------------------------------------------------------------------------------------------------------


def find_folder(run: str, *, store: Path, uri: str | None) -> Path:
    """Return the folder of a run.

    Args:
        run: the folder itself, ``NOTATION/splitK`` or ``NOTATION/splitK/seedS``, the id of an MLflow run, ``best``
            or ``best/SWEEP`` (see ``best_folder``).
        store: folder of the runs.
        uri: of the MLflow server or database, or None for the file in the store.

    Raises:
        InputError: there is no such run, or several.
    """
    for folder in (Path(run), store / "cells" / run, store / "teachers" / run):
        if (folder / cell_folder.CELL).is_file():
            return folder
    if run.partition("/")[0] == BEST:
        return best_folder(store=store, uri=uri, name=run.partition("/")[2] or None)
    if re.fullmatch(r"[0-9a-f]{32}", run):
        return _folder_of_id(run, store=store, uri=uri)
    if named := re.fullmatch(r"([^/]+)/split(\d+)(?:/seed(\d+))?", run):
        return _folder_of_name(
            run, store=store, stem=f"{glob.escape(named[1])}-split{named[2]}-seed{named[3] or '*'}-*"
        )
    raise InputError(
        f"--run {run}: no such folder with a {cell_folder.CELL}; give a run's folder, its name such as "
        f"HReg_KLD_WAug/split0, the id of its MLflow run, or {BEST}"
    )


def best_folder(*, store: Path, uri: str | None, name: str | None) -> Path:
    """Return the folder of a sweep's best distilled student, judged by validation Dice alone.

    First the cell with the highest mean over splits and seeds, then its best run. The sweep is by default the one last
    asked for.

    Raises:
        InputError: there is no sweep, or no distilled student of it is finished.
    """
    from kdsweep.results import costs, dsc  # with mlflow: seconds that names and folders need not wait for
    from kdsweep.tracking import reader

    whole = reader.read_sweep(store=store, uri=uri, name=name)
    sweep, scores = dsc.best_variant(whole, dsc.table4(whole))
    ranked = costs.whole_cells(scores)
    if not ranked:
        raise InputError(f"--run {BEST}: no distilled student of sweep {sweep.name} is finished on all its splits")
    runs = sweep.runs[sweep.runs["notation"] == ranked[0]].sort_values(["val_dice", *PLACE], ascending=False)
    return run_folder(store, runs.iloc[0].to_dict())


def _folder_of_name(run: str, *, store: Path, stem: str) -> Path:
    begun = [folder.parent for folder in sorted(store.glob(f"*/{stem}/{cell_folder.CELL}"))]
    finished = [folder for folder in begun if (folder / cell_folder.FINISHED).is_file()]
    if not begun:
        raise InputError(f"--run {run}: not in --store {store}")
    if len(finished) > 1:
        folders = ", ".join(map(str, finished))
        raise InputError(
            f"--run {run}: {len(finished)} finished runs have this name; give the folder of one: {folders}"
        )
    return (finished or begun)[0]


def _folder_of_id(run: str, *, store: Path, uri: str | None) -> Path:
    from kdsweep.tracking import mirror  # loads mlflow: seconds that names and folders need not wait for

    if uri is None and not (store / "mlflow.db").is_file():
        raise InputError(f"--run {run}: --store {store} has no mlflow.db; name its folder or --tracking-uri")
    where = f"--store {store}" if uri is None else "--tracking-uri"  # which may hold a password
    try:
        tags = mirror.MlflowClient(tracking_uri=mirror.store_uri(store, uri)).get_run(run).data.tags
    except Exception as error:  # of many kinds: server, network, database
        why = " ".join(str(error).split())[:300]
        raise InputError(f"--run {run}: MLflow does not give it from {where}: {why}") from error
    if not {f"kdsweep.{key}" for key in TAGS} <= tags.keys():
        raise InputError(f"--run {run}: the MLflow run is not one of a Student, Teacher or distilled cell")
    folder = run_folder(store, {key: tags[f"kdsweep.{key}"] for key in TAGS})
    if not (folder / cell_folder.CELL).is_file():
        raise InputError(f"--run {run}: its folder {folder} is not there; name the store that has it with --store")
    return folder


def load_model(folder: Path) -> Model:
    """Load the network of a finished run, after checking its weights against their checksum.

    Raises:
        InputError: the run is not finished, or a file of it is damaged.
    """
    if not (folder / cell_folder.FINISHED).is_file():
        raise InputError(f"--run {folder}: not finished, it has no tested weights yet; the sweep's command goes on")
    try:
        about = json.loads((folder / cell_folder.CELL).read_text(encoding="utf-8"))
        params, tags = about["params"], {key: str(about["tags"][f"kdsweep.{key}"]) for key in TAGS}
        node = "teacher" if tags["role"] == "teacher" else "student"
        encoder, channels = str(params[f"{node}.encoder"]), list(params[f"{node}.decoder_channels"])
        image_size, precision = int(params["image_size"]), str(params["precision"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--run {folder}: {cell_folder.CELL} is damaged ({type(error).__name__})") from error
    file = folder / f"{node}.safetensors"
    if not cell_folder.check_file(folder, file.name):
        raise InputError(f"{file}: missing or damaged, its checksum differs; the sweep's command computes it again")
    network = unet.unet(encoder=encoder, decoder_channels=channels, weights="none", seed=0)
    try:
        checkpoint.load_network(file, network)
    except Exception as error:  # torch and safetensors have errors of their own
        raise InputError(f"{file}: belongs to another network than {encoder} as this version builds it") from error
    return Model(unet.freeze(network), folder, tags, encoder, image_size, precision)


# ---- images --------------------------------------------------------------------------------------------------------


def list_images(folder: Path) -> tuple[dict[str, Path], int]:
    """Return a folder's image files by the name that their results get, and the number of its other entries.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"--images {folder}: no such folder")
    entries = sorted(folder.iterdir())
    files = [f for f in entries if folders.is_image(f) and not f.name.startswith(".") and f.is_file()]
    stems = {file.stem for file in files}
    files = [file for file in files if re.sub(r"_mask(_\d+)?$", "", file.stem) not in stems - {file.stem}]  # BUSI's
    if not files:
        raise InputError(f"--images {folder}: no images found; expected files ending in {folders.COMMON}")
    taken = Counter(name.lower() for file in files for name in (file.stem, file.name))  # a.png, a.jpg: their names
    named = {file.stem if taken[file.stem.lower()] == 1 else file.name: file for file in files}
    return named, len(entries) - len(files)


def prepare(image: np.ndarray, *, image_size: int) -> torch.Tensor:
    """Turn (H, W, 3) uint8 into the network's input (1, 3, S, S) float32: the whole image, resized and normalized."""
    return normalize(torch.from_numpy(resize_image(image, image_size))[None])


def probabilities(network: UNet, image: np.ndarray, *, image_size: int, compute: Compute) -> np.ndarray:
    """Return the probability of lesion (H, W) float32 at each pixel of an image (H, W, 3) uint8, at its size."""
    views = prepare(image, image_size=image_size).to(compute.device)
    with torch.no_grad(), compute.autocast():
        logits = network(views).logits
    small = logits[0, 0].float().sigmoid().cpu().numpy()
    height, width = image.shape[:2]
    large: np.ndarray = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    return large


def measure(name: str, probability: np.ndarray) -> list[Any]:
    """Return COLUMNS of one image's probabilities (H, W): area above the threshold, mean there, maximum."""
    mask = probability > THRESHOLD
    height, width = mask.shape
    area = int(mask.sum())
    mean = f"{probability[mask].mean(dtype=np.float64):.6f}" if area else ""
    return [name, width, height, area, f"{100 * area / mask.size:.4f}", mean, f"{probability.max():.6f}"]


def draw(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the contour of a mask (H, W) bool on a copy of the image (H, W, 3) uint8."""
    lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    drawn = np.ascontiguousarray(image).copy()
    cv2.drawContours(drawn, lines, -1, CONTOUR, thickness=max(1, round(min(mask.shape) / 250)))
    return drawn


def _write_png(file: Path, pixels: np.ndarray) -> None:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    write_bytes(file, stream.getvalue())


def predict_file(model: Model, file: Path, *, out: Path, name: str, compute: Compute) -> list[Any]:
    """Write mask and overlay of an image, as it is displayed; return its row of the table.

    Raises:
        FileError: the image cannot be read, or its name is too long or not UTF-8.
    """
    with naming(file):
        file.name.encode()  # the table is in UTF-8
        image = read_gray_or_color(file)
        probability = probabilities(model.network, image, image_size=model.image_size, compute=compute)
        mask = probability > THRESHOLD
        overlay = draw(image, mask)
    try:
        _write_png(out / f"{name}_overlay.png", overlay)  # the longer name first
        _write_png(out / f"{name}_mask.png", mask * np.uint8(255))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise FileError(f"{file}: its name is too long for {name}_overlay.png in {out}; shorten it") from error
    return measure(file.name, probability)


def predict_folder(model: Model, images: dict[str, Path], *, out: Path, compute: Compute) -> int:
    """Write mask, overlay and a table row for each image; return the number of images that failed."""
    placed(model.network, compute)
    rows: list[list[Any]] = []
    try:
        for name, file in track(images.items(), what="predicting", unit="image", total=len(images)):
            try:
                rows.append(predict_file(model, file, out=out, name=name, compute=compute))
            except FileError as error:
                if error.__cause__ and is_device_error(error.__cause__):
                    raise error.__cause__ from None  # no other image can be predicted either
                tqdm.write(f"skipped: {error}", file=sys.stderr)
    finally:  # also after Ctrl-C
        write_text(out / TABLE, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))
    return len(images) - len(rows)


# ---- the command ---------------------------------------------------------------------------------------------------


def check_out(out: Path, *, images: Path, overwrite: bool) -> None:
    """Raise InputError unless results may be written to this folder, which need not exist yet."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder")
    if out.resolve() == images.resolve():
        raise InputError(f"--out {out}: is the folder of the images; give another one")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out {out}: not empty; give another folder, or --overwrite to replace files of equal name")


def make(model: Model, *, images: Path, out: Path, device: str) -> int:
    """Predict a folder of images and report it in two lines; return the number of images that failed."""
    files, others = list_images(images)
    on = find_device(device)
    compute = Compute(device=on, precision=usable_precision(model.precision, on))
    sys.stdout.write(f"{model.title}: {len(files)} images of {images} on {compute.device}\n")
    sys.stdout.flush()
    try:
        failed = predict_folder(model, files, out=out, compute=compute)
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from error
    done = f"wrote masks and overlays of {len(files) - failed} of {len(files)} images and {TABLE} to {out}"
    sys.stdout.write(f"{done}; failed: {failed}; other files skipped: {others}\n")
    return failed


def parse_run(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a run."""
    parser.add_argument(
        "--run", required=True, help="NOTATION/splitK as in the tables, a folder, an MLflow run id, or best"
    )
    add_store(parser)


def find_model(options: argparse.Namespace) -> Model:
    """Load the network that the options of ``parse_run`` name."""
    return load_model(find_folder(options.run, store=options.store, uri=options.tracking_uri))


@command
def main(argv: list[str] | None = None) -> int:
    """Predict a folder; return 1 after a line on stderr for each image that failed."""
    parser = argparse.ArgumentParser(prog="python -m kdsweep predict", description="Masks of one's own images.")
    parse_run(parser)
    parser.add_argument("--images", type=Path, required=True, help="folder of images of any size and mode")
    parser.add_argument("--out", type=Path, required=True, help="folder for masks, overlays and the table")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:NUMBER or auto (cpu)")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    options = parser.parse_args(argv)
    check_out(options.out, images=options.images, overwrite=options.overwrite)
    model = find_model(options)
    failed = make(model, images=options.images, out=options.out, device=options.device)
    return 1 if failed else 0
