"""What each configuration value may be; and every configuration file composes, so that none can rot."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import hydra
import pytest
import yaml

from kdsweep import conf_dir
from kdsweep.config import composition, identity, schema
from kdsweep.core.errors import InputError

CONF = conf_dir()
FILES = sorted(CONF.rglob("*.yaml"))
GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name not in ("experiment", "hydra")
}
OPTIONS = [f"{group}={option}" for group, options in GROUPS.items() for option in options]
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))

NOT_NUMBERS = (None, "1", True, math.nan, math.inf)
NOT_SHARES = (-0.01, 1.01, *NOT_NUMBERS)
NOT_COUNTS = (0, -1, 1.0, 1.5, *NOT_NUMBERS)
NOT_NAMES = ("", "L+H", "a*b", "[x]", "a?", "L/H", "../../evil", "..", ".x", "-x", " x", "a\nb", "it's", 7.5, True)
NOT_WIDTHS = ([16] * 4, [16] * 6, [16, 16, 16, 16, 0], [16, 16, 16, 16, 1.5], 16, None)
BAD: dict[str, tuple[Any, ...]] = {
    "seed": (-1, 0.5, 0.0, 2**32, *NOT_NUMBERS),
    "split.protocol": ("random", None, 1),
    "split.index": (-1, 1.0, *NOT_NUMBERS[1:]),
    "split.folds": (1, 2.5, *NOT_NUMBERS[1:]),
    "split.fold": (-1, 1.0, *NOT_NUMBERS[1:]),
    "split.file": ("", 7),
    "split.group": ("", 7),
    "split.allow_leakage": ("yes", 1, None),
    "device": ("gpu", "cpu:1", "cuda:", "cuda:x", "auto:0", None, 1),
    "deterministic": ("yes", 1, None),
    "retry_failed": ("yes", 1, None),
    "kd.teacher_precision": ("fp16", "BF16", None),
    "precision": ("fp16", "FP32", 32, None),
    "image_size": (0, 32, 63, 100, 64.0, -64, *NOT_NUMBERS),
    "train.epochs": NOT_COUNTS,
    "train.batch_size": NOT_COUNTS,
    "train.lr": (0, -1, 0.0, *NOT_NUMBERS),
    "train.patience": NOT_COUNTS,
    "train.monitor": ("val/loss", "Dice", None, True),
    "train.last_batch": ("keep", None, True, 1),
    "train.supervised": ("dice", None, 1),
    "train.schedule": ("linear", None, 1),
    "teacher.supervised": ("dice", 1),
    "teacher.schedule": ("linear", 1),
    "train.workers": (-1, 1.0, "many", None, True),
    "teacher.lr": (0, -1e-4, *NOT_NUMBERS),
    "teacher.monitor": ("val/loss", "Dice", None, True),
    "teacher.epochs": (0, -1, 1.5, "many", True),
    "teacher.seed": (-1, 0.5, *NOT_NUMBERS),
    "teacher_aug.train_view": ("medium", "Weak", None, 1),
    "teacher_aug.distill_view": ("medium", "Weak", None, 1),
    "kd.weight": (-0.01, 1.01, "match", *NOT_NUMBERS),
    "kd.lambda": (-0.01, *NOT_NUMBERS[1:]),
    "method.supervised": (0, -1, *NOT_NUMBERS),
    "method.kd_weight": (-0.01, 1.01, "matched", *NOT_NUMBERS),
    "method.terms.hint.weight": (0, -1, *NOT_NUMBERS),
    "method.terms.hint.path.stage": ("encoder.0", "decoder.6", "hidden", 5),
    "method.terms.hint.path.teacher_stage": ("encoder.0", "decoder.6", "hidden", 5),
    "method.terms.hint.path.inner_channels": (0, -1, 1.5, "1"),
    "method.terms.hint.path.kernel_size": (0, 2, -1, 1.5, "1"),
    "path.kd_path.stage": ("encoder.0", "decoder.6", "hidden", 5),
    "path.kd_path.teacher_stage": ("encoder.0", "decoder.6", "hidden", 5),
    "kd.ratio": (0, -1, *NOT_NUMBERS),
    "kd.temperature": (0, -1, *NOT_NUMBERS),
    "kd.align": ("crop", None, True),
    "views.shift": (-0.01, 0.51, *NOT_NUMBERS),
    "views.scale": (-0.01, 0.91, 1.0, *NOT_NUMBERS),
    "views.rotate_deg": (-1, 181, *NOT_NUMBERS),
    "views.dropout": NOT_SHARES,
    "views.probability": NOT_SHARES,
    "views.noise_std": ([0.2, 0.1], [0.1], [0.1, 0.2, 0.3], [-0.1, 0.1], [0.1, 1.1], [0.1, "0.2"], 0.1, None),
    "scores.nsd_tolerance_px": (0, -1, *NOT_NUMBERS),
    "stats.margin_points": (0, -1, *NOT_NUMBERS),
    "data.count": (3, 0, 4.0, "many", True),
    "student.decoder_channels": NOT_WIDTHS,
    "teacher.decoder_channels": NOT_WIDTHS,
    "path.kd_path.inner_channels": (0, -1, 1.5, "1"),
    "path.kd_path.kernel_size": (0, 2, -1, 1.5, "1"),
    "data.load_size": (0, 63, -1, 100.5, "256", True),
    "data.allow_empty_masks": ("yes", 1),
    "store": (None, "", 7.5, True, "~", "~/runs"),
    "sweep_name": (*NOT_NAMES, "x" * 201, None),
    **dict.fromkeys(("path.name", "loss.name", "method.name", "data.name", "profile"), NOT_NAMES),
    "method.notation": NOT_NAMES,
    "path.notation": (*NOT_NAMES, "L" * 81, "漢" * 27, "ß" * 41, None),  # in bytes, and of a loss in capitals
}
EDGES: dict[str, tuple[Any, ...]] = {
    "split.index": (0, 1, 2),
    "split.folds": (2, None),
    "split.fold": (0, None),
    "split.group": (r"(?P<patient>\d+)_.*", None),
    "seed": (0, 2**32 - 1),
    "image_size": (64, 96),
    "data.count": (4, None),
    "path.kd_path.kernel_size": (1, 3, None),
    "train.epochs": (1,),
    "train.lr": (1, 1e-9),
    "train.monitor": ("loss", "dice"),
    "train.last_batch": ("smaller", "drop", "fill"),
    "train.supervised": ("bce", "bce_dice"),
    "train.schedule": ("constant", "cosine", "poly"),
    "teacher.supervised": (None, "bce", "bce_dice"),
    "teacher.schedule": (None, "constant", "cosine", "poly"),
    "train.workers": ("auto", 0, 8),
    "precision": ("fp32", "tf32", "bf16"),
    "kd.weight": (0, 0.0, 1, 1.0, "published"),
    "kd.lambda": (0, 50, None),
    "method.terms.hint.path.stage": ("encoder.1", "decoder.5", "logits"),
    "views.shift": (0, 0.5),
    "views.scale": (0, 0.9),
    "views.rotate_deg": (0, 180),
    "views.noise_std": ([0, 0], [0.1, 0.1], [0, 1]),
    "data.load_size": (None, 224, 500),
    "sweep_name": ("busi-paper", "Try 2_b.c", "größer", "x" * 200),
    "path.notation": ("HReg", "KD-T1", "v1.2 b", "_x", "größer", "漢字", "L" * 80),
    "method.notation": ("KD-T1", None),
}


def leaves(node: type[schema.Node] = schema.Settings, lead: str = "") -> dict[str, str]:
    """By dotted key what a value must be, of all keys that have a range."""
    found: dict[str, str] = {}
    for name, field in node.model_fields.items():
        below = [k for k in (field.annotation, *get_args(field.annotation)) if isinstance(k, type)]
        nested = [kind for kind in below if issubclass(kind, schema.Node)]
        if nested:
            own = f"{name}.hint" if get_origin(field.annotation) is dict else name  # a term of method=fitnet
            found |= leaves(nested[0], f"{lead}{own}.")
        elif field.description:
            found[f"{lead}{field.alias or name}"] = field.description
    return found


ALLOWED = leaves()
WORDS = {key for key, allowed in ALLOWED.items() if allowed in ("a word", "imagenet, none, or the name of a file")}


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    of_method = composition.compose(["method=fitnet"]).plain()
    of_path = composition.compose(["path=HR"]).plain()
    return {**of_method, "path": of_path["path"]}  # those with the most keys


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Nested values with another one at a dotted key."""
    first, _, rest = key.partition(".")
    return {**values, first: changed(values[first], rest, value) if rest else value}


