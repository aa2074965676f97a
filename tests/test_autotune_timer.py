"""The timer, the device's name and the ceilings."""

from __future__ import annotations

import gc
import time
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tetris.autotune.ceilings import Ceilings, measure_ceilings
from tetris.autotune.device import device_info, device_name, short_gpu_name, short_name, versions
from tetris.autotune.timer import Timing, graphed, time_us


def test_interleaves_and_counts_runs() -> None:
    calls: list[str] = []
    times = time_us({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, warmup=1, repeats=3)
    assert calls == ["a", "b"] + ["a", "b"] * 3
    assert times["a"].repeats == 3


def test_measures_a_known_pause() -> None:
    times = time_us({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.006)}, warmup=0, repeats=5)
    assert 1900 < times["short"].median_us < 5000
    assert times["long"].median_us > times["short"].median_us


def test_budget_stops_after_at_least_three_rounds() -> None:
    times = time_us({"a": lambda: time.sleep(0.002)}, warmup=0, repeats=1000, budget_s=0.0)
    assert times["a"].repeats == 3


def test_timing_summarises() -> None:
    assert Timing.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Timing(3.0, 1.0, 5.0, 5)


def test_roofline_takes_the_tighter_limit() -> None:
    ceilings = Ceilings(bytes_per_s=1e12, flop_per_s=1e14)
    assert ceilings.least_us(flop=1e9, size_bytes=1e6) == pytest.approx(10)
    assert ceilings.least_us(flop=1e8, size_bytes=1e7) == pytest.approx(10)


def test_ceilings_of_this_machine_are_plausible() -> None:
    found = measure_ceilings("cpu", torch.float32, seconds=0.2)
    assert 1e8 < found.bytes_per_s < 1e13 and 1e8 < found.flop_per_s < 1e15


@pytest.mark.parametrize(
    ("full", "short"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "4090"), ("Foo", "foo")],
)
def test_short_names(full: str, short: str) -> None:
    assert short_gpu_name(full) == short


def test_cpu_is_described() -> None:
    assert short_name("cpu") == "cpu" and device_name("cpu").startswith("cpu ")
    assert device_info("cpu").capability == (0, 0)
    assert torch.__version__.split("+")[0] in versions()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"cold_l2": True}, {"cuda_graph": True}, {"queue_ahead": False}])
def test_gpu_times_are_between_floor_and_launch(options: dict[str, bool]) -> None:
    x = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = time_us({"fill": x.zero_}, device="cuda", repeats=5, **options)
    assert 20 < times["fill"].median_us < 2000


def test_a_captured_graph_keeps_what_it_reads_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner keeps nothing but the replay; a layer whose schedule is freed would be replayed on foreign memory."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool=None: nullcontext())
    replays: list[str] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replays.append("replayed")))
    layer = torch.nn.Linear(2, 2)
    weight = weakref.ref(layer.weight)
    replay = graphed(partial(layer, torch.ones(2)))
    del layer
    gc.collect()
    replay()
    assert weight() is not None and replays == ["replayed"]
