"""Block-sparse linear layers against cuBLAS, torch's BSR (default and swept) and stanford-stk.

The cases are those that the project sets itself targets for: VGG16's classifier, a transformer's projections from one
token to 8192, several block shapes, random and reordered layouts. cuBLAS multiplies dense random weights, not pruned
ones (a product of zeros draws less power and runs faster). Short cases run from CUDA graphs with a cold L2, because
there the weights come from memory in practice.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from tetris.autotune.ceilings import Ceilings, measure_ceilings
from tetris.autotune.device import device_info, device_name, versions
from tetris.autotune.timer import time_us
from tetris.bench.cases import LAYOUTS, LinearCase
from tetris.bench.report import table
from tetris.bench.rows import Row, write_csv
from tetris.dispatch import linear_launch
from tetris.kernels.configs import DeviceInfo, LinearConfig, LinearProblem, default_linear_config
from tetris.kernels.hopper.linear import supports as hopper_supports
from tetris.kernels.linear_paths import DECODE_TOKENS, decode_config, linear_launcher
from tetris.layout import BlockLayout
from tetris.packing import pack
from tetris.tolerances import relative_error, tolerance

BASELINE = "cublas"
CHECKED_TOKENS = 512
"""Rows of the result that are compared with float64; the first and the last ones, where tiles are incomplete."""

SHORT_TOKENS = 1024
"""Up to here a case runs from a CUDA graph with a cold L2."""


@dataclass(frozen=True)
class Case:
    """A layer, its block and its layout. ``floor`` and ``target``: the speedups over cuBLAS that were set as goals."""

    layer: LinearCase
    block: tuple[int, int]
    layout: str = "random"
    floor: float = math.nan
    target: float = math.nan

    @property
    def name(self) -> str:
        layer = self.layer
        block = f"{self.block[0]}x{self.block[1]}"
        return f"{layer.tokens} x {layer.name} b{block} {layer.kept:.0%} {self.layout}"


def _square(tokens: int, kept: float = 0.27) -> LinearCase:
    return LinearCase("4096-4096", 4096, 4096, tokens, kept)


FC6 = LinearCase("25088-4096", 25088, 4096, 4096, 0.04)
UP = LinearCase("4096-14336", 4096, 14336, 1, 0.27)

CASES: tuple[Case, ...] = (
    Case(_square(8192), (64, 64), "random", 2.4, 3.2),
    Case(_square(8192), (64, 64), "reordered", 2.4, 3.2),
    Case(_square(8192), (32, 32), "random", 1.7, 2.6),
    Case(_square(8192), (32, 32), "reordered", 1.7, 2.6),
    Case(_square(8192), (128, 128), "random", 2.9, 3.4),
    Case(_square(8192), (128, 128), "reordered", 2.9, 3.4),
    Case(_square(8192), (128, 32), "random", 2.5, 3.3),
    Case(_square(8192), (128, 32), "reordered", 2.5, 3.3),
    Case(_square(8192), (128, 16), "random", 2.5, 3.3),
    Case(_square(8192), (128, 16), "reordered", 2.5, 3.3),
    Case(LinearCase("14336-4096", 14336, 4096, 8192, 0.10), (64, 64), "random", 6, 8),
    Case(FC6, (64, 64), "random", 10, 18),
    Case(FC6.at(128), (64, 64), "random", 5, 12),
    Case(UP, (64, 64), "random", 2.2, 3.3),
    Case(UP.at(16), (64, 64), "random", 2.2, 3.3),
    Case(_square(128), (64, 64), "random", 1.6, 2.8),
    Case(_square(128), (64, 64), "reordered", 1.6, 2.8),
    Case(_square(512), (64, 64), "reordered"),
    Case(_square(1024), (64, 64), "reordered"),
    Case(_square(8192, 0.60), (64, 64), "random", 1.0),
    Case(_square(8192, 0.75), (64, 64), "random"),
    Case(_square(8192, 0.90), (64, 64), "random", math.nan, 1.0),
    Case(LinearCase("14336-4096", 14336, 4096, 8192, 0.10), (64, 64), "reordered", 6, 8),
    Case(FC6, (64, 64), "reordered", 10, 18),
)

QUICK_CASES: tuple[Case, ...] = (
    Case(LinearCase("256-256", 256, 256, 128, 0.27), (64, 64)),
    Case(LinearCase("256-256", 256, 256, 8, 0.27), (32, 32), "reordered"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--sweep", type=int, default=8, help="torch BSR configurations tried per square block")
    parser.add_argument("--repeats", type=int, default=15)


@dataclass(frozen=True)
class Operands:
    """One case's tensors: x [tokens, in], the pruned weight, the packed blocks, and the float64 result of some rows."""

    layout: BlockLayout
    x: torch.Tensor
    dense: torch.Tensor
    pruned: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    reference: torch.Tensor

    @staticmethod
    def of(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Operands:
        """Random operands; the layout of the case's kind."""
        layer = case.layer
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        shape = (layer.out_features, layer.in_features)
        layout = LAYOUTS[case.layout](shape, case.block, layer.kept, seed=seed).without_empty_rows()
        layout = BlockLayout(layout.shape, layout.block, layout.indptr.to(device), layout.indices.to(device))
        mask = layout.to_mask().repeat_interleave(case.block[0], 0).repeat_interleave(case.block[1], 1)
        dense = (normal(*shape) / layer.in_features**0.5).to(dtype)
        pruned = dense * mask[: shape[0], : shape[1]]
        x = normal(layer.tokens, layer.in_features).to(dtype)
        half = CHECKED_TOKENS // 2
        every = torch.arange(layer.tokens, device=device)
        rows = every if layer.tokens <= CHECKED_TOKENS else torch.cat([every[:half], every[-half:]])
        reference = x[rows].double() @ pruned.double().T
        return Operands(layout, x, dense, pruned, pack(pruned, layout), rows, reference)


def tetris_callable(operands: Operands, config: LinearConfig) -> Callable[[], torch.Tensor]:
    """Our layer with that config, its schedule made beforehand."""
    layout, x = operands.layout, operands.x
    extra = {}
    if config.kernel == "hopper":
        from tetris.kernels.hopper.linear_schedule import make_linear_schedule

        extra["schedule"] = make_linear_schedule(
            layout.indptr,
            layout.indices,
            block=layout.block,
            tokens=x.shape[0],
            tile_tokens=config.tile_tokens,
            n_programs=device_info(x.device).sm_count,
        ).tensors
    launch = linear_launcher(config.kernel)
    return lambda: launch(
        x,
        operands.values,
        layout.indptr,
        layout.indices,
        out_features=layout.shape[0],
        allow_tf32=torch.backends.cuda.matmul.allow_tf32,
        config=config,
        **extra,
    )


def candidates(problem: LinearProblem, info: DeviceInfo) -> list[LinearConfig]:
    """Few configs that a tuner would try: both tiles of the Hopper kernel, the portable one's, decode programs."""
    if problem.tokens <= DECODE_TOKENS:
        base = decode_config(problem, info)
        shapes = [(16, 256, 4, 1), (64, 128, 4, 5), (64, 256, 4, 3)]
        return [
            replace(base, tile_out=out, tile_k=k, num_warps=warps, num_stages=stages)
            for out, k, warps, stages in shapes
            if k >= base.tile_k // 2
        ]
    hopper = [LinearConfig(kernel="hopper", tile_tokens=tile) for tile in (256, 128)]
    portable = default_linear_config(problem, info)
    sizes = (256, 128) if problem.tokens >= 4096 else (128, 64)
    tiles = [tile for tile in sizes if tile <= max(64, problem.tokens) and tile * portable.tile_out <= 16384]
    return [config for config in hopper if hopper_supports(problem, info, config) is None] + [
        replace(portable, tile_tokens=tile, num_stages=10 if tile == 64 else 7) for tile in tiles
    ]


def tetris_cpu_callable(operands: Operands) -> Callable[[], torch.Tensor]:
    """Our layer on a CPU."""
    from tetris.kernels.cpu.linear import prepare, run

    layout = operands.layout
    prepared = prepare(
        operands.values,
        layout.indptr,
        layout.indices,
        in_features=layout.shape[1],
        out_features=layout.shape[0],
        tokens=operands.x.numel() // layout.shape[1],
    )
    return lambda: run(prepared, operands.x)


def bsr_tensor(operands: Operands) -> torch.Tensor:
    """The pruned weight as torch's BSR tensor."""
    layout = operands.layout
    if any(size % block for size, block in zip(layout.shape, layout.block)):
        raise ValueError(f"BSR wants whole blocks; {layout.shape} is no multiple of {layout.block}")
    return torch.sparse_bsr_tensor(layout.indptr, layout.indices, operands.values, size=layout.shape)


def bsr_metas(tokens: int, budget: int) -> list[dict[str, int]]:
    """Launch parameters of torch's BSR kernel, the likeliest first, at most ``budget`` of them."""
    tiles = [tile for tile in (128, 64) if tokens % tile == 0] or [tokens]
    metas = [
        {"SPLIT_N": tokens // tile, "GROUP_SIZE_ROW": group, "num_stages": stages, "num_warps": warps}
        for group in (4, 1, 8)
        for stages in (3, 4, 2, 5)
        for tile in tiles
        for warps in (4, 8)
    ]
    return metas[:budget]


def bsr_callable(operands: Operands, meta: dict[str, int] | None) -> Callable[[], torch.Tensor]:
    """torch's own block-sparse product; ``meta`` None takes its default parameters."""
    from torch.sparse._triton_ops import bsr_dense_addmm

    weight, x = bsr_tensor(operands), operands.x
    columns = x.T
    zero = torch.zeros((), dtype=x.dtype, device=x.device).expand(weight.shape[0], x.shape[0])
    return lambda: bsr_dense_addmm(zero, weight, columns, beta=0, meta=meta).T


def fastest(runs: dict[str, Callable[[], torch.Tensor]], device: str, short: bool) -> str:
    """The name of the fastest; those that do not fit the GPU are passed over."""
    from triton.runtime.errors import OutOfResources

    fitting = {}
    for name, run in runs.items():
        try:
            run()
        except OutOfResources:
            continue
        fitting[name] = run
    times = time_us(fitting, device=device, warmup=1, repeats=4, cuda_graph=short, cold_l2=short)
    return min(times, key=lambda name: times[name].median_us)


def providers(
    case: Case, operands: Operands, dtype: str, device: str, sweep: int
) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, str], dict[str, str]]:
    """(callables, notes on them, why others are missing) by provider."""
    runs: dict[str, Callable[[], torch.Tensor]] = {BASELINE: lambda: F.linear(operands.x, operands.dense)}
    notes: dict[str, str] = {}
    missing: dict[str, str] = {}
    if device == "cpu":
        runs["tetris"] = tetris_cpu_callable(operands)
        return runs, notes, missing
    layer, info, short = case.layer, device_info(device), case.layer.tokens <= SHORT_TOKENS
    problem = LinearProblem(
        layer.tokens, layer.in_features, layer.out_features, case.block, dtype, operands.layout.n_blocks
    )
    chosen = linear_launch(problem, operands.layout.indptr, operands.layout.indices)
    config = LinearConfig.from_key(chosen.config)
    runs["tetris"], notes["tetris"] = tetris_callable(operands, config), config.to_key()
    tried = {config.to_key(): tetris_callable(operands, config) for config in candidates(problem, info)}
    best = fastest(tried, device, short)
    runs["tetris tuned"], notes["tetris tuned"] = tried[best], best
    if layer.tokens >= 16:
        try:  # a peer that cannot run a case gets a row that says why
            plain = bsr_callable(operands, None)
            time_us({"torch BSR": plain}, device=device, warmup=1, repeats=1, cuda_graph=short)
            runs["torch BSR"] = plain
            metas = bsr_metas(layer.tokens, sweep if case.block[0] == case.block[1] else 0)
            swept = {str(meta): bsr_callable(operands, meta) for meta in metas}
            if swept:
                best = fastest(swept, device, short)
                runs["torch BSR swept"], notes["torch BSR swept"] = swept[best], best
        except Exception as error:
            missing["torch BSR"] = f"failed: {type(error).__name__}: {str(error)[:80]}"
    else:
        missing["torch BSR"] = "skipped: it takes 16 tokens and more"
    missing["stanford-stk"] = _stk_status(case)
    return runs, notes, missing


