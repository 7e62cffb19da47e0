"""Models: sizes, one forward for logits and hidden, seeded initialization, and weights from files and the hub."""

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from small import unet
from torch import Tensor, nn

from kdsweep.config import composition
from kdsweep.config.networks import STAGES, Architecture
from kdsweep.core.errors import InputError
from kdsweep.models import networks
from kdsweep.models.build import stage_channels, summary
from kdsweep.models.unet import UNet
from kdsweep.models.weights import imagenet_file, load_weights, read_weights
from kdsweep.training.build import teacher_network

MOBILENET = "timm/mobilenetv3_small_100.lamb_in1k"

TEACHER = {"encoder": "resnext101_32x8d", "decoder_channels": [256, 128, 64, 32, 16]}
STUDENT = {"encoder": "mobilenetv3_small_trimmed", "decoder_channels": [80, 40, 24, 16, 16]}
SMALL_DECODER = [16, 16, 8, 8, 8]


def build(encoder: str, *, weights: str = "none", seed: int = 0) -> UNet:
    return unet(encoder=encoder, decoder_channels=SMALL_DECODER, weights=weights, seed=seed)


def student(seed: int = 0) -> UNet:
    return unet(**STUDENT, weights="none", seed=seed)


def teacher_without_memory() -> UNet:
    with torch.device("meta"):
        return unet(**TEACHER, weights="none", seed=0)


