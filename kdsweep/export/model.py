"""Find the finished run that a user names, and load its network."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdsweep.config import identity
from kdsweep.config.grid import folders_named, run_folder
from kdsweep.config.networks import logits_of
from kdsweep.core.errors import InputError
from kdsweep.core.files import DamagedError, read_json
from kdsweep.data import run_data
from kdsweep.data.pixels import Window
from kdsweep.data.views import normalize
from kdsweep.models import networks
from kdsweep.models.build import new_network
from kdsweep.models.networks import Network
from kdsweep.results.stats import PLACE
from kdsweep.store import cell_folder, checkpoint

BEST = "best"  # the name of a sweep's best distilled student
TAGS = ("notation", "split", "seed", "role", "fingerprint")


@dataclass(frozen=True)
class Model:
    """The network of a finished run, and what its folder records about it."""

    network: Network  # frozen, with the weights that were tested, on the CPU
    folder: Path
    params: dict[str, Any]  # the flat configuration
    tags: dict[str, str]  # by TAGS
    encoder: str
    image_size: int  # S, side in pixels of the images that it takes
    precision: str  # fp32, tf32 or bf16, as in its test; on a CPU fp32 replaces tf32

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of several classes, in the order of the logits behind the background's; empty for one."""
        return run_data.class_names(self.params)

    @property
    def window(self) -> Window | None:
        """Return the ``data.window`` of its training."""
        return run_data.window(self.params)

    def __str__(self) -> str:
        """Return the name for messages, such as ``Student split 0 seed 0 (mobilenetv3_small_trimmed, 224 x 224)``."""
        notation, split, seed = (self.tags[key] for key in TAGS[:3])
        return f"{notation} split {split} seed {seed} ({self.encoder}, {self.image_size} x {self.image_size})"


def find_folder(run: str, *, store: Path, uri: str | None) -> Path:
    """Return the folder of a run, from the folder itself, its name, the id of its MLflow run, or best.

    Names are ``NOTATION/splitK`` and ``NOTATION/splitK/seedS``; ``best`` and ``best/SWEEP`` are ``best_folder``'s.

    Raises:
        InputError: there is no such run, or several.
    """
    if (Path(run) / cell_folder.CELL).is_file():
        return Path(run)
    if run.partition("/")[0] == BEST:
        return best_folder(store=store, uri=uri, name=run.partition("/")[2] or None)
    if re.fullmatch(r"[0-9a-f]{32}", run):
        return _folder_of_id(run, store=store, uri=uri)
    begun = [folder for folder in folders_named(store, run) if (folder / cell_folder.CELL).is_file()]
    if not begun and not re.fullmatch(r"[^/]+/split\d+(/seed\d+)?", run):
        raise InputError(
            f"--run {run}: no such folder with a {cell_folder.CELL}; give a run's folder, its name such as "
            f"HReg_KLD_WAug/split0, the id of its MLflow run, or {BEST}"
        )
    finished = [folder for folder in begun if (folder / cell_folder.FINISHED).is_file()]
    if not begun:
        raise InputError(f"--run {run}: not in --store {store}")
    if len(finished) > 1:
        remedy = f"give the folder of one: {', '.join(map(str, finished))}"
        raise InputError(f"--run {run}: {len(finished)} finished runs have this name; {remedy}")
    return (finished or begun)[0]


def best_folder(*, store: Path, uri: str | None, name: str | None) -> Path:
    """Return the folder of a sweep's best distilled student, by validation Dice alone.

    First the cell with the highest mean over splits and seeds, then its best run. None takes the last sweep.

    Raises:
        InputError: there is no sweep, or no distilled student of it is finished.
    """
    from kdsweep.results.tables import table4  # with mlflow: seconds that names and folders need not wait for
    from kdsweep.tracking import reader

    all_variants = reader.read_sweep(store=store, uri=uri, name=name)
    sweep, scores = table4.best_variant(all_variants, table4.numbers(all_variants))
    ranked = table4.ranked(scores)["notation"].tolist()
    if not ranked:
        raise InputError(f"--run {BEST}: no distilled student of sweep {sweep.name} is finished on all its splits")
    runs = sweep.runs[sweep.runs["notation"] == ranked[0]].sort_values(["val_dice", *PLACE], ascending=False)
    return run_folder(store, runs.iloc[0].to_dict())


def _folder_of_id(run: str, *, store: Path, uri: str | None) -> Path:
    from kdsweep.tracking import mirror  # loads mlflow: seconds that names and folders need not wait for

    if uri is None and not (store / "mlflow.db").is_file():
        raise InputError(f"--run {run}: --store {store} has no mlflow.db; name its folder or --tracking-uri")
    try:
        tags = mirror.MlflowClient(tracking_uri=mirror.store_uri(store, uri)).get_run(run).data.tags
    except Exception as error:  # of many kinds: server, network, database
        where = f"--store {store}" if uri is None else "--tracking-uri"  # which may hold a password
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
        raise InputError(f"--run {folder}: not finished, it has no tested weights yet; the sweep's command resumes it")
    try:
        record = read_json(folder / cell_folder.CELL) or {}
        params, tags = record["params"], {key: str(record["tags"][f"kdsweep.{key}"]) for key in TAGS}
        node = "teacher" if tags["role"] == "teacher" else "student"
        architecture = identity.architecture(params, node)
        image_size, precision = int(params["image_size"]), str(params["precision"])
    except (DamagedError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"--run {folder}: {cell_folder.CELL} is damaged") from error
    if architecture is None:
        raise InputError(f"--run {folder}: is the mean of several Teachers, not one network; choose another run")
    encoder = architecture.name
    file = folder / f"{node}.safetensors"
    if not cell_folder.check_file(folder, file.name):
        raise InputError(f"{file}: missing or damaged, its checksum differs; the sweep's command computes it again")
    logits = logits_of(run_data.class_names(params))
    network = new_network(architecture, logits=logits, weights="none", seed=0)
    try:
        checkpoint.load_network(file, network)
    except Exception as error:  # torch and safetensors have several kinds
        raise InputError(f"{file}: belongs to another network than {encoder} as this version builds it") from error
    return Model(networks.freeze(network), folder, params, tags, encoder, image_size, precision)


def split_images(
    model: Model, part: str, *, store: Path, data_root: Path | None, count: int | None = None
) -> tuple[list[Tensor], Tensor, str]:
    """Return images of a part (``train``, ``validation``, ``test``) of a run's split, resized and normalized.

    ``data_root`` is the folder of the run's images, if they were moved; of more than ``count`` images, so many are
    evenly chosen.

    Returns:
        N images (1, 3, S, S), masks (N, 1, S, S) of class indices, and the name of the data set.

    Raises:
        InputError: the data set is not one of kdsweep's, is missing, or has changed.
    """
    ids = cell_folder.read_split(model.folder)[part]
    if count is not None and count < len(ids):
        ids = [ids[number * len(ids) // count] for number in range(count)]
    with tempfile.TemporaryDirectory() as scratch:
        # Phantoms are drawn again where the store has none: another folder stays as it is.
        phantoms = store if (store / "phantoms").is_dir() else Path(scratch)
        source = run_data.source(model.params, store=phantoms, root=data_root or cell_folder.data_root(model.folder))
        scored = list(run_data.scored(source, ids, image_size=model.image_size).values())
    masks = torch.from_numpy(np.stack([one.mask for one in scored]))[:, None]
    return [normalize(torch.from_numpy(one.image)[None]) for one in scored], masks, source.name
