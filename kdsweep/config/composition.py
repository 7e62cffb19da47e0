"""The configurations of a sweep's jobs, composed by Hydra and checked, with each error in one line."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import cloudpickle
import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from kdsweep import conf_dir
from kdsweep.config import decisions, grid, overrides
from kdsweep.config.fields import NAME_RULE, is_name
from kdsweep.config.grid import is_under
from kdsweep.config.networks import logits_of
from kdsweep.config.schema import KDPathNode, Settings
from kdsweep.config.user_code import canonical
from kdsweep.core.errors import InputError

# In the arguments of a network: the number of its logits, ``${logits:${oc.select:data.classes,null}}``.
OmegaConf.register_new_resolver("logits", lambda classes: logits_of(classes or ()), replace=True)
MESSAGES = {  # of Hydra and OmegaConf
    r"Missing mandatory value: (\S+)": "{0} is missing: give it on the command line, {0}=...",
    r"node `([\w.]+)` is not a container": "{0} does not take that value: give its keys one by one, {0}.KEY=...",
    r"An item is already at '([^']+)'": "+{0} is not allowed: the key exists, so leave + out, {0}=...",
    r"Additional config directory '(.+)' not found": "--config-dir {0}: no such folder",
    r"Could not override '(hydra\.(?:launcher|sweeper)\.[^']*)'": "{0}: no such key here, and none without -m",
    r"Could not override '(hydra[^']*)'": "{0} has no such key yet: to add one put + before it, +{0}=...",
}


def compose_jobs(loader: ConfigLoader, config: DictConfig, jobs: Sequence[Sequence[str]]) -> Iterator[DictConfig]:
    """Yield the configuration of each job of a sweep, from its overrides: 10,000 at a time would take 1.6 GB.

    Hydra's ``load_sweep_config`` takes 70 ms. Jobs that differ in plain values alone share it: a copy takes 2 ms.
    """
    shared: dict[tuple[str, ...], bytes] = {}  # a pickle is copied faster than a DictConfig
    has_value = cache(partial(_has_value, config))
    parse = cache(OverridesParser.create(config_loader=loader).parse_override)
    for job in jobs:
        parsed = [parse(override) for override in job]
        plain = {
            each.key_or_group: each.value()
            for each in parsed
            if has_value(each.key_or_group) and _is_plain(each, parsed)
        }
        shape = tuple(each.key_or_group if each.key_or_group in plain else str(each.input_line) for each in parsed)
        if shape not in shared:
            shared[shape] = cloudpickle.dumps(loader.load_sweep_config(config, overrides.with_ensembles(job)))
        composed: DictConfig = cloudpickle.loads(shared[shape])
        for key, value in plain.items():
            OmegaConf.update(composed, key, value)
        for typed in (line for line in job if line.startswith("teacher=[")):
            composed.hydra.runtime.choices.teacher = typed.partition("=")[2]  # all of an ensemble
        composed.hydra.overrides.task = [each.input_line for each in parsed if not each.is_hydra_override()]
        composed.hydra.job.override_dirname = "???"  # of another job
        yield composed


def _has_value(config: DictConfig, key: str) -> bool:
    """Return whether a key has a plain value: it is not a group of files, nor a section, nor of Hydra."""
    if key.startswith("hydra") or key in config.hydra.runtime.choices:
        return False
    value = OmegaConf.select(config, key)
    return value is not None and not OmegaConf.is_config(value)


def _is_plain(override: Override, parsed: Sequence[Override]) -> bool:
    """Return whether an override gives one value to a key that no other override of the job touches."""
    if override.type is not OverrideType.CHANGE or not isinstance(override.value(), str | int | float | None):
        return False
    key, others = override.key_or_group, [each.key_or_group for each in parsed if each is not override]
    return not any(is_under(key, (each,)) or is_under(each, (key,)) for each in others)


def compose(typed: Sequence[str]) -> Settings:
    """Return the settings of one cell from overrides, outside of a Hydra run.

    Raises:
        InputError: an override is wrong, or a value is not allowed.
    """
    return read(compose_config(typed))


def compose_config(typed: Sequence[str]) -> DictConfig:
    """Compose the configuration of one cell from overrides as Hydra does, unchecked.

    Raises:
        InputError: an override is wrong.
    """
    checked = overrides.check(typed)
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return hydra.compose("config", overrides.with_ensembles(checked))
    except HydraException as error:
        raise InputError(one_line(error)) from error


def read(config: DictConfig) -> Settings:
    """Check a configuration and return its settings, without Hydra's part, references resolved.

    Raises:
        InputError: a value is not allowed, or a key does not exist.
    """
    try:
        nodes = {str(key): config[key] for key in config if key != "hydra"}
        values = {
            key: OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
            for key, node in nodes.items()
        }
    except OmegaConfBaseException as error:
        raise InputError(one_line(error)) from error
    return check(values)


def check(values: Mapping[str, Any]) -> Settings:
    """Check nested plain values and return them as settings.

    Raises:
        InputError: for the first wrong value, in one line with its key, the value and what is allowed.
    """
    try:
        sections = {key: canonical(value) for key, value in values.items() if isinstance(value, Mapping)}
        settings = Settings.model_validate({**values, **sections})  # a name such as 1e3 is not 1000
    except ValidationError as error:
        raise InputError(_message(error, values)) from None
    for conflict in _conflicts(settings):
        raise InputError(conflict)
    return settings


def build(values: Mapping[str, Any]) -> Any:
    """Return the object that ``_target_`` of these settings names, made with the other values as arguments.

    Raises:
        InputError: it does not exist, or does not take these arguments.
    """
    try:
        return hydra.utils.instantiate(canonical(dict(values)))
    except InstantiationException as error:
        cause: BaseException = error  # Hydra wraps the first error in its errors
        while isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {_reason(cause).partition(', set env var')[0]}"
        module, _, name = str(values["_target_"]).rpartition(".")
        if reason.endswith(f"{module!r} is not a package"):
            reason = f"module {module} has no {name}"
        raise InputError(f"_target_={values['_target_']}: {reason}") from error


def check_grid(config: DictConfig, typed: Sequence[str], *, multirun: bool) -> None:
    """Raise InputError if an experiment has a grid of which the job is not a cell: Hydra would drop the grid.

    ``typed`` are the overrides of the job. A command with -m (``multirun``) has the grid of another experiment.
    """
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    keys = {override.lstrip("+~").partition("=")[0] for override in typed}
    dropped = [key for key in map(str, params) if key.lstrip("+") not in keys]
    if dropped:
        name = config.hydra.runtime.choices.get("experiment")
        lead = f"+experiment={name}" if name else f"hydra.sweeper.params.{dropped[0]}"
        one_cell = f"add -m to run it, or choose one cell with {' '.join(f'{key}=...' for key in dropped)}"
        remedy = "run one command for each experiment" if multirun else one_cell
        raise InputError(f"{lead} has a grid ({', '.join(dropped)}): {remedy}")


def one_line(error: BaseException) -> str:
    """Return an error of Hydra or OmegaConf in one line, with key, value and remedy."""
    text, cause = _reason(error), error.__cause__ or error
    if isinstance(error, OverrideParseException):
        return overrides.quoting(error.override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option} is not an option; {group} has: {', '.join(error.options)}"
    for pattern, message in MESSAGES.items():
        if match := re.search(pattern, text):
            return message.format(match[1])
    if match := re.search(r"Could not override '([^']+)'", text):
        return _no_key(match[1])
    if match := re.search(r"Error merging override (.+)", text):
        return f"{match[1]} is not allowed: {_reason(cause)}"
    if not isinstance(error, OmegaConfBaseException):
        return text
    if "Recursive interpolation" in text:
        text = "it refers to itself; give it a value"
    return f"{error.full_key or error.key} cannot be read: {text}"


def _reason(error: BaseException) -> str:
    """Return the message of an error, without OmegaConf's lines on keys and types."""
    return " ".join(str(error).partition("\n    full_key:")[0].split())


