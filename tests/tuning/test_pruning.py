"""Pruning in a group: the answers follow from the curves alone."""

import random
from pathlib import Path

import numpy as np
import pytest

from kdsweep.core.errors import InputError
from kdsweep.tuning.pruning import Curve, Judge, Pruning, make

EPOCHS = 18
HALVING = {"_target_": "optuna.pruners.SuccessiveHalvingPruner", "min_resource": 3, "reduction_factor": 3}
HYPERBAND = {"_target_": "optuna.pruners.HyperbandPruner", "min_resource": 2, "max_resource": EPOCHS}
MEDIAN = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 3, "n_warmup_steps": 4}
PRUNERS = {"default": {}, "halving": HALVING, "hyperband": HYPERBAND, "median": MEDIAN}


def curves(count=9, *, seed=0):
    """Rising curves of unlike height, with noise."""
    chance = np.random.default_rng(seed)
    heights = np.linspace(0.2, 0.8, count)
    return {
        number: tuple(float(height * (step / EPOCHS) ** 0.3 + chance.normal(0, 0.01)) for step in range(1, EPOCHS + 1))
        for number, height in enumerate(heights)
    }


def judged(found, *, options, ended=None, steps=EPOCHS):
    judge = Judge("study", make(options, epochs=EPOCHS), ended or {})
    for step in range(1, steps + 1):
        judge.after(step, found)
    return judge.pruned


def test_successive_halving_keeps_the_best_third_of_each_rung():
    """By hand: of nine trials three go on after epoch 3, and one of these after epoch 9 (1/3 of 3)."""
    found = curves()
    after_3 = sorted(found, key=lambda number: -found[number][2])
    after_9 = sorted(after_3[:3], key=lambda number: -found[number][8])
    expected = dict.fromkeys(after_3[3:], 3) | dict.fromkeys(after_9[1:], 9)
    assert judged(found, options=HALVING) == expected
    assert judged(found, options={}) == expected  # the default: a sixth of 18 epochs, the best third


def test_the_median_pruner_ends_what_is_below_the_median_of_the_others():
    """By hand, with the rule of its documentation: the best value so far against the median of the others' values.

    Optuna counts complete trials alone, and in a group none is complete before the end: those side by side count.
    """
    found = curves()
    expected: dict[int, int] = {}
    for step in range(4, EPOCHS + 1):
        here = [number for number in found if number not in expected]
        for number in here:
            others = [found[other][step - 1] for other in here if other != number]
            if len(others) >= 3 and max(found[number][:step]) < np.percentile(others, 50):
                expected = expected | {number: step}
    assert len(expected) > 4
    assert judged(found, options=MEDIAN) == expected


@pytest.mark.parametrize("options", PRUNERS.values(), ids=PRUNERS)
def test_the_answers_do_not_depend_on_the_order_of_the_trials(options):
    found = curves()
    whole = judged(found, options=options)
    assert whole
    numbers = list(found)
    random.Random(1).shuffle(numbers)
    assert judged({number: found[number] for number in numbers}, options=options) == whole


@pytest.mark.parametrize("options", PRUNERS.values(), ids=PRUNERS)
@pytest.mark.parametrize("at", [1, 3, 7, 12])
def test_a_resumed_group_repeats_the_answers(options, at):
    """After a break each trial has a curve of its own length, at least as long as the decided part."""
    found = curves()
    whole = judged(found, options=options)
    before = judged(found, options=options, steps=at)
    assert before == {number: epochs for number, epochs in whole.items() if epochs <= at}
    shortened = {number: found[number][: before.get(number, EPOCHS)] for number in found}
    assert judged(shortened, options=options) == whole


@pytest.mark.parametrize("options", PRUNERS.values(), ids=PRUNERS)
def test_the_best_trial_is_never_ended(options):
    for seed in range(5):
        found = curves(seed=seed)
        assert max(found) not in judged(found, options=options)


def test_trials_of_an_earlier_round_count():
    """A trial that alone would go on ends beside better ones of the round before."""
    found = curves()
    earlier = {number: Curve("COMPLETE", found[number]) for number in (5, 6, 7, 8)}
    alone = judged({9: found[2], 10: found[1]}, options=HALVING)
    assert 9 not in alone
    assert judged({9: found[2], 10: found[1]}, options=HALVING, ended=earlier) == {9: 3, 10: 3}


def test_what_has_failed_is_not_judged():
    found = curves()
    assert judged(found, options=HALVING)[0] == 3
    left = {number: curve for number, curve in found.items() if number}
    assert 0 not in judged(left, options=HALVING)


def test_studies_of_a_group_are_judged_apart():
    """The worst trial of a good method goes on beside the best of a bad one, as it would alone."""
    good, bad = curves(6, seed=1), curves(6, seed=2)
    trials = {Path(f"good{number}"): ("good", number) for number in good}
    trials |= {Path(f"bad{number}"): ("bad", number) for number in bad}
    values = {Path(f"good{number}"): [0.1 + value for value in curve] for number, curve in good.items()}
    values |= {Path(f"bad{number}"): [0.1 * value for value in curve] for number, curve in bad.items()}
    after = Pruning(HALVING, EPOCHS, trials, {}).begin()
    ended = {folder: step for step in range(1, EPOCHS + 1) for folder in after(step, values)}
    for name, own in (("good", good), ("bad", bad)):
        alone = judged({n: values[Path(f"{name}{n}")] for n in own}, options=HALVING)
        assert {
            int(folder.name[len(name) :]): step for folder, step in ended.items() if folder.name.startswith(name)
        } == alone


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"_target_": "optuna.pruners.SuccessiveHalvingPruner"}, "min_resource is missing: .* from 1 to 18"),
        ({"_target_": "optuna.pruners.HyperbandPruner"}, "max_resource is missing"),
        ({"_target_": "optuna.pruners.Nothing"}, "Nothing"),
        ({"_target_": "optuna.samplers.TPESampler"}, "is not one of optuna.pruners"),
        ({"_target_": "optuna.pruners.MedianPruner", "n_startup": 1}, "n_startup"),
    ],
)
def test_a_pruner_that_is_none_is_told_in_one_line(options, told):
    with pytest.raises(InputError, match=f"hydra.sweeper.pruner.*{told}") as error:
        make(options, epochs=EPOCHS)
    assert "\n" not in str(error.value)
