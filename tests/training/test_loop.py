"""The loop: a group equals its members alone, Teachers stay frozen, early stopping and divergence."""

import itertools
import math
import random
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from small import STUDENT, TEACHER

from kdsweep.config import composition, decisions, identity
from kdsweep.core.device import Compute, placed
from kdsweep.core.errors import DeviceError, InputError
from kdsweep.core.files import write_json
from kdsweep.data.views import normalize
from kdsweep.distill.distillation import TeacherForward, Term, ViewPair
from kdsweep.distill.paths import Logits
from kdsweep.evaluation import scoring
from kdsweep.evaluation.metrics import mean_dice
from kdsweep.models import networks
from kdsweep.models.networks import Outputs
from kdsweep.store import cell_folder, checkpoint
from kdsweep.training import build, group, lockstep, loop, outcome
from kdsweep.training.learner import DivergedError
from kdsweep.training.meter import EpochMeter

QUICK = ["profile=quick", "data=busi", "train.batch_size=6", "train.epochs=2", "device=cpu"]


SMALL = [*STUDENT, *TEACHER]  # where the networks do not matter
REAL = []  # those of the profile

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def compose(small_busi, tmp_path):
    def make(*overrides, networks=SMALL):
        return composition.compose([*QUICK, f"data.root={small_busi}", f"store={tmp_path}", *networks, *overrides])

    return make


def teachers_of(*configs):
    """Untrained but frozen Teachers by fingerprint, unlike each other; distillation does not care how good they are."""
    teachers = {}
    for cfg in configs:
        if cfg.is_distilled:
            network = build.teacher_network(cfg).to(memory_format=torch.channels_last)
            with torch.no_grad():  # equal seeds would give Teachers of both views the same weights
                for parameter in network.parameters():
                    parameter.mul_(1.0 if cfg.teacher_aug.train_view == "weak" else 1.1)
            teachers[identity.teacher_cell(cfg).fingerprint] = networks.freeze(network)
    return teachers


def make_learner(cfg, folder):
    learner = build.learner(cfg, identity.cell(cfg))
    learner.folder = folder
    write_json(folder / "split.json", {})
    return learner


def feed_of(cfg):
    return build.feed(cfg, seed=cfg.seed)


