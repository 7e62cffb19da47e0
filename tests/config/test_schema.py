"""The values that each key may have; and every configuration file composes, so that none can rot."""

import math
import re
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml

from kdsweep import conf_dir
from kdsweep.config import composition, decisions, grid, identity
from kdsweep.config.networks import STAGES as UNET_STAGES
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

TYPES = ("1", True, math.nan, math.inf)  # no number; null is none where a key has no default
NUMBERS = (*TYPES, None)
SHARES, POSITIVE, COUNTS = (-0.01, 1.01, *NUMBERS), (0, -1, *NUMBERS), (0, -1, 1.5, *NUMBERS)
NAMES = ("", "L+H", "a*b", "[x]", "a?", "L/H", "../../evil", "..", ".x", "-x", " x", "a\nb", "it's", 7.5, True)
WIDTHS = ([16] * 4, [16] * 6, [16, 16, 16, 16, 0], [16, 16, 16, 16, 1.5], 16, None)
STAGES = ("encoder.0", "decoder.6", "hidden", 5)
PATH = {
    "stage": STAGES,
    "teacher_stage": STAGES,
    "inner_channels": (0, -1, 1.5, "1"),
    "kernel_size": (0, 2, -1, 1.5, "1"),
    "_target_": ("", 7, None),
}
MODULE = {"network": (5, "net"), "stages": (5, "backbone"), "output": (-1, 1.5, "", True), "input": (5, "224")}
BAD: dict[str, tuple[Any, ...]] = {
    "seed": (-1, 0.5, 2**32, *NUMBERS),
    "split.protocol": ("random", None, 1),
    "split.index": (-1, 1.5, *TYPES),
    "split.folds": (1, 2.5, *TYPES),
    "split.fold": (-1, 1.5, *TYPES),
    **dict.fromkeys(("split.file", "split.group", "teacher.trained"), ("", 7)),
    **dict.fromkeys(("split.allow_leakage", "deterministic", "retry_failed"), ("yes", 1, None)),
    "device": ("gpu", "cpu:1", "cuda:", "cuda:x", "auto:0", None, 1),
    **dict.fromkeys(("precision", "kd.teacher_precision"), ("fp16", "BF16", 32, None)),
    "image_size": (0, 32, 63, 100, 64.5, -64, *NUMBERS),
    **dict.fromkeys(("train.epochs", "train.batch_size", "train.patience"), COUNTS),
    **dict.fromkeys(("train.lr", "teacher.lr", "kd.ratio", "kd.temperature", "method.supervised"), POSITIVE),
    **dict.fromkeys(("method.terms.hint.weight", "scores.nsd_tolerance_px", "stats.margin_points"), POSITIVE),
    **dict.fromkeys(("train.monitor", "teacher.monitor"), ("val/loss", "Dice", None, True)),
    "train.last_batch": ("keep", None, True, 1),
    "train.supervised": ("dice", None, 1),
    "train.schedule": ("linear", None, 1),
    "teacher.supervised": ("dice", 1),
    "teacher.schedule": ("linear", 1),
    "train.workers": (-1, 1.5, "many", None, True),
    **dict.fromkeys(("teacher.epochs", "teacher.patience"), (0, -1, 1.5, "many", True)),
    "teacher.seed": (-1, 0.5, *NUMBERS),
    **dict.fromkeys(("teacher_aug.train_view", "teacher_aug.distill_view"), ("medium", "Weak", None, 1)),
    "kd.weight": (-0.01, 1.01, "match", *NUMBERS),
    "kd.lambda": (-0.01, *TYPES),
    "kd.align": ("crop", None, True),
    "method.kd_weight": (-0.01, 1.01, "matched", *NUMBERS),
    "path.representation": ("maps", 1),
    **{f"{node}.{key}": bad for node in ("path.kd_path", "method.terms.hint.path") for key, bad in PATH.items()},
    "views.shift": (-0.01, 0.51, *NUMBERS),
    "views.scale": (-0.01, 0.91, 1.0, *NUMBERS),
    "views.rotate_deg": (-1, 181, *NUMBERS),
    **dict.fromkeys((f"views.{key}" for key in ("dropout", "probability", "contrast", "flip")), SHARES),
    "views.noise_std": ([0.2, 0.1], [0.1], [0.1, 0.2, 0.3], [-0.1, 0.1], [0.1, 1.1], [0.1, "0.2"], 0.1, None),
    "data.count": (3, 0, 4.5, "many", True),
    "data.load_size": (0, 63, -1, 100.5, "256", True),
    "data.allow_empty_masks": ("yes", 1),
    "data.classes": (
        {"a": 1},
        {"a": 1, "b": 1},
        {"a": 1, "b": "x"},
        {"a": "x", "b": "X"},
        {"a": 1, "A": 2},
        {"a": [0, 0, 0], "b": [1, 2, 3]},
        5,
    ),
    "data.window": ([9, 1], [5, 5], [1], [1, 2, 3], [0, math.inf], [math.nan, 1], [0, "9"], "full", 255, True),
    **dict.fromkeys(("student.decoder_channels", "teacher.decoder_channels"), WIDTHS),
    **{f"{of}.{key}": bad for of in ("student", "teacher") for key, bad in MODULE.items()},
    "kd.resize": ("yes", 1, None),
    "scores.each_epoch": ("yes", 1, None),
    "store": (None, "", 7.5, True, "~", "~/runs"),
    "sweep_name": (*NAMES, "x" * 201, None),
    **dict.fromkeys(("path.name", "loss.name", "method.name", "method.notation", "data.name", "profile"), NAMES),
    "path.notation": (*NAMES, "L" * 81, "漢" * 27, "ß" * 41, None),  # in bytes, and of a loss in capitals
    **dict.fromkeys(("student.encoder", "teacher.encoder", "student.weights", "teacher.weights", "weights"), ("", 7)),
    **dict.fromkeys((f"{of}.{key}" for of in ("student", "teacher") for key in ("imagenet", "imagenet_package")), (7,)),
    **dict.fromkeys(("tracking.uri", "tracking.experiment"), ("", 7)),
    **dict.fromkeys(("loss.logits", "loss.hidden", "data.source", "method.terms", "method.terms.hint.loss"), (5,)),
    "teacher.ensemble": (5,),
    **dict.fromkeys(("path.kd_path", "kd", "train", "method.terms.hint", "method.terms.hint.path"), (5,)),
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
    "train.epochs": (1, 3.0),
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
    "data.classes": (None, {"a": 1, "b": 65535}, {"a": [0, 255, 0], "b": [255, 0, 0]}, {"x y": "x", "z": "z"}),
    "data.window": (None, [0, 4095], [-1024.5, 3071]),
    "sweep_name": ("busi-paper", "Try 2_b.c", "größer", "x" * 200),
    "path.notation": ("HReg", "KD-T1", "v1.2 b", "_x", "größer", "漢字", "L" * 80),
    "method.notation": ("KD-T1", None),
    "device": ("auto", "cpu", "cuda", "cuda:12"),
}


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
    """Flat values of a configuration that is within the limits; data sets that need a folder have one."""
    needs_root = any(override in ("data=udiat", "data=busi", "data=folder") for override in overrides)
    needs_file = ["split.file=s.csv"] if "split=file" in overrides else []
    return identity.params(
        composition.compose([*overrides, *needs_file, *(["data.root=images"] if needs_root else [])])
    )