def _no_key(key: str) -> str:
    """Return what a key that does not exist could be."""
    node = decisions.KEYS.get(key)
    if node is not None and node.is_node:
        return f"{key} does not take that value: give its keys one by one, {key}.KEY=..."
    if node is not None or key in overrides.group_options():
        return f"{key} is not set by default: put + before it, +{key}=..."
    near = difflib.get_close_matches(key, decisions.KEYS, n=1)
    hint = f"do you mean {near[0]}? " if near else ""
    section = key.rpartition(".")[0] if key.rpartition(".")[0] in decisions.KEYS else ""
    names = [each.rpartition(".")[2] for each in decisions.KEYS if each.rpartition(".")[0] == section]
    return f"{key} is not a key of the configuration; {hint}{section or 'it'} has: {', '.join(names)}"


def _message(error: ValidationError, values: Mapping[str, Any]) -> str:
    """Return the error of the uppermost key, to which others may refer, as ``teacher.seed`` does to ``seed``."""
    errors: list[tuple[list[str], Any, str, str]] = []
    for each in error.errors(include_url=False, include_context=False):
        path: list[str] = []
        value: Any = values
        for part in each["loc"]:
            if isinstance(value, Mapping):  # else part is an index, or one of several types
                path, value = [*path, str(part)], value.get(part)
        rule = re.sub(r"^(Value error, |\w+ should )", "", each["msg"])
        errors.append((path, value, each["type"], "be keys with values" if "dictionary" in rule else rule))
    path, value, kind, _ = min(errors, key=lambda each: len(each[0]))
    key = ".".join(path)
    if kind == "missing":
        return f"{key} is missing: give it on the command line, {key}=..."
    if kind == "extra_forbidden":
        return _no_key(key)
    rules = dict.fromkeys(rule for other, *_, rule in errors if other == path)  # one for each allowed type
    shown = {"None": "null", "True": "true", "False": "false"}.get(str(value), " ".join(str(value).split()))
    quotes = f"; quotes within quotes make it text: '{key}=\"...\"'" if kind == "string_type" else ""
    return f"{key}={shown} is not allowed: it must {' or '.join(rules)}{quotes}"


