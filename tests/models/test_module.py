"""Any module as Teacher or Student: its maps, its logits, its weights, and what is refused."""

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from small import STUDENT, unet
from torch import nn

from kdsweep.config import composition, identity
from kdsweep.core.errors import InputError
from kdsweep.data.images import IMAGENET_MEAN, IMAGENET_STD
from kdsweep.models import networks
from kdsweep.models.module import ModuleNetwork
from kdsweep.models.weights import load_weights
from kdsweep.store import checkpoint
from kdsweep.training import build, loop

READY = ("deeplabv3plus", "fpn", "segformer", "fcn", "basicunet", "vit")
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """A small network: two convolutions, an activation in place and a head at half the size."""

    def __init__(self, form=lambda logits: logits, channels=1):
        super().__init__()
        self.body = nn.ModuleDict({"first": nn.Conv2d(3, 4, 3, stride=2, padding=1), "second": nn.Conv2d(4, 4, 1)})
        self.head, self.form, self.ran = nn.Conv2d(4, channels, 1), form, 0

    def forward(self, images):
        maps = F.relu(self.body["first"](images), inplace=True)
        maps = self.body["second"](maps)
        self.ran += 1
        return self.form(self.head(maps))


STAGES = {"encoder.4": "body.first", "encoder.5": "body.second"}


def test_stages_are_the_outputs_of_submodules_before_anything_changes_them():
    module = Two()
    with torch.no_grad():
        outputs = ModuleNetwork(module, stages=STAGES)(IMAGES, ("encoder.4", "encoder.5", "logits"))
        first = module.body["first"](IMAGES)
        assert torch.equal(outputs["encoder.4"], first)
        assert first.min() < 0  # the ReLU that follows works in place
        assert torch.equal(outputs["encoder.5"], module.body["second"](first.relu()))
        at_half = module.head(outputs["encoder.5"])
        assert torch.equal(outputs.logits, F.interpolate(at_half, (64, 64), mode="bilinear", align_corners=False))
    assert not any(part._forward_hooks for part in module.modules())


def test_it_runs_no_further_than_the_last_stage():
    module = Two()
    network = ModuleNetwork(module, stages=STAGES)
    assert set(network(IMAGES, ["encoder.4"])) == {"encoder.4"}
    assert module.ran == 0
    assert set(network(IMAGES)) == {"logits"}
    assert module.ran == 1


@pytest.mark.parametrize(
    ("form", "output"),
    [
        (lambda logits: logits, None),
        (lambda logits: {"aux": logits + 1, "out": logits}, None),
        (lambda logits: {"logits": logits, "loss": None}, None),
        (lambda logits: [logits + 1, logits], 1),
        (lambda logits: {"mask": logits}, "mask"),
    ],
    ids=["tensor", "torchvision", "transformers", "list", "key"],
)
def test_logits_are_taken_from_any_usual_output(form, output):
    module = Two(form)
    logits = ModuleNetwork(module, stages={}, output=output)(IMAGES).logits
    module.form = lambda logits: logits
    expected = F.interpolate(module(IMAGES), (64, 64), mode="bilinear", align_corners=False)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("module", "options", "line"),
    [
        (Two(), {"stages": {"encoder.5": "body.secnd"}}, "stages.encoder.5=body.secnd is not a submodule of Two; near"),
        (Two(), {"stages": {}, "output": "mask"}, "output=mask is not an output of Two; it has one output, a tensor"),
        (Two(lambda logits: [logits]), {"stages": {}}, "Two gives list; choose with output=...: it has 0 to 0"),
        (Two(lambda logits: {"a": logits}), {"stages": {}}, "choose with output=...: it has a"),
        (Two(channels=3), {"stages": {}}, "Two gives logits of shape (2, 3, 32, 32); they must be (N, 1, h, w)"),
        (Two(), {"stages": {"encoder.5": "body"}}, "stages.encoder.5=body does not run in Two's forward"),
        (nn.Sequential(nn.Flatten(), nn.Identity()), {"stages": {"encoder.5": "0"}}, "it must give a map (N, C, h, w)"),
    ],
)
def test_what_does_not_fit_is_one_line(module, options, line):
    with pytest.raises(InputError) as caught:
        network = ModuleNetwork(module, **options)
        network(IMAGES, network.stages)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_stage_is_named_with_the_nearest_one():
    with pytest.raises(InputError, match=r"stage=encoder.6 is not a stage of Two; do you mean encoder.5\? it has: enc"):
        ModuleNetwork(Two(), stages=STAGES)(IMAGES, ["encoder.6"])
    with pytest.raises(InputError, match=r"stage=bridge is not a stage of u-resnet18; it has: encoder.1"):
        unet(encoder="resnet18", decoder_channels=[8] * 5, weights="none", seed=0)(IMAGES, ["bridge"])


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_become_a_map_without_the_class_token(prefix):
    tokens = torch.randn(2, prefix + 16, 8)
    maps = ModuleNetwork(nn.Identity(), stages={})._as_map(tokens, "encoder.5")
    assert maps.shape == (2, 8, 4, 4)
    assert torch.equal(maps[:, :, 1, 2], tokens[:, prefix + 6])


