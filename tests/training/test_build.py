"""What a configuration becomes: the images of its split, networks by seed, views by role, losses with their options."""

import pytest
import torch
from small import STUBS

from kdsweep.config import composition, identity, inputs
from kdsweep.core.device import Compute
from kdsweep.data.splits import random_split
from kdsweep.distill import losses
from kdsweep.models import networks
from kdsweep.training import build, loop

CPU = Compute(device=torch.device("cpu"), precision="fp32")


@pytest.fixture
def compose(small_busi, tmp_path):
    def make(*overrides):
        quick = ["profile=quick", "data=busi", "device=cpu", "train.batch_size=6", f"data.root={small_busi}"]
        return composition.compose([*quick, f"store={tmp_path}", *overrides])

    return make


def weights_of(network):
    return network.encoder.conv_stem.weight if hasattr(network.encoder, "conv_stem") else network.encoder.conv1.weight


@pytest.mark.parametrize("split", [0, 1, 2])
def test_each_part_of_a_split_gets_its_images_and_no_others(compose, split):
    cfg = compose(f"split=s{split}")
    feed, ids = build.feed(cfg, seed=0), inputs.images(cfg).ids
    part = random_split(len(ids), index=split)
    assert sorted(feed.train.batches.indices) == sorted(part.train)
    assert feed.validation.ids == [ids[i] for i in part.validation]
    assert feed.test.ids == [ids[i] for i in part.test]
    trained = {ids[i] for i in feed.train.batches.indices}
    assert not trained & {*feed.validation.ids, *feed.test.ids}
    assert trained | {*feed.validation.ids, *feed.test.ids} == set(ids)
    written = inputs.split_ids(cfg)
    assert set(written["train"]) == trained
    assert written["test"] == feed.test.ids


def test_each_split_has_another_test_part(compose):
    assert len({tuple(build.feed(compose(f"split=s{split}"), seed=0).test.ids) for split in range(3)}) == 3


def test_the_weights_of_a_student_and_of_a_teacher_follow_their_seeds(compose):
    base, other = compose("path=L", "seed=0"), compose("path=L", "seed=1", "teacher.seed=0")
    assert torch.equal(weights_of(build.student_network(base)), weights_of(build.student_network(base)))
    assert not torch.equal(weights_of(build.student_network(base)), weights_of(build.student_network(other)))
    assert torch.equal(weights_of(build.teacher_network(base)), weights_of(build.teacher_network(other)))
    another = compose("path=L", "seed=0", "teacher.seed=1")
    assert not torch.equal(weights_of(build.teacher_network(base)), weights_of(build.teacher_network(another)))


def test_a_teacher_and_a_student_are_trained_at_their_rates(compose):
    cfg = compose("path=L", "teacher.lr=1e-3", "train.lr=1e-5")
    teacher = build.learner(cfg, identity.teacher_cell(cfg))
    student = build.learner(cfg, identity.cell(cfg))
    for made, rate in ((teacher, 1e-3), (student, 1e-5)):
        assert {group["lr"] for group in made.optimizer.param_groups} == {rate}


def test_a_regressor_follows_the_seed(compose):
    paths = [
        build.distillation(compose("path=HR", f"seed={seed}"), teacher="").terms["kd"].kd_path for seed in (0, 0, 1)
    ]
    first, again, other = (path.regressor[0].weight for path in paths)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("view", ["weak", "strong"])
def test_a_teacher_is_trained_on_and_shown_the_view_of_its_name(compose, view):
    cfg = compose("path=L", f"teacher_aug={view}")
    assert build.learner(cfg, identity.teacher_cell(cfg)).view == view
    assert build.distillation(cfg, teacher="").forward.view == view
    assert build.learner(cfg, identity.cell(cfg)).view == "strong"
    assert build.learner(cfg, identity.teacher_cell(cfg)).lr == cfg.teacher.lr


@pytest.mark.parametrize("view", ["weak", "strong"])
def test_a_network_sees_image_and_mask_of_one_view(compose, view):
    CPU.prepare()
    cfg = compose("path=L", f"teacher_aug={view}", "train.epochs=1")
    learner, feed = build.learner(cfg, identity.teacher_cell(cfg)), build.feed(cfg, seed=0)
    seen = []
    terms, forward = learner.terms, learner.network.forward
    learner.terms = lambda *arguments: seen.append(("mask", arguments[-1].student_mask.clone())) or terms(*arguments)
    learner.network.forward = lambda images, stages: seen.append(("image", images.clone())) or forward(images, stages)
    loop.train_epoch([learner], 0, frozen=loop.FrozenTeachers({}, CPU), feed=feed, compute=CPU)
    batches = list(feed.train.epoch(0))
    assert [kind for kind, _ in seen] == ["image", "mask"] * len(batches)
    for number, batch in enumerate(batches):
        assert torch.equal(seen[2 * number][1], loop.normalize(batch[view]))
        assert torch.equal(seen[2 * number + 1][1], batch[f"{view}_mask"][:, None])
    assert any(not torch.equal(batch["weak_mask"], batch["strong_mask"]) for batch in batches)


