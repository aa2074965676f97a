"""``tetris tune``: time kernel configurations for a converted model's layers and remember the best.

Nothing here runs in a forward pass. A layer's choice is a key at ``layer.config``: set once by :func:`apply_tuned` (a
look-up) or :func:`tune_model` (a search), constant afterwards, so CUDA graphs and torch.compile are safe.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import nn

from tetris.autotune.cost import rank
from tetris.autotune.device import device_info
from tetris.autotune.problems import LayerInput, Problem, SparseLayer, capture_inputs, flop, problem_of
from tetris.autotune.search import search
from tetris.autotune.space import Config, config_space, default_config, is_valid
from tetris.autotune.store import Entry, TuningStore, problem_key
from tetris.autotune.timer import time_us
from tetris.errors import TetrisError, UnsupportedError
from tetris.graph import ExampleInputs
from tetris.kernels.configs import DeviceInfo, LinearProblem
from tetris.layers import BlockSparseConv2d, BlockSparseLinear

COMPILE_THREADS = 8
"""Configurations compiled at once: most of a compilation runs outside Python."""
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 4e-3}
"""Largest ||y - y_default|| / ||y_default|| of a configuration that is taken; other summation orders stay far below."""

Progress = Callable[[str, int, int], None]


@dataclass
class Tuning:
    """What :func:`tune_model` did. ``print`` it.

    Attributes:
        entries: the choice for every distinct problem of the model, in the order of its layers.
        layers: names of the layers by problem key.
        reused: keys that were in the store already.
        failures: configurations that did not run or answered wrongly, with the reason.
    """

    entries: list[Entry] = field(default_factory=list)
    layers: dict[str, list[str]] = field(default_factory=dict)
    reused: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = []
        for entry in self.entries:
            key = problem_key(entry.problem, entry.max_pool)
            gain = entry.default_us / entry.time_us
            state = "known" if key in self.reused else f"{entry.tried} tried"
            names = self.layers.get(key, [])
            label = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else ""
            rows.append(
                [label, entry.config.kernel, f"{entry.default_us:.1f}", f"{entry.time_us:.1f}", f"{gain:.2f}", state]
            )
        head = ["layer", "kernel", "default us", "tuned us", "gain", ""]
        table = tabulate(rows, headers=head, disable_numparse=True)
        return table + (f"\n{len(self.failures)} configurations failed or were wrong" if self.failures else "")


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun tells them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_gpu() -> str:
    """The GPU of this process: ``cuda:LOCAL_RANK`` under torchrun, otherwise ``cuda``."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The block-sparse layers of a converted model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseConv2d | BlockSparseLinear)}


def pools(layer: SparseLayer) -> bool:
    """Whether the layer's result is max-pooled."""
    return isinstance(layer, BlockSparseConv2d) and layer.max_pool


def use_config(layer: SparseLayer, key: str) -> None:
    """Give a layer a configuration; launches prepared with another one are forgotten."""
    layer.config = key
    layer._launches.clear()


def apply_tuned(model: nn.Module, example_inputs: ExampleInputs, store: TuningStore | None = None) -> dict[str, float]:
    """Give every layer of a converted model its stored configuration for these inputs; measures nothing.

    Takes the exact or the nearest entry that is valid for the layer; layers without one keep the analytic default.

    Returns:
        layer name -> distance of the entry that was taken (0 = tuned for this very problem).
    """
    store, layers, found = store or TuningStore(), sparse_layers(model), {}
    for name, x in capture_inputs(model, example_inputs, layers).items():
        if x.device.type != "cuda":
            continue
        problem, device, pooled = problem_of(layers[name], x), device_info(x.device), pools(layers[name])
        match = store.lookup(problem, device, max_pool=pooled)
        if match and is_valid(problem, device, match.config, pooled):
            use_config(layers[name], match.config.to_key())
            found[name] = match.distance
    return found


def tune_model(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    store: TuningStore | None = None,
    budget: int = 24,
    again: bool = False,
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> Tuning:
    """Search a configuration for every distinct problem of a converted model; store it and set it on the layers.

    Every finished problem is stored at once: an interrupted run goes on where it stopped.

    Args:
        model: from :func:`tetris.convert`, on a GPU; only its layers' ``config`` changes.
        example_inputs: a tensor, tuple or dict at the batch and dtype to tune for.
        store: where choices go; None = the user's.
        budget: configurations measured for each problem.
        again: search problems that the store already holds for this device and Triton version.
        share: (rank, world): this process and how many share the work, one GPU each (see :func:`rank_and_world`);
            it takes every world-th problem, the most expensive dealt out first. Its layers alone get a config.
        progress: called as ``progress(layer, problems done, problems in all)``.
    Returns:
        what was chosen and tried.
    Raises:
        UnsupportedError: the model does not run on a GPU: nothing to tune.
    Cost: about ``budget`` compilations and 15 runs of each, for every distinct problem.
    """
    store, layers = store or TuningStore(), sparse_layers(model)
    if not layers:
        raise TetrisError("tune: wanted a converted model with block-sparse layers; it has none; call tetris.convert")
    inputs = capture_inputs(model, example_inputs, layers)
    if any(x.device.type != "cuda" for x in inputs.values()):
        raise UnsupportedError("tune: wanted a model on a GPU; the CPU path has nothing to tune; move it with .cuda()")
    tuning = Tuning()
    problems: dict[str, tuple[str, Problem]] = {}
    for name, x in inputs.items():
        problem = problem_of(layers[name], x)
        key = problem_key(problem, pools(layers[name]))
        problems.setdefault(key, (name, problem))
        tuning.layers.setdefault(key, []).append(name)
    rank_, world = share
    dealt = list(problems.items()) if world == 1 else sorted(problems.items(), key=lambda item: -flop(item[1][1]))
    mine = dealt[rank_::world]
    for done, (key, (name, problem)) in enumerate(mine):
        if progress:
            progress(name, done, len(mine))
        device, pooled = device_info(inputs[name].device), pools(layers[name])
        match = store.lookup(problem, device, farthest=0, max_pool=pooled)
        if match and not again:
            tuning.reused.add(key)
            tuning.entries.append(match.entry)
        else:
            bench = _Bench(layers[name], inputs[name], problem, tuning.failures)
            entry = tune_problem(problem, device, bench, budget, pooled)
            store.put([entry])
            tuning.entries.append(entry)
        for layer in tuning.layers[key]:
            use_config(layers[layer], tuning.entries[-1].config.to_key())
    if progress and mine:
        progress(mine[-1][1][0], len(mine), len(mine))
    return tuning


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
    default = default_config(problem, device, max_pool)
    ranked = rank(problem, device, config_space(problem, device, max_pool))
    ranked = [default, *(config for config in ranked if config != default)]
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
class _Bench:
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
            found = time_us(
                runs,
                device=self.x.device,
                warmup=1,
                repeats=repeats,
                cold_l2=not isinstance(self.problem, LinearProblem),
            )
        return times | {config: found[config.to_key()].median_us for config in sound}

    def _call(self, config: Config) -> Callable[[], object]:
        layer, x = self._with(config.to_key()), self.images
        return lambda: layer(x)

    def _is_sound(self, config: Config) -> bool:
        """Compile and run once; a failure or a wrong result is noted, not raised: it is a finding about the config."""
        with torch.no_grad(), torch.cuda.device(self.x.device):
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