def state_of(learner):
    return {f"{k}.{n}": v for k, module in learner.modules.items() for n, v in module.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


CPU = Compute(device=torch.device("cpu"), precision="fp32")


@pytest.mark.parametrize("networks", [SMALL, pytest.param(REAL, marks=pytest.mark.slow)], ids=["small", "real"])
def test_a_group_of_five_equals_five_solo_runs_bit_for_bit(compose, tmp_path, networks):
    configs = [
        compose("path=HR", "loss=kld", "teacher_aug=weak", networks=networks),
        compose("path=L", "loss=mse", "teacher_aug=strong", "train.lr=3e-4", networks=networks),
        compose("path=none", networks=networks),
        compose("method=emkd", "teacher_aug=weak", networks=networks),
        compose("method=mgd", "teacher_aug=weak", networks=networks),  # its path draws random numbers
    ]
    group = [make_learner(cfg, tmp_path / f"group{i}") for i, cfg in enumerate(configs)]
    torch.manual_seed(123)  # what else has drawn random numbers must not matter
    lockstep.run(group, teachers=teachers_of(*configs), feed=feed_of(configs[0]), compute=CPU)
    for i, cfg in enumerate(configs):
        alone = make_learner(cfg, tmp_path / f"alone{i}")
        lockstep.run([alone], teachers=teachers_of(cfg), feed=feed_of(cfg), compute=CPU)
        assert_same(state_of(alone), state_of(group[i]))
        assert alone.history == group[i].history
        together, alone_scores = (tmp_path / f"{kind}{i}" / "test_scores.csv" for kind in ("group", "alone"))
        assert together.read_bytes() == alone_scores.read_bytes()
    finals = [cell_folder.read(learner.folder).values["test/dice"] for learner in group]
    assert len({round(value, 12) for value in finals}) == 5  # different trainings
    assert {"train/kd.affinity_low", "val/kd.logits"} <= group[3].history[0].keys()


def test_the_teacher_is_left_as_it_was_and_gets_no_gradient(compose, tmp_path):
    cfg = compose("path=HR", "teacher_aug=strong")
    frozen = teachers_of(cfg)
    (teacher,) = frozen.values()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    loop.fit([make_learner(cfg, tmp_path)], teachers=frozen, feed=feed_of(cfg), compute=CPU)
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert_same(before, teacher.state_dict())  # batch norm statistics among them


@pytest.mark.parametrize("spoil", [lambda t: t.train(), lambda t: t.requires_grad_(True)], ids=["train", "grad"])
def test_a_teacher_that_is_not_frozen_is_refused(compose, spoil):
    frozen = teachers_of(compose("path=L"))
    spoil(next(iter(frozen.values())))
    with pytest.raises(ValueError, match="not frozen"):
        loop.FrozenTeachers(frozen, CPU)


def test_a_teacher_kept_in_bf16_computes_the_bits_that_autocast_would(compose):
    cfg = compose("path=HR", "teacher_aug=weak")
    ((name, teacher),) = teachers_of(cfg).items()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    frozen = loop.FrozenTeachers({name: teacher}, CPU)
    images = {"weak": torch.rand(2, 3, 64, 64).to(memory_format=torch.channels_last)}
    forward = TeacherForward(name, "weak", "bf16")
    with torch.inference_mode():
        kept = frozen._forward(forward, images, {"encoder.5", "logits"})
        with CPU.autocast("bf16"):
            rounded = teacher(images["weak"], {"encoder.5", "logits"})
        exact = frozen._forward(forward._replace(precision="fp32"), images, {"logits"})
    assert all(torch.equal(kept[stage], rounded[stage]) for stage in ("encoder.5", "logits"))
    assert not torch.equal(exact["logits"], kept["logits"].float())
    assert_same(before, teacher.state_dict())  # the one in fp32 serves other cells


def test_validation_images_are_normalized_once_for_all_learners_and_epochs(compose, tmp_path, monkeypatch):
    configs = [compose("path=none"), compose("path=none", "train.lr=1e-4")]
    feed, calls = feed_of(configs[0]), []
    monkeypatch.setattr(scoring, "normalize", lambda images: calls.append(len(images)) or normalize(images))
    learners = [make_learner(cfg, tmp_path / str(number)) for number, cfg in enumerate(configs)]
    loop.fit(learners, teachers={}, feed=feed, compute=CPU)
    assert sum(calls) == len(feed.validation.ids)


ASSERT = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"


def test_a_failed_device_ends_the_group_and_fails_no_cell(compose, tmp_path, monkeypatch):
    configs = [compose("path=none"), compose("path=none", "train.lr=1e-4"), compose("path=none", "train.lr=1e-5")]
    learners = [make_learner(cfg, tmp_path / str(number)) for number, cfg in enumerate(configs)]
    lockstep._begin(learners, feed=feed_of(configs[0]), compute=CPU)
    for learner in learners:
        learner.save()  # at the start: they resume from here
    forward = learners[1].network.forward
    calls = []

    def breaks(*args):
        calls.append(0)
        if len(calls) > 2:
            raise torch.AcceleratorError(ASSERT)
        return forward(*args)

    monkeypatch.setattr(learners[1].network, "forward", breaks)
    where = "epoch 1, step 3, forward: AcceleratorError: CUDA error: device-side assert triggered"
    with pytest.raises(DeviceError, match=rf"the device failed \(.*{where}\)$"):
        lockstep.run(learners, teachers={}, feed=feed_of(configs[0]), compute=CPU)
    assert not any(cell_folder.read(learner.folder).error for learner in learners)
    assert {cell_folder.epochs(learner.folder) for learner in learners} == {0}  # no state of a broken device is saved


def test_hidden_paths_run_the_teachers_encoder_alone_and_each_view_once(compose, tmp_path):
    configs = [compose("path=H", "teacher_aug=weak"), compose("path=HR", "teacher_aug=weak")]
    frozen = loop.FrozenTeachers(teachers_of(*configs), CPU)
    (teacher,) = frozen.teachers.values()
    calls = []
    teacher.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    teacher.decoder.blocks[0].register_forward_hook(lambda *_: calls.append("decoder"))
    images = {"weak": torch.zeros(2, 3, 64, 64), "strong": torch.ones(2, 3, 64, 64)}
    learners = [make_learner(cfg, tmp_path) for cfg in configs]
    (outputs,) = frozen.teach(learners, images).values()
    assert calls == ["encoder"]
    calls.clear()
    learners.append(make_learner(compose("path=L", "teacher_aug=weak"), tmp_path))
    (full,) = frozen.teach(learners, images).values()
    assert calls == ["encoder", "decoder"]
    assert torch.equal(outputs.hidden, full.hidden)


def test_a_teacher_whose_stage_is_another_runs_no_further_than_that(compose, tmp_path):
    path = "method.terms.hint.path"
    cfg = compose(
        "method=fitnet",
        f"{path}.stage=decoder.1",
        f"+{path}.teacher_stage=encoder.4",
        "teacher_aug=weak",
        networks=REAL,
    )
    frozen = loop.FrozenTeachers(teachers_of(cfg), CPU)
    (teacher,) = frozen.teachers.values()
    calls = []
    teacher.encoder.layer4.register_forward_hook(lambda *_: calls.append("layer4"))
    learner = make_learner(cfg, tmp_path)
    (outputs,) = frozen.teach([learner], {"weak": torch.zeros(2, 3, 64, 64)}).values()
    assert (set(outputs), calls) == ({"encoder.4"}, [])
    assert learner.stages == {"decoder.1", "logits"}


def test_terms_are_weighted_as_equation_one_says_and_their_ratio_is_recorded(compose, tmp_path):
    cfg = compose("path=L", "loss=mse", "kd.weight=0.3", "train.epochs=1")
    learner = make_learner(cfg, tmp_path)
    loop.fit([learner], teachers=teachers_of(cfg), feed=feed_of(cfg), compute=CPU)
    (values,) = learner.history
    for part in ("train", "val"):
        expected = 0.3 * values[f"{part}/kd"] + 0.7 * values[f"{part}/supervised"]
        assert values[f"{part}/loss"] == pytest.approx(expected, rel=1e-6)
    assert values["train/kd_to_supervised"] == pytest.approx(values["train/kd"] / values["train/supervised"])
    assert {"train/loss", "train/kd", "train/supervised", "val/loss", "val/dice"} <= values.keys()


def test_each_image_weighs_alike_in_the_means_of_an_epoch(compose, tmp_path):
    """The batches are unequal: 16 training images in sixes, 4 validation images in threes."""
    cfg = compose("method=emkd", "train.epochs=1", "train.lr=1e-2")
    learner, seen = make_learner(cfg, tmp_path), {"train": [], "val": []}
    terms = learner.terms

    def watched(outputs, teacher_outputs, views):
        values_by_term = terms(outputs, teacher_outputs, views)
        values = {name: value.item() for name, value in values_by_term.items()}
        if not torch.is_grad_enabled():
            values["dice"] = mean_dice(logits=outputs.logits, mask=views.student_mask).item()
        seen["train" if torch.is_grad_enabled() else "val"].append((len(views.student_mask), values))
        return values_by_term

    learner.terms = watched
    compute = Compute(device=torch.device("cpu"), precision="fp32", eval_batch=3)
    loop.fit([learner], teachers=teachers_of(cfg), feed=feed_of(cfg), compute=compute)
    for part, sizes in (("train", [6, 6, 4]), ("val", [3, 1])):
        assert [count for count, _ in seen[part]] == sizes
        for name in seen[part][0][1]:
            values = [values[name] for _, values in seen[part]]
            expected = sum(count * value for count, value in zip(sizes, values, strict=True)) / sum(sizes)
            assert learner.history[0][f"{part}/{name}"] == pytest.approx(expected, rel=1e-6), name
            if name in ("loss", "supervised"):
                assert expected != pytest.approx(sum(values) / len(values), rel=1e-4), "or the test says nothing"


def test_each_adapter_of_a_method_is_trained_and_saved(compose, tmp_path):
    cfg = compose("method=reviewkd", "teacher_aug=weak", "train.epochs=2", "train.lr=1e-2")
    learner = make_learner(cfg, tmp_path)
    adapters = {name: term.kd_path.adapter.weight for name, term in learner.distillation.terms.items()}
    before = {name: weight.detach().clone() for name, weight in adapters.items()}
    lockstep.run([learner], teachers=teachers_of(cfg), feed=feed_of(cfg), compute=CPU)
    best = checkpoint.load_state(tmp_path / "checkpoint.pt")["best"]
    saved = [value for state in best.values() for key, value in state.items() if key == "adapter.weight"]
    assert len(adapters) == len(saved) == 4
    for name, weight in adapters.items():
        assert not torch.equal(weight, before[name]), f"{name} was not trained"
        assert any(torch.equal(weight, value) for value in saved), f"{name} was not saved"


def test_the_kd_term_reaches_the_student_and_the_regressor_which_is_not_exported(compose, tmp_path):
    cfg = compose("path=HR", "loss=mse", "kd.weight=1.0", "train.epochs=1", networks=REAL)
    learner = make_learner(cfg, tmp_path)
    before = {name: value.clone() for name, value in state_of(learner).items()}
    lockstep.run([learner], teachers=teachers_of(cfg), feed=feed_of(cfg), compute=CPU)
    moved = {name for name, value in state_of(learner).items() if not torch.equal(value, before[name])}
    assert {"kd_path.regressor.0.weight", "network.encoder.conv_stem.weight"} <= moved
    assert "network.segmentation_head.0.weight" not in moved  # with weight 1 nothing supervises the head
    best = checkpoint.load_state(tmp_path / "checkpoint.pt")["best"]
    assert "regressor.0.weight" in best["kd_path"]
    exported = build.student_network(cfg)
    checkpoint.load_network(tmp_path / "student.safetensors", exported)
    assert networks.count_parameters(exported) == 820_385
    assert_same(exported.state_dict(), best["network"])


def test_align_none_compares_the_maps_as_they_are(compose, tmp_path):
    states = []
    for align in ("warp", "none"):
        cfg = compose("path=L", "teacher_aug=weak", f"kd.align={align}", "train.epochs=1")
        learner = make_learner(cfg, tmp_path / align)
        loop.fit([learner], teachers=teachers_of(cfg), feed=feed_of(cfg), compute=CPU)
        states.append(learner.history[0]["train/kd"])
    assert states[0] != states[1]


def test_the_best_epoch_is_tested_not_the_last(compose, tmp_path):
    cfg = compose("path=none", "train.epochs=4", "scores.nsd_tolerance_px=5")
    learner = make_learner(cfg, tmp_path)
    losses, end_epoch, states = iter([0.5, 0.4, 0.6, 0.7]), learner.end_epoch, []

    def end_with_next_loss(values):
        states.append({name: value.clone() for name, value in learner.network.state_dict().items()})
        end_epoch({**values, "val/loss": next(losses)})

    learner.end_epoch = end_with_next_loss
    (final,) = lockstep.run([learner], teachers={}, feed=feed_of(cfg), compute=CPU)
    assert final["best_epoch"] == 1
    assert_same(learner.network.state_dict(), states[1])
    assert not torch.equal(states[1]["segmentation_head.0.weight"], states[3]["segmentation_head.0.weight"])
    table = pd.read_csv(tmp_path / "test_scores.csv")
    again = build.student_network(cfg)
    checkpoint.load_network(tmp_path / "student.safetensors", again)
    part = feed_of(cfg).test
    predictions = scoring.predict(again, part, compute=CPU)
    fresh = scoring.score(predictions, part, nsd_tolerance_px=5.0)
    for name in ("dice", "nsd"):
        assert fresh[name].tolist() == pytest.approx(table[name].tolist())
    kept = checkpoint.load_predictions(tmp_path / "test_predictions.npz")
    assert list(kept) == table["image"].tolist() == part.ids
    assert np.array_equal(np.stack(list(kept.values())), predictions[:, 0].numpy())
    assert final["test/dice"] == pytest.approx(table["dice"].mean())
    assert final["test/dice_std"] == pytest.approx(table["dice"].std(ddof=1))
    for name in ("iou", "precision", "sensitivity", "hd95_px", "nsd"):
        assert final[f"test/{name}"] == pytest.approx(table[name].mean()), name
    assert final["best/val_dice"] == learner.history[1]["val/dice"]
    assert final["epochs"] == 4
    assert cell_folder.read_finished(tmp_path) == final


@pytest.mark.parametrize(
    ("monitor", "values", "best", "is_stopped"),
    [
        ("loss", [(0.9, 0.2), (0.8, 0.2), (0.85, 0.2), (0.81, 0.2)], 1, True),
        ("loss", [(0.5, 0.2), (0.5, 0.2), (0.5, 0.2)], 0, True),  # an equal loss is not an improvement
        ("loss", [(0.9, 0.2), (0.5, 0.4), (0.6, 0.7), (0.7, 0.6)], 1, True),
        ("dice", [(0.9, 0.2), (0.5, 0.4), (0.6, 0.7), (0.7, 0.6)], 2, False),
    ],
)
def test_early_stopping_waits_for_patience_epochs_without_a_better_value(
    compose, tmp_path, monitor, values, best, is_stopped
):
    cfg = compose("path=none", f"train.monitor={monitor}", "train.patience=2", "train.epochs=9")
    learner = make_learner(cfg, tmp_path)
    for loss, dice in values:
        assert not learner.stopped
        learner.end_epoch({"val/loss": loss, "val/dice": dice})
    assert (learner.best_epoch, learner.stopped) == (best, is_stopped)


def test_a_teacher_is_the_same_whatever_its_students_monitor(compose):
    configs = [compose("path=L", f"train.monitor={monitor}") for monitor in ("loss", "dice")]
    assert len({identity.cell(cfg).fingerprint for cfg in configs}) == 2
    assert len({identity.teacher_cell(cfg).fingerprint for cfg in configs}) == 1


def test_one_stopped_learner_does_not_stop_the_group(compose, tmp_path):
    short, long = compose("path=none", "train.epochs=1"), compose("path=none", "train.epochs=3")
    learners = [make_learner(short, tmp_path / "short"), make_learner(long, tmp_path / "long")]
    loop.fit(learners, teachers={}, feed=feed_of(long), compute=CPU)
    assert [len(learner.history) for learner in learners] == [1, 3]
    assert learners[0].history[0] == learners[1].history[0]


@pytest.mark.parametrize(
    ("call", "value", "expected"),  # an epoch is 3 steps and 1 validation batch
    [
        (1, math.nan, "train/kd is nan in epoch 1, step 1; "),
        (6, math.inf, "train/kd is inf in epoch 2, step 2; "),
        (4, math.nan, "val/kd is nan in epoch 1, validation batch 1; "),
    ],
)
def test_a_value_that_is_not_finite_ends_the_learner_with_term_and_step(compose, tmp_path, call, value, expected):
    cfg = compose("path=L", "train.epochs=3")
    learner, calls = make_learner(cfg, tmp_path), itertools.count(1)
    usual = learner.distillation.terms["kd"].loss
    learner.distillation.terms["kd"].loss = lambda **maps: usual(**maps) * (value if next(calls) == call else 1.0)
    (result,) = lockstep.run([learner], teachers=teachers_of(cfg), feed=feed_of(cfg), compute=CPU)
    assert isinstance(result, DivergedError)
    assert str(result).startswith(f"L_KLD_WAug split 0 seed 0: {expected}")
    record = cell_folder.read(tmp_path)
    assert (record.status, record.error) == ("FAILED", str(result))
    assert cell_folder.read_finished(tmp_path) is None


def test_a_student_is_validated_and_tested_in_eval_mode_and_trained_in_train_mode(compose, tmp_path):
    learner, modes = make_learner(compose("path=none"), tmp_path), []
    forward = learner.network.forward
    learner.network.forward = lambda *arguments: modes.append(learner.network.training) or forward(*arguments)
    lockstep.run([learner], teachers={}, feed=feed_of(compose()), compute=CPU)
    assert modes == [True, True, True, False, True, True, True, False, False]  # 2 epochs of 3 steps, then the test


def test_the_gradient_ratio_is_that_of_two_separate_backward_passes(compose, tmp_path):
    cfg = compose("path=H", "loss=mse", "kd.weight=0.3", "train.epochs=1")
    learner, ratios = make_learner(cfg, tmp_path), []
    terms = learner.terms

    def measured(*arguments):
        measured_terms = terms(*arguments)
        if learner.steps == 0 and torch.is_grad_enabled():
            encoder = list(learner.network.encoder.parameters())
            norms = [
                torch.cat(
                    [part.flatten() for part in torch.autograd.grad(measured_terms[name], encoder, retain_graph=True)]
                )
                for name in ("kd", "supervised")
            ]
            ratios.append(float(norms[0].double().norm() / norms[1].double().norm()))
        return measured_terms

    learner.terms = measured
    loop.fit([learner], teachers=teachers_of(cfg), feed=feed_of(cfg), compute=CPU)
    (values,) = learner.history
    assert values["train/kd_gradient_ratio"] == pytest.approx(0.3 / 0.7 * ratios[0], rel=1e-4)
    assert "train/kd_weight" not in values


def test_measuring_the_gradients_changes_no_bit_of_the_training(compose, tmp_path):
    cfg, learners = compose("path=HR", "teacher_aug=weak"), []
    for measures in (True, False):
        learner = make_learner(cfg, tmp_path / str(measures))
        if not measures:
            learner.backward = lambda terms: terms["loss"].backward()
        loop.fit([learner], teachers=teachers_of(cfg), feed=feed_of(cfg), compute=CPU)
        learners.append(learner)
    assert ["train/kd_gradient_ratio" in learner.history[0] for learner in learners] == [True, False]
    assert_same(*map(state_of, learners))


def test_a_matched_weight_balances_the_first_epoch_and_is_kept(compose, tmp_path):
    cfg = compose("path=L", "loss=mse", "kd.weight=matched", "kd.ratio=0.5", "train.epochs=3")
    learner = make_learner(cfg, tmp_path)
    (final,) = lockstep.run([learner], teachers=teachers_of(cfg), feed=feed_of(cfg), compute=CPU)
    rows = learner.history
    assert rows[0]["train/kd_gradient_ratio"] == pytest.approx(0.5, rel=1e-4)
    weights = {row["train/kd_weight"] for row in rows}
    assert len(weights) == 1
    (weight,) = weights
    assert final["kd/weight"] == weight
    assert 0 < weight < 1
    assert weight != pytest.approx(0.5, abs=0.01)
    for row in rows:
        expected = weight * row["val/kd"] + (1 - weight) * row["val/supervised"]
        assert row["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert ["train/kd_gradient_ratio" in row for row in rows] == [True, False, False]
    assert final["kd/gradient_ratio"] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("weight", ["0.5", pytest.param("matched", marks=pytest.mark.slow)])  # short: the next test
def test_a_training_resumes_where_it_was_interrupted_and_measures_every_tenth_epoch(compose, tmp_path, weight):
    recipe = ["train.schedule=cosine", "train.supervised=bce_dice"]
    cfg = compose("path=HR", f"kd.weight={weight}", "train.epochs=21", "train.patience=99", *recipe)
    frozen, feed = teachers_of(cfg), feed_of(cfg)
    unbroken, part, again = (make_learner(cfg, tmp_path / name) for name in ("unbroken", "part", "part"))
    (final,) = lockstep.run([unbroken], teachers=frozen, feed=feed, compute=CPU)
    ratios = {row["epoch"]: row.get("train/kd_gradient_ratio") for row in unbroken.history}
    measured = [epoch for epoch, ratio in ratios.items() if ratio is not None]
    assert measured == [0, 10, 20]
    assert {"train/kd_weight" in row for row in unbroken.history} == {weight == "matched"}
    best = [ratios[epoch] for epoch in measured if epoch <= unbroken.best_epoch]
    assert final["kd/gradient_ratio"] == pytest.approx(math.prod(best) ** (1 / len(best)))

    def breaks(progress, usual=part.set_rate):
        if (part.epoch, part.steps) == (9, 2):  # in the eleventh epoch, after the step that is measured
            raise InterruptedError
        usual(progress)

    part.set_rate = breaks
    lockstep.run([part], teachers=frozen, feed=feed, compute=CPU)
    assert isinstance(part.failure.__cause__, InterruptedError)
    part.save()
    lockstep.run([again], teachers=frozen, feed=feed, compute=CPU)
    assert again.history == unbroken.history
    assert_same(state_of(again), state_of(unbroken))


def test_a_matched_weight_resumes_where_it_was_interrupted(compose, tmp_path):
    cfg = compose("method=reviewkd", "kd.weight=matched")  # which has several adapters
    unbroken, part = make_learner(cfg, tmp_path / "unbroken"), make_learner(cfg, tmp_path / "part")
    frozen, feed = teachers_of(cfg), feed_of(cfg)
    lockstep.run([unbroken], teachers=frozen, feed=feed, compute=CPU)

    class Stop(BaseException):
        pass

    def forward(images, stages, usual=part.network.forward):
        if part.steps == 2:
            raise Stop
        return usual(images, stages)

    part.network.forward = forward
    placed(part.trained, CPU)  # as run does: the layout in memory decides the last bits
    with pytest.raises(Stop):
        loop.train_epoch([part], 0, frozen=loop.FrozenTeachers(frozen, CPU), feed=feed, compute=CPU)
    part.save()
    again = make_learner(cfg, tmp_path / "part")
    lockstep.run([again], teachers=frozen, feed=feed_of(cfg), compute=CPU)
    assert_same(state_of(again), state_of(unbroken))
    assert again.history == unbroken.history


def test_what_has_diverged_does_not_take_the_place_of_a_good_checkpoint(compose, tmp_path):
    learner = make_learner(compose("path=none"), tmp_path)
    learner.save()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    learner.means.add({"loss": torch.tensor(math.inf), "supervised": torch.tensor(math.inf)}, 6)
    with pytest.raises(DivergedError, match="train/supervised is inf in epoch 1, step 1"):
        learner.save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_an_error_is_returned_also_when_it_cannot_be_written_down(compose, tmp_path, monkeypatch):
    learner = make_learner(compose("path=none"), tmp_path)
    learner.network.forward = lambda *_: (_ for _ in ()).throw(RuntimeError("the real cause"))
    monkeypatch.setattr(cell_folder, "write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    (result,) = lockstep.run([learner], teachers={}, feed=feed_of(compose()), compute=CPU)
    assert str(result) == "Student split 0 seed 0: epoch 1, step 1, forward: RuntimeError: the real cause"


def test_bf16_runs_and_stays_close_to_fp32(compose, tmp_path):
    values = {}
    for precision in ("fp32", "bf16"):
        cfg = compose("path=L", "loss=mse", "train.epochs=1", f"precision={precision}", networks=REAL)
        learner = make_learner(cfg, tmp_path / precision)
        loop.fit([learner], teachers=teachers_of(cfg), feed=feed_of(cfg), compute=build.compute(cfg))
        values[precision] = learner.history[0]["train/supervised"]
    assert values["bf16"] == pytest.approx(values["fp32"], rel=0.02)
    assert values["bf16"] != values["fp32"]  # autocast really was on


def test_training_learns_a_visible_lesion(compose, tmp_path):
    cfg = compose("path=none", "train.epochs=25", "train.patience=25", "train.lr=3e-3", networks=REAL)
    learner = make_learner(cfg, tmp_path)
    (values,) = lockstep.run([learner], teachers={}, feed=feed_of(cfg), compute=CPU)
    everything = scoring.score(
        torch.ones_like(feed_of(cfg).test.masks, dtype=torch.bool), feed_of(cfg).test, nsd_tolerance_px=2.0
    )["dice"].mean()
    assert values["test/dice"] > 1.5 * everything


def test_batch_larger_than_the_training_set_is_refused(compose):
    with pytest.raises(InputError, match=r"train\.batch_size=500 is larger than the training set of \d+ images"):
        feed_of(compose("train.batch_size=500"))


def test_a_teacher_read_from_the_store_teaches_as_the_one_just_trained(compose, tmp_path, caplog):
    caplog.set_level("INFO")
    cfg = compose("path=L", "train.epochs=1", f"store={tmp_path}", networks=REAL)
    cell = identity.teacher_cell(cfg)
    trained, read = (group.obtain_teachers([identity.job(cfg)])[cell.fingerprint] for _ in range(2))
    assert caplog.text.count("not in the store yet") == 1  # trained once, then read
    assert not read.training
    images = torch.randn(3, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        read_maps = read(images)
        assert all(torch.equal(maps, read_maps[stage]) for stage, maps in trained(images).items())
    strides = [tuple(network.encoder.layer4[0].conv1.weight.stride()) for network in (trained, read)]
    assert strides[0] == strides[1]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cell_trains_on_cuda_close_to_the_cpu(compose, tmp_path, precision):
    values = {}
    for device in ("cpu", "cuda"):
        cfg = compose(
            "path=L", "loss=mse", "train.epochs=1", f"device={device}", f"precision={precision}", networks=REAL
        )
        learner = make_learner(cfg, tmp_path / device)
        compute = build.compute(cfg)
        frozen = {name: teacher.to(compute.device) for name, teacher in teachers_of(cfg).items()}
        lockstep.run([learner], teachers=frozen, feed=feed_of(cfg), compute=compute)
        values[device] = learner.history[0]["train/loss"]
    assert values["cuda"] == pytest.approx(values["cpu"], rel=0.05)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_group_equals_solo_runs_on_cuda(compose, tmp_path, deterministic):
    """Exactly if configured; else kernels that sum in varying order may move the validation loss of 4 steps by 1 %.

    Adam turns a gradient's sign into a full step, so that rounding of gradients near zero can move single weights by
    twice the learning rate in each step: weights are no measure, the loss over all validation images is.
    """
    names = [*("path=HR", "path=L"), "path=none"]
    configs = [compose(name, "device=cuda", f"deterministic={deterministic}", networks=REAL) for name in names]
    compute = build.compute(configs[0])
    frozen = {name: placed(teacher, compute) for name, teacher in teachers_of(*configs).items()}
    group = [make_learner(cfg, tmp_path / f"group{i}") for i, cfg in enumerate(configs)]
    lockstep.run(group, teachers=frozen, feed=feed_of(configs[0]), compute=compute)
    for i, cfg in enumerate(configs):
        alone = make_learner(cfg, tmp_path / f"alone{i}")
        lockstep.run([alone], teachers=frozen, feed=feed_of(cfg), compute=compute)
        if deterministic:
            assert_same(state_of(alone), state_of(group[i]))
        losses = [learner.history[-1]["val/loss"] for learner in (alone, group[i])]
        assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.gpu
@needs_cuda
def test_no_step_makes_the_host_wait_for_the_device(compose, tmp_path):
    configs = [compose(name, "device=cuda", networks=REAL) for name in ("path=HR", "path=L", "path=H", "path=none")]
    compute = build.compute(configs[0])
    frozen = loop.FrozenTeachers({n: placed(t, compute) for n, t in teachers_of(*configs).items()}, compute)
    group = [make_learner(cfg, tmp_path / str(i)) for i, cfg in enumerate(configs)]
    for learner in group:
        placed(learner.trained, compute)
    feed = feed_of(configs[0])
    loop.train_epoch(group, 0, frozen=frozen, feed=feed, compute=compute)  # what is done once may wait
    for learner in group:
        learner.means = EpochMeter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.train_epoch(group, 1, frozen=frozen, feed=feed, compute=compute)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [learner.failure for learner in group] == [None] * 4


# ---- the recipe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "cosine", "poly"])
def test_the_learning_rate_falls_as_in_pytorchs_schedules(compose, tmp_path, schedule, monkeypatch):
    """At the start of each epoch; within an epoch it keeps falling, step by step."""
    cfg = compose("path=none", "train.epochs=4", "train.patience=9", f"train.schedule={schedule}", "train.lr=0.01")
    learner, feed, rates = make_learner(cfg, tmp_path), feed_of(cfg), []
    step = learner.optimizer.step
    monkeypatch.setattr(
        learner.optimizer, "step", lambda: (rates.append(learner.optimizer.param_groups[0]["lr"]), step())
    )
    loop.fit([learner], teachers={}, feed=feed, compute=CPU)
    other = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    reference = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(other, factor=1.0),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(other, T_max=4),
        "poly": lambda: torch.optim.lr_scheduler.PolynomialLR(other, total_iters=4, power=0.9),
    }[schedule]()
    starts = []
    for _ in range(4):
        starts.append(other.param_groups[0]["lr"])
        other.step()
        reference.step()
    per_epoch = len(feed.train)
    assert rates[::per_epoch] == pytest.approx(starts)
    falls = [later < earlier for earlier, later in itertools.pairwise(rates)]
    assert set(falls) == {schedule != "constant"}


def test_a_recipe_is_the_students_and_unless_it_has_another_the_teachers(compose):
    plain, tuned = compose("path=L"), compose("path=L", "train.schedule=cosine", "train.supervised=bce_dice")
    teacher, student = identity.teacher_cell(tuned), identity.cell(tuned)
    for cell, keys in ((student, ("train", "teacher")), (teacher, ("teacher",))):
        assert {cell.settings[f"{key}.schedule"] for key in keys} == {"cosine"}
        assert {cell.settings[f"{key}.supervised"] for key in keys} == {"bce_dice"}
    assert not {"train.schedule", "train.supervised"} & identity.cell(plain).settings.keys()  # defaults do not count
    separate = compose("path=L", "train.schedule=cosine", "teacher.schedule=constant", "teacher.supervised=bce")
    assert identity.teacher_cell(separate).fingerprint == identity.teacher_cell(plain).fingerprint
    assert identity.cell(separate).fingerprint != identity.cell(plain).fingerprint
    learner = build.learner(separate, identity.teacher_cell(separate))
    assert (learner.schedule, build.learner(separate, identity.cell(separate)).schedule) == ("constant", "cosine")
    swept = {"train.schedule": "cosine"}
    assert decisions.used_by("teacher", swept, identity.params(tuned)) == swept
    assert decisions.used_by("teacher", swept, identity.params(separate)) == {}


# ---- a user's loss in a group ----------------------------------------------------------------------------------------


def plain(*, student, teacher, valid):
    return (student - teacher).square().mean()


def changing(change, *, only_in_validation=False):
    """A loss that changes what all share, but not while it is checked before the training."""

    def loss(*, student, teacher, valid):
        if not (only_in_validation and torch.is_grad_enabled()):
            change()
        return plain(student=student, teacher=teacher, valid=valid)

    return loss


CHANGES = [
    (
        changing(lambda: torch.set_default_dtype(torch.float64)),
        "step 1, afterwards: its code changes torch.set_default_dtype",
    ),
    (changing(lambda: torch.set_num_threads(torch.get_num_threads() + 1)), "step 1, afterwards: .*set_num_threads"),
    (changing(lambda: torch.set_grad_enabled(False)), "step 1, .*"),
    (changing(lambda: torch.set_default_device("meta")), "step 1, .*"),
    (changing(lambda: torch.backends.mkldnn.set_flags(False)), "step 1, afterwards: .*mkldnn.enabled"),
    (changing(lambda: np.seterr(all="raise")), "step 1, afterwards: .*numpy.seterr"),
    (changing(sys.exit), r"step 1, kd term: its code raises SystemExit\("),
    (
        changing(lambda: torch.set_default_dtype(torch.float64), only_in_validation=True),
        "validation, afterwards: .*torch.set_default_dtype",
    ),
    (changing(lambda: sys.exit("done"), only_in_validation=True), r"validation, kd term: .*SystemExit\('done'\)"),
]


def test_a_loss_that_changes_what_all_share_fails_alone_and_the_others_keep_their_bits(compose, tmp_path):
    good = [compose("path=L", "loss=mse"), compose("path=none")]
    bad = compose("path=HR", "loss=mse")
    frozen, feed = teachers_of(*good, bad), feed_of(bad)
    alone = [make_learner(cfg, tmp_path / f"alone{i}") for i, cfg in enumerate(good)]
    lockstep.run(alone, teachers=frozen, feed=feed, compute=CPU)
    together = [make_learner(cfg, tmp_path / f"group{i}") for i, cfg in enumerate(good)]
    guilty = [make_learner(bad, tmp_path / f"bad{i}") for i in range(len(CHANGES))]
    for learner, (loss, _) in zip(guilty, CHANGES, strict=True):
        learner.distillation.terms["kd"].loss = loss
    results = lockstep.run([together[0], *guilty, together[1]], teachers=frozen, feed=feed, compute=CPU)
    for result, (_, expected) in zip(results[1:-1], CHANGES, strict=True):
        assert re.match(rf"HReg_MSE_WAug split 0 seed 0: epoch 1, {expected}", str(result)), result
        assert "\n" not in str(result)
    for one, other in zip(alone, together, strict=True):
        assert_same(state_of(one), state_of(other))
        assert one.history == other.history


def drawing(*, student, teacher, valid):
    """Draws from every generator, in validation too."""
    noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
    return (student - teacher + noise).square().mean()


def keeping(*, student, teacher, valid):
    """Keeps the Teacher's map for its backward pass, which tensors of inference mode do not allow."""
    return (student * teacher).mean()


def test_what_a_loss_draws_in_steps_and_in_validation_is_the_same_alone_and_again(compose, tmp_path):
    configs = [compose(*cell) for cell in (["path=L", "loss=mse"], ["path=HR", "loss=mse"], ["method=mgd"])]
    frozen, feed = teachers_of(*configs), feed_of(configs[0])

    def trained(members, name):
        learners = [make_learner(configs[i], tmp_path / f"{name}{i}") for i in members]
        for learner in learners:
            next(iter(learner.distillation.terms.values())).loss = keeping if "HReg" in learner.title else drawing
        for draw in (random.random, np.random.rand, torch.rand(3).sum):  # what else has drawn must not matter
            draw()
        lockstep.run(learners, teachers=frozen, feed=feed, compute=CPU)
        return learners

    group = trained(range(3), "group")
    for number in range(2):
        (alone,) = trained([number], "alone")
        assert alone.history == group[number].history
        assert_same(state_of(alone), state_of(group[number]))
    assert len({learner.history[0]["val/kd"] for learner in group}) == 3


def test_a_loss_that_spoils_its_arguments_leaves_the_batch_and_the_teachers_maps_as_they_were():
    def spoiling(*, student, teacher, valid, student_mask, teacher_mask):
        for tensor in (teacher, student_mask, teacher_mask):
            tensor.mul_(0).sub_(7)
        valid.logical_not_()
        return student.square().mean()

    maps = {name: torch.rand(2, 1, 8, 8) for name in ("student", "teacher", "mask")}
    masks = (maps["mask"] > 0.5).to(torch.uint8)
    shared = [maps["teacher"], masks, theta := torch.eye(2, 3).repeat(2, 1, 1)]
    before = [tensor.clone() for tensor in shared]
    term = Term(Logits(), spoiling, ("logits",))
    for each_theta in (theta, None):
        views = ViewPair(each_theta, student_mask=masks, teacher_mask=masks)
        student, teacher = (Outputs(logits=maps[name]) for name in ("student", "teacher"))
        assert float(term.value(student=student, teacher=teacher, views=views, align=True)) > 0
        assert all(map(torch.equal, shared, before))


# ---- the end of a training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["train.epochs=2"], ["train.epochs=9", "train.patience=1", "train.lr=0.1"]])
def test_a_failed_test_costs_no_training(compose, tmp_path, monkeypatch, options):
    cfg = compose("path=HR", *options)
    frozen, feed = teachers_of(cfg), feed_of(cfg)
    unbroken = make_learner(cfg, tmp_path / "unbroken")
    (expected,) = lockstep.run([unbroken], teachers=frozen, feed=feed, compute=CPU)
    with monkeypatch.context() as patch:
        patch.setattr(outcome, "score", lambda *_, **__: 1 / 0)
        (result,) = lockstep.run([make_learner(cfg, tmp_path / "cell")], teachers=frozen, feed=feed, compute=CPU)
    assert isinstance(result, ZeroDivisionError)
    assert cell_folder.read(tmp_path / "cell").status == "FAILED"
    monkeypatch.setattr(loop, "_step", lambda *_: 1 / 0)  # no step is needed
    again = make_learner(cfg, tmp_path / "cell")
    assert lockstep.run([again], teachers=frozen, feed=feed, compute=CPU) == [expected]
    for name in ("student.safetensors", "history.csv", "test_scores.csv"):
        assert (tmp_path / "cell" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    assert cell_folder.read(tmp_path / "cell").status == "FINISHED"


@pytest.mark.parametrize("options", ["kd.weight=0", "kd.weight=0.0", "kd.lambda=0", "kd.weight=1", "kd.weight=1e-30"])
def test_any_weight_of_the_kd_term_reaches_the_end(compose, tmp_path, options):
    cfg = compose("path=HR", "loss=mse", options)
    learner = make_learner(cfg, tmp_path)
    (values,) = lockstep.run([learner], teachers=teachers_of(cfg), feed=feed_of(cfg), compute=CPU)
    assert values == cell_folder.read_finished(tmp_path)
    has_both_terms = learner.distillation.weight not in (0, 1)
    assert ("kd/gradient_ratio" in values) == has_both_terms == ("train/kd_gradient_ratio" in learner.history[0])