def test_maps_with_channels_last_are_turned():
    maps = torch.randn(2, 4, 4, 8)
    assert torch.equal(ModuleNetwork(nn.Identity(), stages={})._as_map(maps, "a"), maps.permute(0, 3, 1, 2))


def test_a_module_gets_images_of_its_statistics_and_size():
    seen = []

    class Watch(nn.Module):
        def forward(self, images):
            seen.append(images)
            return images[:, :1]

    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    network = ModuleNetwork(Watch(), stages={}, mean=mean, std=std, size=96)
    pixels = torch.rand(2, 3, 64, 64)
    shape = (1, 3, 1, 1)
    normalized = (pixels - torch.tensor(IMAGENET_MEAN).view(shape)) / torch.tensor(IMAGENET_STD).view(shape)
    assert network(normalized).logits.shape == (2, 1, 64, 64)
    expected = (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    expected = F.interpolate(expected, (96, 96), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


def test_weights_have_the_modules_names_and_are_read_into_it(tmp_path):
    network, other = ModuleNetwork(Two(), stages=STAGES), ModuleNetwork(Two(), stages={})
    assert network.state_dict().keys() == network.module.state_dict().keys()
    checkpoint.save_network(tmp_path / "a.safetensors", network)
    checkpoint.load_network(tmp_path / "a.safetensors", other)
    assert torch.equal(network(IMAGES).logits, other(IMAGES).logits)
    wrapped = {f"module.{name}": value + 1 for name, value in network.module.state_dict().items()}
    torch.save({"state_dict": wrapped}, tmp_path / "b.pt")  # of DataParallel
    load_weights(other, tmp_path / "b.pt", label="weights=b.pt")
    assert torch.equal(other.module.head.bias, network.module.head.bias + 1)
    with pytest.raises(InputError, match=r"b.pt belongs to another network than Identity: .* the file alone has"):
        load_weights(ModuleNetwork(nn.Identity(), stages={}), tmp_path / "b.pt", label="weights=b.pt")


def test_gradients_are_compared_over_the_encoder_if_there_is_one():
    plain, with_encoder = Two(), nn.Module()
    with_encoder.encoder, with_encoder.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 1)
    assert len(ModuleNetwork(plain, stages={}).measured_parameters()) == len(list(plain.parameters())) == 6
    measured = ModuleNetwork(with_encoder, stages={}).measured_parameters()
    assert [id(each) for each in measured] == [id(each) for each in with_encoder.encoder.parameters()]


@pytest.mark.parametrize("name", ["deeplabv3plus", "fpn", "segformer"])
def test_stages_of_smps_networks_are_the_maps_of_their_encoders(name):
    settings = composition.compose([f"teacher={name}"])
    network = build.teacher_network(settings).eval()
    assert isinstance(network.module, smp.base.SegmentationModel)
    with torch.no_grad():
        features, outputs = network.module.encoder(IMAGES), network(IMAGES, network.stages)
    for number in range(2, 6):
        assert torch.equal(outputs[f"encoder.{number}"], features[number]), number


@pytest.mark.parametrize("name", READY)
def test_a_ready_teacher_is_trained_for_a_step_and_taught_from(name, small_busi, tmp_path):
    settings = composition.compose(
        [
            *("profile=quick", "data=busi", f"data.root={small_busi}", f"store={tmp_path}", "device=cpu"),
            *(f"teacher={name}", "path=H", "loss=mse", "kd.resize=true", "train.batch_size=2", *STUDENT),
            *(["teacher.input.size=64"] if name == "vit" else []),
        ]
    )
    teacher, feed = build.learner(settings, identity.teacher_cell(settings)), build.feed(settings, seed=0)
    feed.train.batches.indices = feed.train.batches.indices[:2]
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    compute = build.compute(settings)
    compute.prepare()
    nothing = loop.FrozenTeachers({}, compute)
    loop.train_epoch([teacher], 0, frozen=nothing, feed=feed, compute=compute)
    assert teacher.failure is None
    assert any(not torch.equal(before[key], value) for key, value in teacher.network.state_dict().items())
    cell = identity.cell(settings)
    student = build.learner(settings, cell)
    frozen = loop.FrozenTeachers({cell.teacher.fingerprint: networks.freeze(teacher.network)}, compute)
    loop.train_epoch([student], 0, frozen=frozen, feed=feed, compute=compute)
    assert student.failure is None
    assert float(student.columns()["kd"][0]) > 0
