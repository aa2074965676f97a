"""Linear layers with weights in one byte: the layer in float16, int8 and float8 against cuBLAS on dense weights.

Few tokens wait for the kept weights, so half the bytes should count there; many wait for products, which stay the same.
Everything runs from CUDA graphs with a cold L2. Errors are against the dequantised weights; what quantisation itself
costs is a column of its own.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from tetris.autotune.ceilings import measure_ceilings
from tetris.autotune.device import device_name, versions
from tetris.autotune.timer import time_us
from tetris.bench.cases import LinearCase, random_layout
from tetris.bench.rows import OK, WRONG, Row
from tetris.layers import BlockSparseLinear
from tetris.layout import BlockLayout
from tetris.packing import pack
from tetris.quantization import quantize, quantized
from tetris.tolerances import relative_error, tolerance

UP = LinearCase("4096-14336", 4096, 14336, 1, 0.27)
SQUARE = LinearCase("4096-4096", 4096, 4096, 128, 0.27)
CASES = (UP, UP.at(4), UP.at(16), SQUARE.at(64), SQUARE, SQUARE.at(512), SQUARE.at(8192))
QUICK = (LinearCase("256-256", 256, 256, 1, 0.27), LinearCase("256-256", 256, 256, 16, 0.27))
BLOCK = (64, 64)
WEIGHTS: tuple[torch.dtype | None, ...] = (None, torch.int8, torch.float8_e4m3fn)
BASELINE = "dense"
CHECKED_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each provider")


def run(args: argparse.Namespace) -> list[Row]:
    """A row of the dense layer and one for each dtype of weights; fp16 on a GPU, fp32 on a CPU."""
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    cases = QUICK if args.quick or args.device == "cpu" else CASES
    ceilings = measure_ceilings("cuda", dtype) if args.device == "cuda" else None
    rows = []
    for case in cases:
        for row in measure(case, args.device, dtype, args.repeats):
            least = ceilings.least_us(row.flop, row.bytes) if ceilings else math.nan
            rows.append(replace(row, roofline_fraction=least / row.median_us))
            print(row.case, row.provider, f"{row.median_us:.2f} us {row.speedup:.2f}x {row.status}", flush=True)
    return rows


@torch.no_grad()
def measure(case: LinearCase, device: str, dtype: torch.dtype, repeats: int) -> list[Row]:
    """The rows of one case; a wrong result gets no time."""
    torch.manual_seed(0)
    shape = (case.out_features, case.in_features)
    layout = random_layout(shape, BLOCK, case.kept).without_empty_rows()
    layout = BlockLayout(shape, BLOCK, layout.indptr.to(device), layout.indices.to(device))
    dense = (torch.randn(shape, device=device) / case.in_features**0.5).to(dtype)
    pruned = dense * layout.to_mask().repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    x = torch.randn(case.tokens, case.in_features, device=device).to(dtype)
    runs = {BASELINE: lambda: F.linear(x, dense)}
    facts: dict[str, dict[str, float]] = {BASELINE: {"bytes": case.bytes(1.0, dtype.itemsize)}}
    for stored in WEIGHTS:
        name = f"tetris {str(stored or dtype).removeprefix('torch.')}"
        weight, scales = (pruned, None) if stored is None else quantize(pruned, stored)
        layer = BlockSparseLinear(
            case.in_features, case.out_features, BLOCK, layout.n_blocks, values=pack(weight, layout), scales=scales,
            layout=layout, bias=False,
        )  # fmt: skip
        exact = pruned.double() if stored is None else quantized(pruned, stored)
        saved = layout.n_blocks * BLOCK[0] * BLOCK[1] * (dtype.itemsize - weight.element_size())
        facts[name] = {
            "bytes": case.bytes(layout.kept_fraction, dtype.itemsize) - saved,
            "error": relative_error(layer(x)[:CHECKED_TOKENS], x[:CHECKED_TOKENS].double() @ exact.T),
            "quantisation": relative_error(exact, pruned),
        }
        if facts[name]["error"] <= tolerance(dtype):
            runs[name] = lambda layer=layer: layer(x)  # type: ignore[misc]
    on_gpu = device == "cuda"
    times = time_us(runs, device=device, repeats=repeats, cuda_graph=on_gpu, cold_l2=on_gpu)
    rows = []
    for name, fact in facts.items():
        kept = 1.0 if name == BASELINE else layout.kept_fraction
        row = Row(
            "quantized", f"{case.tokens} x {case.name}", name, flop=case.flop(kept), bytes=fact["bytes"],
            error=fact.get("error", math.nan), status=OK if name in times else WRONG, device=device_name(device),
            versions=versions(),
            extra={"tokens": case.tokens, "kept": kept, "quantisation": fact.get("quantisation", 0.0)},
        )  # fmt: skip
        if name in times:
            t = times[name]
            speedup = times[BASELINE].median_us / t.median_us
            row = replace(row, median_us=t.median_us, p10_us=t.p10_us, p90_us=t.p90_us, speedup=speedup)
        rows.append(row)
    return rows