def images(count: int = 2, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def copy_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def scrambled(network: nn.Module, seed: int = 99) -> dict[str, Tensor]:
    """A state dict with another random value in every tensor, running means and counters included."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.randint(1, 1000, value.shape, generator=generator)
        for key, value in network.state_dict().items()
    }


def one_line(error: pytest.ExceptionInfo[InputError], *parts: object) -> None:
    message = str(error.value)
    assert message.count("\n") == 0
    assert len(message) < 600
    for part in parts:
        assert str(part) in message


# ---- sizes ---------------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_papers_96_million() -> None:
    teacher = teacher_without_memory()
    with torch.device("meta"):
        stock = smp.Unet("resnext101_32x8d", encoder_weights=None, in_channels=3, classes=1)
    assert networks.count_parameters(teacher) == networks.count_parameters(stock) == 95_755_409
    shapes, stock_shapes = ({k: v.shape for k, v in net.state_dict().items()} for net in (teacher, stock))
    assert shapes == stock_shapes


def test_the_student_is_the_papers_0_82_million() -> None:
    count = networks.count_parameters(student())
    assert 815_000 < count < 825_000
    assert count == 820_385


def test_every_parameter_of_the_student_is_used() -> None:
    network = student().train()
    network(images(count=4)).logits.square().mean().backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []
    still = [name for name, parameter in network.named_parameters() if not parameter.grad.any()]
    assert len(still) <= 0.02 * len(list(network.parameters())), still


def test_hidden_maps_at_224() -> None:
    with torch.device("meta"):
        hidden = teacher_without_memory()(torch.zeros(1, 3, 224, 224), ["encoder.5"]).hidden
    assert hidden.shape == (1, 2048, 7, 7)
    outputs = student().eval()(images(count=1, size=224))
    assert outputs.hidden.shape == (1, 96, 7, 7)
    assert outputs.logits.shape == (1, 1, 224, 224)


def test_the_students_encoder_gives_every_stride() -> None:
    network = student()
    features = network.encoder(images(size=64))
    assert [feature.shape[1] for feature in features] == network.encoder.out_channels == [3, 16, 16, 24, 48, 96]
    assert [64 // feature.shape[2] for feature in features] == [1, 2, 4, 8, 16, 32]


def test_the_students_convolutions_pad_symmetrically() -> None:
    """TensorFlow's padding would shift the 7 x 7 map by most of a cell against the Teacher's."""
    convolutions = [module for module in student().encoder.modules() if isinstance(module, nn.Conv2d)]
    strided = [module for module in convolutions if module.stride == (2, 2)]
    assert len(strided) == 5
    for module in convolutions:
        assert type(module) is nn.Conv2d
        assert module.padding == tuple(size // 2 for size in module.kernel_size)


def test_summary_and_macs() -> None:
    teacher = teacher_without_memory()
    assert networks.count_macs(teacher, image_size=224) / 1e9 == pytest.approx(20.5, abs=0.1)
    table = summary(teacher=teacher, student=student(), image_size=224)
    assert "95,755,409" in table
    assert "820,385" in table
    assert "2048 x 7 x 7" in table
    assert "96 x 7 x 7" in table
    assert "20.47 G" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_macs_by_hand() -> None:
    class OneConvolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, batch: Tensor) -> Tensor:
            return self.layer(batch)

    network = OneConvolution().train()
    assert networks.count_macs(network, image_size=10) == 10 * 10 * 8 * 3 * 3 * 3  # type: ignore[arg-type]
    assert network.training, "counting leaves the mode as it was"


# ---- one forward ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenetv3_small_trimmed"])
def test_forward_is_smps_and_hidden_is_its_encoders_deepest_map(encoder: str) -> None:
    network = build(encoder).eval()
    stock = smp.Unet(encoder, encoder_weights=None, decoder_channels=SMALL_DECODER, in_channels=3, classes=1).eval()
    stock.load_state_dict(network.state_dict())
    with torch.no_grad():
        outputs = network(images())
        assert torch.equal(outputs.logits, stock(images()))
        assert torch.equal(outputs.hidden, stock.encoder(images())[-1])
        every = network(images(), STAGES)
        for number, maps in enumerate(stock.encoder(images())[1:], start=1):
            assert torch.equal(every[f"encoder.{number}"], maps)
        assert torch.equal(network.segmentation_head(every["decoder.5"]), outputs.logits)
    assert outputs.logits.min() < 0, "no activation"


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenetv3_small_trimmed"])
def test_every_stage_has_the_channels_that_are_read_beforehand(encoder: str) -> None:
    with torch.no_grad():
        outputs = build(encoder).eval()(images(size=96), STAGES)
    channels = stage_channels(Architecture(encoder=encoder, decoder_channels=SMALL_DECODER), image_size=96)
    assert {name: maps.shape[1] for name, maps in outputs.items()} == channels
    sides = [96 >> halvings for halvings in (1, 2, 3, 4, 5, 4, 3, 2, 1, 0, 0)]
    assert [maps.shape[2] for maps in outputs.values()] == sides


@pytest.mark.parametrize(
    ("stages", "ran"),
    [
        (["encoder.2"], ["layer1"]),
        (["encoder.4"], ["layer1", "layer2", "layer3"]),
        (["decoder.2", "encoder.3"], ["layer1", "layer2", "layer3", "layer4", "blocks.0", "blocks.1"]),
    ],
)
def test_a_network_runs_no_further_than_the_last_requested_stage(stages: list[str], ran: list[str]) -> None:
    network = build("resnet18").eval()
    seen: list[str] = []
    parts = {name: getattr(network.encoder, name) for name in ("layer1", "layer2", "layer3", "layer4")}
    parts |= {f"blocks.{number}": block for number, block in enumerate(network.decoder.blocks)}
    parts |= {"head": network.segmentation_head}
    for name, module in parts.items():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        outputs = network(images(), stages)
        assert set(outputs) == set(stages)
        assert seen == ran
        complete = network(images(), STAGES)
    assert all(torch.equal(maps, complete[name]) for name, maps in outputs.items())


def test_the_teachers_hidden_map_is_not_negative_and_the_students_is_signed() -> None:
    with torch.no_grad():
        assert build("resnet18").eval()(images()).hidden.min() >= 0
        assert student().eval()(images()).hidden.min() < 0


def test_freeze_stops_gradients_and_batch_statistics() -> None:
    network = networks.freeze(build("resnet18").train())
    before = copy_of(network.state_dict())
    outputs = network(images())
    assert not network.training
    assert not outputs.logits.requires_grad
    assert equal(before, network.state_dict())


# ---- initialization ------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_weights_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = student(seed=7).state_dict()
    torch.manual_seed(2)
    torch.randn(1000)
    build("resnet18")
    assert equal(first, student(seed=7).state_dict())
    assert not torch.equal(first["encoder.conv_stem.weight"], student(seed=8).encoder.conv_stem.weight)


def test_building_a_network_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(5)
    torch.manual_seed(3)
    student(seed=7)
    assert torch.equal(torch.randn(5), expected)


# ---- weights that fit ----------------------------------------------------------------------------------------------


def mobilenet_state() -> dict[str, Tensor]:
    return scrambled(timm.create_model("mobilenetv3_small_100", pretrained=False))


def resnet_state(name: str = "resnet18") -> dict[str, Tensor]:
    return scrambled(getattr(torchvision.models, name)(weights=None))


def test_imagenet_weights_reach_every_tensor_of_the_students_encoder(tmp_path: Path) -> None:
    state = mobilenet_state()
    save_file(state, tmp_path / "model.safetensors")
    network = build("mobilenetv3_small_trimmed")
    decoder = copy_of(network.decoder.state_dict())
    load_weights(network, tmp_path / "model.safetensors", label="weights")
    encoder_state = network.encoder.state_dict()
    assert len(encoder_state) == 212
    assert all(torch.equal(value, state[key]) for key, value in encoder_state.items())
    assert equal(decoder, network.decoder.state_dict())
    dropped = {key.split(".")[0] for key in state.keys() - encoder_state.keys()}
    assert dropped == {"blocks", "conv_head", "classifier"}


def test_imagenet_weights_reach_every_tensor_of_a_resnet(tmp_path: Path) -> None:
    state = resnet_state()
    assert "fc.weight" in state
    torch.save(state, tmp_path / "resnet18.pt")
    network = build("resnet18", weights=str(tmp_path / "resnet18.pt"))
    encoder_state = network.encoder.state_dict()
    assert encoder_state.keys() == {key for key in state if not key.startswith("fc.")}
    assert all(torch.equal(value, state[key]) for key, value in encoder_state.items())


@pytest.mark.parametrize("nested", [False, True])
def test_a_complete_networks_state_is_loaded_completely(tmp_path: Path, nested: bool) -> None:
    state = scrambled(build("resnet18"))
    torch.save({"state_dict": state} if nested else state, tmp_path / "unet.pt")
    assert equal(state, build("resnet18", weights=str(tmp_path / "unet.pt")).state_dict())


def test_counters_of_old_files_may_be_missing(tmp_path: Path) -> None:
    state = {key: value for key, value in resnet_state().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    network = build("resnet18", weights=str(tmp_path / "old.pt"))
    assert torch.equal(network.encoder.conv1.weight, state["conv1.weight"])


# ---- weights that are refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offered", "encoder"), [("resnet34", "resnet18"), ("resnet18", "resnet34")])
@pytest.mark.parametrize("is_network", [False, True])
def test_weights_of_another_encoder_are_refused(tmp_path: Path, offered: str, encoder: str, is_network: bool) -> None:
    file = tmp_path / "weights.pt"
    torch.save(scrambled(build(offered)) if is_network else resnet_state(offered), file)
    network = build(encoder)
    before = copy_of(network.state_dict())
    with pytest.raises(InputError) as error:
        load_weights(network, file, label=f"weights={file}")
    one_line(error, file, encoder)
    assert equal(before, network.state_dict()), "nothing was loaded"


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    state = resnet_state()
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:, :32].clone()
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError) as error:
        build("resnet18", weights=str(tmp_path / "weights.pt"))
    one_line(error, "layer1.0.conv1.weight", "(64, 32, 3, 3)", "(64, 64, 3, 3)", "1 such")


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("seed", range(12))
def test_junk_is_refused(tmp_path: Path, name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    file = tmp_path / name
    file.write_bytes(rng.bytes(int(rng.integers(0, 300))))
    with pytest.raises(InputError) as error:
        read_weights(file)
    one_line(error, file)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    state = resnet_state()
    save_file(state, tmp_path / "complete.safetensors")
    torch.save(state, tmp_path / "complete.pt")
    for suffix in (".safetensors", ".pt"):
        content = (tmp_path / "complete").with_suffix(suffix).read_bytes()
        for share in (0.999, 0.5, 0.00001):
            file = (tmp_path / "part").with_suffix(suffix)
            file.write_bytes(content[: int(share * len(content))])
            with pytest.raises(InputError) as error:
                read_weights(file)
            one_line(error, file)


class Attack:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("form", ["torch", "plain"])
def test_code_in_a_file_is_not_run(tmp_path: Path, name: str, form: str) -> None:
    file, marker = tmp_path / name, tmp_path / "marker"
    payload = {"conv1.weight": torch.zeros(1), "extra": Attack(marker)}
    if form == "torch":
        torch.save(payload, file)
    else:
        file.write_bytes(pickle.dumps(Attack(marker)))
    assert not marker.exists()
    with pytest.raises(InputError) as error:
        build("resnet18", weights=str(file))
    one_line(error, file)
    assert not marker.exists()
    if form == "plain":
        pickle.loads(file.read_bytes()).close()
        assert marker.exists(), "the attack must be one"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        build("resnet18", weights=str(tmp_path / "absent.pt"))
    one_line(error, tmp_path / "absent.pt", "no such file", "none")
    with pytest.raises(InputError):
        build("resnet18", weights=str(tmp_path))  # a folder is not a file


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], {"epoch": 3}, {"state_dict": [torch.zeros(2)]}, {0: torch.zeros(2)}, torch.zeros(2)],
    ids=["list", "numbers", "nested list", "unnamed", "tensor"],
)
def test_other_content_than_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(InputError) as error:
        build("resnet18", weights=str(tmp_path / "weights.pt"))
    one_line(error, tmp_path / "weights.pt", "no state dict")


# ---- weights from the hub ------------------------------------------------------------------------------------------


class Hub:
    """Stands in for hf_hub_download: a cache and a network that have the file or have not."""

    def __init__(self, *, cached: Path | None = None, online: Path | None = None) -> None:
        self.cached, self.online, self.requests = cached, online, []

    def __call__(self, *, repo_id: str, filename: str, revision: str, local_files_only: bool = False) -> str:
        self.requests.append((repo_id, filename, local_files_only))
        assert revision
        if local_files_only and self.cached is None:
            raise LocalEntryNotFoundError("not in the cache")
        if not local_files_only and self.online is None:
            raise ConnectionError("no route\nto host")
        return str(self.cached if local_files_only else self.online)


@pytest.fixture
def student_file(tmp_path: Path) -> Path:
    save_file(mobilenet_state(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture(autouse=True)
def quiet_hub() -> Any:
    """The code under test turns the hub's log down; put it back."""
    level = huggingface_hub.logging.get_verbosity()
    yield
    huggingface_hub.logging.set_verbosity(level)


def install(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Hub:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    return hub


def test_cached_imagenet_weights_need_no_network(monkeypatch: pytest.MonkeyPatch, student_file: Path) -> None:
    hub = install(monkeypatch, Hub(cached=student_file))
    network = build("mobilenetv3_small_trimmed", weights=f"imagenet:{MOBILENET}@main")
    assert torch.equal(network.encoder.conv_stem.weight, mobilenet_state()["conv_stem.weight"])
    assert hub.requests == [(MOBILENET, "model.safetensors", True)]


def test_imagenet_weights_are_fetched_once_the_cache_has_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, student_file: Path
) -> None:
    hub = install(monkeypatch, Hub(online=student_file))
    with caplog.at_level(logging.INFO, logger="kdsweep"):
        network = build("mobilenetv3_small_trimmed", weights=f"imagenet:{MOBILENET}@main")
    assert torch.equal(network.encoder.conv_stem.weight, mobilenet_state()["conv_stem.weight"])
    assert [local for _, _, local in hub.requests] == [True, False]
    assert MOBILENET in caplog.text


def test_without_a_network_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Hub())
    with pytest.raises(InputError) as error:
        imagenet_file(f"{MOBILENET}@main")
    one_line(error, MOBILENET, "ConnectionError", "weights=none", "weights=FILE")


@pytest.mark.parametrize("name", ["resnext101", "resnext50", "resnet101", "resnet34", "resnet18"])
def test_the_configured_imagenet_weights_are_those_that_smp_knows(name: str) -> None:
    node = composition.compose([f"teacher={name}"]).teacher
    pretrained = smp.encoders.encoders[node.encoder]["pretrained_settings"]["imagenet"]
    assert node.imagenet == f"{pretrained['repo_id']}@{pretrained['revision']}"


def test_the_students_imagenet_weights_are_those_that_timm_knows() -> None:
    source, _, revision = composition.compose([]).student.imagenet.partition("@")
    assert source == timm.get_pretrained_cfg("mobilenetv3_small_100").hf_hub_id
    assert re.fullmatch(r"[0-9a-f]{40}", revision)  # a branch may move


def test_weights_none_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, Hub())
    build("mobilenetv3_small_trimmed", weights="none")
    assert hub.requests == []


def test_an_encoder_without_imagenet_weights_says_so() -> None:
    cfg = composition.compose(["teacher.encoder=tu-resnet18", "~teacher.imagenet"])
    with pytest.raises(InputError) as error:
        teacher_network(cfg)
    one_line(error, "there are none for tu-resnet18", "weights=none")
