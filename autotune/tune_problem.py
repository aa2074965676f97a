"""Tuning of one problem: what to try, how a configuration is timed, and when it counts as right."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from tetris.autotune.compile_ahead import Job
from tetris.autotune.cost import rank
from tetris.autotune.problems import LayerInput, Problem, SparseLayer, pools
from tetris.autotune.search import first_batch, search
from tetris.autotune.space import Config, config_space, default_config
from tetris.autotune.store import Entry
from tetris.autotune.timer import time_us
from tetris.errors import TetrisError
from tetris.kernels.configs import DeviceInfo

COMPILE_THREADS = 8
"""Configurations compiled at once: most of a compilation runs outside Python."""
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 4e-3}
"""Largest ||y - y_default|| / ||y_default|| of a configuration that is taken; other summation orders stay far below."""


def proposals(problem: Problem, device: DeviceInfo, max_pool: bool = False) -> list[Config]:
    """All configurations, the default first, then the most promising."""
    default = default_config(problem, device, max_pool)
    ranked = rank(problem, device, config_space(problem, device, max_pool))
    return [default, *(config for config in ranked if config != default)]


def first_jobs(wanted: Sequence[tuple[Problem, SparseLayer]], device: DeviceInfo, budget: int) -> list[Job]:
    """What the searches of these problems will measure first, to be compiled ahead."""
    return [
        Job(problem, config.to_key(), layer.activation, pools(layer), layer.bias is not None)
        for problem, layer in wanted
        for config in first_batch(proposals(problem, device, pools(layer)), budget)
    ]


def tune_problem(
    problem: Problem,
    device: DeviceInfo,
    measure: Callable[[Sequence[Config], int], dict[Config, float]],
    budget: int,
    max_pool: bool = False,
) -> Entry:
    """Search one problem: ranked proposals, a few measurements of each, then the finalists against the default.

    Args:
        measure: (configurations, timed runs) -> microseconds, infinite for those that fail.
    Raises:
        TetrisError: not even the default runs.
    """
    ranked = proposals(problem, device, max_pool)
    default = ranked[0]
    found = search(ranked, lambda configs: measure(configs, 7), budget)
    leaders = sorted(found.measured, key=lambda config: found.measured[config])[:3]
    final = measure(list(dict.fromkeys([default, *leaders])), 25)
    best = min(final, key=lambda config: final[config])
    if math.isinf(final[best]):
        raise TetrisError(f"tune: no configuration runs {problem} on {device.name}; the failures say why")
    return Entry(
        device.name,
        device.capability,
        device.triton_version,
        problem,
        best,
        final[best],
        final[default],
        len(found.measured),
        max_pool,
    )


@dataclass
class LayerBench:
    """Times configurations of one layer, each checked against the default's result."""

    layer: SparseLayer
    x: LayerInput
    problem: Problem
    failures: dict[str, str]

    def __post_init__(self) -> None:
        self.images = self.x.random(self.x.device, channels_last=True)
        with torch.no_grad():
            self.reference = self._with("")(self.images).float()

    def _with(self, config: str) -> nn.Module:
        layer = copy.copy(self.layer)
        layer.config = config
        return layer

    def __call__(self, configs: Sequence[Config], repeats: int) -> dict[Config, float]:
        times = dict.fromkeys(configs, math.inf)
        with ThreadPoolExecutor(COMPILE_THREADS) as pool:
            sound = [config for config, ok in zip(configs, pool.map(self._is_sound, configs)) if ok]
        runs = {config.to_key(): self._call(config) for config in sound}
        with torch.no_grad():
            found = time_us(runs, device=self.x.device, warmup=1, repeats=repeats, cold_l2=True)
        return times | {config: found[config.to_key()].median_us for config in sound}

    def _call(self, config: Config) -> Callable[[], object]:
        layer, x = self._with(config.to_key()), self.images
        return lambda: layer(x)

    def _is_sound(self, config: Config) -> bool:
        """Compile and run once; a failure or a wrong result is noted, not raised: it is a finding about the config."""
        with torch.no_grad(), torch.cuda.device(self.x.device if self.x.device.type == "cuda" else -1):
            try:
                y = self._with(config.to_key())(self.images).float()
                error = float((y - self.reference).norm() / self.reference.norm().clamp_min(1e-30))
            except (RuntimeError, ValueError, TypeError, AssertionError) as problem:
                self.failures[config.to_key()] = (
                    f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
                )
                return False
        if not error <= TOLERANCE[self.problem.dtype]:
            self.failures[config.to_key()] = f"differs from the default's result by {error:.2e}"
            return False
        return True
