"""Studies in Optuna's storage: the trials of one method on one split, the choice among them, and their readers.

A trial is in the storage, RUNNING, from its first value until it has ended. A command that was killed finds its trials
there and what they have reported, and their checkpoints in the folders of their cells.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, GridSampler, QMCSampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from kdsweep.core import databases
from kdsweep.core.errors import InputError, one_line
from kdsweep.store import sweep_file
from kdsweep.tuning import space as spaces
from kdsweep.tuning.space import Space

SAMPLER, PRUNER = "hydra.sweeper.sampler", "hydra.sweeper.pruner"

# ---- storage -------------------------------------------------------------------------------------------------------


def default_storage(store: Path) -> str:
    """Return the address of the database for trials that is in a store, and moves with it."""
    return databases.sqlite_url(store.absolute() / "optuna.db")


@contextlib.contextmanager
def using(storage: str) -> Iterator[None]:
    """Turn every error of Optuna, SQLAlchemy or a driver into one line that names the storage's address."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        where = f"hydra.sweeper.storage={databases.shown(storage)}"
        raise InputError(f"{where} cannot be used ({one_line(error)}); check it and run the same command") from error


def open_storage(storage: str) -> RDBStorage:
    """Open Optuna's database at an address; a SQLite file waits for its other writers."""
    options = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else None
    with using(storage):
        return RDBStorage(storage, engine_kwargs=options)


def make(options: Mapping[str, Any], *, key: str) -> Any:
    """Return the sampler or pruner of Optuna that the options of a key, ``_target_`` and arguments, name.

    Raises:
        InputError: there is no such class, or it does not take these arguments.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # QMC is, since 3.0
            made = hydra.utils.instantiate(dict(options), _convert_="all")
    except Exception as error:
        raise InputError(f"{key}={dict(options)}: {one_line(error.__cause__ or error)}") from error
    if not isinstance(made, BaseSampler if key == SAMPLER else BasePruner):
        raise InputError(f"{key}._target_={options.get('_target_')} is not one of optuna.{key.rpartition('.')[2]}s")
    return made


# ---- trials --------------------------------------------------------------------------------------------------------


def settle(study: optuna.Study, fixed: Mapping[str, Any]) -> None:
    """Record what decides the results of a study's trials; raise InputError if they were made with other values."""
    before = study.user_attrs
    for key, value in fixed.items():
        if before.get(key, value) != value:
            change = f"study {study.study_name} has trials with another {key} ({before[key]}, now {value})"
            raise InputError(f"{change}; give another sweep_name")
        study.set_user_attr(key, value)


def trials_of(study: optuna.Study) -> list[FrozenTrial]:
    """Return all trials of a study, in the order of their numbers."""
    return study.get_trials(deepcopy=False)


def ended(study: optuna.Study) -> int:
    """Return how many trials of a study have ended."""
    return sum(trial.state.is_finished() for trial in trials_of(study))


def ask(
    study: optuna.Study, space: Space, *, configured: Mapping[str, Any], sampler: Mapping[str, Any], count: int
) -> list[FrozenTrial]:
    """Ask for trials until there are so many; return those that are RUNNING.

    A trial of which a killed command has drawn some values gets those that it would have had. Trial 0 has the
    configured values that are in the space. The sampler is one of Optuna's by ``_target_``, by default TPE.

    Raises:
        InputError: there is no such sampler, or it cannot draw from this space.
    """
    if not trials_of(study):
        first = {key: space[key] for key in configured}
        study.add_trial(optuna.create_trial(state=TrialState.RUNNING, params=dict(configured), distributions=first))
    for number in range(1, count):
        begun = trials_of(study)[number : number + 1]
        if begun and begun[0].params.keys() >= space.keys():
            continue
        try:
            study.sampler = make_sampler(sampler, space, seed_of=f"{number}")
            trial = optuna.Trial(study, begun[0]._trial_id) if begun else study.ask()
            for key, distribution in space.items():
                study.sampler = make_sampler(sampler, space, seed_of=f"{number} {key}")
                trial._suggest(key, distribution)
        except InputError:
            raise
        except Exception as error:  # of the sampler, such as a range where it takes lists
            raise InputError(f"{SAMPLER}: {one_line(error)}") from error
    study.sampler = optuna.samplers.RandomSampler()  # some samplers do not let a trial end
    return [trial for trial in trials_of(study)[:count] if trial.state is TrialState.RUNNING]


