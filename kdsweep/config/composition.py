"""The configurations of a sweep's jobs, composed once for all that differ in plain values alone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import cloudpickle
import hydra
from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from kdsweep import conf_dir
from kdsweep.config import messages, overrides, schema, user_code
from kdsweep.config.grid import is_under
from kdsweep.config.schema import Settings
from kdsweep.core.errors import InputError


class Composer:
    """Gives each job the configuration that Hydra's ``load_sweep_config`` would, which takes 70 ms: a copy takes 2.

    Args:
        loader: Hydra's own.
        config: of the sweep.
    """

    def __init__(self, loader: ConfigLoader, config: DictConfig) -> None:
        self._loader, self._config = loader, config
        self._composed: dict[tuple[str, ...], bytes] = {}  # a pickle is copied faster than a DictConfig
        self._is_value = cache(self._look_up)
        self._parse = cache(OverridesParser.create(config_loader=loader).parse_override)

    def compose(self, words: Sequence[str], *, number: int) -> DictConfig:
        """Compose the configuration of one job.

        Args:
            words: overrides of the job.
            number: of the job.
        """
        parsed = [self._parse(word) for word in words]
        changed = {own.key_or_group: own.value() for own in parsed if self._is_plain(own, parsed)}
        shape = tuple(own.key_or_group if own.key_or_group in changed else str(own.input_line) for own in parsed)
        if shape not in self._composed:
            self._composed[shape] = cloudpickle.dumps(self._loader.load_sweep_config(self._config, list(words)))
        config: DictConfig = cloudpickle.loads(self._composed[shape])
        for key, value in changed.items():
            OmegaConf.update(config, key, value)
        job, own = config.hydra.job, [each for each in parsed if not each.is_hydra_override()]
        config.hydra.overrides.task = [each.input_line for each in own]
        job.override_dirname = get_overrides_dirname(own, **job.config.override_dirname)
        with open_dict(config):
            job.id = job.num = number
        return config

    def _is_plain(self, own: Override, among: Sequence[Override]) -> bool:
        """Return whether an override gives one value to a key that no other override touches, and composes nothing."""
        key = own.key_or_group
        if own.type is not OverrideType.CHANGE or not isinstance(own.value(), str | int | float | None):
            return False
        others = [other.key_or_group for other in among if other is not own]
        touched = any(is_under(key, (other,)) or is_under(other, (key,)) for other in others)
        return not touched and self._is_value(key)

    def _look_up(self, key: str) -> bool:
        """Return whether a key is that of a value: not of a group of files, nor of a part, nor Hydra's own."""
        if key.startswith("hydra") or key in self._config.hydra.runtime.choices:
            return False
        now = OmegaConf.select(self._config, key)
        return now is not None and not OmegaConf.is_config(now)


class Composed(Sequence[DictConfig]):
    """The configurations of all jobs, each composed anew when it is asked for: ten thousand would take 1.6 GB.

    Args:
        composer: of the sweep.
        jobs: overrides of each.
        first: number of the first one.
    """

    def __init__(self, composer: Composer, jobs: Sequence[Sequence[str]], *, first: int) -> None:
        self._composer, self._jobs, self._first = composer, jobs, first

    def __len__(self) -> int:
        """Return how many jobs there are."""
        return len(self._jobs)

    def __getitem__(self, index: Any) -> Any:
        """Compose the configuration of one job."""
        return self._composer.compose(self._jobs[index], number=self._first + index)


def compose(words: Sequence[str]) -> Settings:
    """Return the settings of one cell from overrides, outside of a Hydra run.

    Raises:
        InputError: an override is wrong, or a value is not allowed.
    """
    return read(compose_config(words))


def compose_config(words: Sequence[str]) -> DictConfig:
    """Compose the configuration of one cell from overrides as Hydra does, unchecked.

    Raises:
        InputError: an override is wrong.
    """
    checked = overrides.check(words)
    try:
        return _compose(checked)
    except HydraException as error:
        raise InputError(one_line(error, checked)) from error


