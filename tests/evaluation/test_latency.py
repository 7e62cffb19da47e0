"""Latency and the other costs of a network: how it is timed, and that a store keeps what was measured."""

import json

import pytest
import torch

from kdsweep.config.networks import Architecture
from kdsweep.core.device import usable_cores
from kdsweep.evaluation import costs, latency
from kdsweep.models import networks
from kdsweep.models.unet import UNet

SMALL = Architecture(encoder="mobilenetv3_small_trimmed", decoder_channels=[16, 16, 8, 8, 8]).as_json()


@pytest.fixture
def clock(monkeypatch):
    """Forward passes of 1, 2, 3 ... ms, whatever they take, and how they were made."""
    state = {"now": 0.0, "calls": 0, "threads": []}

    def now(device):
        state["calls"] += 1
        if state["calls"] % 2 == 0:
            state["now"] += state["calls"] / 2 / 1000
            state["threads"].append(torch.get_num_threads())
            assert torch.is_inference_mode_enabled()
        return state["now"]

    monkeypatch.setattr(latency, "_now_s", now)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return state


def test_durations_are_reported_as_median_and_95th_percentile(monkeypatch):
    durations_s = [9.0] * latency.WARM_UP + [number / 1000 for number in range(1, latency.REPEATS + 1)]
    ticks = iter(tick for duration_s in durations_s for tick in (0.0, duration_s))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(ticks))
    assert latency.time_ms(lambda: None, device=torch.device("cpu"), threads=1) == pytest.approx((25.5, 47.55))


def test_latency_is_median_and_95th_percentile_after_warm_up(clock):
    network = costs.Network(SMALL, 32)
    before, warm = torch.get_num_threads(), latency.WARM_UP
    result = costs.measure(network, repeats=21)
    assert result["cpu_1_thread_median_ms"] == pytest.approx(warm + 11)
    assert result["cpu_1_thread_p95_ms"] == pytest.approx(warm + 20)
    assert result["cpu_all_threads_median_ms"] == pytest.approx(2 * warm + 21 + 11)
    assert clock["threads"] == [1] * (warm + 21) + [usable_cores()] * (warm + 21)
    assert torch.get_num_threads() == before
    assert "cuda_median_ms" not in result


def test_networks_are_timed_in_eval_mode_and_channels_last(clock, monkeypatch):
    seen = []

    def forward(self, images):
        seen.append((self.training, images.shape, images.is_contiguous(memory_format=torch.channels_last)))

    monkeypatch.setattr(networks, "count_macs", lambda network, image_size: 1)
    monkeypatch.setattr(UNet, "forward", forward)
    costs.measure(costs.Network(SMALL, 64), repeats=1)
    assert set(seen) == {(False, (1, 3, 64, 64), True)}


def test_equal_networks_are_measured_once(clock):
    network = costs.Network(SMALL, 96)
    first = costs.measure(network, repeats=2)
    timed = len(clock["threads"])
    assert timed > 0
    assert costs.measure(costs.Network(*network), repeats=2) == first
    assert len(clock["threads"]) == timed


def test_a_store_keeps_what_a_machine_measured(clock, tmp_path, monkeypatch):
    network = costs.Network(SMALL, 32)
    first = costs.measure(network, store=tmp_path, repeats=3)
    timed = len(clock["threads"])
    (entry,) = json.loads((tmp_path / "costs.json").read_text())["measured"]
    assert entry["costs"] == first
    assert (entry["about"]["threads"], entry["about"]["cuda"]) == ([1, usable_cores()], None)
    assert entry["about"]["pytorch"] == torch.__version__
    costs._measured.cache_clear()  # as in another process
    assert costs.measure(network, store=tmp_path, repeats=3) == first
    assert len(clock["threads"]) == timed
    monkeypatch.setattr(costs, "cpu_name", lambda: "another processor")
    costs._measured.cache_clear()
    other = costs.measure(network, store=tmp_path, repeats=3)
    assert other["parameters"] == first["parameters"]
    assert len(clock["threads"]) == 2 * timed
    assert len(json.loads((tmp_path / "costs.json").read_text())["measured"]) == 2
    (tmp_path / "costs.json").write_text("{")
    assert costs.measure(network, store=tmp_path, repeats=3) == other
    assert len(json.loads((tmp_path / "costs.json").read_text())["measured"]) == 1
    assert costs.measure(network, store=tmp_path / "none", repeats=3) == other
    assert not (tmp_path / "none").exists()
