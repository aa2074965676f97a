"""What a call of a layer costs the CPU: eager calls of every kernel's layer beside torch's dense one, not waited for.

A GPU is fed as fast as it computes only while a call takes Python less than its kernel takes the GPU. Measured are
calls in a row without a synchronisation, so that nothing but the CPU's own time is in the result. "registered" calls
go through torch's registered operation every time, as compiled models do; the others repeat a recording of the first.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import nn

from tetris.autotune.device import device_name, versions
from tetris.autotune.timer import Timing
from tetris.bench.cases import random_layout
from tetris.bench.rows import Row
from tetris.block_sparse_layer import FusedLayer
from tetris.kernels.configs import Conv2dConfig, LinearConfig
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.layout import BlockLayout
from tetris.stem import StemConv2d

Call = Callable[[torch.Tensor], object]

CALLS = 100
"""In a row; a GPU's queue holds about a thousand launches before a call has to wait."""
SHOWN = 25
"""Lines of a printed profile."""


@dataclass(frozen=True)
class EagerCase:
    """A layer: linear without ``size``, else a convolution on images of ``size`` x ``size``.

    Attributes:
        shape: (output, input) channels.
        batch: images or tokens.
        kernel: the one that is expected to run on an H200.
        permuted: whether channels are moved before and after.
    """

    name: str
    kernel: str
    shape: tuple[int, int]
    batch: int
    size: int = 0
    taps: int = 3
    block: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.float16
    permuted: bool = False


CASES = (
    EagerCase("3x3 512-512@14, 1 image", "hopper", (512, 512), 1, 14),
    EagerCase("3x3 256-256@28, 8 images", "hopper", (256, 256), 8, 28, block=(64, 32)),
    EagerCase("1x1 256-1024@14, 128 images", "hopper_linear", (1024, 256), 128, 14, 1),
    EagerCase("3x3 256-256@14, 1 image, fp32", "hopper", (256, 256), 1, 14, dtype=torch.float32),
    EagerCase("3x3 48-48@28, 1 image", "portable", (48, 48), 1, 28, block=(16, 16)),
    EagerCase("3-64@224, 1 image", "stem", (64, 3), 1, 224),
    EagerCase("4096-4096, 2048 tokens", "hopper", (4096, 4096), 2048),
    EagerCase("4096-4096, 2048 tokens, 32x32", "narrow", (4096, 4096), 2048, block=(32, 32)),
    EagerCase("4096-4096, 64 tokens", "split", (4096, 4096), 64),
    EagerCase("4096-4096, 1 token", "vector", (4096, 4096), 1),
    EagerCase("1024-1024, 8 tokens, fp32", "decode", (1024, 1024), 8, dtype=torch.float32),
    EagerCase("1024-1024, 256 tokens, fp32", "portable", (1024, 1024), 256, dtype=torch.float32),
    EagerCase("4096-4096, 64 tokens, permuted", "split", (4096, 4096), 64, permuted=True),
)
QUICK = (
    EagerCase("3x3 32-32@8", "portable", (32, 32), 1, 8, block=(16, 16)),
    EagerCase("64-64", "portable", (64, 64), 4, block=(16, 16)),
    EagerCase("3-16@16", "stem", (16, 3), 1, 16),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--repeats", type=int, default=9, help=f"rounds of {CALLS} calls of each layer")
    parser.add_argument("--profile", action="store_true", help=f"the {SHOWN} functions that take longest, by layer")


@torch.no_grad()
def run(args: argparse.Namespace) -> list[Row]:
    """Three rows a layer: the dense one and ours twice, in microseconds a call."""
    rows = []
    on_gpu = args.device == "cuda"
    for case in QUICK if args.quick or not on_gpu else CASES:
        dense, ours, x = layers(case, args.device, case.dtype if on_gpu else torch.float32)
        calls: dict[str, Call] = {
            "dense": dense,
            "tetris registered": partial(ours._forward, residual=None),
            "tetris": ours,
        }
        times = {provider: host_us(call, x, args.repeats) for provider, call in calls.items()}
        for provider, timing in times.items():
            rows.append(
                Row(
                    "eager",
                    case.name,
                    provider,
                    timing.median_us,
                    timing.p10_us,
                    timing.p90_us,
                    speedup=times["dense"].median_us / timing.median_us,
                    device=device_name(args.device),
                    versions=versions(),
                    extra={"kernel": kernel_of(ours, x) if provider != "dense" else ""},
                )
            )
        print(f"{case.name}:", *(f"{name} {timing.median_us:.1f}" for name, timing in times.items()), flush=True)
        if args.profile:
            print(profiled(calls["tetris registered"], x), profiled(ours, x), sep="\n", flush=True)
    return rows


def layers(case: EagerCase, device: str, dtype: torch.dtype) -> tuple[nn.Module, FusedLayer, torch.Tensor]:
    """(dense layer, ours, input) of a case; a quarter of the blocks is kept."""
    torch.manual_seed(0)
    out, inputs = case.shape
    dense: nn.Module
    if case.size:
        x = torch.randn(case.batch, inputs, case.size, case.size).contiguous(memory_format=torch.channels_last)
        dense = nn.Conv2d(inputs, out, case.taps, padding=case.taps // 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    else:
        x, dense = torch.randn(case.batch, inputs), nn.Linear(inputs, out)
    if isinstance(dense, nn.Conv2d) and StemConv2d.supports(dense):
        ours: FusedLayer = StemConv2d.from_dense(dense, "relu")
    else:
        ours = _sparse(case, dense)
    return tuple(item.to(device, dtype) for item in (dense.eval(), ours.eval(), x))  # type: ignore[return-value]


def _sparse(case: EagerCase, dense: nn.Module) -> FusedLayer:
    out, inputs = case.shape
    layout: BlockLayout = random_layout(case.shape, case.block, 0.25).without_empty_rows()
    options: dict[str, Any] = {"layout": layout, "activation": "relu"}
    if case.permuted:
        orders = torch.randperm(inputs), torch.randperm(out)
        options |= dict(zip(("input_permutation", "output_permutation"), orders))
    if isinstance(dense, nn.Linear):
        values = torch.randn(layout.n_blocks, *case.block)
        return BlockSparseLinear(inputs, out, case.block, layout.n_blocks, values=values, **options)
    taps, padding = (case.taps, case.taps), (case.taps // 2, case.taps // 2)
    values = torch.randn(layout.n_blocks, case.taps**2, *case.block)
    return BlockSparseConv2d(inputs, out, taps, case.block, layout.n_blocks, padding=padding, values=values, **options)


def kernel_of(layer: nn.Module, x: torch.Tensor) -> str:
    """The kernel that a layer's launch names."""
    if x.device.type == "cpu":
        return "cpu"
    if isinstance(layer, StemConv2d):
        return "stem"
    key = layer.launch(x).config  # type: ignore[operator,union-attr]
    config = Conv2dConfig.from_key(key) if isinstance(layer, BlockSparseConv2d) else LinearConfig.from_key(key)
    return config.kernel


def host_us(layer: Call, x: torch.Tensor, repeats: int, calls: int = CALLS) -> Timing:
    """Microseconds of the CPU a call, the median of ``repeats`` rounds of ``calls``."""

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
        samples.append((time.perf_counter_ns() - start) / 1e3 / calls)
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
