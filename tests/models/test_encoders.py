"""The family of small EfficientNet-Lite0 encoders: sizes, maps, and the channels that a narrow one begins with."""

import pytest
import timm
import torch
from small import unet
from test_packages import renamed

from kdsweep.config import composition
from kdsweep.core.errors import InputError
from kdsweep.models import encoders, networks
from kdsweep.training import build

SIZES = {"200k": 0.2e6, "400k": 0.4e6, "small": 0.82e6, "1600k": 1.6e6, "3600k": 3.6e6}
CHANNELS = [52, 32, 24, 16, 16]


def built(encoder):
    return unet(encoder=encoder, decoder_channels=CHANNELS, weights="none", seed=0)


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_the_ladders_students_have_the_size_of_their_name_and_begin_with_imagenets_weights(name, size):
    cfg = composition.compose([f"student=efficientnet_lite0_{name}", "weights=imagenet", "path=none"])
    network = build.student_network(cfg)
    assert networks.count_parameters(network) == pytest.approx(size, rel=0.04)
    stem = renamed(cfg.student, "tf_efficientnet_lite0").conv_stem.weight
    assert torch.equal(network.encoder.conv_stem.weight, stem)
    maps = network.eval()(torch.zeros(1, 3, 64, 64), [f"encoder.{number}" for number in range(1, 6)])
    assert [each.shape[2] for each in maps.values()] == [32, 16, 8, 4, 2]
    assert [each.shape[1] for each in maps.values()] == network.encoder.out_channels[1:]


def test_the_complete_network_is_timms():
    slim, complete = built("efficientnet_lite0_w100_b1223341").encoder, timm.create_model("tf_efficientnet_lite0")
    gone = ("conv_head.", "bn2.", "classifier.")
    shapes = {key: value.shape for key, value in complete.state_dict().items() if not key.startswith(gone)}
    assert {key: value.shape for key, value in slim.state_dict().items()} == shapes
    slim.load_state_dict({key: value for key, value in complete.state_dict().items() if not key.startswith(gone)})
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = complete.eval().blocks(complete.bn1(complete.conv_stem(images)))
        assert torch.equal(slim.eval()(images)[-1], expected)


def test_a_narrow_network_begins_with_the_same_evenly_chosen_channels_in_each_layer():
    cfg = composition.compose(["student=efficientnet_lite0_200k", "weights=imagenet", "path=none"])
    network, complete = build.student_network(cfg), renamed(cfg.student, "tf_efficientnet_lite0")
    narrow, wide = network.encoder.blocks[1][0], complete.blocks[1][0]

    def kept(count, of):
        return [number * of // count for number in range(count)]

    outer = kept(narrow.conv_pw.in_channels, wide.conv_pw.in_channels)
    inner = kept(narrow.conv_pw.out_channels, wide.conv_pw.out_channels)
    assert len(inner) < wide.conv_pw.out_channels
    assert torch.equal(narrow.conv_pw.weight, wide.conv_pw.weight[inner][:, outer])
    assert torch.equal(narrow.bn1.running_var, wide.bn1.running_var[inner])
    assert torch.equal(narrow.conv_dw.weight, wide.conv_dw.weight[inner])
    assert torch.equal(narrow.conv_pwl.weight[:, 0], wide.conv_pwl.weight[kept(narrow.conv_pwl.out_channels, 24), 0])


@pytest.mark.parametrize("name", ["w100_b1223342", "w100_b0223341", "w05_b1223341", "w101_b1223341"])
def test_a_network_with_more_blocks_than_there_are_or_another_width_is_refused(name):
    with pytest.raises(InputError, match=f"encoder=efficientnet_lite0_{name}: EfficientNet-Lite0 is "):
        built(f"efficientnet_lite0_{name}")


def test_an_unknown_encoder_is_refused():
    with pytest.raises(InputError, match="encoder=resnet1 is not an encoder of segmentation-models-pytorch"):
        encoders.check_encoder("resnet1")