def compose(*overrides: str) -> dict[str, Any]:
    """Flat values of a configuration that is within the limits; data sets that need a folder are given one."""
    needs_root = any(override in ("data=udiat", "data=busi", "data=folder") for override in overrides)
    needs_file = ["split.file=s.csv"] if "split=file" in overrides else []
    return identity.params(
        composition.compose([*overrides, *needs_file, *(["data.root=images"] if needs_root else [])])
    )


def test_every_range_has_bad_values_in_this_test() -> None:
    assert sorted(BAD) == sorted(ALLOWED.keys() - WORDS - {"path.representation"})
    assert EDGES.keys() <= BAD.keys()


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_with_key_value_and_what_is_allowed(
    defaults: dict[str, Any], key: str, value: Any
) -> None:
    with pytest.raises(InputError) as caught:
        schema.read(changed(defaults, key, value))
    typed = {"None": "null", "True": "true"}.get(str(value), " ".join(str(value).split()))
    expected = f"{key}={typed} is not allowed: it must be {ALLOWED[key]}"
    quotes = f"; quotes within quotes make it text: '{key}=\"...\"'"
    assert str(caught.value) in (expected, expected + quotes)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in EDGES.items() for value in values])
def test_values_at_the_edge_of_the_allowed_are_taken(defaults: dict[str, Any], key: str, value: Any) -> None:
    size = {"image_size": 64} if key != "image_size" else {}
    schema.read(changed({**defaults, **size}, key, value))


