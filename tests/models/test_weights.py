"""Files of weights as other programs write them: read, or refused in one line that names the tensor."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import unet
from torch import Tensor

from kdsweep.core.errors import InputError
from kdsweep.models.unet import UNet
from kdsweep.models.weights import load_weights

LAYER = "encoder.model.stem.conv.weight"


def network(seed: int = 0) -> UNet:
    return unet(encoder="tu-test_byobnet", decoder_channels=[16, 8, 8, 4, 4], weights="none", seed=seed)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights of a complete network, other ones than ``network()`` begins with."""
    return network(seed=1).state_dict()


def load(content: Any, tmp_path: Path) -> dict[str, Tensor]:
    """The state of a network after a file of this content was loaded."""
    file = tmp_path / "weights.ckpt"
    torch.save(content, file)
    target = network()
    load_weights(target, file, label=f"student.weights={file}")
    return target.state_dict()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module.net.student."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model", "net", "network_weights"])
def test_wrappers_and_shared_prefixes_are_left_out(state, tmp_path, prefix, wrapper) -> None:
    content = prefixed(state, prefix)
    loaded = load({"epoch": 3, "lr": [0.1], wrapper: content} if wrapper else content, tmp_path)
    assert all(torch.equal(value, loaded[key]) for key, value in state.items())


def test_an_encoder_alone_is_loaded_below_a_prefix(state, tmp_path) -> None:
    encoder = {key: value for key, value in state.items() if key.startswith("encoder.")}
    loaded = load({"state_dict": prefixed(encoder, "module.")}, tmp_path)
    assert all(torch.equal(value, loaded[key]) for key, value in encoder.items())
    assert not torch.equal(state["segmentation_head.0.weight"], loaded["segmentation_head.0.weight"])


def test_other_names_are_shown_with_those_of_the_network(state, tmp_path) -> None:
    content = {f"backbone{number}.{key}": value for number, (key, value) in enumerate(state.items())}
    with pytest.raises(InputError, match="belongs to another network") as caught:
        load(content, tmp_path)
    both = str(caught.value).partition("the file alone has ")[2].split("; the network alone has ")
    encoder = [key.removeprefix("encoder.") for key in state if key.startswith("encoder.")]
    for shown, names in zip(both, (content, encoder), strict=True):
        first = ", ".join(sorted(names)[:5])
        assert shown.partition(";")[0] == f"{first} and {len(names) - 5} more"


def spoiled(value: Tensor, kind: str) -> Tensor:
    """A tensor of the same shape with something that weights cannot have."""
    one = value.clone()
    if kind in ("nan", "inf"):
        one.view(-1)[3] = float(kind)
    return {
        "nan": lambda: one,
        "inf": lambda: one,
        "sparse": one.to_sparse,
        "meta": lambda: one.to("meta"),
        "complex": lambda: one.to(torch.complex64),
        "quantized": lambda: torch.quantize_per_tensor(one, 0.1, 0, torch.qint8),
        "integer": lambda: one.to(torch.int8),
    }[kind]()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch, about such tensors
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("nan", "holds NaN or infinity"),
        ("inf", "holds NaN or infinity"),
        ("sparse", "is float32, torch.sparse_coo; save dense tensors"),
        ("meta", "has no values (meta device); save dense tensors"),
        ("complex", "is complex64, torch.strided; save dense tensors of real numbers"),
        ("quantized", "is qint8, torch.strided; save dense tensors"),
        ("integer", "holds int8, not floating-point numbers"),
    ],
)
def test_tensors_that_are_not_weights_are_refused_by_name(state, tmp_path, kind, line) -> None:
    with pytest.raises(InputError) as caught:
        load(state | {LAYER: spoiled(state[LAYER], kind)}, tmp_path)
    message = str(caught.value)
    assert LAYER in message
    assert line in message
    assert "weights.ckpt" in message
    assert "\n" not in message


def test_a_tensor_of_another_rank_is_refused_by_a_narrow_encoder(tmp_path) -> None:
    narrow = unet(encoder="efficientnet_lite0_w50_b1111110", decoder_channels=[8] * 5, weights="none", seed=0)
    weights = narrow.encoder.state_dict()
    name = next(key for key, value in weights.items() if value.ndim == 4)
    torch.save(weights | {name: weights[name].flatten(1)}, tmp_path / "flat.pt")
    with pytest.raises(InputError, match="has shape"):
        load_weights(narrow, tmp_path / "flat.pt", label="student.weights")


def test_a_checkpoint_with_other_objects_says_how_to_save_the_weights_alone(state, tmp_path) -> None:
    with pytest.raises(InputError, match=r"holds argparse\.Namespace next to its tensors.* save its state dict alone"):
        load({"state_dict": state, "hyper_parameters": Namespace(lr=0.1)}, tmp_path)
