"""A search that measures few configurations: the cost model proposes, neighbours of the winners refine.

It knows no device: ``measure`` turns a batch of configurations into times, and a test turns it into a table look-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from tetris.autotune.space import Config

FIRST = 0.6
"""Share of the budget spent on the cost model's proposals before neighbours of the best are tried."""

Measure = Callable[[list[Config]], dict[Config, float]]
"""Configurations -> microseconds; infinite for one that fails or answers wrongly."""


@dataclass
class Found:
    """The result of a search: the fastest configuration, its time, and everything that was measured."""

    best: Config
    time_us: float
    measured: dict[Config, float] = field(default_factory=dict)


def difference(a: Config, b: Config) -> int:
    """In how many fields two configurations differ; the tile's extents count as one field."""
    left, right = asdict(a), asdict(b)
    fields = {name for name in left if left[name] != right.get(name)}
    extents = fields & {"tile_n", "tile_h", "tile_w"}
    return len(fields - extents) + bool(extents)


def spread(ranked: Sequence[Config], count: int) -> list[Config]:
    """The ``count`` first of ``ranked``, but no two of the same kernel, tile and step before every other was taken."""

    def family(config: Config) -> tuple[object, ...]:
        values = asdict(config)
        names = ("kernel", "tile_n", "tile_h", "tile_w", "tile_tokens", "tile_k", "tile_out", "descriptors")
        return tuple(values.get(name) for name in names)

    firsts: list[Config] = []
    seen: set[tuple[object, ...]] = set()
    for config in ranked:
        if family(config) not in seen:
            seen.add(family(config))
            firsts.append(config)
    return (firsts + [config for config in ranked if config not in firsts])[:count]


def first_batch(ranked: Sequence[Config], budget: int) -> list[Config]:
    """What a search measures before it knows anything."""
    return spread(ranked, max(1, round(budget * FIRST)))


def search(ranked: Sequence[Config], measure: Measure, budget: int = 24) -> Found:
    """The fastest configuration found within ``budget`` measurements.

    Args:
        ranked: all configurations, the most promising first; the analytic default may stand anywhere in it.
        measure: times a batch.
        budget: how many configurations may be measured.
    Returns:
        the winner and all measurements. Time is infinite if every configuration failed.
    """
    measured = measure(first_batch(ranked, budget))
    while len(measured) < min(budget, len(ranked)):
        leaders = sorted(measured, key=lambda config: measured[config])[:2]
        rest = [config for config in ranked if config not in measured]
        near = sorted(rest, key=lambda config: min(difference(config, leader) for leader in leaders))
        batch = near[: min(4, budget - len(measured))]
        before = min(measured.values())
        measured |= measure(batch)
        if min(measured.values()) >= before and len(measured) >= 0.85 * budget:
            break
    best = min(measured, key=lambda config: measured[config])
    return Found(best, measured.get(best, math.inf), measured)
