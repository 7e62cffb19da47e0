"""``python -m kdsweep score --sweep NAME data=NAME data.root=DIR``: finished networks on another data set, as a test.

Nothing is trained. Each network's scores are kept in its folder and logged to its MLflow run under ``external/``;
``python -m kdsweep tables external`` compares them with the scores on the sweep's test images.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import pandas as pd

from kdsweep.config import composition, grid, inputs
from kdsweep.config.grid import run_folder
from kdsweep.core.device import Compute, find_device, usable_precision
from kdsweep.core.errors import InputError, one_line
from kdsweep.core.files import write_text
from kdsweep.core.progress import plural, track
from kdsweep.data import run_data, sources
from kdsweep.data.folders import ignored_line
from kdsweep.data.images import load_images
from kdsweep.data.listing import Listing, list_images
from kdsweep.data.loaders import EvalPart, eval_part
from kdsweep.data.pixels import Window, read_gray_or_color
from kdsweep.evaluation import scoring
from kdsweep.export.model import load_model
from kdsweep.store import cell_folder
from kdsweep.tracking import reader
from kdsweep.tracking.reader import EXTERNAL, Sweep


def score_sweep(
    sweep: Sweep,
    *,
    source: sources.Source,
    name: str,
    store: Path,
    uri: str | None,
    device: str,
    allow_empty_masks: bool = False,
) -> tuple[int, list[str]]:
    """Score every finished network of a sweep on another data set; those with scores are not computed again.

    The scores are kept under a name that ``data_set_name`` returns.

    Returns:
        The number of networks scored now, and a line for each that could not be.

    Raises:
        InputError: no run is finished, or the data set cannot be read, has other classes, or holds images of the
            sweep's.
    """
    runs = sweep.runs[sweep.runs["status"] == "FINISHED"].drop_duplicates("run_id")
    if runs.empty:
        raise InputError(f"sweep {sweep.name} has no finished run yet; its command resumes it")
    _refuse_other_classes(sweep, source, runs)
    listed = list_images(source)
    _refuse_shared_images(sweep, source, listed.entries, store=store)
    files = {str(run["run_id"]): run_folder(store, run) / EXTERNAL / f"{name}.csv" for run in runs.to_dict("records")}
    _announce(sweep, source, listed, files.values(), device=device)

    @lru_cache(maxsize=1)
    def part(image_size: int) -> EvalPart:
        images = load_images(source, load_size=image_size, image_size=image_size, allow_empty_masks=allow_empty_masks)
        return eval_part(images, list(range(len(images.ids))))

    count, problems = 0, []
    for run_id, file in track(files.items(), what="scoring", unit="network", total=len(files)):
        try:
            count += _score(file, part, device=device)
            reader.keep_external(file, run_id=run_id, store=store, uri=uri)
        except (InputError, OSError) as error:
            problems.append(f"{file.parents[1].name}: {one_line(error)}")
    return count, problems


def _announce(sweep: Sweep, source: sources.Source, listed: Listing, files: Collection[Path], *, device: str) -> None:
    """Print what will be scored on what, and the files of the data set that are not used."""
    done = sum(file.is_file() for file in files)
    sys.stdout.write(
        f"sweep {sweep.name}: {plural(len(files), 'network')}, {len(files) - done} to score on data={source.name} "
        f"with {plural(len(listed.entries), 'image')} (digest {listed.digest[:8]}), {done} scored before; device "
        f"{find_device(device)}\n"
    )
    if line := ignored_line(listed.ignored):
        sys.stdout.write(f"data={source.name}, ignored: {line}\n")
    sys.stdout.flush()


def data_set_name(name: str, source: sources.Source, digest: str) -> str:
    """Return the name under which scores on a data set are kept; with a window or classes it is another one."""
    if isinstance(source, sources.ReadAs):
        digest = grid.digest([digest, source.window, *([source.classes] if source.classes else [])])
    word = re.sub(r"[^\w.-]+", "_", name)  # in a tag of the run, and a file
    return f"{word}-{digest[:8]}"


def _score(file: Path, part: Callable[[int], EvalPart], *, device: str) -> bool:
    """Write the file of a network's scores, below its folder; return whether it was computed now."""
    folder = file.parents[1]
    with contextlib.ExitStack() as stack:
        if not file.is_file() and not cell_folder.hold(stack, folder):
            raise InputError("another process is at it; the same command scores what is left")
        if file.is_file():  # perhaps by that process
            return False
        model = load_model(folder)
        on = find_device(device)
        compute = Compute(device=on, precision=usable_precision(model.precision, on))
        compute.prepare()
        images = part(model.image_size)
        predictions = scoring.predict(model.network.to(compute.device), images, compute=compute)
        tolerance_px = float(model.params.get("scores.nsd_tolerance_px", 2.0))  # runs before NSD recorded none
        file.parent.mkdir(exist_ok=True)
        write_text(file, scoring.score(predictions, images, nsd_tolerance_px=tolerance_px).to_csv(index=False))
    return True


