"""What calls cost the CPU, however long the GPU takes."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from io import StringIO

import torch

from tetris.autotune.timer import Timing

Call = Callable[[torch.Tensor], object]

CALLS = 100
"""In a row; a GPU's queue holds about a thousand launches before a call has to wait."""
SHOWN = 25
"""Lines of a printed profile."""


def host_us(layer: Call, x: torch.Tensor, repeats: int, calls: int = CALLS, layers: int = 1) -> Timing:
    """Microseconds of the CPU a call (a layer of it), the median of ``repeats`` rounds of ``calls``."""

    def wait() -> None:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    for _ in range(3):
        layer(x)
    samples = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter_ns()
        for _ in range(calls):
            layer(x)
        samples.append((time.perf_counter_ns() - start) / 1e3 / calls / layers)
    wait()
    return Timing.of(samples)


def profiled(layer: Call, x: torch.Tensor, calls: int = 2 * CALLS) -> str:
    """Where the calls spend their time, as ``cProfile`` tells it (it slows short functions down)."""
    profile, text = cProfile.Profile(), StringIO()
    profile.enable()
    for _ in range(calls):
        layer(x)
    profile.disable()
    pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(SHOWN)
    return text.getvalue()
