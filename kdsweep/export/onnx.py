"""Export the network of a finished run as one ONNX file that says how to prepare images for it.

Usage: ``python -m kdsweep export --run RUN --out student.onnx [--store DIR] [--data-root DIR] [--register
NAME]``; RUN as for predict. The file is written only if ONNX Runtime computes from it what PyTorch computes, by default
on the run's test images.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kdsweep.core.errors import InputError, command, one_line
from kdsweep.core.files import write_bytes, write_text
from kdsweep.data import phantom, run_data
from kdsweep.data.images import IMAGENET_MEAN, IMAGENET_STD
from kdsweep.data.pixels import read_gray_or_color
from kdsweep.data.views import normalize
from kdsweep.evaluation import latency, metrics
from kdsweep.export import predict
from kdsweep.export.card import card, card_file
from kdsweep.export.predict import Model
from kdsweep.models.unet import UNet
from kdsweep.results import costs
from kdsweep.store import cell_folder

if TYPE_CHECKING:
    import onnxruntime

NEEDS = ("onnx", "onnxruntime", "onnxscript")
OPSET = 18
TOLERANCE = 1e-4  # of probabilities, between PyTorch and ONNX Runtime
DICE_TOLERANCE = 1e-3  # of mean Dice: a pixel or two at the threshold may change sides
INPUT, OUTPUT = "images", "probabilities"


class Probabilities(nn.Module):
    """A network whose output is the probability of lesion (N, 1, S, S) of normalized images (N, 3, S, S)."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities (N, 1, S, S) in 0 to 1."""
        return torch.sigmoid(self.network(images).logits)


def check_installed() -> None:
    """Raise InputError if a package of the extra is missing."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX export needs {', '.join(missing)}: pip install 'kdsweep[export]'")


def metadata(model: Model) -> dict[str, str]:
    """Return what the file says about itself: which run it is from, and how an image becomes its input."""
    size = model.image_size
    mean, std = (", ".join(map(str, numbers)) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    steps = (
        "RGB, a gray image in three equal channels, 16 bit divided by 257",
        f"resize the whole image to {size} x {size}, aspect ratio not kept: OpenCV INTER_AREA if both sides are at "
        f"least {size}, else bilinear (INTER_LINEAR); uint8",
        "divide by 255",
        f"subtract the mean ({mean}), divide by the standard deviation ({std})",
        f"float32 (N, 3, {size}, {size})",
    )
    about = {
        **model.tags,
        "source_run": model.folder.name,
        "encoder": model.encoder,
        "image_size": str(size),
        "preprocessing": "; ".join(steps),
        "output": "probability of lesion of each pixel; resize bilinearly to the image's own size",
        "threshold": str(predict.THRESHOLD),
    }
    return {f"kdsweep.{key}": value for key, value in about.items()}


def to_onnx(model: Model) -> bytes:
    """Return a model as an ONNX file: images (batch, 3, S, S) float32 to probabilities (batch, 1, S, S), any batch."""
    import onnx

    example = torch.zeros(2, 3, model.image_size, model.image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own parts
        program = torch.onnx.export(
            Probabilities(model.network),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    if program is None:
        raise InputError(f"--run {model.folder}: PyTorch does not export {model.encoder} to ONNX")
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # where each was traced: they hold paths of this computer
    onnx.helper.set_model_props(proto, metadata(model))
    content: bytes = proto.SerializeToString()
    return content


def open_session(content: bytes) -> onnxruntime.InferenceSession:
    """Open an ONNX file in ONNX Runtime, on one thread of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


