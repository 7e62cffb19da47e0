"""Digests of a small sweep, to compare two commits bit for bit on one machine.

    OMP_NUM_THREADS=1 python tests/bits.py before.json   # in the checkout of the one commit
    OMP_NUM_THREADS=1 python tests/bits.py after.json    # in that of the other
    diff before.json after.json

The twelve cells, the Student, both Teachers and two methods (one with several adapters, one that takes masks) are
trained for three epochs of unequal batches on phantoms, from the command line, in a folder that is removed. Of each the
file has its fingerprint (as far as the name of its folder shows it) and the SHA-256 of its history, weights, scores and
predictions; of four images both views with masks and theta. It takes two minutes.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from small import STUDENT, TEACHER

from kdsweep.data import phantom
from kdsweep.data.views import Strengths, Views, sampling_theta

FIXED = ["profile=quick", "data.count=25", "train.epochs=3", "train.batch_size=6", "train.workers=0", "device=cpu"]
FIXED += ["weights=none", "train.lr=3e-3", "store=store", *STUDENT, *TEACHER]
COMMANDS = [
    ["path=L,H,HR", "loss=mse,kld", "teacher_aug=weak,strong"],
    ["path=none"],
    ["method=reviewkd,emkd", "teacher_aug=weak"],
]
KINDS = (".csv", ".npz", ".safetensors")


def digest(*parts: bytes) -> str:
    """SHA-256 of bytes, one part after the other."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def of_file(file: Path) -> str:
    """Digest of a file's content; of an archive of arrays, that of the arrays."""
    if file.suffix != ".npz":
        return digest(file.read_bytes())
    with np.load(file, allow_pickle=False) as arrays:
        return digest(*(part for name in sorted(arrays) for part in (name.encode(), arrays[name].tobytes())))


def of_views() -> dict[str, str]:
    """Digests of both views of four phantoms."""
    strengths = Strengths(shift=0.06, scale=0.1, rotate_deg=45, noise_std=(0.01, 0.03), dropout=0.01, probability=0.5)
    views, digests = Views(image_size=64, strengths=strengths), {}
    for number, item in enumerate(phantom.cohort(count=4, seed=0)):
        image, mask = np.repeat(item.image[..., None], 3, axis=2), item.mask.astype(np.uint8)
        drawn = views.render(image=image, mask=mask, seed=[0, 0, 1, number])
        theta = sampling_theta(drawn.matrix, image_size=64)
        digests[f"views of phantom {number}"] = digest(*(each.tobytes() for each in (*drawn, theta)))
    return digests


def of_cells(store: Path) -> dict[str, dict[str, str]]:
    """Digests of the files of all cells and Teachers in a store."""
    digests = {}
    for folder in sorted(path for part in ("cells", "teachers") for path in (store / part).iterdir()):
        name, _, fingerprint = folder.name.rpartition("-")
        files = sorted(file for file in folder.iterdir() if file.suffix in KINDS)
        digests[name] = {"fingerprint": fingerprint, **{file.name: of_file(file) for file in files}}
    return digests


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="kdsweep-bits-") as cwd:
        for overrides in COMMANDS:
            subprocess.run([sys.executable, "-m", "kdsweep", "-m", *FIXED, *overrides], cwd=cwd, check=True)
        digests = of_views() | of_cells(Path(cwd) / "store")
    Path(sys.argv[1]).write_text(json.dumps(digests, indent=1) + "\n")
