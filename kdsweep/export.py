"""The network of a finished run as one ONNX file that says how images are prepared for it.

Usage: ``python -m kdsweep.export --run RUN --out student.onnx [--store DIR] [--images FOLDER]``; RUN as for predict.
The file appears only if ONNX Runtime computes from it what PyTorch computes.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kdsweep import checkpoint, costs, phantom, predict
from kdsweep.errors import InputError, exit_code
from kdsweep.models import UNet
from kdsweep.predict import Model
from kdsweep.views import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    import onnxruntime

NEEDS = ("onnx", "onnxruntime", "onnxscript")
OPSET = 18
TOLERANCE = 1e-4  # of probabilities, between PyTorch and ONNX Runtime
INPUT, OUTPUT = "images", "probabilities"
WARM_UP, TIMED = 5, 50  # forward passes


class Probabilities(nn.Module):
    """A network whose output is the probability of lesion (N, 1, S, S) of normalised images (N, 3, S, S)."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities (N, 1, S, S) in 0 to 1."""
        return torch.sigmoid(self.network(images).logits)


def check_installed() -> None:
    """Raise InputError if a package of the extra is missing."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX export needs {', '.join(missing)}: pip install 'kdsweep[export]'")


def metadata(model: Model) -> dict[str, str]:
    """What the file says about itself: which run it is from, and how an image becomes its input."""
    size = model.image_size
    mean, std = (", ".join(map(str, numbers)) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    steps = (
        "RGB, a grey image in three equal channels, 16 bit divided by 257",
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
    """The ONNX file of a model: images (batch, 3, S, S) float32 to probabilities (batch, 1, S, S), any batch."""
    import onnx

    example = torch.zeros(2, 3, model.image_size, model.image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own parts
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
        del node.metadata_props[:]  # where each was traced: paths of this computer
    onnx.helper.set_model_props(proto, metadata(model))
    content: bytes = proto.SerializeToString()
    return content


def open_session(content: bytes) -> onnxruntime.InferenceSession:
    """An ONNX file in ONNX Runtime, on one thread of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def check_inputs(*, images: Path | None, image_size: int) -> list[Tensor]:
    """Inputs (1, 3, S, S) on which both runtimes are compared: a folder's images, else phantoms and noise.

    Raises:
        InputError: the folder has no image, or an unreadable one.
    """
    if images is None:
        noise = torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        drawn = [np.repeat(item.image[..., None], 3, axis=2) for item in phantom.cohort(count=4, seed=0)]
        return [*(predict.prepare(image, image_size=image_size) for image in drawn), *noise.split(1)]
    try:
        read = [predict.read_image(file) for file in predict.list_images(images)[0].values()]
    except ValueError as error:
        raise InputError(f"--images {images}: {error}") from error
    return [predict.prepare(image, image_size=image_size) for image in read]


def largest_difference(session: Any, network: nn.Module, inputs: list[Tensor]) -> float:
    """The largest absolute difference of a probability between ONNX Runtime and PyTorch, both on the CPU.

    Args:
        session: takes and gives arrays by name, as ONNX Runtime's does.
        network: gives probabilities (1, 1, S, S).
        inputs: each (1, 3, S, S).
    """
    largest = 0.0
    for images in inputs:
        with torch.no_grad():
            expected = network(images).numpy()
        (found,) = session.run([OUTPUT], {INPUT: np.ascontiguousarray(images.numpy())})
        difference = float(np.abs(found - expected).max())
        largest = max(largest, difference if np.isfinite(difference) else np.inf)
    return largest


def time_ms(forward: Callable[[], object]) -> tuple[float, float]:
    """Median and 95th percentile of the duration of a call in milliseconds, on one thread of PyTorch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        durations = []
        for _ in range(WARM_UP + TIMED):
            start = time.perf_counter()
            forward()
            durations.append(1000 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    median, slow = np.percentile(durations[WARM_UP:], [50, 95])
    return float(median), float(slow)


def latency(session: Any, network: nn.Module, images: Tensor) -> str:
    """One line: how long both runtimes take for one image (1, 3, S, S) on one thread, and of which CPU."""
    array = np.ascontiguousarray(images.numpy())
    with torch.inference_mode():
        ours = time_ms(lambda: network(images))
    theirs = time_ms(lambda: session.run([OUTPUT], {INPUT: array}))
    told = [
        f"{name} {median:.2f} ms (95th percentile {slow:.2f})"
        for name, (median, slow) in {"ONNX Runtime": theirs, "PyTorch": ours}.items()
    ]
    return f"one image on one thread of {costs.cpu_name()}, median of {TIMED}: {', '.join(told)}"


def make(model: Model, *, out: Path, images: Path | None) -> None:
    """Export, compare, write, and tell about it in three lines.

    Raises:
        InputError: the runtimes differ by more than TOLERANCE (nothing is written), or the file cannot be written.
    """
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; give a file such as {out / 'student.onnx'}")
    inputs = check_inputs(images=images, image_size=model.image_size)
    sys.stdout.write(f"{model.title} to ONNX opset {OPSET}: {out}\n")
    sys.stdout.flush()
    content, network = to_onnx(model), Probabilities(model.network)
    session = open_session(content)
    difference = largest_difference(session, network, inputs)
    where = f"{len(inputs)} images of {images}" if images else "4 phantoms and 4 images of noise"
    if difference > TOLERANCE:
        raise InputError(
            f"--out {out}: not written, probabilities of ONNX Runtime and PyTorch differ by up to {difference:.1e} "
            f"on {where}; allowed are {TOLERANCE:.0e}"
        )
    sys.stdout.write(latency(session, network, inputs[0]) + "\n")
    try:
        checkpoint.write_bytes(out, content)
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from error
    agree = f"probabilities differ from PyTorch's by at most {difference:.1e} on {where}, allowed {TOLERANCE:.0e}"
    sys.stdout.write(f"wrote {out} ({len(content) / 1e6:.1f} MB); {agree}\n")


def main(argv: list[str] | None = None) -> int:
    """Export one network; 0, or 1 after one line on stderr that says what to mend."""
    parser = argparse.ArgumentParser(prog="python -m kdsweep.export", description="A trained network as ONNX.")
    predict.parse_run(parser)
    parser.add_argument("--out", type=Path, required=True, help="ONNX file; one that is there is replaced")
    parser.add_argument("--images", type=Path, help="folder of images to compare on (4 phantoms and noise)")
    options = parser.parse_args(argv)

    def work() -> None:
        check_installed()
        make(predict.find_model(options), out=options.out, images=options.images)

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
