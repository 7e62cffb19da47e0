"""The metadata of an exported file: which run it is from, and how an image becomes its input."""

from __future__ import annotations

import json

from kdsweep.data.images import IMAGENET_MEAN, IMAGENET_STD
from kdsweep.export import predict
from kdsweep.export.model import Model


def metadata(model: Model) -> dict[str, str]:
    """Return what the file says about itself: which run it is from, and how an image becomes its input."""
    size = model.image_size
    mean, std = (", ".join(map(str, numbers)) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    deep = "16 bit divided by 257"
    if model.window:
        low, high = model.window
        deep = f"more than 8 bit mapped from {low:g} to {high:g} onto 0 to 255, clipped and rounded"
    steps = (
        f"RGB, a gray image in three equal channels, {deep}",
        f"resize the complete image to {size} x {size}, aspect ratio not kept: OpenCV INTER_AREA if both sides are at "
        f"least {size}, else bilinear (INTER_LINEAR); uint8",
        "divide by 255",
        f"subtract the mean ({mean}), divide by the standard deviation ({std})",
        f"float32 (N, 3, {size}, {size})",
    )
    output = {
        "output": "probability of lesion of each pixel; resize bilinearly to the size of the image",
        "threshold": str(predict.THRESHOLD),
    }
    if model.class_names:
        output = {
            "output": "probabilities of each pixel, a channel per name of kdsweep.classes, the highest is its class; "
            "resize bilinearly to the size of the image",
            "classes": json.dumps(predict.channels(model.class_names)),
        }
    about = model.tags | {
        "source_run": model.folder.name,
        "encoder": model.encoder,
        "image_size": str(size),
        "preprocessing": "; ".join(steps),
        **output,
    }
    return {f"kdsweep.{key}": value for key, value in about.items()}