# ---- on which images -----------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Images on which both runtimes are compared.

    Attributes:
        where: name of the images in the printed lines.
        images: each (1, 3, S, S), normalized.
        masks: (N, 1, S, S) in {0, 1}, or None where there is no ground truth.
    """

    where: str
    images: list[Tensor]
    masks: Tensor | None = None


def check_inputs(model: Model, *, images: Path | None, store: Path, data_root: Path | None) -> Inputs:
    """Return a folder's images, else the run's test images, else phantoms and noise (and print that these are used).

    Args:
        model: the network whose input they become.
        images: the folder.
        store: where the run's phantoms lie.
        data_root: folder of the run's images, if they were moved.

    Raises:
        InputError: a folder that was named does not have the images.
    """
    if images is not None:
        return folder_inputs(images, image_size=model.image_size)
    try:
        return run_inputs(model, store=store, data_root=data_root)
    except (InputError, OSError) as error:
        if data_root is not None:
            raise InputError(f"--data-root {data_root}: {one_line(error)}") from error
        drawn = drawn_inputs(model.image_size)
        why = f"the run's test images cannot be read: {one_line(error)}"
        sys.stdout.write(f"{why}; compared on {drawn.where} instead (--data-root DIR names images that were moved)\n")
        return drawn


def run_inputs(
    model: Model, *, store: Path, data_root: Path | None, part: str = "test", count: int | None = None
) -> Inputs:
    """Return the images and masks of a part of a run's split, as they are scored: whole, resized, normalized.

    Args:
        model: the network of the run.
        store: folder of the runs.
        data_root: folder of the run's images, if they were moved.
        part: ``train``, ``validation`` or ``test``.
        count: at most so many, evenly chosen; None for all.

    Raises:
        InputError: the data set is not one of kdsweep's, is missing, or has changed.
    """
    ids = cell_folder.read_split(model.folder)[part]
    if count is not None and count < len(ids):
        ids = [ids[number * len(ids) // count] for number in range(count)]
    params = json.loads((model.folder / cell_folder.CELL).read_text(encoding="utf-8"))["params"]
    with tempfile.TemporaryDirectory() as scratch:
        # Phantoms are drawn anew where the store has none: a folder that is no store stays as it is.
        place = store if (store / "phantoms").is_dir() else Path(scratch)
        source = run_data.source(params, store=place, root=data_root)
        found = list(run_data.scored(source, ids, image_size=model.image_size).values())
    masks = torch.from_numpy(np.stack([one.mask for one in found]))[:, None]
    images = [normalize(torch.from_numpy(one.image)[None]) for one in found]
    return Inputs(f"the run's {len(images)} {part} images ({source.name})", images, masks)


def folder_inputs(folder: Path, *, image_size: int) -> Inputs:
    """Read the images of a folder; raise InputError if it has none, or an unreadable one."""
    try:
        read = [read_gray_or_color(file) for file in predict.list_images(folder)[0].values()]
    except ValueError as error:
        raise InputError(f"--images {folder}: {error}") from error
    return Inputs(f"{len(read)} images of {folder}", [predict.prepare(image, image_size=image_size) for image in read])


def drawn_inputs(image_size: int) -> Inputs:
    """Draw phantoms and noise, the same ones each time."""
    noise = torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    drawn = [np.repeat(item.image[..., None], 3, axis=2) for item in phantom.cohort(count=4, seed=0)]
    images = [*(predict.prepare(image, image_size=image_size) for image in drawn), *noise.split(1)]
    return Inputs("4 phantoms and 4 images of noise", images)


# ---- what is compared ----------------------------------------------------------------------------------------------


def onnx_probabilities(session: Any, images: list[Tensor]) -> np.ndarray:
    """Return probabilities (N, 1, S, S) of N images (1, 3, S, S), from a session with ONNX Runtime's interface."""
    return np.concatenate([session.run([OUTPUT], {INPUT: np.ascontiguousarray(one.numpy())})[0] for one in images])


def largest_difference(found: np.ndarray, network: nn.Module, images: list[Tensor]) -> float:
    """Return the largest absolute difference from PyTorch's probabilities on the CPU, infinite if one is NaN.

    Args:
        found: (N, 1, S, S), from ONNX Runtime.
        network: gives probabilities (1, 1, S, S).
        images: N of (1, 3, S, S).
    """
    with torch.no_grad():
        expected = np.concatenate([network(one).numpy() for one in images])
    difference = float(np.abs(found - expected).max())
    return difference if np.isfinite(difference) else np.inf