def read(cfg: DictConfig) -> Settings:
    """Check a configuration and return its settings, without Hydra's part, references resolved.

    Raises:
        InputError: a value is not allowed, or a key does not exist.
    """
    try:
        parts = {str(key): cfg[key] for key in cfg if key != "hydra"}
        values = {
            key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for key, value in parts.items()
        }
    except OmegaConfBaseException as error:
        raise InputError(messages.of_reference(error, cfg)) from error
    return schema.read(values, source=partial(messages.source_of, cfg))


def _compose(words: Sequence[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra.compose("config", list(words))


def build(values: Mapping[str, Any]) -> Any:
    """Return the object that ``_target_`` of these settings names, made with the other values as arguments.

    Raises:
        InputError: it does not exist, or does not take these arguments.
    """
    try:
        return hydra.utils.instantiate(user_code.canonical(dict(values)))
    except InstantiationException as error:
        raise InputError(f"_target_={values['_target_']}: {messages.of_target(error)}") from error


def check_grid(cfg: DictConfig, words: Sequence[str]) -> None:
    """Raise InputError if a job's experiment has a grid of which the job is not a cell: Hydra would drop the grid.

    Hydra reads the grid of one experiment, in a multirun.

    Args:
        cfg: configuration of the job, with Hydra's part.
        words: overrides of the job.
    """
    params = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    typed = {word.lstrip("+~").partition("=")[0] for word in words}
    dropped = [key for key in map(str, params) if key.lstrip("+") not in typed]
    if not dropped:
        return
    name = cfg.hydra.runtime.choices.get("experiment")
    lead = f"+experiment={name}" if name else f"hydra.sweeper.params.{dropped[0]}"
    if cfg.hydra.mode == RunMode.MULTIRUN:
        raise InputError(f"{lead} has a grid ({', '.join(dropped)}), and a command runs one: run one command for each")
    values = " ".join(f"{key}=..." for key in dropped)
    raise InputError(f"{lead} has a grid ({', '.join(dropped)}): add -m to run it, or choose one cell with {values}")


def one_line(error: BaseException, words: Sequence[str] = ()) -> str:
    """Return an error of Hydra or OmegaConf in one line, with key, value and remedy.

    Args:
        error: the exception.
        words: the overrides, which decide what keys there are.
    """
    text = " ".join(str(error).split())
    if isinstance(error, OverrideParseException):
        return overrides.quoting(error.override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option} is not an option; {group} has: {', '.join(error.options)}"
    if isinstance(error, OmegaConfBaseException):
        return messages.of_reference(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _no_key(match[1], words)
    if match := re.search(r"An item is already at '([^']+)'", text):
        return f"+{match[1]} is not allowed: the key exists, so leave + out, {match[1]}=..."
    if match := re.search(r"Error merging override (.+)", text):
        reason = messages.reason(error.__cause__ or error)
        return f"{match[1]} is not allowed: {reason}"
    if match := re.search(r"Additional config directory '(.+)' not found", text):
        return f"--config-dir {match[1]}: no such folder"
    return text


def _no_key(key: str, words: Sequence[str]) -> str:
    """Return what a key that does not exist could have been."""
    if key.startswith("hydra"):
        return f"{key} has no such key yet: to add one put + before it, +{key}=..."
    groups = overrides.group_options()
    try:
        chosen = [word for word in words if word.partition("=")[0].lstrip("+") in groups.keys() - {key}]
        node = _compose([word.partition(",")[0] for word in chosen])
    except (HydraException, OmegaConfBaseException):
        return f"{key} is not a key of the configuration; see python -m kdsweep --cfg job"
    parents, name = [], key
    while "." in name and OmegaConf.is_dict(node.get(name.partition(".")[0])):
        parent, _, name = name.partition(".")
        parents.append(f"{parent}.")
        node = node[parent]
    if name in node:
        return f"{key} does not take that value: give its keys one by one, {key}.KEY=..."
    if key in groups:
        word = next((word for word in words if word.startswith(f"{key}=")), f"{key}=...")
        return f"{key} is not set by default: put + before it, +{word}"
    lead, keys = "".join(parents), sorted(map(str, node))
    near = difflib.get_close_matches(name.partition(".")[0], keys, n=1)
    hint = f"do you mean {lead}{near[0]}? " if near else ""
    return f"{key} is not a key of the configuration; {hint}{lead.rstrip('.') or 'it'} has: {', '.join(keys)}"
