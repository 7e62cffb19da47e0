"""Export the network of a finished run as one ONNX file that says how to prepare images for it.

The file is written only if ONNX Runtime computes from it what PyTorch computes, by default on the run's test images.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kdsweep.core.errors import InputError, one_line
from kdsweep.core.files import DamagedError, read_json, write_bytes, write_text
from kdsweep.data import phantom
from kdsweep.data.pixels import read_gray_or_color
from kdsweep.evaluation import latency, metrics
from kdsweep.evaluation.costs import cpu_name
from kdsweep.export import predict
from kdsweep.export.card import card
from kdsweep.export.metadata import metadata
from kdsweep.export.model import Model, find_folder, load_model, split_images
from kdsweep.models.networks import Network
from kdsweep.store import cell_folder

if TYPE_CHECKING:
    import onnxruntime

NEEDS = ("onnx", "onnxruntime", "onnxscript")
OPSET = 18
TOLERANCE = 1e-4  # of probabilities, between PyTorch and ONNX Runtime
DICE_TOLERANCE = 1e-3  # of mean Dice: a pixel or two at the threshold may change sides
INPUT, OUTPUT = "images", "probabilities"


class Probabilities(nn.Module):
    """A network whose output are the probabilities (N, C, S, S) of normalized images (N, 3, S, S).

    Of one class C is 1, the lesion; of K classes C is K + 1, background first.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities (N, C, S, S) in 0 to 1."""
        return predict.of_logits(self.network(images).logits)


def check_installed() -> None:
    """Raise InputError if a package of the extra is missing."""
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise InputError(f"ONNX export needs {', '.join(missing)}: pip install 'kdsweep[export]'")


# ---- the file ------------------------------------------------------------------------------------------------------


def to_onnx(model: Model) -> bytes:
    """Return a model as an ONNX file: images (batch, 3, S, S) float32 to probabilities (batch, C, S, S), any batch."""
    import onnx

    example = torch.zeros(2, 3, model.image_size, model.image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its parts
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


def feed(image: Tensor) -> dict[str, np.ndarray]:
    """Return an image (1, 3, S, S) as the input of a session."""
    return {INPUT: np.ascontiguousarray(image.numpy())}


def onnx_probabilities(session: Any, images: list[Tensor]) -> np.ndarray:
    """Return probabilities (N, C, S, S) of N images (1, 3, S, S), from a session with ONNX Runtime's interface."""
    return np.concatenate([session.run([OUTPUT], feed(image))[0] for image in images])


# ---- what is compared ----------------------------------------------------------------------------------------------


def find_inputs(
    model: Model, *, images: Path | None, store: Path, data_root: Path | None
) -> tuple[list[Tensor], Tensor | None, str]:
    """Return a folder's images, else the run's test images, else phantoms (and print that these are used).

    Returns:
        Normalized images (1, 3, S, S); masks (N, 1, S, S) of class indices of test images; their name in the
        printed lines.

    Raises:
        InputError: a folder that was named does not have the images.
    """
    if images is not None:
        try:
            pixels = [read_gray_or_color(file, model.window) for file in predict.list_images(images)[0].values()]
        except ValueError as error:
            raise InputError(f"--images {images}: {error}") from error
        inputs = [predict.prepare(one, image_size=model.image_size) for one in pixels]
        return inputs, None, f"{len(inputs)} images of {images}"
    try:
        inputs, masks, data = split_images(model, "test", store=store, data_root=data_root)
    except (InputError, OSError) as error:
        if data_root is not None:
            raise InputError(f"--data-root {data_root}: {one_line(error)}") from error
        why = f"the run's test images cannot be read: {one_line(error)}"
        sys.stdout.write(f"{why}; compared on 4 phantoms instead (--data-root DIR names images that were moved)\n")
        return phantoms(4, image_size=model.image_size), None, "4 phantoms"
    return inputs, masks, f"the run's {len(inputs)} test images ({data})"


def phantoms(count: int, *, image_size: int) -> list[Tensor]:
    """Draw phantoms, the same ones each time, as inputs (1, 3, S, S)."""
    grays = [item.image for item in phantom.cohort(count=count, seed=0)]
    return [predict.prepare(np.repeat(gray[..., None], 3, axis=2), image_size=image_size) for gray in grays]


def largest_difference(outputs: np.ndarray, network: nn.Module, images: list[Tensor]) -> float:
    """Return the largest difference of probabilities (N, C, S, S) from PyTorch's on the CPU, infinite if one is NaN."""
    with torch.no_grad():
        expected = np.concatenate([network(one).numpy() for one in images])
    difference = float(np.abs(outputs - expected).max())
    return difference if np.isfinite(difference) else np.inf


