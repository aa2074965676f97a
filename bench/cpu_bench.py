"""The CPU path against dense PyTorch (oneDNN, MKL) on layers of LeNet, VGG16 and a transformer, fp32, 73 % sparse.

Dense convolutions run in both memory formats, and the faster one is the baseline. Epilogues (bias, ReLU) are part of
every time. The weight is repacked before the clock starts, as a layer does once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tetris import reference
from tetris.autotune.device import device_name, versions
from tetris.autotune.timer import time_us
from tetris.bench.cases import LAYOUTS, ConvCase, LinearCase
from tetris.bench.rows import OK, WRONG, Row
from tetris.kernels.cpu import conv2d, linear
from tetris.layout import BlockLayout
from tetris.packing import pack
from tetris.pruning import fit_block
from tetris.tolerances import relative_error, tolerance

CONVS: tuple[tuple[ConvCase, tuple[tuple[int, int], ...]], ...] = (
    (ConvCase("lenet conv2", 20, 50, 12, 12, 5, padding=0, batch=1), ((25, 10),)),
    (ConvCase("lenet conv2", 20, 50, 12, 12, 5, padding=0, batch=64), ((25, 10), (10, 5))),
    (ConvCase("vgg16 conv2_2", 128, 128, 112, 112, batch=1), ((32, 32), (64, 32))),
    (ConvCase("vgg16 conv3_2", 256, 256, 56, 56, batch=1), ((32, 32), (64, 64))),
    (ConvCase("vgg16 conv4_2", 512, 512, 28, 28, batch=1), ((32, 32), (64, 64))),
    (ConvCase("vgg16 conv5_2", 512, 512, 14, 14, batch=1), ((32, 32), (64, 64))),
    (ConvCase("vgg16 conv5_2", 512, 512, 14, 14, batch=8), ((32, 32), (64, 64))),
)
LINEARS: tuple[tuple[LinearCase, tuple[tuple[int, int], ...]], ...] = (
    (LinearCase("lenet fc1", 800, 500, tokens=64), ((32, 32), (64, 64))),
    (LinearCase("vgg16 fc7", 4096, 4096, tokens=1), ((32, 32), (64, 64))),
    (LinearCase("vgg16 fc7", 4096, 4096, tokens=64), ((32, 32), (64, 64))),
)


@dataclass(frozen=True)
class Layer:
    """One layer to measure: the dense baselines, ours, and the reference that ours must match."""

    case: str
    baselines: dict[str, Callable[[], torch.Tensor]]
    ours: Callable[[], torch.Tensor]
    reference: Callable[[], torch.Tensor]
    flop: float
    extra: dict[str, object]


def conv_layer(case: ConvCase, block: tuple[int, int], layout: BlockLayout) -> Layer:
    """A convolution, NHWC and NCHW."""
    size, padding = (case.kernel_size, case.kernel_size), (case.padding, case.padding)
    x = torch.randn(case.batch, case.c_in, case.height, case.width)
    dense = torch.randn(case.c_out, case.c_in, *size) / math.sqrt(case.c_in * size[0] * size[1])
    bias, values = torch.randn(case.c_out), pack(dense, layout)
    x_last, dense_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, dense))
    pixels = case.batch * case.out_size[0] * case.out_size[1]
    prepared = conv2d.prepare(
        values, layout.indptr, layout.indices, c_in=case.c_in, c_out=case.c_out, kernel_size=size, pixels=pixels
    )
    return Layer(
        f"{case.name} batch {case.batch}",
        {
            "dense NCHW": lambda: F.conv2d(x, dense, bias, padding=padding).relu_(),
            "dense NHWC": lambda: F.conv2d(x_last, dense_last, bias, padding=padding).relu_(),
        },
        lambda: conv2d.run(prepared, x_last, bias, padding=padding, activation="relu"),
        lambda: reference.block_sparse_conv2d(
            x,
            values,
            layout.indptr,
            layout.indices,
            bias,
            c_out=case.c_out,
            kernel_size=size,
            padding=padding,
            activation="relu",
        ),
        case.flop(layout.kept_fraction),
        {"batch": case.batch, "operations": len(prepared.groups)},
    )


def linear_layer(case: LinearCase, block: tuple[int, int], layout: BlockLayout) -> Layer:
    """A linear layer."""
    x, bias = torch.randn(case.tokens, case.in_features), torch.randn(case.out_features)
    dense = torch.randn(case.out_features, case.in_features) / math.sqrt(case.in_features)
    values, pattern = pack(dense, layout), (layout.indptr, layout.indices)
    prepared = linear.prepare(
        values, *pattern, in_features=case.in_features, out_features=case.out_features, tokens=case.tokens
    )
    return Layer(
        f"{case.name} batch {case.tokens}",
        {"dense": lambda: F.linear(x, dense, bias).relu_()},
        lambda: linear.run(prepared, x, bias, activation="relu"),
        lambda: reference.block_sparse_linear(
            x, values, *pattern, bias, out_features=case.out_features, activation="relu"
        ),
        2.0 * case.tokens * layout.n_blocks * block[0] * block[1],
        {"batch": case.tokens, "operations": len(prepared.groups)},
    )


def make_layer(
    case: ConvCase | LinearCase, block: tuple[int, int], kind: str, kept: float
) -> tuple[Layer, tuple[int, int]]:
    """The layer of a case with a layout of that kind, and the block that fits it."""
    if isinstance(case, ConvCase):
        block = fit_block(block, (case.c_out, case.c_in))
        layout = LAYOUTS[kind]((case.c_out, case.c_in), block, kept).without_empty_rows()
        return conv_layer(case, block, layout), block
    block = fit_block(block, (case.out_features, case.in_features))
    layout = LAYOUTS[kind]((case.out_features, case.in_features), block, kept).without_empty_rows()
    return linear_layer(case, block, layout), block


def measure(layer: Layer, columns: dict[str, object], repeats: int) -> list[Row]:
    """Rows of the baselines and of ours, timed interleaved; a wrong result gets no time."""
    error = relative_error(layer.ours(), layer.reference())
    times = time_us({**layer.baselines, "tetris": layer.ours}, device="cpu", repeats=repeats, budget_s=4.0)
    best = min(times[name].median_us for name in layer.baselines)
    correct = error <= tolerance(torch.float32)
    rows = []
    for name, timing in times.items():
        ours = name == "tetris"
        shown = correct or not ours
        rows.append(
            Row(
                "cpu",
                layer.case,
                name,
                timing.median_us if shown else math.nan,
                timing.p10_us if shown else math.nan,
                timing.p90_us if shown else math.nan,
                flop=layer.flop if ours else math.nan,
                speedup=best / timing.median_us if shown else math.nan,
                error=error if ours else math.nan,
                status=OK if shown else WRONG,
                device=device_name("cpu"),
                versions=versions(),
                extra={**columns, **layer.extra},
            )
        )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options beside the common ones."""
    parser.add_argument("--kept", type=float, default=0.27, help="fraction of the blocks that is kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="OpenMP threads")


def run(args: argparse.Namespace) -> list[Row]:
    """Every layer, block and kind of layout."""
    rows: list[Row] = []
    torch.manual_seed(0)
    before = torch.get_num_threads()
    cases: list[tuple[ConvCase | LinearCase, tuple[tuple[int, int], ...]]]
    cases = [*CONVS[:1], *LINEARS[:1]] if args.quick else [*CONVS, *LINEARS]
    try:
        with torch.inference_mode():
            for case, blocks in cases:
                for wanted in blocks:
                    for kind in LAYOUTS:
                        layer, block = make_layer(case, wanted, kind, args.kept)
                        torch.set_num_threads(args.threads)  # Numba, which makes the layouts, sets OpenMP's number too
                        columns = {"block": f"{block[0]}x{block[1]}", "layout": kind, "threads": args.threads}
                        rows += measure(layer, columns, 3 if args.quick else 25)
    finally:
        torch.set_num_threads(before)
    return rows