def test_every_key_has_bad_values_in_this_test() -> None:
    assert decisions.LEAVES.keys() - BAD.keys() == {"data.root"}  # which may be anything
    assert EDGES.keys() <= BAD.keys()


@pytest.mark.parametrize("key", BAD)
def test_a_bad_value_is_refused_with_key_and_value(defaults: dict[str, Any], key: str) -> None:
    for value in BAD[key]:
        shown = {"None": "null", "True": "true"}.get(str(value), " ".join(str(value).split()))
        with pytest.raises(InputError) as caught:
            composition.check(changed(defaults, key, value))
        message = str(caught.value)
        assert message.startswith(f"{key}={shown} is not allowed: it must "), value
        assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("train.epochs", 0, "be greater than or equal to 1"),
        ("train.epochs", 1.5, "be a valid integer"),
        ("kd.weight", 2, "be a number from 0 to 1 or be 'matched' or 'published'"),
        ("train.monitor", "Dice", "be 'loss' or 'dice'"),
        ("views.noise_std", [0.2, 0.1], "ascend"),
        ("data.window", [9, 1], "ascend"),
        ("data.classes.a", 0, "be greater than or equal to 1 or be a valid list or be a valid string"),
        ("kd", 5, "be keys with values"),
        (
            "path.kd_path.stage",
            "encoder.6",
            f"be one of those of student=mobilenetv3_small_trimmed: {', '.join(UNET_STAGES)}",
        ),
        ("sweep_name", 7.5, "be a valid string; quotes within quotes make it text: 'sweep_name=\"...\"'"),
    ],
)
def test_the_error_says_which_values_are_allowed(defaults: dict[str, Any], key: str, value: Any, rule: str) -> None:
    values = changed(defaults, "data.classes", {"b": 1, "c": 2})
    with pytest.raises(InputError, match=re.escape(f"{key}={value} is not allowed: it must {rule}") + "$"):
        composition.check(changed(values, key, value))


