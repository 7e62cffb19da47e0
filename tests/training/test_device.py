"""The device of the computation: its precision, its errors, and what a process does with it."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch

from kdsweep.core.device import Compute, find_device, is_device_error, is_out_of_memory, usable_precision
from kdsweep.core.errors import CellError, DeviceError, InputError, one_line
from kdsweep.training import build

ASSERT = """CUDA error: device-side assert triggered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1"""


def test_a_device_of_cuda_has_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert {str(find_device(name)) for name in ("auto", "cuda", "cuda:0")} == {"cuda:0"}
    assert str(find_device("cuda:1")) == "cuda:1"
    with pytest.raises(InputError, match="PyTorch sees 2 CUDA devices"):
        find_device("cuda:2")


@pytest.fixture
def flags():
    """The flags of TF32, as PyTorch has them after the test too."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield lambda: (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_a_process_computes_on_one_device_alone(flags, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    Compute(torch.device("cuda:1"), "fp32").prepare()
    Compute(torch.device("cpu"), "fp32").prepare()
    assert [str(device) for device in chosen] == ["cuda:1"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_tf32_is_used_where_it_is_configured_and_nowhere_else(flags, precision, before):
    compute = Compute(torch.device("cpu"), precision)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = before
    with compute.autocast():
        assert flags() == (precision == "tf32",) * 2
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
    assert flags() == (before, before)
    with pytest.raises(ValueError, match="the cause"), compute.autocast("tf32"):
        assert flags() == (True, True)
        raise ValueError("the cause")
    assert flags() == (before, before)
    compute.prepare()
    assert flags() == (precision == "tf32",) * 2  # for backward passes


def test_tf32_is_refused_on_a_cpu_and_read_there_as_fp32(small_busi, tmp_path):
    from kdsweep.config import composition

    overrides = ["profile=quick", "data=busi", f"data.root={small_busi}", f"store={tmp_path}", "device=cpu"]
    with pytest.raises(InputError, match="precision=tf32 needs a CUDA device, and device=cpu is cpu; use fp32 or bf16"):
        build.compute(composition.compose([*overrides, "precision=tf32"]))
    with pytest.raises(InputError, match=r"kd\.teacher_precision=tf32 needs a CUDA device"):
        build.compute(composition.compose([*overrides, "kd.teacher_precision=tf32"]))
    assert usable_precision("tf32", torch.device("cpu")) == "fp32"  # a network that was tested in it is used here
    assert usable_precision("tf32", torch.device("cuda:0")) == "tf32"
    assert usable_precision("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate",
    ],
)
def test_a_lack_of_memory_is_recognized_by_all_its_names(text):
    assert is_out_of_memory(RuntimeError(text))
    assert not is_device_error(RuntimeError(text))


@pytest.mark.parametrize(
    "text",
    [
        ASSERT,
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
def test_an_error_that_may_have_broken_the_device_is_recognized_inside_a_cell_error(text):
    error = RuntimeError(text)
    assert is_device_error(error)
    assert not is_out_of_memory(error)
    named = CellError("H_MSE_WAug: epoch 1, step 2, kd term: ...")
    named.__cause__ = error
    assert is_device_error(named)
    assert is_device_error(DeviceError("the device failed"))
    assert not is_device_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_device_error(CellError(text))  # a text alone comes from another process


def test_advice_for_developers_of_pytorch_does_not_reach_the_user():
    assert one_line(RuntimeError(ASSERT)) == "RuntimeError: CUDA error: device-side assert triggered"


def test_fewer_processes_prepare_batches_where_shared_memory_is_short(monkeypatch, tmp_path, caplog):
    from kdsweep.data.loaders import affordable_workers

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    batch_bytes = 8 * 224**2 * 64  # of the paper: 25.7 MB
    assert affordable_workers(4, batch_bytes=batch_bytes, folder=tmp_path) == 0
    assert affordable_workers(4, batch_bytes=batch_bytes // 4, folder=tmp_path) == 4
    assert affordable_workers(4, batch_bytes=batch_bytes // 3, folder=tmp_path) == 2
    assert affordable_workers(4, batch_bytes=batch_bytes, folder=tmp_path / "absent") == 4  # not on Linux
    monkeypatch.setattr(build, "affordable_workers", lambda requested, batch_bytes: min(requested, 1))
    build._affordable.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert build._affordable(4, batch_bytes) == build._affordable(4, batch_bytes) == 1
    build._affordable.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "train.workers=4: /dev/shm has no room for their batches of 26 MB, 1 of them work; a smaller batch or "
        "more room helps, in a container --shm-size"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("precision", "least", "most"), [("fp32", 0, 1e-5), ("tf32", 5e-5, 1e-3), ("bf16", 1e-3, 1e-2)]
)
def test_each_precision_is_what_it_says_on_cuda(precision, least, most):
    """By the relative error of a convolution against fp64.

    On these numbers a direct sum in fp32 has 2.2e-7, Winograd's F(4 x 4, 3 x 3), which cuDNN may choose, 1.6e-6, and
    operands rounded to TF32 have 2.9e-4: the bounds leave room for other algorithms and keep fp32 and TF32 apart.
    """
    torch.manual_seed(0)
    maps, weight = torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3)
    exact = torch.nn.functional.conv2d(maps.double(), weight.double())
    with Compute(torch.device("cuda:0"), precision).autocast():
        rounded = torch.nn.functional.conv2d(maps.cuda(), weight.cuda()).double().cpu()
    assert least < float((rounded - exact).norm() / exact.norm()) < most
