"""An exported network in MLflow's model registry: versions of a named model that whoever has the store can load."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kdsweep import phantom, predict
from kdsweep.predict import Model

TOLERANCE = 1e-4  # of probabilities, between PyTorch and the model as MLflow loads it


def register(model: Model, content: bytes, *, network: nn.Module, name: str, store: Path, uri: str | None) -> None:
    """Make an ONNX file the next version of a registered model, and tell in one line how to load it.

    Args:
        model: the network that was exported.
        content: the ONNX file, with one input, one output and what it says about itself.
        network: gives probabilities (1, 1, S, S) of normalised images (1, 3, S, S).
        name: of the registered model; made if there is none.
        store: folder of the runs.
        uri: of an MLflow server or database, or None for the file in the store.

    Raises:
        InputError: MLflow does not have the finished run, does not take the model, or gives back another one; then
            there is no new version.
    """
    import onnx
    import onnxruntime

    from kdsweep import tracking  # loads mlflow: seconds that an export alone need not wait for

    proto = onnx.load_model_from_string(content)
    # The example is kept in the clear with the model and goes wherever that goes: a phantom, never a patient's image.
    grey = next(phantom.cohort(count=1, seed=0)).image
    example = predict.prepare(np.repeat(grey[..., None], 3, axis=2), image_size=model.image_size)
    with torch.no_grad():
        expected = network(example).numpy()
    packages = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
    version = tracking.register_onnx(
        tracking.OnnxModel(
            proto=proto,
            example={proto.graph.input[0].name: example.numpy()},
            expected={proto.graph.output[0].name: expected},
            tolerance=TOLERANCE,
            metadata={entry.key: entry.value for entry in proto.metadata_props},
            requirements=[f"{package}=={number}" for package, number in packages.items()],
        ),
        name=name,
        fingerprint=model.tags["fingerprint"],
        store=store,
        uri=uri,
    )
    place = f"MLFLOW_TRACKING_URI={tracking.store_uri(store, uri)}"
    call = f'mlflow.pyfunc.load_model("models:/{name}/{version}")'
    sys.stdout.write(f"registered {name} version {version}; to load it: {place} and {call}\n")
