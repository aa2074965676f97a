"""What a call of a layer costs the CPU: eager and compiled calls of every kernel's layer beside torch's dense one.

A GPU is fed as fast as it computes only while a call takes Python less than its kernel takes the GPU. Measured are
calls in a row without a synchronisation, so that nothing but the CPU's own time is in the result: of the layer itself
(eager), through the registered operation (as exported programs call it), and compiled without a CUDA graph, a layer of
a network of four. Then whole networks, waited for.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tetris.autotune.device import device_name, versions
from tetris.bench.cases import random_layout
from tetris.bench.eager_networks import network_rows
from tetris.bench.host_time import CALLS, SHOWN, Call, host_us, profiled
from tetris.bench.networks import NETWORKS
from tetris.bench.rows import Row
from tetris.block_sparse_layer import FusedLayer
from tetris.kernels.configs import Conv2dConfig, LinearConfig
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.layout import BlockLayout
from tetris.stem import StemConv2d

COPIES = 4
"""Layers in the network whose compiled call is timed, a layer: the call's own cost is shared by as many."""


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
    parser.add_argument("--backend", default="inductor", help="torch.compile's; none = do not compile")
    parser.add_argument("--only", nargs="*", help="parts of the names of the layers to measure; default: all")
    parser.add_argument("--network", nargs="*", choices=sorted(NETWORKS), help="default: vgg16 on a GPU")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="of the networks")


@torch.no_grad()
def run(args: argparse.Namespace) -> list[Row]:
    """Up to five rows a layer, in microseconds of the CPU a call; then the networks'."""
    rows = []
    on_gpu = args.device == "cuda"
    cases = QUICK if args.quick or not on_gpu else CASES
    for case in cases if args.only is None else [c for c in cases if any(part in c.name for part in args.only)]:
        rows += layer_rows(case, args)
    networks = ["vgg16"] if args.network is None and on_gpu and not args.quick else args.network or []
    for name in networks:
        rows += network_rows(name, args)
    columns = {key: "" for row in rows for key in row.extra}
    return [replace(row, extra=columns | row.extra) for row in rows]


def layer_rows(case: EagerCase, args: argparse.Namespace) -> list[Row]:
    """The dense layer and ours: eager, compiled, and ours through the registered operation."""
    dense, ours, x = layers(case, args.device, case.dtype if args.device == "cuda" else torch.float32)
    calls: dict[str, Call] = {
        "dense": dense,
        "tetris": ours,
        "tetris registered": partial(ours._forward, residual=None),
    }
    times = {provider: host_us(call, x, args.repeats) for provider, call in calls.items()}
    if args.backend != "none":
        for provider in ("dense", "tetris"):
            network = compiled_copies(calls[provider], x, args.backend)  # type: ignore[arg-type]
            times[f"{provider} compiled"] = host_us(network, x, args.repeats, CALLS // COPIES, COPIES)
    print(f"{case.name}:", *(f"{name} {timing.median_us:.1f}" for name, timing in times.items()), flush=True)
    if args.profile:
        print(profiled(calls["tetris registered"], x), profiled(ours, x), sep="\n", flush=True)
    return [
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
            extra={"kernel": kernel_of(ours, x) if provider.startswith("tetris") else ""},
        )
        for provider, timing in times.items()
    ]


class Copies(nn.Module):
    """Copies of a layer, all called on the same input; whoever compiles it cannot leave one out."""

    def __init__(self, layer: nn.Module, x: torch.Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(COPIES))
        self(x)  # what a layer makes at its first call is there before a compiler looks

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


def compiled_copies(layer: nn.Module, x: torch.Tensor, backend: str) -> Call:
    """COPIES of a layer as a compiled network without a CUDA graph."""
    torch._dynamo.reset()
    return torch.compile(Copies(layer, x), fullgraph=True, dynamic=False, backend=backend)


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
