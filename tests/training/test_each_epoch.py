"""Test Dice after each epoch (``scores.each_epoch``): it is measured, and changes and chooses nothing."""

import pandas as pd
import pytest
from test_loop import CPU, assert_same, feed_of, make_learner, state_of, teachers_of
from test_loop import compose as compose  # a fixture

from kdsweep.evaluation import scoring
from kdsweep.store import cell_folder
from kdsweep.training import lockstep, loop


class Undecided:
    """A pruner that ends no trial."""

    def begin(self):
        return lambda epochs, curves: set()


def test_each_epoch_is_tested_and_nothing_else_changes(compose, tmp_path):
    histories, finals, states = {}, {}, {}
    for tests in (True, False):
        configs = [compose(words, "train.epochs=3", f"scores.each_epoch={tests}") for words in ("path=none", "path=HR")]
        learners = [make_learner(cfg, tmp_path / f"{tests}{i}") for i, cfg in enumerate(configs)]
        lockstep.run(learners, teachers=teachers_of(*configs), feed=feed_of(configs[0]), compute=CPU)
        histories[tests] = [learner.history for learner in learners]
        finals[tests] = [cell_folder.read_finished(learner.folder) for learner in learners]
        states[tests] = list(map(state_of, learners))
    for number in range(2):
        by_epoch = [row.pop("test/dice_by_epoch") for row in histories[True][number]]
        assert histories[True][number] == histories[False][number]
        assert_same(states[True][number], states[False][number])
        final = finals[True][number]
        assert by_epoch[int(final["best_epoch"])] == pytest.approx(final["test/dice"])
        assert final.pop("test/dice_of_best_test_epoch") == max(by_epoch)
        assert final == finals[False][number]
        files = [tmp_path / f"{tests}{number}" / "test_scores.csv" for tests in (True, False)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert len({round(value, 12) for value in by_epoch}) == 3


def test_a_learner_that_was_tested_in_some_epochs_alone_has_no_best_one(compose, tmp_path):
    for epochs, tests in ((1, False), (2, True)):
        cfg = compose("path=none", f"train.epochs={epochs}", f"scores.each_epoch={tests}")
        learner = make_learner(cfg, tmp_path / "cell")
        learner.resume()
        loop.fit([learner], teachers={}, feed=feed_of(cfg), compute=CPU)
        learner.save()
    assert ["test/dice_by_epoch" in row for row in learner.history] == [False, True]
    final = lockstep.run([learner], teachers={}, feed=feed_of(cfg), compute=CPU)[0]
    assert "test/dice_of_best_test_epoch" not in final


def test_trials_are_not_tested(compose, tmp_path):
    cfg = compose("path=none", "scores.each_epoch=true")
    learner = make_learner(cfg, tmp_path)
    lockstep.run([learner], teachers={}, feed=feed_of(cfg), compute=CPU, pruning=Undecided())
    assert len(learner.history) == 2
    assert not any("test/dice_by_epoch" in row for row in learner.history)


def test_pixels_of_prediction_and_lesion_are_counted(compose, tmp_path):
    cfg = compose("path=none", "train.epochs=1")
    learner, part = make_learner(cfg, tmp_path), feed_of(cfg).test
    lockstep.run([learner], teachers={}, feed=feed_of(cfg), compute=CPU)
    table = pd.read_csv(tmp_path / "test_scores.csv")
    predictions = scoring.predict(learner.network, part, compute=CPU)
    for number, row in table.iterrows():
        prediction, mask = predictions[number, 0].bool(), part.masks[number, 0].bool()
        assert (row["predicted_px"], row["lesion_px"]) == (int(prediction.sum()), int(mask.sum()))
        overlap = int((prediction & mask).sum())
        assert row["dice"] * (row["predicted_px"] + row["lesion_px"]) == pytest.approx(2 * overlap)
    assert table["predicted_px"].tolist() != table["lesion_px"].tolist()