@pytest.mark.parametrize(("path", "formula"), [("L", losses.kld_pixels), ("H", losses.kld_positions)])
def test_the_temperature_reaches_the_loss(compose, path, formula):
    generator = torch.Generator().manual_seed(0)
    maps = {name: torch.randn(2, 1, 4, 4, generator=generator) for name in ("student", "teacher")}
    maps["valid"] = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    for temperature in (1.0, 4.0):
        loss = build.distillation(compose(f"path={path}", f"kd.temperature={temperature}"), teacher="").terms["kd"].loss
        assert float(loss(**maps)) == pytest.approx(float(formula(**maps, temperature=temperature)))
    assert float(formula(**maps, temperature=1.0)) != pytest.approx(float(formula(**maps, temperature=4.0)))


def test_the_options_of_training_reach_the_learner(compose):
    values = ["train.lr=2e-4", "train.epochs=7", "train.patience=3", "train.monitor=dice", "scores.nsd_tolerance_px=3"]
    cfg = compose("path=H", "kd.weight=0.2", "kd.align=none", "teacher_aug=weak", *values)
    learner = build.learner(cfg, identity.cell(cfg))
    assert (learner.lr, learner.epochs, learner.patience) == (2e-4, 7, 3)
    assert (learner.monitor, learner.nsd_tolerance_px) == ("dice", 3)
    assert (learner.distillation.weight, learner.distillation.align) == (0.2, False)
    assert learner.optimizer.param_groups[0]["lr"] == 2e-4


def test_the_options_of_a_teachers_training_reach_its_learner(compose):
    """Those of ``teacher`` where they are set, else those of the Student."""
    logits, mask = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 1, 8, 8)
    common = ["train.epochs=7", "train.patience=3", "train.supervised=bce_dice", "train.schedule=cosine"]
    of_teacher = ["teacher.epochs=5", "teacher.monitor=dice", "teacher.supervised=bce", "teacher.schedule=poly"]
    expected = [(7, "loss", losses.cross_entropy_and_dice, "cosine"), (5, "dice", losses.cross_entropy, "poly")]
    for overrides, (epochs, monitor, supervised, schedule) in zip(
        (common, [*common, *of_teacher]), expected, strict=True
    ):
        cfg = compose("path=L", *overrides)
        teacher = build.learner(cfg, identity.teacher_cell(cfg))
        student = build.learner(cfg, identity.cell(cfg))
        assert (teacher.epochs, teacher.patience, teacher.monitor, teacher.schedule) == (epochs, 3, monitor, schedule)
        assert (student.epochs, student.monitor, student.schedule) == (7, "loss", "cosine")
        assert teacher.supervised(logits=logits, mask=mask) == supervised(logits=logits, mask=mask)
        assert student.supervised(logits=logits, mask=mask) == losses.cross_entropy_and_dice(logits=logits, mask=mask)


def test_a_teacher_has_a_patience_of_its_own(compose, small_busi, tmp_path):
    """In the study no network is stopped by its curve, also no Teacher with more epochs than the Students."""
    study = [
        "profile=study",
        "path=L",
        "data=busi",
        f"data.root={small_busi}",
        "split=s0",
        "weights=none",
        "train.epochs=4",
        *STUBS,
        f"store={tmp_path}",
    ]
    for settings, expected in (
        (compose("path=L", "train.patience=3"), (3, 3)),
        (compose("path=L", "train.patience=3", "teacher.patience=9"), (9, 3)),
        (composition.compose([*study, "teacher.epochs=9"]), (9, 4)),
        (composition.compose(study), (4, 4)),
    ):
        teacher = build.learner(settings, identity.teacher_cell(settings))
        assert (teacher.patience, build.learner(settings, identity.cell(settings)).patience) == expected


def test_the_groups_of_images_reach_their_scores(compose, tmp_path):
    ids, file = inputs.images(compose()).ids, tmp_path / "groups.csv"
    groups = {image_id: f"patient {number // 2}" for number, image_id in enumerate(ids)}
    file.write_text("id,group\n" + "".join(f"{image_id},{group}\n" for image_id, group in groups.items()))
    for overrides in (["split=kfold"], ["split=kfold", f"split.group={file}"]):
        part = build.feed(compose(*overrides), seed=0).test
        assert part.groups == ([groups[image_id] for image_id in part.ids] if len(overrides) > 1 else None)


def test_a_frozen_teacher_is_in_eval_mode_without_gradients(compose):
    network = networks.freeze(build.teacher_network(compose("path=L")))
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
