"""Predict masks of a user's images with the network of a finished run."""

from __future__ import annotations

import errno
import io
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from kdsweep.core.device import Compute, find_device, is_device_error, placed, usable_precision
from kdsweep.core.errors import InputError
from kdsweep.core.files import write_bytes, write_text
from kdsweep.core.progress import track
from kdsweep.data import folders
from kdsweep.data.images import resize_image
from kdsweep.data.pixels import FileError, naming, read_gray_or_color
from kdsweep.data.views import normalize
from kdsweep.export.model import Model, find_folder, load_model
from kdsweep.models.networks import Network

THRESHOLD = 0.5  # a pixel is lesion if its probability is above: as in testing
CONTOUR = (0xFF, 0x17, 0x44)  # RGB; the red of predictions in figures
TABLE = "predictions.csv"
COLUMNS = ["image", "width", "height", "area_px", "area_percent", "mean_probability", "max_probability"]


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
        raise InputError(f"--images {folder}: no images in it; expected files ending in {folders.COMMON}")
    taken = Counter(name.lower() for file in files for name in (file.stem, file.name))  # a.png, a.jpg: their names
    named = {file.stem if taken[file.stem.lower()] == 1 else file.name: file for file in files}
    return named, len(entries) - len(files)


def prepare(image: np.ndarray, *, image_size: int) -> torch.Tensor:
    """Turn (H, W, 3) uint8 into the network's input (1, 3, S, S) float32: the image resized and normalized."""
    return normalize(torch.from_numpy(resize_image(image, image_size))[None])


def probabilities(network: Network, image: np.ndarray, *, image_size: int, compute: Compute) -> np.ndarray:
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


def predict_file(model: Model, file: Path, *, out: Path, name: str, compute: Compute) -> list[Any]:
    """Write mask and overlay of an image, as it is displayed; return its row of the table.

    Raises:
        FileError: the image cannot be read, or its name is too long or not UTF-8.
    """
    with naming(file):
        file.name.encode()  # the table is in UTF-8
        image = read_gray_or_color(file, model.window)
        probability = probabilities(model.network, image, image_size=model.image_size, compute=compute)
        mask = probability > THRESHOLD
        pictures = {f"{name}_overlay.png": draw(image, mask), f"{name}_mask.png": mask * np.uint8(255)}
    try:
        for picture, pixels in pictures.items():  # the longer name first
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, format="PNG")
            write_bytes(out / picture, stream.getvalue())
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


def predict(
    *,
    run: str,
    images: Path,
    out: Path,
    store: Path,
    uri: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> int:
    """Predict a folder and report it in two lines; return 1 after a line on stderr for each image that failed."""
    check_out(out, images=images, overwrite=overwrite)
    model = load_model(find_folder(run, store=store, uri=uri))
    files, others = list_images(images)
    on = find_device(device)
    sys.stdout.write(f"{model}: {len(files)} images of {images} on {on}\n")
    sys.stdout.flush()
    compute = Compute(device=on, precision=usable_precision(model.precision, on))
    failed = predict_folder(model, files, out=out, compute=compute)
    done = f"wrote masks and overlays of {len(files) - failed} of {len(files)} images and {TABLE} to {out}"
    sys.stdout.write(f"{done}; failed: {failed}; other files skipped: {others}\n")
    return int(failed > 0)