def _stk_status(case: Case) -> str:
    if importlib.util.find_spec("stk") is None:
        return "skipped: not installed"
    return "skipped: blocks of 128 x 128 only" if case.block != (128, 128) else "skipped: no adapter"


def measure(case: Case, args: argparse.Namespace, ceilings: Ceilings | None) -> list[Row]:
    """The rows of one case."""
    dtype = getattr(torch, args.dtype)
    operands = Operands.of(case, dtype, args.device)
    runs, notes, missing = providers(case, operands, args.dtype, args.device, args.sweep)
    allowed = tolerance(dtype, torch.backends.cuda.matmul.allow_tf32)
    errors: dict[str, float] = {}
    status: dict[str, str] = {}
    for name, run in list(runs.items()):
        reference = operands.x[operands.rows].double() @ operands.dense.double().T if name == BASELINE else None
        errors[name] = relative_error(run()[operands.rows], operands.reference if reference is None else reference)
        status[name] = "ok" if errors[name] <= allowed else "wrong"
        if status[name] != "ok":
            del runs[name]
    short = case.layer.tokens <= SHORT_TOKENS and args.device == "cuda"
    times = time_us(runs, device=args.device, repeats=args.repeats, cuda_graph=short, cold_l2=short)
    kept = operands.layout.kept_fraction
    flop, size = case.layer.flop(kept), case.layer.bytes(kept, dtype.itemsize)
    base = Row(
        "linear", case.name, BASELINE, flop=flop, bytes=size, device=device_name(args.device), versions=versions(),
        extra={"tokens": case.layer.tokens, "block": f"{case.block[0]}x{case.block[1]}", "kept": kept,
               "layout": case.layout, "floor": case.floor, "target": case.target, "dtype": args.dtype},
    )  # fmt: skip
    rows = [replace(base, provider=name, status=why) for name, why in missing.items()]
    for name in errors:
        extra = base.extra | {"note": notes.get(name, "")}
        row = replace(base, provider=name, error=errors[name], status=status[name], extra=extra)
        if name in times:
            t = times[name]
            least = ceilings.least_us(flop, size) if ceilings else math.nan
            row = replace(
                row, median_us=t.median_us, p10_us=t.p10_us, p90_us=t.p90_us, roofline_fraction=least / t.median_us,
                speedup=times[BASELINE].median_us / t.median_us if BASELINE in times else math.nan,
            )  # fmt: skip
        rows.append(row)
    return sorted(rows, key=lambda row: row.provider != BASELINE)


def run(args: argparse.Namespace) -> list[Row]:
    """Measure all cases (those that match), print each as it is done."""
    cases = QUICK_CASES if args.quick or args.device == "cpu" else CASES
    ceilings = measure_ceilings(args.device, getattr(torch, args.dtype)) if args.device == "cuda" else None
    rows: list[Row] = []
    for case in cases:
        if args.match in case.name:
            try:
                rows += measure(case, args, ceilings)
            except Exception as error:  # the other cases are worth having; this one is shown as failed
                rows.append(Row("linear", case.name, "tetris", status=f"failed: {type(error).__name__}: {error}"[:200]))
            found = {row.provider: row for row in rows if row.case == case.name}
            print(case.name, *(f"{name} {row.speedup:.2f}x" for name, row in found.items()), sep="  ", flush=True)
            write_csv(args.out / "linear.csv", rows)  # after every case: a run that is cut short keeps its rows
    return rows


def show(rows: list[Row]) -> str:
    """The table of a run."""
    return table(rows, extra=("floor", "target"))
