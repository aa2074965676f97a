"""Which of many callables is fastest, without timing the slow ones well: heats, after each of which losers drop out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from tetris.autotune.timer import Timing, time_us

HEATS = ((2, 1.6), (5, 1.15), (9, 1.05))
"""(runs of each, how much slower than the fastest one may be and still be in the next heat)."""


def race(callables: Mapping[str, Callable[[], object]], device: str | torch.device) -> dict[str, float]:
    """Microseconds of each, operands from memory (cold L2); the slower, the fewer runs stand behind its number.

    Within a heat all run in turns, so that a change of clock meets all alike. A loser's number is its ratio to the
    fastest of its last heat times the winner's.
    """
    ratios: dict[str, float] = {}
    left, fastest = dict(callables), 0.0
    for heat, (runs, margin) in enumerate(HEATS):
        medians = {name: time.median_us for name, time in heat_us(left, device, runs, warmup=heat == 0).items()}
        fastest = min(medians.values(), default=0.0)
        ratios |= {name: us / fastest for name, us in medians.items()}
        left = {name: run for name, run in left.items() if ratios[name] <= margin}
        if len(left) <= 1:
            break
    return {name: ratio * fastest for name, ratio in ratios.items()}


def heat_us(
    callables: Mapping[str, Callable[[], object]], device: str | torch.device, runs: int, warmup: int = 1
) -> dict[str, Timing]:
    """All of them in turns, ``runs`` times, as every choice here is timed."""
    return time_us(callables, device=device, warmup=warmup, repeats=runs, cold_l2=True)
