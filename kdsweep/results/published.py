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
from kdsweep.core.errors import InputError, reading
from kdsweep.core.files import without_folders, write_bytes
from kdsweep.core.progress import plural
from kdsweep.results.frame import of_seeds
from kdsweep.tracking.reader import Sweep, read_scores, read_sweep

FORMAT = 1
GZIP = b"\x1f\x8b"  # the first bytes of a compressed file
WHAT, REMEDY = f"a file of format {FORMAT} that publish has written", "publish writes such files"
TAGS = re.compile(r"kdsweep\.(split_images|precision|threads|torch|hardware)|mlflow\.source\.git\.commit")
TABLES = ("scores", "external")


def write(sweep: Sweep) -> bytes:
    """Return the content of a file with the runs and scores of a sweep; equal sweeps give equal bytes."""
    runs = sweep.runs.sort_values(["role", "notation", "split", "seed", "fingerprint"])
    records = []
    for run in runs.to_dict("records"):
        shared = [
            key for key in run["params"] if kind(key) not in ("place", "local") or key.startswith("stats.")
        ]  # not the machine's
        params = {key: run["params"][key] for key in shared}
        tags = {key: value for key, value in run["tags"].items() if TAGS.fullmatch(key)}
        known = {key: value for key, value in run.items() if key != "run_id" and value == value}  # without NaN
        records.append(without_folders({**known, "params": params, "tags": tags}))
    content = {
        "format": FORMAT,
        "name": sweep.name,
        "varied": sweep.varied,
        "tuned": sweep.tuned,
        "commands": [without_folders(command) for command in sweep.commands],
        "columns": [str(column) for column in runs],
        "runs": records,
        **{name: _csv(getattr(sweep, name)) for name in TABLES},
    }
    return gzip.compress(json.dumps(content, indent=0).encode(), mtime=0)


def _csv(table: pd.DataFrame) -> str:
    order = [column for column in ("data_set", "fingerprint", "image") if column in table]
    if table.empty:
        return ""
    exact = table.assign(dice=[repr(float(value)) for value in table["dice"]])  # the statistics are of it, to the digit
    return exact.sort_values(order).to_csv(index=False, float_format="%.6g")


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
    columns = dict.fromkeys(column for part in parts for column in part["columns"])
    runs = pd.DataFrame([run for part in parts for run in part["runs"]], columns=list(columns))
    runs = runs.assign(done=runs["status"] == "FINISHED").sort_values("done", ascending=False, kind="stable")
    runs = runs.drop_duplicates("fingerprint").drop(columns="done").assign(run_id="")
    scores, external = (_table([part[name] for part in parts]) for name in TABLES)

    def joined(key: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value for part in parts for value in part[key]))

    return Sweep(
        parts[0]["name"],
        runs.reset_index(drop=True),
        scores,
        varied=joined("varied"),
        tuned=joined("tuned"),
        commands=joined("commands"),
        external=external,
    )


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
    if not tables:
        return pd.DataFrame(columns=["fingerprint", "image", "dice"])
    whole = pd.concat(tables, ignore_index=True)
    key = [column for column in ("data_set", "fingerprint", "image") if column in whole]
    return whole.drop_duplicates(key, ignore_index=True)


def publish(
    *, store: Path, out: Path, uri: str | None = None, sweep: str | None = None, seeds: Sequence[int] | None = None
) -> None:
    """Write a sweep's file, of these seeds or of all."""
    published = of_seeds(read_sweep(store=store, uri=uri, name=sweep), seeds)
    content = write(published)
    try:
        write_bytes(out, content)
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from error
    done = int((published.runs["status"] == "FINISHED").sum())
    sys.stdout.write(
        f"wrote {out} ({len(content) / 1e6:.2f} MB): sweep {published.name}, {plural(done, 'finished run')}, "
        f"{plural(len(published.scores), 'score')} of test images by their ids\n"
    )
