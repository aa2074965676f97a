"""What a permutation of a convolution's output channels costs: in its store, in groups, or by a kernel of its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from tetris.autotune.device import device_name, versions
from tetris.autotune.timer import time_us
from tetris.bench.conv_cases import FLAGSHIP, Case
from tetris.bench.conv_measure import Operands, candidates
from tetris.bench.rows import Row
from tetris.kernels.configs import Conv2dConfig
from tetris.kernels.permute import permute_channels
from tetris.permutation import inverse

CASE = Case(FLAGSHIP, (64, 64))
PERMUTED_NAME = f"{CASE.name} permuted"
GROUPS = (8, 16)
"""Channels that move together."""


def permuted_configs() -> list[tuple[Case, Conv2dConfig]]:
    """The launches of :func:`permuted_rows` that store permuted channels."""
    config = candidates(CASE, 1)[0]
    return [(CASE, replace(config, output_group=group)) for group in GROUPS]


def grouped_permutation(channels: int, group: int, seed: int = 0) -> torch.Tensor:
    """A random permutation of whole groups; int64 [channels]."""
    order = torch.randperm(channels // group, generator=torch.Generator().manual_seed(seed))
    return (order[:, None] * group + torch.arange(group)).reshape(-1)


def permuted_rows(repeats: int) -> list[Row]:
    """The flagship layer without a permutation, with one in its store, and followed by the permute kernel.

    Results must equal the unpermuted one's channels bit by bit; the speedup is over the permute kernel.
    """
    operands = Operands.of(CASE, "cuda")
    plain = operands.tetris(candidates(CASE, 1)[0])
    y = plain()
    inverse_order = inverse(grouped_permutation(y.shape[1], GROUPS[0]).to(y.device))
    apart = "tetris, then the permute kernel"
    runs = {"tetris, not permuted": plain, apart: lambda: permute_channels(plain(), inverse_order, dim=1)}
    expected = {"tetris, not permuted": y, apart: y.index_select(1, inverse_order)}
    for _, config in permuted_configs():
        order = grouped_permutation(y.shape[1], config.output_group).to(y.device)
        name = f"tetris, groups of {config.output_group} permuted in its store"
        runs[name] = operands.tetris(config, order)
        expected[name] = y.index_select(1, inverse(order))
    right = {name: torch.equal(run(), expected[name]) for name, run in runs.items()}
    times = time_us({name: run for name, run in runs.items() if right[name]}, device="cuda", repeats=repeats,
                    cuda_graph=True)  # fmt: skip
    rows = []
    for name in runs:
        row = Row("conv", PERMUTED_NAME, name, device=device_name("cuda"), versions=versions())
        if right[name]:
            t = times[name]
            row = replace(row, median_us=t.median_us, p10_us=t.p10_us, p90_us=t.p90_us,
                          speedup=times[apart].median_us / t.median_us, error=0.0)  # fmt: skip
        rows.append(row if right[name] else replace(row, status="wrong"))
    return rows