def make_sampler(options: Mapping[str, Any], space: Space, *, seed_of: str) -> BaseSampler:
    """Make the sampler that draws one value; its seed follows from that of the options and what it draws.

    So a trial's values do not depend on what was drawn before a break, and methods with equal keys begin with equal
    values. A sequence (QMCSampler, GridSampler) has one seed for all trials: a trial is the point of its number.
    """
    options = {"_target_": "optuna.samplers.TPESampler", **options}
    kind, seed = hydra.utils.get_class(options["_target_"]), options.get("seed", 0)
    if issubclass(kind, GridSampler):
        if ranges := [key for key, values in space.items() if not isinstance(values, CategoricalDistribution)]:
            raise InputError(f"{spaces.KEY}: {ranges[0]} is a range, and GridSampler takes lists of values")
        options["search_space"] = {key: spaces.ends(values) for key, values in space.items()}
    if "seed" in inspect.signature(kind).parameters:
        is_sequence = issubclass(kind, QMCSampler | GridSampler)
        options["seed"] = seed if is_sequence else zlib.crc32(f"{seed} {seed_of}".encode())
    sampler: BaseSampler = make(options, key=SAMPLER)
    return sampler


def annotate(study: optuna.Study, number: int, **about: Any) -> None:
    """Record something of a trial that has not ended."""
    trial = optuna.Trial(study, trials_of(study)[number]._trial_id)
    for key, value in about.items():
        trial.set_user_attr(key, value)


def tell(study: optuna.Study, number: int, outcome: float | Exception, *, seconds: Sequence[float]) -> None:
    """End a trial, unless it was pruned, with its validation Dice or its error; ``seconds`` are those of its epochs."""
    if trials_of(study)[number].state.is_finished():
        return
    annotate(study, number, seconds=list(seconds))
    if isinstance(outcome, Exception):
        annotate(study, number, error=str(outcome))
        study.tell(number, state=TrialState.FAIL)
    else:
        study.tell(number, outcome)


def best_of(study: optuna.Study) -> FrozenTrial | None:
    """Return the trial with the best validation Dice of those that are complete; the first of equal ones.

    No test score enters: none is computed before the choice.
    """
    complete = [trial for trial in trials_of(study) if trial.state is TrialState.COMPLETE]
    return max(complete, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)


# ---- readers -------------------------------------------------------------------------------------------------------


def read_studies(store: Path, sweep: str) -> list[optuna.Study]:
    """Return the studies of a sweep; of several of one method and split, with other settings, that used last."""
    storage = sweep_file.read(store, sweep).storage
    if storage is None:
        return []
    opened = open_storage(storage or default_storage(store))
    with using(opened.url):
        studies = [optuna.load_study(study_name=name, storage=opened) for name in optuna.get_all_study_names(opened)]
        # The last attribute that is set is "opened": a study without it was begun by a command that was killed.
        begun = [(study.user_attrs, study) for study in studies if "opened" in study.user_attrs]
        begun.sort(key=lambda pair: float(pair[0]["opened"]))
        return list({(of["notation"], of["split"]): study for of, study in begun if of["sweep"] == sweep}.values())


def read_trials(studies: Sequence[optuna.Study]) -> pd.DataFrame:
    """Return the ended trials of studies.

    Returns:
        A row per trial: notation, split, role, number, round (from 0), state, is_chosen, value (validation Dice of a
        complete one, the last one of a pruned one), params (tuned values, as a dict), dice and seconds (of each epoch).
    """
    method = ["notation", "split", "role"]
    columns = [*method, "number", "round", "state", "is_chosen", "value", "params", "dice", "seconds"]
    rows: list[list[Any]] = []
    for study in studies:
        attrs, best = study.user_attrs, best_of(study)
        for trial in (each for each in trials_of(study) if each.state.is_finished()):
            way: list[Any] = [trial.number, trial.number // int(attrs["round"]), trial.state.name]
            way += [best is not None and trial.number == best.number, trial.value, trial.params]
            dice = [value for _, value in sorted(trial.intermediate_values.items())]
            rows.append([*(attrs[key] for key in method), *way, dice, trial.user_attrs.get("seconds", [])])
    return pd.DataFrame(rows, columns=columns)


def one_row_each(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials of ``read_trials`` for a file.

    Returns:
        A row per trial: notation, split, number, state, is_chosen, epochs (that were trained), val_dice_percent (the
        best of these, NaN of none), seconds, and a column per tuned key, NaN where the method does not use it.
    """
    counted = trials[["notation", "split", "number", "state", "is_chosen"]].reset_index(drop=True)
    counted["epochs"] = [len(dice) for dice in trials["dice"]]
    counted["val_dice_percent"] = [100 * max(dice, default=math.nan) for dice in trials["dice"]]
    counted["seconds"] = [sum(seconds) for seconds in trials["seconds"]]
    values = pd.DataFrame(list(trials["params"]), index=counted.index)
    return counted.join(values[sorted(values, key=str)]).sort_values(["notation", "split", "number"])
