"""Depthwise convolutions under autocast on the CPU: in fp32 where they are trained, in bf16 elsewhere."""

from functools import partial

import pytest
import torch
from small import unet
from torch import nn

from kdsweep.core.device import Compute

CPU = torch.device("cpu")
ENCODERS = [
    "mobilenetv3_small_trimmed",
    "efficientnet_lite0_w40_b1223110",
    "tu-mobilenetv3_large_100",
    "tu-tf_efficientnet_lite0",
]
FP32, BF16 = Compute(CPU, "fp32").autocast, Compute(CPU, "bf16").autocast
PLAIN = partial(torch.autocast, "cpu", torch.bfloat16)  # PyTorch's alone
DECODER = [32, 16, 8, 8, 4]


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 64, 64, generator=generator).to(memory_format=torch.channels_last)
    return images, (torch.rand(4, 1, 64, 64, generator=generator) > 0.5).float()


def network_of(encoder, seed=0):
    network = unet(encoder=encoder, decoder_channels=DECODER, weights="none", seed=seed)
    return network.to(memory_format=torch.channels_last)


def train(network, context, seed=0):
    """Return the logits and all gradients of one step."""
    images, mask = batch(seed)
    with context():
        logits = network(images).logits
    network.zero_grad()
    nn.functional.binary_cross_entropy_with_logits(logits.float(), mask).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
    return logits.detach().float(), torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_trained_depthwise_convolutions_alone_stay_in_fp32(encoder):
    network, types = network_of(encoder), {True: [], False: []}
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            is_depthwise = module.groups == module.in_channels > 1
            module.register_forward_hook(lambda *call, dtypes=types[is_depthwise]: dtypes.append(call[-1].dtype))
    train(network, BF16)
    assert [set(dtypes) for dtypes in types.values()] == [{torch.float32}, {torch.bfloat16}]
    assert all(parameter.grad.any() for parameter in network.parameters())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_bf16_is_closer_to_fp32_than_with_depthwise_convolutions_in_bf16(encoder):
    """In the mean over four initial networks and batches: a single one may fall to either side."""
    errors = torch.zeros(2, 2)  # of logits and gradients; with depthwise convolutions in fp32, in bf16
    for seed in range(4):
        network = network_of(encoder, seed)
        exact, *others = (train(network, context, seed) for context in (FP32, BF16, PLAIN))
        for column, values in enumerate(others):
            errors[:, column] += torch.stack([(a - b).norm() / b.norm() for a, b in zip(values, exact, strict=True)])
    assert 0 < errors[0, 0] < errors[0, 1]
    assert 0 < errors[1, 0] < 1.05 * errors[1, 1]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_fp32_and_what_is_not_trained_keep_their_bits(encoder):
    network, (images, _) = network_of(encoder), batch(0)
    plain = train(network, torch.enable_grad)
    assert all(map(torch.equal, train(network.requires_grad_(), FP32), plain))
    for no_gradients in (torch.no_grad, torch.inference_mode):
        with no_gradients():
            logits = []
            for context in (BF16, PLAIN):
                with context():
                    logits.append(network.eval()(images).logits)
            assert logits[0].dtype == torch.bfloat16
            assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("channels", "groups", "dtype", "expected"),
    [
        (8, 8, torch.float32, torch.float32),
        (8, 4, torch.float32, torch.bfloat16),  # grouped, as in a ResNeXt
        (1, 1, torch.float32, torch.bfloat16),  # of one channel, which is not depthwise
        (8, 8, torch.bfloat16, torch.bfloat16),  # weights that are kept in bf16
    ],
)
def test_convolutions_of_any_code_are_recognized_by_their_weights(channels, groups, dtype, expected):
    weight = torch.ones(8, channels // groups, 3, 3, dtype=dtype, requires_grad=True)
    with BF16():
        convolved = nn.functional.conv2d(input=torch.ones(2, channels, 8, 8), weight=weight, padding=1, groups=groups)
    assert convolved.dtype == expected
    assert not torch.overrides._get_current_function_mode_stack()
    convolved.sum().backward()
    assert weight.grad.dtype == dtype
