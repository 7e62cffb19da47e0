"""Hydra's compositions, each file read and each choice of files merged once per process, not 0.2 s of a CPU each time.

Only of the shipped files, which no test changes. Overrides are parsed and applied each time, as they are by Hydra.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.plugins.config_source import ConfigSource

from kdsweep import conf_dir

load = ConfigRepository.load_config
merge = ConfigLoaderImpl._compose_config_from_defaults_list
memory: dict[tuple[object, ...], bytes] = {}  # pickles: what comes out of them may be changed


def remembered(compute: Callable[[], Any], sources: Sequence[ConfigSource], *key: object) -> Any:
    """The result of this call for these sources and this key, computed if it is the first one."""
    names = tuple(f"{source.scheme()}:{source.path}" for source in sources)
    if any(name.startswith("file:") and name != f"file:{conf_dir()}" for name in names):  # the user's, or a test's
        return compute()
    if (names, *key) not in memory:
        memory[(names, *key)] = cloudpickle.dumps(compute())
    return cloudpickle.loads(memory[(names, *key)])


def load_once(repository: ConfigRepository, config_path: str) -> Any:
    return remembered(lambda: load(repository, config_path), repository.sources, "file", config_path)


def merge_once(loader: ConfigLoaderImpl, defaults: Sequence[Any], repo: Any) -> Any:
    return remembered(lambda: merge(loader, defaults, repo), repo.get_sources(), "choice", *map(repr, defaults))


ConfigRepository.load_config = load_once
ConfigLoaderImpl._compose_config_from_defaults_list = merge_once
