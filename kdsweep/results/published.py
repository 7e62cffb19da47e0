"""Publish a sweep's runs and per-image scores as one file, and read such files as a sweep again.

The file holds runs and scores of images by their ids, nothing else: no image, no mask, no weights, no path of a
machine. ``tables`` and ``figures`` read it with ``--published``; the parts of a sweep that was trained on several
machines become one table.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kdsweep.config.decisions import kind
from kdsweep.config.grid import run_folder
from kdsweep.core.errors import InputError, reading
from kdsweep.core.files import without_folders, write_bytes
from kdsweep.core.progress import plural
from kdsweep.results.frame import of_seeds
from kdsweep.store import cell_folder
from kdsweep.tracking.reader import Sweep, read_scores, read_sweep

FORMAT = 1
GZIP = b"\x1f\x8b"  # the first bytes of a compressed file
WHAT, REMEDY = f"a file of format {FORMAT} that publish has written", "publish writes such files"
TAGS = re.compile(r"kdsweep\.(split_images|precision|threads|torch|hardware)|mlflow\.source\.git\.commit")
TABLES = ("scores", "external")


def write(sweep: Sweep) -> bytes:
    """Return the content of a file with the runs and scores of a sweep; equal sweeps give equal bytes."""
    runs = sweep.runs.sort_values(["role", "notation", "split", "seed", "fingerprint"])
    content = {
        "format": FORMAT,
        "name": sweep.name,
        "varied": sweep.varied,
        "tuned": sweep.tuned,
        "commands": [without_folders(command) for command in sweep.commands],
        "columns": [str(column) for column in runs],
        "runs": [_record(run) for run in runs.to_dict("records")],
        **{name: _csv(getattr(sweep, name)) for name in TABLES},
    }
    return gzip.compress(json.dumps(content, indent=0).encode(), mtime=0)


def _record(run: dict[Any, Any]) -> dict[str, Any]:
    """Return what is published of a run: no NaN, and nothing of the machine that trained it."""
    shared = [key for key in run["params"] if kind(key) not in ("place", "local") or key.startswith("stats.")]
    values = {key: value for key, value in run.items() if key != "run_id" and value == value}
    values["params"] = {key: run["params"][key] for key in shared}
    values["tags"] = {key: value for key, value in run["tags"].items() if TAGS.fullmatch(key)}
    published: dict[str, Any] = without_folders(values)
    return published


def _csv(table: pd.DataFrame) -> str:
    if table.empty:
        return ""
    exact = table.assign(dice=[repr(float(value)) for value in table["dice"]])  # the statistics are of it, to the digit
    return exact.sort_values(_keys(table)).to_csv(index=False, float_format="%.6g")


def _keys(table: pd.DataFrame) -> list[str]:
    """Return the columns that identify a row of scores."""
    return [column for column in ("data_set", "fingerprint", "image") if column in table]


def read(files: Sequence[Path]) -> Sweep:
    """Read published files, or folders of them, as one sweep; of a run in several files a finished one counts.

    Raises:
        InputError: a file is missing or not such a file, or they are of sweeps with other names.
    """
    files = [file for path in files for file in _files(path)]
    parts = [_content(file) for file in files]
    with reading(f"--published {' '.join(map(str, files))}", what=WHAT, remedy=REMEDY):
        return _joined(parts, files)


def _files(path: Path) -> list[Path]:
    """Return the published files of a folder, or the file itself."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.json.gz"))
    if not files:
        raise InputError(f"--published {path}: no file in this folder ends in .json.gz; {REMEDY}")
    return files


def _joined(parts: list[dict[str, Any]], files: Sequence[Path]) -> Sweep:
    """Return the contents of files as one sweep."""
    names = {part["name"]: file for part, file in zip(parts, files, strict=True)}
    if len(names) > 1:
        of = " and ".join(f"{file} of sweep {name}" for name, file in list(names.items())[:2])
        raise InputError(f"--published: {of}; give files of one sweep")
    lists = ("columns", "runs", "varied", "commands", "tuned")
    columns, records, *keys = ([value for part in parts for value in part[key]] for key in lists)
    runs = pd.DataFrame(records, columns=list(dict.fromkeys(columns)))
    runs = runs.assign(done=runs["status"] == "FINISHED").sort_values("done", ascending=False, kind="stable")
    runs = runs.drop_duplicates("fingerprint", ignore_index=True).drop(columns="done").assign(run_id="")
    scores, external = (_table([part[name] for part in parts]) for name in TABLES)
    varied, commands, tuned = (tuple(dict.fromkeys(values)) for values in keys)
    return Sweep(parts[0]["name"], runs, scores, varied, commands, tuned=tuned, external=external)


def _content(file: Path) -> dict[str, Any]:
    """Return what ``write`` has put into a file, of which a browser may have undone the compression."""
    with reading(f"--published {file}", what=WHAT, remedy=REMEDY):
        packed = file.read_bytes()
        content: dict[str, Any] = json.loads(gzip.decompress(packed) if packed.startswith(GZIP) else packed)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        return content


def _table(parts: list[str]) -> pd.DataFrame:
    tables = [read_scores(io.StringIO(part)) for part in parts if part]
    table = pd.concat(tables or [pd.DataFrame(columns=["fingerprint", "image", "dice"])], ignore_index=True)
    return table.drop_duplicates(_keys(table), ignore_index=True)


def read_folds(sweep: Sweep, store: Path) -> dict[int, dict[str, list[str]]]:
    """Return by split the ids of the images of its parts: train, val, test, the keys of nnU-Net's splits_final.json.

    Raises:
        InputError: a split's file in the store is missing or damaged, or cells of one split have other images.
    """
    folds: dict[int, dict[str, list[str]]] = {}
    begun = sweep.runs[sweep.runs["params"].map(bool)].sort_values("split", kind="stable")
    for run in begun.to_dict("records"):
        train, val, test = map(cell_folder.read_split(run_folder(store, run)).__getitem__, cell_folder.PARTS)
        fold = {"train": train, "val": val, "test": test}
        if folds.setdefault(run["split"], fold) != fold:
            raise InputError(f"--folds: cells of split {run['split']} of sweep {sweep.name} have different images")
    return folds


def publish(
    *,
    store: Path,
    out: Path,
    folds: Path | None = None,
    uri: str | None = None,
    sweep: str | None = None,
    seeds: Sequence[int] | None = None,
) -> None:
    """Write a sweep's file, of these seeds or of all, and its splits as a list of folds if a file for them is named."""
    published = of_seeds(read_sweep(store=store, uri=uri, name=sweep), seeds)
    content = write(published)
    _write("--out", out, content)
    if folds is not None:
        by_split = read_folds(published, store)
        _write("--folds", folds, (json.dumps(list(by_split.values()), indent=1, ensure_ascii=False) + "\n").encode())
        listed = ", ".join(f"{fold}: split {split}" for fold, split in enumerate(by_split))
        sys.stdout.write(f"wrote {folds}: split=file split.file={folds} split.fold=N draws the same images; {listed}\n")
    done = int((published.runs["status"] == "FINISHED").sum())
    sys.stdout.write(
        f"wrote {out} ({len(content) / 1e6:.2f} MB): sweep {published.name}, {plural(done, 'finished run')}, "
        f"{plural(len(published.scores), 'score')} of test images by their ids\n"
    )


def _write(option: str, file: Path, content: bytes) -> None:
    try:
        write_bytes(file, content)
    except OSError as error:
        raise InputError(f"{option} {file}: cannot write there ({error.strerror})") from error
