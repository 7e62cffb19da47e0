"""Predict masks of a user's images with the network of a finished run."""

from __future__ import annotations

import errno
import io
import re
import sys
from collections import Counter
from collections.abc import Sequence
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
from kdsweep.core.palette import BACKGROUND, as_hex, class_colors
from kdsweep.core.progress import track
from kdsweep.data import folders
from kdsweep.data.images import resize_image
from kdsweep.data.pixels import FileError, naming, read_gray_or_color
from kdsweep.data.views import normalize
from kdsweep.export.model import Model, find_folder, load_model
from kdsweep.models.networks import Network

THRESHOLD = 0.5  # a pixel is lesion if its probability is above: as in testing, of one class
CONTOUR = (0xFF, 0x17, 0x44)  # RGB; the red of predictions in figures
TABLE, LEGEND = "predictions.csv", "classes.csv"
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
    """Return the probabilities float32 at each pixel of an image (H, W, 3) uint8, at its size.

    Returns:
        (H, W) of lesion or, of K classes, (K + 1, H, W) of background and classes.
    """
    views = prepare(image, image_size=image_size).to(compute.device)
    with torch.no_grad(), compute.autocast():
        logits = network(views).logits
    small = of_logits(logits.float())[0].cpu().numpy()
    height, width = image.shape[:2]
    large = np.stack([cv2.resize(one, (width, height), interpolation=cv2.INTER_LINEAR) for one in small])
    return large[0] if len(large) == 1 else large


def of_logits(logits: torch.Tensor) -> torch.Tensor:
    """Return the probabilities of logits (N, C, H, W): their sigmoid if C = 1, else their softmax over channels."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


def channels(class_names: Sequence[str]) -> list[str]:
    """Return the names of the channels of several classes' logits, which are those of the indices in a mask."""
    return ["background", *class_names]


def predicted(probabilities: np.ndarray) -> np.ndarray:
    """Return the class (N, 1, H, W) of each pixel from probabilities (N, C, H, W), as ``metrics.predicted``."""
    if probabilities.shape[1] == 1:
        return probabilities > THRESHOLD
    return probabilities.argmax(axis=1, keepdims=True).astype(np.uint8)


def columns(class_names: Sequence[str]) -> list[str]:
    """Return COLUMNS; of several classes each has its areas and probabilities, such as ``area_px_NAME``."""
    if not class_names:
        return COLUMNS
    return [*COLUMNS[:3], *(f"{column}_{name}" for name in class_names for column in COLUMNS[3:])]


def measure(name: str, probability: np.ndarray) -> list[Any]:
    """Return ``columns`` of one image's probabilities (H, W) or (K + 1, H, W).

    Per class they are the area where it is predicted, as pixels and share, its mean probability there, and its maximum.
    """
    height, width = probability.shape[-2:]
    row = [name, width, height]
    mask = predicted(probability.reshape(1, -1, height, width))[0, 0]
    by_class = probability[1:] if probability.ndim == 3 else probability[None]  # without the background
    for index, one in enumerate(by_class, start=1):
        region = mask == index
        area = int(region.sum())
        mean = f"{one[region].mean(dtype=np.float64):.6f}" if area else ""
        row += [area, f"{100 * area / mask.size:.4f}", mean, f"{one.max():.6f}"]
    return row


def draw(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the contours of a mask (H, W), bool or class indices uint8, on a copy of the image (H, W, 3) uint8."""
    colors = [CONTOUR] if mask.dtype == np.bool_ else class_colors(int(mask.max()))
    drawn = np.ascontiguousarray(image).copy()
    for index, color in enumerate(colors, start=1):
        region = (mask == index).astype(np.uint8)
        lines, _ = cv2.findContours(region, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, lines, -1, color, thickness=max(1, round(min(mask.shape) / 250)))
    return drawn


def picture_of(mask: np.ndarray) -> Image.Image:
    """Return a mask (H, W) as a picture: of bool 255 is lesion; class indices uint8 stay, their palette colors them."""
    if mask.dtype == np.bool_:
        return Image.fromarray(mask * np.uint8(255))
    picture = Image.fromarray(mask)
    picture.putpalette([level for color in (BACKGROUND, *class_colors(255)) for level in color])
    return picture


def legend(class_names: Sequence[str]) -> pd.DataFrame:
    """Return a row for background and each class: its index in a mask, name, and color (``#RRGGBB``)."""
    colors = map(as_hex, (BACKGROUND, *class_colors(len(class_names))))
    rows = zip(channels(class_names), colors, strict=True)
    return pd.DataFrame(rows, columns=["name", "color"]).rename_axis("index")


def predict_file(model: Model, file: Path, *, out: Path, name: str, compute: Compute) -> list[Any]:
    """Write mask and overlay of an image, as it is displayed; return its row of the table.

    Raises:
        FileError: the image cannot be read, or its name is too long or not UTF-8.
    """
    with naming(file):
        file.name.encode()  # the table is in UTF-8
        image = read_gray_or_color(file, model.window)
        probability = probabilities(model.network, image, image_size=model.image_size, compute=compute)
        mask = predicted(probability.reshape(1, -1, *image.shape[:2]))[0, 0]
        pictures = {f"{name}_overlay.png": Image.fromarray(draw(image, mask)), f"{name}_mask.png": picture_of(mask)}
    try:
        for file_name, picture in pictures.items():  # the longer name first
            stream = io.BytesIO()
            picture.save(stream, format="PNG")
            write_bytes(out / file_name, stream.getvalue())
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise FileError(f"{file}: its name is too long for {name}_overlay.png in {out}; shorten it") from error
    return measure(file.name, probability)


def predict_folder(model: Model, images: dict[str, Path], *, out: Path, compute: Compute) -> int:
    """Write mask, overlay and a table row for each image, for classes a legend; return the number that failed."""
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
        write_text(out / TABLE, pd.DataFrame(rows, columns=columns(model.class_names)).to_csv(index=False))
        if model.class_names:
            write_text(out / LEGEND, legend(model.class_names).to_csv())
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
    tables = f", {TABLE} and {LEGEND}" if model.class_names else f" and {TABLE}"
    done = f"wrote masks and overlays of {len(files) - failed} of {len(files)} images{tables} to {out}"
    sys.stdout.write(f"{done}; failed: {failed}; other files skipped: {others}\n")
    return int(failed > 0)