@pytest.mark.parametrize("key", sorted(WORDS))
def test_a_number_is_no_word(defaults: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=f"^{key}=7 is not allowed: it must be "):
        schema.read(changed(defaults, key, 7))


def test_an_unknown_key_and_a_missing_one_are_told(defaults: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=r"^kd\.foo is not a key of the configuration; it has: weight, lambda, ratio, temp"
    ):
        schema.read(changed(defaults, "kd.foo", 1))
    with pytest.raises(InputError, match=r"^loss is missing: give it on the command line, loss=\.\.\.$"):
        schema.read({key: value for key, value in defaults.items() if key != "loss"})


def test_what_was_read_is_given_back_as_it_was(defaults: dict[str, Any]) -> None:
    assert schema.read(defaults).plain() == defaults
    assert schema.read(defaults).train.epochs == defaults["train"]["epochs"]


@pytest.mark.parametrize(("part", "key"), [("loss.logits", "a+b"), ("loss.logits", "a/b"), ("path.kd_path", "x" * 200)])
def test_a_key_that_mlflow_would_not_take_is_refused(defaults: dict[str, Any], part: str, key: str) -> None:
    message = re.escape(f"{part}.{key} is not allowed as a key: it must be made of letters, digits, blank . _ -,")
    with pytest.raises(InputError, match=f"^{message}"):
        schema.read(changed(defaults, part, {"_target_": "mine.loss", key: 1}))


def test_images_cannot_be_loaded_smaller_than_they_are_cropped(defaults: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"data\.load_size=200 is not allowed: image_size=224"):
        schema.read(changed(defaults, "data.load_size", 200))
    schema.read(changed(defaults, "data.load_size", 224))


# --- configuration files


def test_the_groups_are_those_that_the_design_names() -> None:
    assert GROUPS.keys() >= {"path", "loss", "teacher_aug", "data", "teacher", "student", "profile", "tracking"}
    assert GROUPS["path"] == ["H", "HR", "L", "none"]
    assert EXPERIMENTS == ["capacity", "cpu_study", "methods", "recipe", "study", "table3", "table4", "tuned"]


def test_the_defaults_are_the_papers_best_cell_by_its_protocol() -> None:
    defaults = compose()
    expected = {
        "path.notation": "L",
        "loss.name": "kld",
        "teacher_aug.distill_view": "weak",
        "split.protocol": "paper",
        "split.index": 0,
        "seed": 0,
        "data.name": "phantom",
        "profile": "paper",
        "device": "auto",
        "image_size": 224,
        "train.epochs": 500,
        "train.batch_size": 64,
        "train.lr": 1e-4,
        "train.patience": 50,
        "kd.weight": 0.5,
    }
    assert {key: defaults[key] for key in expected} == expected


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes_within_the_limits(option: str) -> None:
    values = compose(option)
    group, _, name = option.partition("=")
    if f"{group}.name" in values:
        assert values[f"{group}.name"] == name


@pytest.mark.parametrize("profile", GROUPS["profile"])
@pytest.mark.parametrize("path", GROUPS["path"])
def test_every_path_composes_under_every_profile(path: str, profile: str) -> None:
    values = compose(f"path={path}", f"profile={profile}", "teacher_aug=strong", "loss=mse")
    assert values["profile"] == profile


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_sweeps_existing_options_within_the_limits(name: str) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", [f"+experiment={name}"], return_hydra_config=True)
    composition.read(cfg)
    swept = {key: str(values).split(",") for key, values in cfg.hydra.sweeper.params.items()}
    if "method" in swept:
        assert sorted(swept["method"]) == GROUPS["method"], "all of them"
    for key, values in swept.items():
        for value in values:
            compose(f"+experiment={name}", f"{key}={value}")
    for words in cfg.hydra.sweeper.also:
        assert not any(word.startswith("seed=") for word in words.split()), "a part of the grid is a part of this too"
        for word in words.split():
            compose(f"+experiment={name}", word.partition(",")[0])
    count = math.prod(map(len, swept.values()))
    counts = {"table3": 12, "table4": 48, "cpu_study": 48, "methods": 16, "tuned": 48, "capacity": 10, "recipe": 2}
    assert count == (counts | {"study": 144})[name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_every_configuration_file_opens_with_a_comment_that_says_what_it_is(file: Path) -> None:
    first, *rest = file.read_text(encoding="utf-8").splitlines()
    line = rest[0] if first.startswith("# @package") else first
    assert line.startswith("# ")
    assert len(line) > 20
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "_target_")
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from targets(child)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_every_target_of_a_configuration_file_exists(file: Path) -> None:
    for name in targets(yaml.safe_load(file.read_text(encoding="utf-8"))):
        assert callable(hydra.utils.get_object(name)), name


def test_both_networks_follow_the_weights_of_the_profile() -> None:
    values = compose("profile=quick")
    assert values["weights"] == values["student.weights"] == values["teacher.weights"] == "none"
    paper = compose()
    assert paper["weights"] == paper["student.weights"] == paper["teacher.weights"] == "imagenet"


def test_a_number_as_a_name_is_taken_as_text():
    given = composition.compose(["sweep_name=2024", "store=2025"])
    assert (given.sweep_name, given.store) == ("2024", "2025")
