"""The search space: its forms, and which method uses what."""

import re

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from kdsweep.core.errors import InputError
from kdsweep.tuning import space


def test_keys_may_be_nested_or_joined_by_dots():
    joined = space.read({"train.lr": {"log": [1e-4, 1e-2]}, "kd.temperature": [1, 2, 4]})
    nested = space.read({"train": {"lr": {"log": [1e-4, 1e-2]}}, "kd": {"temperature": [1, 2, 4]}})
    assert joined == nested
    assert joined["train.lr"] == FloatDistribution(1e-4, 1e-2, log=True)
    assert joined["kd.temperature"] == CategoricalDistribution([1, 2, 4])


def test_a_key_without_values_is_not_tuned():
    assert set(space.read({"train": {"lr": [1, 2]}, "teacher": {"lr": None}})) == {"train.lr"}


def test_a_range_is_even_and_int_gives_whole_numbers():
    made = space.read({"kd.weight": {"range": [0.1, 1]}, "path.kd_path.inner_channels": {"int": [8, 64]}})
    assert made["kd.weight"] == FloatDistribution(0.1, 1.0)
    assert made["path.kd_path.inner_channels"] == IntDistribution(8, 64)


def test_values_of_no_form_and_keys_that_must_be_equal_are_refused_in_one_line():
    forms = (
        {"train.lr": {"log": [0, 1e-2]}},
        {"train.lr": {"log": [1e-2, 1e-4]}},
        {"train.lr": {"log": [1e-4, 1e-2, 1]}},
        {"train.lr": {"log": ["a", "b"]}},
        {"train.lr": {"log": [1e-4, 1e-2], "range": [0, 1]}},
        {"train.batch_size": {"int": [8, 16.5]}},
        {"train.lr": 1e-3},
        {"train.lr": []},
        {"train.lr": [[1], [2]]},
        {"kd.temperature": [1, 1]},
    )
    cases = [
        (search, "=.* is not allowed: it must be a list of unlike values, or .*log.*range.*int") for search in forms
    ]
    fixed = {"train.epochs": [5, 10], "seed": [0, 1], "path": ["L", "H"], "data.load_size": [64, 128]}
    cases += [({key: values}, " is not to be tuned: it is equal for all trials") for key, values in fixed.items()]
    cases += [({"train.lr": [1, 2], "train": {"lr": [1, 2]}}, " is there twice, nested and joined by dots")]
    for search, message in cases:
        with pytest.raises(InputError) as error:
            space.read(search)
        assert re.match(f"hydra.sweeper.search: {next(iter(search))}{message}", str(error.value)), search
        assert "\n" not in str(error.value)


def test_a_method_has_the_keys_that_it_uses():
    keys = ("train.lr", "teacher.lr", "kd.weight", "kd.temperature", "student.weights")
    everything = space.read({key: [1, 2] for key in keys})
    plain = {"teacher_aug.distill_view": "weak", "path.representation": "logits"}
    kld = {**plain, "loss.logits._target_": "kdsweep.distill.losses.kld", "loss.logits.temperature": 1}
    mse = {**plain, **dict.fromkeys(("loss.logits._target_", "loss.hidden._target_"), "kdsweep.distill.losses.mse")}

    def used(role, params):
        return set(space.used(everything, role=role, params=params))

    assert used("baseline", kld) == {"train.lr", "student.weights"}
    assert used("teacher", kld) == {"teacher.lr"}
    # A Teacher's settings are chosen once, in its study, and all methods learn from that Teacher.
    assert used("distilled", kld) == {"train.lr", "kd.weight", "kd.temperature", "student.weights"}
    recipes = space.read({"train": {"schedule": ["constant", "poly"]}, "teacher": {"schedule": ["constant", "poly"]}})
    assert set(space.used(recipes, role="teacher", params=kld)) == {"teacher.schedule"}
    assert set(space.used(recipes, role="baseline", params=kld)) == {"train.schedule"}
    assert used("distilled", mse) == {"train.lr", "kd.weight", "student.weights"}


def test_ends_and_words():
    made = space.read({"train.lr": {"log": [1e-4, 1e-2]}, "kd.temperature": [1, 2, 4]})
    assert [space.ends(values) for values in made.values()] == [[1e-4, 1e-2], [1, 2, 4]]
    assert [space.in_words(values) for values in made.values()] == ["log 0.0001 to 0.01", "1, 2, 4"]
    assert space.contains(made["train.lr"], 1e-2)
    assert not space.contains(made["train.lr"], 0.1)
    assert not space.contains(made["train.lr"], "matched")
    assert not space.contains(made["kd.temperature"], 3)