def compare_dice(model: Model, outputs: np.ndarray, masks: Tensor) -> str:
    """Return a sentence: the mean Dice of probabilities (N, C, S, S) and the one that the run recorded."""
    try:
        recorded = float((read_json(model.folder / cell_folder.FINISHED) or {})["values"]["test/dice"])
    except (DamagedError, KeyError, TypeError) as error:
        file = model.folder / cell_folder.FINISHED
        raise InputError(f"{file} is damaged; the sweep's command tests it again") from error
    prediction = torch.from_numpy(predict.predicted(outputs))
    scores = metrics.overlap(prediction=prediction, mask=masks, class_names=model.class_names)
    dice = float(scores["dice"].mean())
    if abs(dice - recorded) <= DICE_TOLERANCE:
        return f"mean Dice {dice:.4f} there, recorded {recorded:.4f}"
    rounded = model.precision != "fp32"
    cause = f"it was tested in {model.precision}" if rounded else "are these the images that it was tested on?"
    return f"WARNING: mean Dice {dice:.4f} there, but recorded {recorded:.4f} ({cause})"


def compare_latency(session: Any, network: nn.Module, image: Tensor) -> str:
    """Return one line: how long both runtimes take for one image (1, 3, S, S) on one thread, and on which CPU."""
    calls = {"ONNX Runtime": partial(session.run, [OUTPUT], feed(image)), "PyTorch": partial(network, image)}
    times = {name: latency.time_ms(call, device=torch.device("cpu"), threads=1) for name, call in calls.items()}
    each = [f"{name} {median:.2f} ms (95th percentile {slow:.2f})" for name, (median, slow) in times.items()]
    return f"one image on one thread of {cpu_name()}, median of {latency.REPEATS}: {', '.join(each)}"


# ---- the command ---------------------------------------------------------------------------------------------------


def make(model: Model, *, out: Path, images: list[Tensor], masks: Tensor | None, where: str) -> bytes:
    """Export, compare, write file and card, and report it in three lines; return the content of the file.

    Raises:
        InputError: the runtimes differ by more than TOLERANCE; nothing is written.
    """
    sys.stdout.write(f"{model} to ONNX opset {OPSET}: {out}\n")
    sys.stdout.flush()
    content, network = to_onnx(model), Probabilities(model.network)
    session = open_session(content)
    outputs = onnx_probabilities(session, images)
    difference = largest_difference(outputs, network, images)
    if difference > TOLERANCE:
        raise InputError(
            f"--out {out}: not written, probabilities of ONNX Runtime and PyTorch differ by up to {difference:.1e} "
            f"on {where}; allowed are {TOLERANCE:.0e}"
        )
    scored = "" if masks is None else f"; {compare_dice(model, outputs, masks)}"
    sys.stdout.write(compare_latency(session, network, images[0]) + "\n")
    card_file = out.with_suffix(".md")
    try:
        write_bytes(out, content)
        write_text(card_file, card(model, content, name=out.name))
        with_card = f"and its card {card_file.name}"
    except InputError as error:
        with_card = f"without a card ({one_line(error)})"
    agree = f"probabilities differ from PyTorch's by at most {difference:.1e} on {where}, allowed {TOLERANCE:.0e}"
    sys.stdout.write(f"wrote {out} ({len(content) / 1e6:.1f} MB) {with_card}; {agree}{scored}\n")
    return content


def register_model(model: Model, content: bytes, *, name: str, store: Path, uri: str | None) -> None:
    """Make an ONNX file the next version of a model in MLflow's registry, and print in one line how to load it.

    Raises:
        InputError: MLflow does not have the finished run, does not take the model, or gives back another one; then
            there is no new version.
    """
    import onnx

    from kdsweep.tracking import mirror, registry  # loads mlflow: seconds that an export alone need not wait for

    # The example is kept in the clear with the model and goes wherever that goes: a phantom, never a patient's image.
    (example,) = phantoms(1, image_size=model.image_size)
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
    address = f"MLFLOW_TRACKING_URI={mirror.store_uri(store, uri)}"
    call = f'mlflow.pyfunc.load_model("models:/{name}/{version}")'
    sys.stdout.write(f"registered {name} version {version}; to load it: {address} and {call}\n")


def export(
    *,
    run: str,
    out: Path,
    store: Path,
    uri: str | None = None,
    images: Path | None = None,
    data_root: Path | None = None,
    register: str | None = None,
) -> None:
    """Export one network, and register it in MLflow under a name."""
    check_installed()
    if images and data_root:
        raise InputError(f"--images {images}: not together with --data-root; leave out one of them")
    model = load_model(find_folder(run, store=store, uri=uri))
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; give a file such as {out / 'student.onnx'}")
    folder = model.folder.resolve()
    store = folder.parents[1] if folder.parent.name in ("cells", "teachers") else store
    inputs, masks, where = find_inputs(model, images=images, store=store, data_root=data_root)
    content = make(model, out=out, images=inputs, masks=masks, where=where)
    if register is not None:
        register_model(model, content, name=register, store=store, uri=uri)
