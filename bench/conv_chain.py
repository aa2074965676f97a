"""VGG16's thirteen convolutions with bias, ReLU and pooling, as one chain on a CUDA graph.

The dense side is ``torch.compile`` of the same layers, replayed from a graph too. Ours fuses each layer's epilogue and
pooling; the first layer runs dense on our kernel, its image padded from three to eight channels (counted).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from tetris.autotune.ceilings import Ceilings
from tetris.autotune.device import device_name, versions
from tetris.autotune.timer import time_us
from tetris.bench.conv_cases import Case, vgg16_cases
from tetris.bench.conv_measure import Operands, candidates, least_bytes
from tetris.bench.rows import Row
from tetris.kernels.configs import Conv2dConfig
from tetris.tolerances import relative_error

CHAIN_BATCH, CHAIN_BLOCK = 128, (64, 32)
CHAIN_ERROR = 5e-3
"""Thirteen layers of float16 roundings, each within 1e-3 of its float64 value."""


def chain_name(batch: int) -> str:
    """The case of its rows."""
    return f"VGG16 convolutions, bias, ReLU, pool n{batch}"


def dense_chain(layers: list[Operands]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The dense layers as ``torch.compile`` makes them."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = F.relu(F.conv2d(x, layer.dense, layer.bias, padding=1))
            x = F.max_pool2d(x, 2) if layer.case.pool else x
        return x

    return torch.compile(forward)


def sparse_chain(layers: list[Operands], configs: list[Conv2dConfig]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Our layers one after the other, schedules made beforehand."""
    runs = [layer.bound(config) for layer, config in zip(layers, configs)]

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, 8 - x.shape[1])).contiguous(memory_format=torch.channels_last)
        for run in runs:
            x = run(x)
        return x

    return forward


def best_configs(cases: tuple[Case, ...], layers: list[Operands], most: int) -> list[Conv2dConfig]:
    """The fastest of ``most`` candidates for every layer."""
    chosen = []
    for case, layer in zip(cases, layers):
        configs = candidates(case, most)
        runs = {str(i): layer.tetris(config) for i, config in enumerate(configs)}
        times = time_us(runs, device="cuda", warmup=1, repeats=5, cuda_graph=True)
        chosen.append(configs[int(min(times, key=lambda name: times[name].median_us))])
    return chosen


def chain_rows(most: int, repeats: int, ceilings: Ceilings, batches: tuple[int, ...] = (CHAIN_BATCH,)) -> list[Row]:
    """Rows of the dense and the sparse chain, reordered layouts, the paper's pruning rates."""
    rows = []
    for batch in batches:
        cases = vgg16_cases(batch, CHAIN_BLOCK)
        layers = [Operands.of(case, "cuda", seed) for seed, case in enumerate(cases)]
        x = layers[0].x
        sparse = sparse_chain(layers, best_configs(cases, layers, most))
        reference = x[:2].double()
        with torch.backends.cudnn.flags(enabled=True, benchmark=False):
            for layer in layers:
                reference = layer.cudnn(reference, layer.pruned.double())
        error = relative_error(sparse(x)[:2], reference)
        with torch.no_grad():
            runs = {"torch.compile": partial(dense_chain(layers), x), "tetris tuned": partial(sparse, x)}
            times = time_us(runs, device="cuda", warmup=3, repeats=repeats, cuda_graph=True)
        parts = [(case.layer.flop(layer.layout.kept_fraction), least_bytes(case, layer.layout))
                 for case, layer in zip(cases, layers)]  # fmt: skip
        least = sum(ceilings.least_us(flop, size) for flop, size in parts)
        goals = (2.4, 3.2) if batch == CHAIN_BATCH else (math.nan, math.nan)
        for provider, t in times.items():
            ours = provider != "torch.compile"
            rows.append(Row(
                "conv", chain_name(batch), provider, t.median_us, t.p10_us, t.p90_us,
                flop=sum(flop for flop, _ in parts), bytes=sum(size for _, size in parts),
                roofline_fraction=least / t.median_us, speedup=times["torch.compile"].median_us / t.median_us,
                error=error if ours else math.nan, status="ok" if not ours or error <= CHAIN_ERROR else "wrong",
                device=device_name("cuda"), versions=versions(),
                extra={"batch": batch, "floor": goals[0], "target": goals[1], "block": "64x32", "layout": "reordered"},
            ))  # fmt: skip
        del layers
        torch.cuda.empty_cache()
    return rows
