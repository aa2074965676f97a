"""Which configurations of a problem are worth compiling: the cost model proposes, measuring decides."""

from __future__ import annotations

from collections.abc import Sequence

from tetris.autotune.cost import estimate_us
from tetris.autotune.problems import Problem
from tetris.autotune.space import Config, config_space
from tetris.kernels.configs import DeviceInfo

WITHIN, PORTABLE_WITHIN = 1.5, 1.2
"""A full search leaves out what is estimated to take longer than this times the best; of the portable kernel less is
worth trying, because it has hundreds of configurations and wins where the specialised ones do not run."""
MOST_PORTABLE, MOST_BESIDE = 32, 12
"""Of equal estimates (everything bound by memory) so many portable configurations are enough, alone and beside other
kernels: 96 searches on an H200 were all won by configurations that 8 keep, two of them by portable ones."""


def candidates(
    problem: Problem,
    device: DeviceInfo,
    max_pool: bool = False,
    budget: int | None = None,
    space: list[Config] | None = None,
) -> list[Config]:
    """The configurations to measure, the analytic default first.

    Args:
        problem, device, max_pool: as for ``config_space``.
        budget: how many, the most promising and most different ones; None = a full search, see :data:`WITHIN` and
            :data:`MOST_PORTABLE`.
        space: what ``config_space`` gives, if the caller has it.
    """
    space = space or config_space(problem, device, max_pool)
    default = space[0]
    estimates = {config: estimate_us(problem, device, config) for config in space}
    ranked = sorted(space, key=estimates.__getitem__)
    if budget is not None:  # half of them by the estimate alone, half against its errors
        return list(dict.fromkeys([default, *ranked[: budget // 2], *spread(ranked, budget)]))[: max(budget, 1)]
    best = estimates[ranked[0]]
    limits = {config: PORTABLE_WITHIN if config.kernel == "portable" else WITHIN for config in ranked}
    worth = [config for config in ranked if estimates[config] <= limits[config] * best]
    most = MOST_PORTABLE if all(config.kernel == "portable" for config in ranked) else MOST_BESIDE
    portable = set(spread([config for config in worth if config.kernel == "portable"], most))
    full = [config for config in worth if config.kernel != "portable" or config in portable]
    return list(dict.fromkeys([default, *full]))


def spread(ranked: Sequence[Config], count: int) -> list[Config]:
    """The ``count`` first of ``ranked``, but no two of the same kernel, tile and step before every other was taken."""

    def family(config: Config) -> tuple[object, ...]:
        names = ("kernel", "tile_n", "tile_h", "tile_w", "tile_tokens", "tile_k", "tile_out", "descriptors")
        return tuple(getattr(config, name, None) for name in names)

    families: dict[tuple[object, ...], Config] = {}
    for config in ranked:
        families.setdefault(family(config), config)
    firsts = set(families.values())
    return [*families.values(), *(config for config in ranked if config not in firsts)][:count]
