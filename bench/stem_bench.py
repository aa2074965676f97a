"""First convolutions: cuDNN with bias and ReLU against ``StemConv2d``, which does all three in one pass."""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

from tetris.autotune.device import device_name, versions
from tetris.autotune.timer import time_us
from tetris.bench.cases import ConvCase
from tetris.bench.rows import OK, WRONG, Row
from tetris.stem import StemConv2d
from tetris.tolerances import relative_error, tolerance

CASES = (
    ConvCase("VGG16 conv1_1", 3, 64, 224, 224, 3, padding=1, batch=128),
    ConvCase("VGG16 conv1_1", 3, 64, 224, 224, 3, padding=1, batch=8),
    ConvCase("ResNet conv1", 3, 64, 224, 224, 7, stride=2, padding=3, batch=128),
)
QUICK = (ConvCase("quick", 3, 16, 32, 32, 3, padding=1, batch=2),)
CHECKED_IMAGES = 4
"""Images compared with float64: the whole batch would not fit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each provider")


def run(args: argparse.Namespace) -> list[Row]:
    """Both providers on every case, fp16 on a GPU and fp32 on a CPU, interleaved."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    return [row for case in (QUICK if args.quick else CASES) for row in measure(case, args.device, dtype, args.repeats)]


@torch.no_grad()
def measure(case: ConvCase, device: str, dtype: torch.dtype, repeats: int) -> list[Row]:
    """A row of the dense layers and one of ours; a wrong result gets no time."""
    conv = nn.Conv2d(case.c_in, case.c_out, case.kernel_size, case.stride, case.padding)
    conv = conv.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    stem = StemConv2d.from_dense(conv, "relu")
    x = torch.randn(case.batch, case.c_in, case.height, case.width, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    few = x[:CHECKED_IMAGES].double()
    reference = F.relu(F.conv2d(few, conv.weight.double(), conv.bias.double(), conv.stride, conv.padding))  # type: ignore[union-attr,arg-type]
    error = relative_error(stem(x[:CHECKED_IMAGES]), reference)
    correct = error <= tolerance(dtype)
    times = time_us({"dense": lambda: F.relu_(conv(x)), "tetris": lambda: stem(x)}, device=device, repeats=repeats)
    pixels = case.batch * case.out_size[0] * case.out_size[1]
    rows = []
    for name, timing in times.items():
        shown = correct or name == "dense"
        rows.append(
            Row(
                "stem",
                f"{case.name} n{case.batch}",
                name,
                timing.median_us if shown else math.nan,
                timing.p10_us if shown else math.nan,
                timing.p90_us if shown else math.nan,
                flop=case.flop(1.0),
                bytes=float((x.numel() + pixels * case.c_out) * x.element_size()),
                speedup=times["dense"].median_us / timing.median_us if shown else math.nan,
                error=error if name == "tetris" else math.nan,
                status=OK if shown else WRONG,
                device=device_name(device),
                versions=versions(),
            )
        )
    return rows