def _conflicts(settings: Settings) -> Iterator[str]:
    """Yield the errors of values that do not go together, and of a user's keys, which have no type in the schema."""
    for key, value in grid.flatten(settings.plain()).items():
        if not is_name(key, longest=200):  # MLflow keeps it as a parameter
            yield f"{key} is not allowed as a key: it must {NAME_RULE}"
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            yield f"{key}={value} is not allowed: it must be finite"
    yield from _network_conflicts(settings)
    split, kd, size = settings.split, settings.kd, settings.data.load_size
    if split.protocol == "paper" and split.index not in (0, 1, 2):
        yield f"split.index={split.index} is not allowed: the paper has 0, 1 and 2; split=holdout has more"
    if split.protocol == "kfold" and split.number >= (split.folds or 0):
        yield f"split.fold={split.fold} is not allowed: split.folds={split.folds} are counted from 0"
    if split.protocol == "file" and split.file is None:
        yield "split.file is missing: give the .csv or .json file on the command line, split.file=..."
    if kd.lambda_ is not None and kd.weight != settings.method.kd_weight:
        yield f"kd.weight={kd.weight} and kd.lambda={kd.lambda_:g} are two spellings of one weight: give one of them"
    if kd.weight == "published" and not settings.method.terms:
        yield "kd.weight=published is not allowed: path and loss have none; give a number, or a method"
    if size is not None and size < settings.image_size:
        yield f"data.load_size={size} is not allowed: image_size={settings.image_size} is cropped from it"


def _network_conflicts(settings: Settings) -> Iterator[str]:
    """Yield the errors of a network's keys, and of stages that it does not have."""
    further = settings.teacher.ensemble or {}
    nodes = {"student": settings.student, "teacher": settings.teacher}
    for group, node in (nodes | {f"teacher.ensemble.{name}": node for name, node in further.items()}).items():
        if node.network is not None and node.encoder is not None:
            yield f"{group}.encoder and {group}.network are two networks: give one of them"
        for key in ("encoder", "decoder_channels") if node.network is None else ():
            if getattr(node, key) is None:
                yield f"{group}.{key}=null is not allowed: it must be set, unless {group}.network is"
        if node.input is not None and (node.input.mean is None) != (node.input.std is None):
            yield f"{group}.input has only one of mean and std: give both, a number for each of three channels"
    for name in (name for name, node in further.items() if node.ensemble or name == "teacher"):
        yield f"teacher.ensemble.{name} is not allowed: members have other names than teacher, and are no ensembles"
    for name, term in settings.method.terms.items():
        yield from _stage_conflicts(settings, f"method.terms.{name}.path", term.path)
    if settings.path.kd_path is not None:
        yield from _stage_conflicts(settings, "path.kd_path", settings.path.kd_path)


def _stage_conflicts(settings: Settings, key: str, kd_path: KDPathNode) -> Iterator[str]:
    """Yield the errors of the stages that a path names or, if it is one of kdsweep's for hidden maps, implies."""
    implied = kd_path.target.startswith(f"{grid.PACKAGE}.") and settings.path.representation == "hidden"
    of_student = kd_path.stage if "stage" in kd_path.model_fields_set or implied else None
    stages = {"student": of_student, "teacher": kd_path.teacher_stage or of_student}
    for group, stage in stages.items():
        names = getattr(settings, group).stage_names
        if stage is not None and stage not in names:
            name = "teacher_stage" if group == "teacher" and kd_path.teacher_stage else "stage"
            network = f"{group}={getattr(settings, group).name}"
            network += " with teacher.ensemble" if group == "teacher" and settings.members else ""
            yield f"{key}.{name}={stage} is not allowed: it must be one of those of {network}: {', '.join(names)}"
