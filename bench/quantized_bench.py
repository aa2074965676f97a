"""Linear layers with weights in one byte: the layer in float16, int8 and float8 against cuBLAS on dense weights.

Few tokens wait for the kept weights, so half the bytes should count there; many wait for products, which stay the same.
Everything runs from CUDA graphs with a cold L2, with the config that a layer gets and with the best of a few. Errors
are against the dequantised weights; what quantisation itself costs is a column of its own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from tetris.autotune.ceilings import measure_ceilings
from tetris.autotune.device import device_info, device_name, versions
from tetris.autotune.timer import time_us
from tetris.bench.cases import LinearCase, random_layout
from tetris.bench.linear_bench import Run, candidates, fastest
from tetris.bench.rows import OK, WRONG, Row, write_csv
from tetris.dispatch import dtype_name
from tetris.kernels.configs import LinearConfig, LinearProblem, default_linear_config
from tetris.kernels.linear_paths import DECODE_TOKENS, decode_config, linear_refuses, split_config
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


@dataclass(frozen=True)
class Contender:
    """One way to compute a case: its product, its traffic, its errors (NaN for the baseline) and its config."""

    name: str
    product: Run
    bytes: float
    kept: float = 1.0
    error: float = math.nan
    quantisation: float = math.nan
    config: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each provider")
    parser.add_argument("--match", default="", help="only cases whose name contains this")


def run(args: argparse.Namespace) -> list[Row]:
    """A row of the dense layer and one or two for each dtype of weights; fp16 on a GPU, fp32 on a CPU."""
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    cases = QUICK if args.quick or args.device == "cpu" else CASES
    ceilings = measure_ceilings("cuda", dtype) if args.device == "cuda" else None
    rows = []
    for case in cases:
        if args.match not in case_name(case):
            continue
        for row in measure(case, args.device, dtype, args.repeats):
            least = ceilings.least_us(row.flop, row.bytes) if ceilings else math.nan
            rows.append(replace(row, roofline_fraction=least / row.median_us))
            print(row.case, row.provider, f"{row.median_us:.2f} us {row.speedup:.2f}x {row.status}", flush=True)
        write_csv(args.out / "quantized.csv", rows)  # after every case: a run that is cut short keeps its rows
    return rows


def case_name(case: LinearCase) -> str:
    """Such as "16 x 4096-14336"."""
    return f"{case.tokens} x {case.name}"


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
    contenders = [Contender(BASELINE, lambda: F.linear(x, dense), case.bytes(1.0, dtype.itemsize))]
    contenders += [c for stored in WEIGHTS for c in layers(case, x, pruned, layout, stored)]
    right = {c.name: c.product for c in contenders if c.name == BASELINE or c.error <= tolerance(dtype)}
    on_gpu = device == "cuda"
    times = time_us(right, device=device, repeats=repeats, cuda_graph=on_gpu, cold_l2=on_gpu)
    rows = []
    for c in contenders:
        row = Row(
            "quantized", case_name(case), c.name, flop=case.flop(c.kept), bytes=c.bytes, error=c.error,
            status=OK if c.name in times else WRONG, device=device_name(device), versions=versions(),
            extra={"tokens": case.tokens, "kept": c.kept, "quantisation": c.quantisation, "note": c.config},
        )  # fmt: skip
        if c.name in times:
            t = times[c.name]
            speedup = times[BASELINE].median_us / t.median_us
            row = replace(row, median_us=t.median_us, p10_us=t.p10_us, p90_us=t.p90_us, speedup=speedup)
        rows.append(row)
    return rows


def layers(
    case: LinearCase, x: torch.Tensor, pruned: torch.Tensor, layout: BlockLayout, stored: torch.dtype | None
) -> Iterator[Contender]:
    """The layer with weights in that dtype (None = x's): as users get it and, on a GPU, with the best of some."""
    weight, scales = (pruned, None) if stored is None else quantize(pruned, stored)
    exact = pruned.double() if stored is None else quantized(pruned, stored)
    values, expected = pack(weight, layout), x[:CHECKED_TOKENS].double() @ exact.T

    def product(config: str) -> Run:
        layer = BlockSparseLinear(
            case.in_features, case.out_features, BLOCK, layout.n_blocks, values=values, scales=scales, layout=layout,
            bias=False, config=config,
        )  # fmt: skip
        return lambda: layer(x)

    name = f"tetris {dtype_name(weight.dtype)}"
    made = {name: ("", product(""))}
    if x.is_cuda:
        problem = LinearProblem(
            case.tokens, case.in_features, case.out_features, BLOCK, dtype_name(x.dtype), layout.n_blocks,
            "" if stored is None else dtype_name(stored),
        )  # fmt: skip
        tried = {config.to_key(): product(config.to_key()) for config in tuning_candidates(problem)}
        best = fastest(tried, "cuda", short=True)
        made[f"{name} tuned"] = best, tried[best]
    saved = values.numel() * (x.element_size() - values.element_size())
    size, lost = case.bytes(layout.kept_fraction, x.element_size()) - saved, relative_error(exact, pruned)
    for provider, (config, run) in made.items():
        error = relative_error(run()[:CHECKED_TOKENS], expected)
        yield Contender(provider, run, size, layout.kept_fraction, error, lost, config)


def tuning_candidates(problem: LinearProblem) -> list[LinearConfig]:
    """The linear bench's and, for one-byte weights, deeper steps, the split kernel, two programs a multiprocessor."""
    info = device_info("cuda")
    found = candidates(problem, info)
    if problem.tokens <= DECODE_TOKENS:
        found += [replace(split_config(problem, info), num_stages=stages) for stages in (6, 10, 14)]
        found += [replace(decode_config(problem, info), tile_out=64, tile_k=128, num_stages=8)]
    else:
        found += [replace(default_linear_config(problem, info), num_stages=5)]
    return [config for config in dict.fromkeys(found) if linear_refuses(problem, info, config) is None]