def compare_dice(model: Model, found: np.ndarray, masks: Tensor) -> str:
    """Return a sentence: the mean Dice of probabilities (N, 1, S, S) beside the one that the run recorded.

    Raises:
        InputError: the record is damaged.
    """
    try:
        marker = json.loads((model.folder / cell_folder.FINISHED).read_text(encoding="utf-8"))
        recorded = float(marker["values"]["test/dice"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{model.folder / cell_folder.FINISHED} is damaged; the sweep's command tests it again"
        ) from error
    prediction = torch.from_numpy(found > predict.THRESHOLD)
    dice = float(metrics.overlap(prediction=prediction, mask=masks)["dice"].mean())
    if abs(dice - recorded) <= DICE_TOLERANCE:
        return f"mean Dice {dice:.4f} there, recorded {recorded:.4f}"
    rounded = model.precision != "fp32"
    cause = f"it was tested in {model.precision}" if rounded else "are these the images that it was tested on?"
    return f"WARNING: mean Dice {dice:.4f} there, but recorded {recorded:.4f} ({cause})"


def compare_latency(session: Any, network: nn.Module, images: Tensor) -> str:
    """Return one line: how long both runtimes take for one image (1, 3, S, S) on one thread, and on which CPU."""
    array = np.ascontiguousarray(images.numpy())
    cpu = torch.device("cpu")
    theirs = latency.time_ms(session.run, [OUTPUT], {INPUT: array}, device=cpu, threads=1)
    ours = latency.time_ms(network, images, device=cpu, threads=1)
    told = [
        f"{name} {median:.2f} ms (95th percentile {slow:.2f})"
        for name, (median, slow) in {"ONNX Runtime": theirs, "PyTorch": ours}.items()
    ]
    return f"one image on one thread of {costs.cpu_name()}, median of {latency.REPEATS}: {', '.join(told)}"


# ---- the command ---------------------------------------------------------------------------------------------------


def make(model: Model, *, out: Path, inputs: Inputs) -> bytes:
    """Export, compare, write, and report it in three lines; return the content of the file.

    Raises:
        InputError: the runtimes differ by more than TOLERANCE (nothing is written), or the file cannot be written.
    """
    sys.stdout.write(f"{model.title} to ONNX opset {OPSET}: {out}\n")
    sys.stdout.flush()
    content, network = to_onnx(model), Probabilities(model.network)
    session = open_session(content)
    found = onnx_probabilities(session, inputs.images)
    difference = largest_difference(found, network, inputs.images)
    if difference > TOLERANCE:
        raise InputError(
            f"--out {out}: not written, probabilities of ONNX Runtime and PyTorch differ by up to {difference:.1e} "
            f"on {inputs.where}; allowed are {TOLERANCE:.0e}"
        )
    scored = "" if inputs.masks is None else f"; {compare_dice(model, found, inputs.masks)}"
    sys.stdout.write(compare_latency(session, network, inputs.images[0]) + "\n")
    try:
        write_bytes(out, content)
        with_card = _write_card(model, content, out=out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from error
    agree = f"probabilities differ from PyTorch's by at most {difference:.1e} on {inputs.where}"
    both = f"wrote {out} ({len(content) / 1e6:.1f} MB) {with_card}"
    sys.stdout.write(f"{both}; {agree}, allowed {TOLERANCE:.0e}{scored}\n")
    return content


def _write_card(model: Model, content: bytes, *, out: Path) -> str:
    """Write the card beside an ONNX file; return that it is there, or why a damaged record gives none."""
    try:
        text = card(model, content, name=out.name)
    except InputError as error:
        return f"without a card ({one_line(error)})"
    write_text(card_file(out), text)
    return f"and its card {card_file(out).name}"


def register(model: Model, content: bytes, *, name: str, store: Path, uri: str | None) -> None:
    """Make an ONNX file the next version of a model in MLflow's registry, and print in one line how to load it.

    Args:
        model: the network that was exported.
        content: the ONNX file.
        name: of the registered model; made if there is none.
        store: folder of the runs.
        uri: of an MLflow server or database, or None for the file in the store.

    Raises:
        InputError: MLflow does not have the finished run, does not take the model, or gives back another one; then
            there is no new version.
    """
    import onnx

    from kdsweep.tracking import mirror, registry  # loads mlflow: seconds that an export alone need not wait for

    # The example is kept in the clear with the model and goes wherever that goes: a phantom, never a patient's image.
    gray = next(phantom.cohort(count=1, seed=0)).image
    example = predict.prepare(np.repeat(gray[..., None], 3, axis=2), image_size=model.image_size)
    with torch.no_grad():
        expected = Probabilities(model.network)(example).numpy()
    version = registry.register_onnx(
        onnx.load_model_from_string(content),
        example={INPUT: example.numpy()},
        expected={OUTPUT: expected},
        tolerance=TOLERANCE,
        metadata=metadata(model),
        name=name,
        store=store,
        uri=uri,
    )
    place = f"MLFLOW_TRACKING_URI={mirror.store_uri(store, uri)}"
    call = f'mlflow.pyfunc.load_model("models:/{name}/{version}")'
    sys.stdout.write(f"registered {name} version {version}; to load it: {place} and {call}\n")


def find_store(model: Model, *, named: Path) -> Path:
    """Return the store that contains the run's folder, else the one that was named."""
    folder = model.folder.resolve()
    return folder.parents[1] if folder.parent.name in ("cells", "teachers") else named


@command
def main(argv: list[str] | None = None) -> None:
    """Export one network."""
    parser = argparse.ArgumentParser(prog="python -m kdsweep export", description="A trained network as ONNX.")
    predict.parse_run(parser)
    parser.add_argument("--out", type=Path, required=True, help="ONNX file; one that is there is replaced")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--images", type=Path, help="folder of images to compare on (the run's test images)")
    where.add_argument("--data-root", type=Path, help="where the run's images lie now (where they lay then)")
    parser.add_argument(
        "--register", metavar="NAME", help="make it the next version of this model in MLflow's registry"
    )
    options = parser.parse_args(argv)
    check_installed()
    model = predict.find_model(options)
    if options.out.is_dir():
        raise InputError(f"--out {options.out}: is a folder; give a file such as {options.out / 'student.onnx'}")
    store = find_store(model, named=options.store)
    inputs = check_inputs(model, images=options.images, store=store, data_root=options.data_root)
    content = make(model, out=options.out, inputs=inputs)
    if options.register is not None:
        register(model, content, name=options.register, store=store, uri=options.tracking_uri)
