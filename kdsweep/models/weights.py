"""Weights of networks: ImageNet's from an installed package or the hub, or a file; read without running code."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from kdsweep.config.inputs import INSTALL, PACKAGE, package_file
from kdsweep.core.errors import InputError, reading, some
from kdsweep.core.files import file_digest
from kdsweep.models.module import ModuleNetwork
from kdsweep.models.networks import Network
from kdsweep.models.unet import UNet

log = logging.getLogger(__name__)

# Parts of a classification network outside its encoder; ignored when a complete classifier's weights are offered.
CLASSIFIER_PREFIXES = ("fc.", "classifier.", "conv_head.", "norm_head.", "last_linear.", "bn2.")

# Where a training checkpoint keeps the state dict: Lightning and timm, the tutorials of PyTorch, torchvision, nnU-Net.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network_weights")
# A module, the tensors that it would get, and a line for each that does not fit.
Fit = tuple[nn.Module, dict[str, Tensor], list[str]]
IMAGENET = "imagenet:"  # leads the name of a source of ImageNet weights


def imagenet_file(source: str) -> Path:
    """Return the file of an encoder's ImageNet weights: of an installed package, of the local cache, or of the hub.

    Args:
        source: ``package:PACKAGE/FILE-DIGEST.pth``, with the first digits of the file's SHA-256, or
            ``REPOSITORY@REVISION`` on the Hugging Face hub.

    Raises:
        InputError: it is damaged, or could not be fetched.
    """
    if source.startswith(PACKAGE):
        file = package_file(source)
        digest = file.stem.rpartition("-")[2] if file is not None else ""
        if file is None or not file_digest(file).startswith(digest):
            raise InputError(f"weights=imagenet: {source} is missing or damaged; {INSTALL}")
        _log_source(f"of the installed package {source.removeprefix(PACKAGE).partition('/')[0]}")
        return file
    return _hub_file(source)


@cache
def _log_source(where: str) -> None:
    """Say once where ImageNet weights are from, however many networks begin with them."""
    log.info("ImageNet weights: %s", where)


def _hub_file(source: str) -> Path:
    """Return a file of the hub, from the local cache or fetched.

    Args:
        source: ``REPOSITORY@REVISION``.

    Raises:
        InputError: it could not be fetched.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = source.partition("@")
    where = {"repo_id": repository, "filename": "model.safetensors", "revision": revision}
    try:
        file = Path(huggingface_hub.hf_hub_download(**where, local_files_only=True))
        _log_source(f"{repository} of the local cache")
        return file
    except LocalEntryNotFoundError:
        log.info("fetching ImageNet weights from the hub: %s", repository)
    huggingface_hub.logging.set_verbosity_error()  # our one line replaces its messages about retries
    try:
        return Path(huggingface_hub.hf_hub_download(**where))
    except Exception as error:  # the hub's client raises many kinds: network, proxy, disk, missing entry
        raise InputError(
            f"weights=imagenet: {repository}/model.safetensors could not be fetched "
            f"({type(error).__name__}); connect to the network, name a file of it with weights=FILE per network "
            "(teacher.weights=FILE student.weights=FILE), or train from scratch with weights=none"
        ) from error


def load_weights(network: Network, file: Path, *, label: str, complete: bool = False) -> None:
    """Load a complete network's state or, unless ``complete``, the ImageNet classifier that its encoder was cut from.

    A classifier with other names for the same tensors in the same order, as the packages have them, is taken by order.
    An encoder with fewer channels gets evenly chosen ones of it. A prefix that all names share is left out, such as
    ``module.`` of DataParallel or ``model.`` of Lightning.

    Raises:
        InputError: the file cannot be read, does not belong to this network, or holds numbers that are not weights.
    """
    states = list(_without_prefixes(read_weights(file)))
    fits = [_as_network(state, network) for state in states]
    if isinstance(network, UNet) and not complete:
        fits += [_as_encoder(state, network) for state in states]
    target, state, wrong = min(fits, key=lambda fit: len(fit[2]))
    if wrong:
        raise InputError(
            f"{label}: the file {file} belongs to another network than {network.name}: {wrong[0]}"
            f" ({len(wrong)} such tensors){_names(expected=target.state_dict(), offered=state)}; "
            f"{'configure its network' if complete else 'take weights of that encoder, or weights=none'}"
        )
    for key, value in state.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise InputError(f"{label}: {key} of the file {file} holds NaN or infinity; take others, or weights=none")
    nn.Module.load_state_dict(target, state, strict=False)


