"""The one timer. Every time in this project is a median that came from here.

Alternatives are interleaved: in every round each of them runs once, so that a change of clock or temperature meets
all of them alike and their ratio stands. A GPU is timed with events around each run, a CPU with ``perf_counter``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

L2_FLUSH_BYTES = 256 << 20
"""Read between runs with ``cold_l2``: more than any GPU's L2 (H200: 50 MB). Read, not written: dirty lines would be
written back during the timed run, which on an H200 doubled the traffic of runs that read less than 50 MB."""

QUEUE_CYCLES = 300_000
"""How long the GPU idles in a kernel while a run is queued: about 0.16 ms at 1.8 GHz, several launches' worth."""

Callables = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Microseconds: the median of ``repeats`` runs and the spread between their 10th and 90th percentiles."""

    median_us: float
    p10_us: float
    p90_us: float
    repeats: int

    @staticmethod
    def of(samples_us: list[float]) -> Timing:
        """The summary of samples in microseconds."""
        ordered = sorted(samples_us)

        def percentile(q: float) -> float:
            return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

        return Timing(statistics.median(ordered), percentile(0.1), percentile(0.9), len(ordered))


def time_us(
    callables: Callables,
    *,
    device: str | torch.device = "cpu",
    warmup: int = 3,
    repeats: int = 20,
    cold_l2: bool = False,
    cuda_graph: bool = False,
    queue_ahead: bool = True,
    budget_s: float | None = None,
) -> dict[str, Timing]:
    """Time each callable; all of them in every round.

    Args:
        callables: name -> function without arguments; what it returns is dropped.
        device: where they run; ``cuda`` times with events.
        warmup: runs of each before the first timed one (compilation, cuDNN's search and caches happen there).
        repeats: timed runs of each.
        cold_l2: fill the GPU's L2 cache with other data before every timed run, so that operands come from memory.
        cuda_graph: capture each callable once and time replays: launch costs of Python vanish.
        queue_ahead: keep the GPU busy while the CPU queues a run, so that a short kernel's time is the kernel's and
            not its launch's. Switch it off to time what an eager caller waits for.
        budget_s: stop early, after at least three rounds, once the rounds have taken this long.
    Returns:
        name -> Timing in microseconds.
    Cost:
        (warmup + repeats) runs of everything, plus one read of 256 MB a run with ``cold_l2``.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _time_cuda(callables, warmup, repeats, cold_l2, cuda_graph, queue_ahead, budget_s)
    return _time_cpu(callables, warmup, repeats, budget_s)


def _time_cpu(callables: Callables, warmup: int, repeats: int, budget_s: float | None) -> dict[str, Timing]:
    for function in callables.values():
        for _ in range(warmup):
            function()
    samples: dict[str, list[float]] = {name: [] for name in callables}
    start = time.perf_counter()
    for done in range(repeats):
        for name, function in callables.items():
            before = time.perf_counter_ns()
            function()
            samples[name].append((time.perf_counter_ns() - before) / 1e3)
        if budget_s is not None and done >= 2 and time.perf_counter() - start > budget_s:
            break
    return {name: Timing.of(values) for name, values in samples.items()}


def _time_cuda(
    callables: Callables,
    warmup: int,
    repeats: int,
    cold_l2: bool,
    cuda_graph: bool,
    queue_ahead: bool,
    budget_s: float | None,
) -> dict[str, Timing]:
    for function in callables.values():
        for _ in range(warmup):
            function()
    torch.cuda.synchronize()
    runs = {name: graphed(function) for name, function in callables.items()} if cuda_graph else dict(callables)
    flush = torch.zeros(L2_FLUSH_BYTES // 4, device="cuda") if cold_l2 else None
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    start = time.perf_counter()
    for done in range(repeats):
        for name, function in runs.items():
            if flush is not None:
                flush.sum()
            if queue_ahead:
                torch.cuda._sleep(QUEUE_CYCLES)
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            function()
            after.record()
            events[name].append((before, after))
        if budget_s is not None:
            torch.cuda.synchronize()
            if done >= 2 and time.perf_counter() - start > budget_s:
                break
    torch.cuda.synchronize()
    return {name: Timing.of([a.elapsed_time(b) * 1e3 for a, b in pairs]) for name, pairs in events.items()}


@dataclass(frozen=True)
class Graphed:
    """A captured function. It keeps the function, and so all memory that the graph reads, alive."""

    function: Callable[[], object]
    graph: Any

    def __call__(self) -> None:
        self.graph.replay()


def graphed(function: Callable[[], object], pool: Any = None) -> Graphed:
    """The function captured in a CUDA graph: calling the result replays it on the same memory.

    Functions captured with one ``pool`` (``torch.cuda.graph_pool_handle()``) share memory: their results do not last.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    return Graphed(function, graph)
