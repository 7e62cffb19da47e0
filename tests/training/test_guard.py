"""The guard around a cell's code: settings that cells share are as before, and draws depend on the seed alone."""

import random
import signal

import numpy as np
import pytest
import torch

from kdsweep.core import signals
from kdsweep.training import guard

CHANGES = {
    "torch.set_default_dtype (was torch.float32, became torch.float64)": lambda: torch.set_default_dtype(torch.float64),
    "torch.set_default_device (was cpu, became meta)": lambda: torch.set_default_device("meta"),
    "torch.set_num_threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "torch.set_grad_enabled (was True, became False)": lambda: torch.set_grad_enabled(False),
    "torch.autograd.set_detect_anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "torch.autocast": lambda: torch.autocast("cpu").__enter__(),
    "torch.use_deterministic_algorithms (was 0, became 2)": lambda: torch.use_deterministic_algorithms(True),
    "torch.set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("medium"),
    "cudnn.allow_tf32": lambda: setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32),
    "torch.backends.cudnn.benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "torch.backends.mkldnn.enabled": lambda: setattr(torch.backends.mkldnn, "enabled", False),
    "torch.set_flush_denormal (was False, became True)": lambda: torch.set_flush_denormal(True),
    "torch.backends.fp32_precision": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
    "numpy.seterr": lambda: np.seterr(all="raise"),
}


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize(("name", "change"), CHANGES.items())
def test_a_setting_that_is_changed_is_named_and_restored(name, change, raises):
    before = guard._settings()
    with pytest.raises((guard.SharedStateError, KeyError)) as caught, guard.confined(0):
        change()
        assert guard._settings() != before
        if raises:
            raise KeyError("its error")
    assert guard._settings() == before
    assert ("its error" if raises else name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def installed():
    """The handlers of a command, as in a process that trains."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signals.install()
    yield
    signals.install()  # forgets the signal that has come
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("end", [SystemExit(0), SystemExit(3), SystemExit("no licence"), KeyboardInterrupt()])
def test_what_ends_a_program_is_an_error_of_the_cell(installed, end):
    with pytest.raises(guard.SharedStateError, match="raise an error instead") as caught, guard.confined(0):
        raise end
    assert repr(end) in str(caught.value)


def test_a_signal_ends_the_program(installed):
    with pytest.raises(signals.Stopped), guard.confined(0):
        signal.raise_signal(signal.SIGINT)


def draws():
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002 (as a user's code may)


def seed_all():
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)


def test_all_three_generators_follow_the_seed_and_continue_outside_as_if_nothing_had_been_drawn():
    seed_all()
    expected = [draws(), draws()]
    seed_all()
    outside, inside = [draws()], []
    for seed in (1, 2, 1):
        with guard.confined(seed):
            inside.append(draws())
            with guard.confined(seed + 10):  # as a path is built inside the check of its term
                draws()
            inside[-1] += draws()
    outside.append(draws())
    assert outside == expected
    assert inside[0] == inside[2]
    assert not set(inside[0]) & set(inside[1])