def _without_prefixes(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield tensors by name, then again without the first part of their names for as long as all share it."""
    yield state
    while len({key.partition(".")[0] for key in state}) == 1 and all("." in key for key in state):
        state = {key.partition(".")[2]: value for key, value in state.items()}
        yield state


def _as_network(state: dict[str, Tensor], network: Network) -> Fit:
    """Take tensors as those of a complete network."""
    target = network.module if isinstance(network, ModuleNetwork) else network
    return target, state, _mismatches(expected=target.state_dict(), offered=state)


def _as_encoder(state: dict[str, Tensor], network: UNet) -> Fit:
    """Take tensors as those of the encoder, among which may be a classifier's head."""
    expected = network.encoder.state_dict()
    ignored = CLASSIFIER_PREFIXES + tuple(getattr(network.encoder, "removed_prefixes", ()))
    state = {key: value for key, value in _renamed(state, network).items() if not key.startswith(ignored)}
    if getattr(network.encoder, "is_narrow", False):
        state = _thinned(state, shapes=expected)
    return network.encoder, state, _mismatches(expected=expected, offered=state)


def _names(*, expected: dict[str, Tensor], offered: dict[str, Tensor]) -> str:
    """Return the first names that only one side has, for an error; nothing if both have the same."""
    sides = {"the file": offered.keys() - expected.keys(), "the network": expected.keys() - offered.keys()}
    return "".join(f"; {side} alone has {some(sorted(keys), most=5)}" for side, keys in sides.items() if keys)


def _thinned(state: dict[str, Tensor], *, shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a wide network's tensors with evenly spaced channels of them, as many as a narrow one has.

    Equal widths keep the same channels, so that a layer's outputs fit the next one's inputs (uniform selection: Xu et
    al., Initializing models with larger ones, ICLR 2024, arXiv 2311.18823, section 3).
    """
    for key in state.keys() & shapes.keys():
        for dim, (count, of) in enumerate(zip(shapes[key].shape, state[key].shape, strict=False)):
            if count < of:
                state[key] = state[key].index_select(dim, torch.arange(count) * of // count)
    return state


def _renamed(state: dict[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """Return a classifier's tensors under the names of the encoder's: timm's, which smp puts below ``model.``."""
    if not network.classifier:
        return state
    if "_conv_stem.weight" in state:
        with torch.device("meta"):
            expected = timm.create_model(network.classifier, pretrained=False).state_dict()
        if [tuple(value.shape) for value in expected.values()] == [tuple(value.shape) for value in state.values()]:
            state = dict(zip(expected, state.values(), strict=True))
    kept = {key: value for key, value in state.items() if not key.startswith(CLASSIFIER_PREFIXES)}
    is_wrapped = "model.conv_stem.weight" in network.encoder.state_dict()
    return {f"model.{key}": value for key, value in kept.items()} if is_wrapped else kept


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read tensors by name from a .safetensors file or a PyTorch state dict, never running code from the file.

    Raises:
        InputError: the file is missing, unreadable, or not a plain state dict of plain tensors.
    """
    if not file.is_file():
        raise InputError(f"weights={file}: no such file; use imagenet, none, or a .safetensors or .pt file")
    with reading(f"weights={file}", what="a file of weights", remedy="use a .safetensors or .pt file, or none"):
        state = _tensors(file)
    for key, value in state.items():
        is_plain = value.layout is torch.strided and not (value.is_quantized or value.is_nested or value.is_complex())
        if value.is_meta or not is_plain:
            kind = "has no values (meta device)" if value.is_meta else f"is {str(value.dtype)[6:]}, {value.layout}"
            raise InputError(f"weights={file}: {key} {kind}; save dense tensors of real numbers, such as float32")
    return state


def _tensors(file: Path) -> dict[str, Tensor]:
    """Read a file's tensors by name, out of the parts of a training checkpoint if it is one."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(file))
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not (foreign := re.search(r"Unsupported global: GLOBAL (\S+)", str(error))):
            raise
        raise InputError(
            f"weights={file}: holds {foreign[1]} next to its tensors, which is not read because it could run code; if "
            "you trust the file, save its state dict alone: torch.load(FILE, weights_only=False), then torch.save"
        ) from error
    while isinstance(state, dict) and (inner := [state[key] for key in WRAPPERS if isinstance(state.get(key), dict)]):
        state = inner[0]
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"weights={file}: holds no state dict of tensors by name, also not in {', '.join(WRAPPERS)}")
    return state


def _mismatches(*, expected: dict[str, Tensor], offered: dict[str, Tensor]) -> list[str]:
    counters = {key for key in expected if key.endswith("num_batches_tracked")}  # absent from files of old PyTorch
    wrong = [f"{key} is missing" for key in sorted(expected.keys() - offered.keys() - counters)]
    wrong += [f"{key} is not in it" for key in sorted(offered.keys() - expected.keys())]
    for key in sorted(expected.keys() & offered.keys()):
        if expected[key].shape != offered[key].shape:
            wrong.append(f"{key} has shape {tuple(offered[key].shape)}, not {tuple(expected[key].shape)}")
        elif expected[key].is_floating_point() and not offered[key].is_floating_point():
            wrong.append(f"{key} holds {str(offered[key].dtype)[6:]}, not floating-point numbers")
    return wrong
