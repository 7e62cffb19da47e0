"""Shows the lockstep launcher to Hydra, which takes launchers from the namespace ``hydra_plugins`` alone.

This folder has no ``__init__.py``: one would hide the plugins of other packages.
"""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from kdsweep import launcher


class LockstepLauncher(launcher.LockstepLauncher):
    """See kdsweep/launcher.py."""


@dataclass
class LockstepConf:
    """What ``hydra/launcher=lockstep`` can be told."""

    _target_: str = "hydra_plugins.kdsweep_lockstep.LockstepLauncher"
    devices: list[str] = field(default_factory=list)
    processes: int = 1
    plan: bool = False


ConfigStore.instance().store(group="hydra/launcher", name="lockstep", node=LockstepConf, provider="kdsweep")
