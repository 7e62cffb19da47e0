"""Write docs/configuration.md from conf/ and the schema: ``python docs/reference.py [FILE]``.

Values and meanings come from the files of conf/ (their comments), what is allowed from kdsweep/config/schema.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from kdsweep.config.schema import Settings

DOCS = Path(__file__).resolve().parent
CONF = DOCS.parent / "conf"
LINE = re.compile(r"^( *)([\w]+):(?: +(.*?))?(?: +# (.*))?$")
SHOWN = {  # the file that shows the keys of a group
    "data": "busi", "split": "kfold", "train": "paper", "teacher": "resnext101", "student": "mobilenetv3_small",
    "tracking": "mlflow", "path": "HR", "loss": "kld", "teacher_aug": "weak", "method": "none",
}  # fmt: skip
TYPES = {
    "integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text",
    "null": "null", "array": "a list", "object": "keys with values",
}  # fmt: skip
HEAD = """# Configuration

For those who change a setting. At the end you know every group and key, its value and what it may be. Written by
`python docs/reference.py`.

Give overrides as `KEY=VALUE`, several values with `-m` and commas, and groups as `GROUP=OPTION`.
`python -m kdsweep --cfg job` prints what a command composes. Options of launchers (`hydra.launcher.*`):
[sweeps.md](sweeps.md), [cluster.md](cluster.md); of tuning (`hydra.sweeper.*`): [tuning.md](tuning.md).

## Groups

| group | options |
| --- | --- |
"""
KEYS = """
## Keys

Values are those of `profile=paper`; other profiles set others (`conf/profile/`, `conf/train/`).

| key | value | allowed | meaning |
| --- | --- | --- | --- |
"""


def allowed(model: type[BaseModel] = Settings, prefix: str = "") -> dict[str, str]:
    """Return by key what the schema says that its value must be."""
    meanings: dict[str, str] = {}
    schema = model.model_json_schema()
    properties = (schema if "properties" in schema else schema["$defs"][model.__name__])["properties"]  # it has itself
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        nodes = [kind for kind in kinds if issubclass(kind, BaseModel)]
        meanings |= allowed(nodes[0], f"{key}.") if nodes else {key: in_words(properties[field.alias or name])}
        if nodes and type(None) in kinds:
            meanings[key] = "keys with values or null"
    return meanings


def in_words(values: dict[str, Any]) -> str:
    """Return a JSON schema of values as text, such as "a number from 0 to 1 or matched or published"."""
    if "description" in values:
        return str(values["description"])
    if "anyOf" in values:
        return " or ".join(in_words(each) for each in values["anyOf"])
    if "enum" in values or "const" in values:
        *first, last = values.get("enum") or [values["const"]]
        return f"{', '.join(first)} or {last}" if first else str(last)
    text = TYPES.get(values.get("type", ""), "")
    if "maximum" in values:
        text += f" from {values['minimum']} to {values['maximum']}"
    elif "minimum" in values:
        text += f" of at least {values['minimum']}"
    if "exclusiveMinimum" in values:
        text += f" above {values['exclusiveMinimum']}"
    if "multipleOf" in values:
        text += f" that {values['multipleOf']} divides"
    return f"{text} of {values['minItems']}: {in_words(values['items'])}" if "minItems" in values else text


def lines(file: Path, prefix: str = "") -> list[tuple[str, str, str]]:
    """Return key, value and comment of each line of a file of conf/ that holds a value."""
    rows, parents = [], [(-1, prefix)]
    for line in file.read_text(encoding="utf-8").splitlines():
        match = LINE.match(line)
        if match is None or match[2] == "defaults":
            continue
        depth, value = len(match[1]), match[3] or ""
        parents = [entry for entry in parents if entry[0] < depth]
        key = f"{parents[-1][1]}{match[2]}"
        if value:
            rows.append((key, value, match[4] or ""))
        else:
            parents.append((depth, f"{key}."))
    return rows


def page() -> str:
    """Return the page."""
    text = HEAD
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        options = [file.stem for file in sorted(folder.glob("*.yaml"))]
        text += f"| `{folder.name}` | {', '.join(f'`{option}`' for option in options)} |\n"
    text += KEYS
    rows = [*lines(CONF / "profile" / "paper.yaml")[1:], *lines(CONF / "config.yaml")]
    shown_files = [*SHOWN.items(), *((group, "module") for group in ("student", "teacher"))]
    rows += [row for group, option in shown_files for row in lines(CONF / group / f"{option}.yaml", f"{group}.")]
    types = allowed()
    first = {key: (key, value, meaning) for key, value, meaning in reversed(rows)}
    for key, value, meaning in (first.pop(key) for key, *_ in rows if key in first):
        if key in types:
            shown = "" if value == "???" else f"`{value}`"
            text += f"| `{key}` | {shown} | {types[key]} | {meaning} |\n"
    return text


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "configuration.md"
    target.write_text(page(), encoding="utf-8")
