"""The overrides of a command line, checked before Hydra composes them: Hydra drops parts of some without a message."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import OverrideParseException

from kdsweep import conf_dir
from kdsweep.core.errors import InputError


def divide(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options and the checked overrides of a command line, which may be in any order.

    Raises:
        InputError: an option does not exist, or an override is wrong.
    """
    parsed, unknown = get_args_parser().parse_known_intermixed_args(list(arguments))
    if unknown:
        raise InputError(f"{unknown[0]} is not an option of this command; --help lists them, overrides are KEY=VALUE")
    options, rest = [], list(parsed.overrides)
    for argument in arguments:
        if rest and argument == rest[0]:
            rest.pop(0)
        else:
            options.append(argument)
    multirun = parsed.multirun or "hydra.mode=MULTIRUN" in parsed.overrides
    folders = [Path(parsed.config_dir)] if parsed.config_dir else []
    return options, check(parsed.overrides, multirun=multirun, folders=folders)


def check(overrides: Sequence[str], *, multirun: bool = False, folders: Sequence[Path] = ()) -> list[str]:
    """Return overrides with the home folder for the ~ of KEY=~/folder, which a shell leaves as it is.

    With ``multirun`` a key may have several values; ``folders`` hold further configuration files (``--config-dir``).

    Raises:
        InputError: one cannot be read, or Hydra would drop a part of it.
    """
    home = str(Path.home())
    overrides = [re.sub(r"(?<=[=,])~(?=/)", lambda _: home, override) for override in overrides]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise InputError(quoting(error.override)) from error
    groups = group_options(folders)
    first: dict[str, Override] = {}
    for override in parsed:
        if not override.key_or_group:
            raise InputError(quoting(str(override.input_line)))
        before = first.setdefault(override.get_key_element().lstrip("+~"), override)
        if before.input_line != override.input_line:
            line = f"{before.input_line} and {override.input_line} give {override.key_or_group} twice"
            if override.key_or_group in groups:
                raise InputError(f"{line}: leave one out, or run one command for each")
            sys.stderr.write(f"kdsweep: {line}: the last one counts\n")  # a script may add to options
        _check_values(override, groups.get(override.key_or_group), multirun=multirun)
    _check_methods({key: _values(override) for key, override in first.items()})
    return overrides


def with_ensembles(overrides: Sequence[str]) -> list[str]:
    """Return overrides for Hydra, which would merge the files of ``teacher=[a,b]``: b becomes a further Teacher."""
    expanded: list[str] = []
    for override in overrides:
        listed = re.fullmatch(r"teacher=\[(.+)\]", override)
        if listed is None:
            expanded.append(override)
            continue
        first, *others = (name.strip() for name in listed[1].split(","))
        expanded.append(f"teacher={first}")
        for number, name in enumerate(others):
            key = name if name not in others[:number] else f"{name}_{number + 2}"
            expanded.append(f"+teacher@teacher.ensemble.{key}={name}")
    return expanded


def group_options(folders: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Return the options of each group of configuration files, in the package's folder and in others."""
    options: dict[str, set[str]] = {}
    for file in (file for folder in (conf_dir(), *folders) for file in Path(folder).glob("*/*.yaml")):
        options.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(names) for group, names in options.items()}


def quoting(override: str) -> str:
    """Return how to type an override that is not in Hydra's grammar."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        return f"{override} is not an override: type KEY=VALUE, such as path=L or train.epochs=10"
    quoted = value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"')
    typed = shlex.quote(f'{key}="{quoted}"')
    return f"{override} cannot be read: brackets, quotes, commas and = in a value need quotes within quotes: {typed}"


def _values(override: Override) -> list[Any]:
    """Return the values that an override gives: several for a choice such as ``path=L,H``."""
    value = override.value()
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return [each.text if isinstance(each, QuotedString) else each for each in values]


def _check_values(override: Override, options: Sequence[str] | None, *, multirun: bool) -> None:
    """Raise InputError for several values without -m, and unless a group with options takes one name at a time."""
    typed, _, text = str(override.input_line).partition("=")
    if override.is_sweep_override() and not multirun:
        remedy = f"-m runs one cell for each; one value is a list, '{typed}=[{text}]', or a text, '{typed}=\"{text}\"'"
        raise InputError(f"{typed}={text} gives several values: {remedy}")
    if options is None or override.is_delete():
        return
    for value in _values(override):
        if isinstance(value, list) and typed == "teacher" and len(value) > 1:
            if missing := [name for name in value if name not in options]:
                raise InputError(f"teacher={missing[0]} is not an option; teacher has: {', '.join(options)}")
            continue
        if isinstance(value, list):
            remedy = f"run one command for each, or with -m {typed}={','.join(map(str, value))}"
            raise InputError(f"{typed}={text} is a list, of which only the last option counts: {remedy}")
        if value == "" or isinstance(value, int | float):
            raise InputError(f"{typed}={text} is not an option; {override.key_or_group} has: {', '.join(options)}")


def _check_methods(typed: dict[str, list[Any]]) -> None:
    """Raise InputError for a method with a path or a loss, which it brings itself."""
    methods = typed.get("method", ["none"])
    for key in ("path", "loss"):
        if "none" not in methods and typed.get(key, ["none"]) != ["none"]:
            names = ",".join(map(str, methods))
            raise InputError(f"method={names} brings its paths and losses: leave {key} out")
