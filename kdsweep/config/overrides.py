"""The overrides of a command line, checked before Hydra composes anything: what Hydra takes without a word but drops.

Every command uses ``check``: those that train cells, and those that compose one configuration.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import OverrideParseException

from kdsweep import conf_dir
from kdsweep.core.errors import InputError

EXPERIMENT = "experiment"


def divide(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options and the overrides of a command line, which may stand in any order.

    Raises:
        InputError: an option does not exist.
    """
    parsed, unknown = get_args_parser().parse_known_intermixed_args(list(arguments))
    if unknown:
        raise InputError(f"{unknown[0]} is not an option of this command; --help lists them, overrides are KEY=VALUE")
    options, overrides = [], list(parsed.overrides)
    for argument in arguments:
        if overrides and argument == overrides[0]:
            overrides.pop(0)
        else:
            options.append(argument)
    return options, list(parsed.overrides)


def check_typed(options: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Return what ``check`` does of the two parts of a command line."""
    parsed = get_args_parser().parse_args(list(options))
    folders = [Path(parsed.config_dir)] if parsed.config_dir else []
    return check(overrides, multirun=parsed.multirun or "hydra.mode=MULTIRUN" in overrides, folders=folders)


def check(overrides: Sequence[str], *, multirun: bool = False, folders: Sequence[Path] = ()) -> list[str]:
    """Return overrides with the home folder for ~.

    Args:
        overrides: as they are typed.
        multirun: whether a key may have several values.
        folders: further folders of configuration files (``--config-dir``).

    Raises:
        InputError: one cannot be read, or Hydra would drop a part of what they say.
    """
    overrides = _with_home(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise InputError(quoting(error.override)) from error
    if unnamed := [override.input_line for override in parsed if not override.key_or_group]:
        raise InputError(quoting(str(unnamed[0])))
    options = group_options(folders)
    _check_once(parsed, options)
    for override in parsed:
        if override.is_sweep_override() and not multirun:
            raise InputError(_several(override, is_group=override.key_or_group in options))
        if override.key_or_group in options and not override.is_delete():
            _check_option(override, options[override.key_or_group])
    _check_methods({override.key_or_group: values(override) for override in parsed})
    return overrides


def group_options(folders: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Return the options of each group of configuration files.

    Args:
        folders: beside the package's folder.
    """
    options: dict[str, set[str]] = {}
    for file in (file for folder in (conf_dir(), *folders) for file in Path(folder).glob("*/*.yaml")):
        options.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(names) for group, names in options.items()}


def values(override: Override) -> list[Any]:
    """Return the values that an override gives: several for a choice such as ``path=L,H``."""
    value = override.value()
    several = value.list if isinstance(value, ChoiceSweep) else [value]
    return [each.text if isinstance(each, QuotedString) else each for each in several]


def quoting(word: str) -> str:
    """Return how to type an override that is not in Hydra's grammar."""
    key, separator, value = word.partition("=")
    if not separator or not key:
        return f"{word} is not an override: type KEY=VALUE, such as path=L or train.epochs=10"
    quoted = value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"')
    typed = shlex.quote(f'{key}="{quoted}"')
    return f"{word} cannot be read: brackets, quotes, commas and = in a value need quotes within quotes: {typed}"


def _with_home(words: Sequence[str]) -> list[str]:
    """Return overrides with the home folder for the ~ of KEY=~/folder, which a shell leaves as it is."""
    home = str(Path.home())
    return [re.sub(r"(?<=[=,])~(?=/)", lambda _: home, word) for word in words]


def _check_once(parsed: Sequence[Override], groups: Container[str]) -> None:
    """Raise InputError if a group of files has two options, and name a key with two values: Hydra takes the last."""
    first: dict[str, Override] = {}
    for override in parsed:
        before = first.setdefault(override.get_key_element().lstrip("+~"), override)
        if before.input_line == override.input_line:
            continue
        key, both = override.key_or_group, f"{before.input_line} and {override.input_line}"
        if key not in groups:  # a script may add to options of its own
            sys.stderr.write(f"kdsweep: {both} give {key} twice: the last one counts\n")
            continue
        texts = [str(each.input_line).partition("=")[2] for each in (before, override)]
        sweep = f", or run each: -m {key}={','.join(texts)}" if all(texts) and key != EXPERIMENT else ""
        raise InputError(f"{both} give {key} twice: leave one out{sweep}")


def _several(override: Override, *, is_group: bool) -> str:
    """Return why an override of several values needs -m, and how one value with commas is typed."""
    key, _, text = str(override.input_line).partition("=")
    line = f"{key}={text} gives several values: -m runs one cell for each"
    if is_group or not override.is_choice_sweep():
        return line
    return f"{line}; one value is a list, '{key}=[{text}]', or a text, '{key}=\"{text}\"'"


def _check_option(override: Override, options: Sequence[str]) -> None:
    """Raise InputError if an override does not give a group of configuration files one name at a time."""
    typed, _, text = str(override.input_line).partition("=")
    several = values(override)
    for value in several:
        if isinstance(value, list):
            sweep = f"-m {typed}={','.join(map(str, value))} runs each"
            remedy = "run one command for each" if override.key_or_group == EXPERIMENT else sweep
            raise InputError(f"{typed}={text} is a list, of which only the last option counts: {remedy}")
        if value == "" or isinstance(value, int | float):
            raise InputError(f"{typed}={text} is not an option; {_choices(typed, several, options)}")


def _choices(group: str, several: Sequence[Any], options: Sequence[str]) -> str:
    """Return what a group has; the paper's splits are named, not numbered."""
    if group == "split" and set(several) <= {0, 1, 2}:
        named = ",".join(f"s{number}" for number in several)
        return f"the paper's random splits are s0, s1 and s2, so split={named}"
    return f"{group.lstrip('+')} has: {', '.join(options)}"


def _check_methods(typed: Mapping[str, list[Any]]) -> None:
    """Raise InputError for a method with a path or a loss: it brings its own."""
    methods = typed.get("method", ["none"])
    for key in ("path", "loss"):
        if "none" not in methods and typed.get(key, ["none"]) != ["none"]:
            names = ",".join(map(str, methods))
            raise InputError(f"method={names} brings paths and losses of its own: leave {key} out")
