"""The one command: ``python -m kdsweep`` trains cells, one per Hydra job; ``python -m kdsweep WORD`` is a subcommand.

A bare first word can never be an override, so that subcommands take nothing away from Hydra.
"""

from __future__ import annotations

import difflib
import getpass
import logging
import os
import re
import sys
from pathlib import Path

from kdsweep import cli, conf_dir
from kdsweep.core.errors import TRACEBACK, CellError, InputError, command, one_line, report


@command
def main() -> int:
    """Run a subcommand or train cells, as ``python -m kdsweep`` and as the console script ``kdsweep``."""
    _prepare_process()
    words, first = cli.app.commands, "".join(sys.argv[1:2])
    if first in (*words, "--help", "-h", "--version") or cli.COMPLETE in os.environ:
        return cli.main(sys.argv[1:])
    if re.fullmatch(r"[a-z]\w*", first):
        near = difflib.get_close_matches(first, words, n=1)
        hint = f"do you mean {near[0]}?" if near else f"it must be one of {', '.join(words)}, or overrides KEY=VALUE"
        raise InputError(f"{first} is not a word of this command; {hint}")
    return train()


def _prepare_process() -> None:
    """Give the process what libraries expect of it, or raise InputError: name, home, folder, docstrings, backend."""
    if sys.flags.optimize > 1:
        raise InputError("python -OO takes docstrings away, which segmentation-models-pytorch needs; -O may stay")
    try:
        getpass.getuser()  # MONAI cannot be imported without a name, which a container may not have
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())
    try:
        Path.home()  # nor MLflow without a home folder
    except RuntimeError as error:
        raise InputError("this user has no home folder; put one before the command, such as HOME=/tmp") from error
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise InputError("the working directory does not exist anymore; change to another folder") from error
    # A notebook passes on its backend, without which MONAI, which scores, cannot be imported.
    os.environ["MPLBACKEND"] = "Agg"


def train() -> int:
    """Run Hydra, which hands the jobs of the command to a launcher; return the exit code."""
    import hydra

    from kdsweep.config import overrides
    from kdsweep.core import signals
    from kdsweep.sweep import launcher

    launcher.arguments = sys.argv[1:]
    signals.install()
    logging.raiseExceptions = False  # "kdsweep ... | head" must not turn each later line into a traceback
    os.environ.setdefault(TRACEBACK, os.environ.get("HYDRA_FULL_ERROR", "0"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra hand exceptions on instead of printing them
    try:
        arguments = ["hydra.launcher.plan=true" if argument == "--plan" else argument for argument in sys.argv[1:]]
        options, typed = overrides.divide(arguments)
        sys.argv[1:] = launcher.as_sweep(options, typed)
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(launcher.train_cell)()
    except Exception as error:
        return report(error, user_message(error))
    return 0


def user_message(error: BaseException) -> str:
    """Return a message that the user can act on, from an exception and its causes."""
    from kdsweep.config import composition

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError | CellError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    if type(error).__module__.startswith(("hydra", "omegaconf")):
        return composition.one_line(error)
    return one_line(error)


if __name__ == "__main__":
    sys.exit(main())