def test_of_several_errors_the_key_is_named_that_others_refer_to(defaults: dict[str, Any]) -> None:
    values = changed(changed(defaults, "teacher.seed", -1), "seed", -1)
    with pytest.raises(InputError, match=r"^seed=-1 is not allowed"):
        composition.check(values)


@pytest.mark.parametrize("key", EDGES)
def test_values_at_the_edge_of_the_allowed_are_taken(defaults: dict[str, Any], key: str) -> None:
    size = {"image_size": 64} if key != "image_size" else {}
    for value in EDGES[key]:
        composition.check(changed({**defaults, **size}, key, value))


def test_an_unknown_key_and_a_missing_one_are_named(defaults: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^kd\.foo is not a key of the configuration; .*kd has: weight, lambda, rat"):
        composition.check(changed(defaults, "kd.foo", 1))
    with pytest.raises(InputError, match=r"^loss is missing: give it on the command line, loss=\.\.\.$"):
        composition.check({key: value for key, value in defaults.items() if key != "loss"})


def test_settings_give_back_the_values_that_they_are_made_of(defaults: dict[str, Any]) -> None:
    assert composition.check(defaults).plain() == defaults
    assert composition.check(defaults).train.epochs == defaults["train"]["epochs"]


@pytest.mark.parametrize(("node", "key"), [("loss.logits", "a+b"), ("loss.logits", "a/b"), ("path.kd_path", "x" * 200)])
def test_a_key_that_mlflow_would_not_take_is_refused(defaults: dict[str, Any], node: str, key: str) -> None:
    message = re.escape(f"{node}.{key} is not allowed as a key: it must be made of letters, digits, blank . _ -,")
    with pytest.raises(InputError, match=f"^{message}"):
        composition.check(changed(defaults, node, {"_target_": "mine.loss", key: 1}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("split.index=3", "split.index=3 is not allowed: the paper has 0, 1 and 2"),
        ("split=kfold split.fold=5", "split.fold=5 is not allowed: split.folds=5 are counted from 0"),
        ("split=file", "split.file is missing"),
        ("kd.lambda=1 kd.weight=0.3", "kd.weight=0.3 and kd.lambda=1 are two spellings of one weight"),
        ("kd.weight=published", "kd.weight=published is not allowed: path and loss have none"),
        ("data.load_size=200", "data.load_size=200 is not allowed: image_size=224 is cropped from it"),
    ],
)
def test_values_that_do_not_go_together_are_refused(overrides: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        composition.compose(overrides.split())


# --- configuration files


def test_the_groups_are_those_of_the_design() -> None:
    assert GROUPS.keys() >= {"path", "loss", "teacher_aug", "data", "teacher", "student", "profile", "tracking"}
    assert GROUPS["path"] == ["H", "HR", "L", "none"]
    assert EXPERIMENTS == ["capacity", "cpu_study", "methods", "recipe", "study", "table3", "table4", "tuned"]


def test_the_defaults_are_the_papers_best_cell_by_its_protocol() -> None:
    defaults = compose()
    expected = {
        "path.notation": "L",
        "loss.name": "kld",
        "teacher_aug.distill_view": "weak",
        "kd.weight": 0.5,
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
        "weights": "imagenet",
        "student.weights": "imagenet",
        "teacher.weights": "imagenet",
    }
    assert {key: defaults[key] for key in expected} == expected


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes_within_the_limits(option: str) -> None:
    values = compose(option)
    group, _, name = option.partition("=")
    assert values.get(f"{group}.name", name) == name


@pytest.mark.parametrize("profile", GROUPS["profile"])
@pytest.mark.parametrize("path", GROUPS["path"])
def test_every_path_composes_under_every_profile(path: str, profile: str) -> None:
    values = compose(f"path={path}", f"profile={profile}", "teacher_aug=strong", "loss=mse")
    assert values["profile"] == profile
    assert values["weights"] == values["student.weights"] == values["teacher.weights"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_sweeps_existing_options_within_the_limits(name: str) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", [f"+experiment={name}"], return_hydra_config=True)
    composition.read(cfg)
    swept = {key: str(values).split(",") for key, values in cfg.hydra.sweeper.params.items()}
    if "method" in swept:
        of_one_class = [
            name for name in GROUPS["method"] if "distill.classes." not in (CONF / f"method/{name}.yaml").read_text()
        ]
        assert sorted(swept["method"]) == of_one_class, "all of them"
    for place in range(max(map(len, swept.values()))):  # each value in one of these cells
        compose(f"+experiment={name}", *(f"{key}={values[place % len(values)]}" for key, values in swept.items()))
    for words in cfg.hydra.sweeper.also:
        assert not any(word.startswith("seed=") for word in words.split()), "a part of the grid is a part of this too"
        compose(f"+experiment={name}", *(word.partition(",")[0] for word in words.split()))
    count = math.prod(map(len, swept.values()))
    counts = {"table3": 12, "table4": 48, "cpu_study": 48, "methods": 16, "tuned": 48, "capacity": 10, "recipe": 2}
    assert count == (counts | {"study": 144})[name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_every_configuration_file_opens_with_a_comment_and_names_existing_code(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    first, *rest = text.splitlines()
    line = rest[0] if first.startswith("# @package") else first
    assert line.startswith("# ")
    assert len(line) > 20
    values = yaml.safe_load(text)
    assert isinstance(values, dict)
    for name in set(grid.targets(values)) - {"???"}:  # which the user gives
        assert callable(hydra.utils.get_object(name)), name


def test_a_number_as_a_name_is_taken_as_text() -> None:
    settings = composition.compose(["sweep_name=2024", "store=2025"])
    assert (settings.sweep_name, settings.store) == ("2024", "2025")


@pytest.mark.parametrize(
    ("statistics", "line"),
    [
        ("{mean: [0.5, 0.5, 0.5]}", "teacher.input has only one of mean and std"),
        ("{mean: [0, 0, 0], std: [1, 1, 0]}", "teacher.input.std=[1, 1, 0] is not allowed: it must be greater than 0"),
        ("{size: 0}", "teacher.input.size=0 is not allowed: it must be greater than or equal to 1"),
    ],
)
def test_impossible_statistics_of_a_network_are_one_line(statistics: str, line: str) -> None:
    with pytest.raises(InputError) as caught:
        composition.compose(
            ["teacher=vit", "~teacher.input", f"+teacher.input={statistics}", "teacher.network.size=64"]
        )
    assert line in str(caught.value)