def _refuse_other_classes(sweep: Sweep, source: sources.Source, runs: pd.DataFrame) -> None:
    """Raise InputError unless a data set has the classes of all networks, in the same order."""
    classes = source.classes if isinstance(source, sources.ReadAs) else None
    names = tuple(name for name, _ in classes or ())
    for trained in map(run_data.class_names, runs["params"]):
        if trained != names:
            scored, expected = (f"[{', '.join(each)}]" if each else "null" for each in (names, trained))
            raise InputError(
                f"data.classes: the data set has {scored}, the networks of sweep {sweep.name} have {expected}; "
                "name their classes, in their order"
            )


def _refuse_shared_images(sweep: Sweep, source: sources.Source, entries: list[sources.Entry], *, store: Path) -> None:
    """Raise InputError if images of the data set are among those that the sweep was trained on, pixel by pixel."""
    started = sweep.runs[sweep.runs["params"].map(bool)]
    if started.empty:
        return
    run = started.iloc[0].to_dict()
    try:
        root = cell_folder.data_root(run_folder(store, run))
        window = run_data.window(run["params"])  # for both: through another one the same image looks different
        trained = _digests(run_data.source(run["params"], store=store, root=root).entries(), window)
    except (InputError, OSError, ValueError) as error:
        sys.stdout.write(f"not checked for images of the sweep's data, which cannot be read: {one_line(error)}\n")
        return
    shared = [image for digest, image in _digests(entries, window).items() if digest in trained]
    if shared:
        raise InputError(
            f"data={source.name}: {len(shared)} of {len(entries)} images are also in the data that the sweep was "
            f"trained on, the first is {shared[0]}; an external test needs other images"
        )


def _digests(entries: Iterable[sources.Entry], window: Window | None) -> dict[str, str]:
    """Return ids by the SHA-256 of decoded pixels: the same image in another file format counts as the same."""
    digests = {}
    for entry in entries:
        with contextlib.suppress(ValueError):  # named when the images are loaded
            pixels = read_gray_or_color(entry.image_file, window)
            digests[hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()] = entry.id
    return digests


def score(
    overrides: Sequence[str], *, store: Path, uri: str | None = None, sweep: str | None = None, name: str | None = None
) -> int:
    """Score a sweep on another data set; return 1 after a line on stderr for each network that could not be scored.

    Tables call the data set by ``name``, by default that of a plain folder, else ``data.name``.
    """
    settings = composition.compose(overrides)
    source, digest = inputs.source(settings), inputs.listing(settings).digest  # names an absent data set first
    scored = reader.read_sweep(store=store, uri=uri, name=sweep)
    root = settings.data.root
    called = name or (Path(str(root)).resolve().name if settings.data.name == "folder" and root else settings.data.name)
    data_set = data_set_name(called, source, digest)
    count, problems = score_sweep(
        scored,
        source=source,
        name=data_set,
        store=store,
        uri=uri,
        device=settings.device,
        allow_empty_masks=bool(settings.data.allow_empty_masks),
    )
    sys.stdout.write(f"scored {plural(count, 'network')} now; mean over images, splits and seeds:\n")
    scored = reader.read_sweep(store=store, uri=uri, name=scored.name)
    notations = scored.runs[["fingerprint", "notation"]].drop_duplicates()
    scores = scored.external[scored.external["data_set"] == data_set].merge(notations)
    for notation, dice in scores.groupby("notation")["dice"].mean().sort_values(ascending=False).items():
        sys.stdout.write(f"  {notation:20} Dice {100 * dice:5.2f} %\n")
    sys.stdout.write(f"compared with the sweep's test images: tables external --sweep {scored.name}\n")
    for problem in problems:
        sys.stderr.write(f"kdsweep: error: {problem}\n")
    return int(bool(problems))
