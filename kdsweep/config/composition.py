"""The configurations of a sweep's jobs, composed once for all that differ in plain values alone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cloudpickle
import hydra
from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict

from kdsweep import conf_dir
from kdsweep.config.grid import is_under
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

    def compose(self, overrides: Sequence[str], *, number: int) -> DictConfig:
        """Compose the configuration of one job.

        Args:
            overrides: of the job.
            number: of the job.
        """
        parsed = [self._parse(word) for word in overrides]
        changed = {own.key_or_group: own.value() for own in parsed if self._is_plain(own, parsed)}
        shape = tuple(own.key_or_group if own.key_or_group in changed else str(own.input_line) for own in parsed)
        if shape not in self._composed:
            self._composed[shape] = cloudpickle.dumps(self._loader.load_sweep_config(self._config, list(overrides)))
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


def with_home(words: Sequence[str]) -> list[str]:
    """Return overrides with the home folder for the ~ of KEY=~/folder, which a shell leaves as it is."""
    home = str(Path.home())
    return [re.sub(r"(?<=[=,])~(?=/)", lambda _: home, word) for word in words]


def check_splits(words: Sequence[str]) -> None:
    """Raise InputError for ``split=0``: Hydra reads a number, and options of a group are names."""
    for word in words:
        if match := re.fullmatch(r"split=(\d+(?:,\d+)*)", word):
            named = ",".join(f"s{number}" for number in match[1].split(","))
            raise InputError(f"{word} is not an option: the paper's random splits are s0, s1 and s2, so split={named}")


def check_methods(words: Sequence[str]) -> None:
    """Raise InputError for a method with a path or a loss: it brings its own."""
    given = dict(word.lstrip("+").partition("=")[::2] for word in words)
    if "none" not in given.get("method", "none").split(","):
        for key in ("path", "loss"):
            if given.get(key, "none") != "none":
                raise InputError(f"method={given['method']} brings paths and losses of its own: leave {key} out")


def quoting(word: str) -> str:
    """Return how to type an override that is no sentence of Hydra's grammar."""
    key, _, value = word.partition("=")
    quoted = value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"')
    typed = shlex.quote(f'{key}="{quoted}"')
    return f"{word} cannot be read: brackets, quotes, commas and = in a value need quotes within quotes: {typed}"


def compose(overrides: list[str]) -> DictConfig:
    """Compose the configuration of one cell from overrides, outside of a Hydra run.

    Raises:
        InputError: an override is wrong, or a key has no value.
    """
    check_splits(overrides)
    check_methods(overrides)
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = hydra.compose("config", with_home(overrides))
    except OverrideParseException as error:
        raise InputError(quoting(error.override)) from error
    except HydraException as error:
        raise InputError(" ".join(str(error).split()).partition(" To append")[0]) from error
    for key in _missing(OmegaConf.to_container(cfg)):
        raise InputError(f"{key} is missing: give it on the command line, {key}=...")
    return cfg


def _missing(value: Any, key: str = "") -> Iterator[str]:
    """Yield the keys without a value below a plain nested value."""
    if value == "???":
        yield key
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _missing(part, f"{key}.{name}".lstrip("."))
