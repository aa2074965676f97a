"""Block-sparse linear layers against cuBLAS, torch's BSR (default and swept) and stanford-stk.

The cases are those that the project sets itself targets for: VGG16's classifier, a transformer's projections from one
token to 8192, several block shapes, random and reordered layouts. cuBLAS multiplies dense random weights, not pruned
ones (a product of zeros draws less power and runs faster). Short cases run from CUDA graphs with a cold L2, because
there the weights come from memory in practice.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from tetris.autotune.ceilings import Ceilings, measure_ceilings
from tetris.autotune.device import device_info, device_name, versions
from tetris.autotune.timer import time_us
from tetris.bench.linear_cases import CASES, QUICK_CASES, Case
from tetris.bench.linear_operands import Operands
from tetris.bench.linear_peers import bsr_callable, bsr_metas, stk_status
from tetris.bench.report import table
from tetris.bench.rows import Row, replaced, write_csv
from tetris.dispatch import linear_launch
from tetris.kernels.configs import DeviceInfo, LinearConfig, LinearProblem, default_linear_config
from tetris.kernels.linear_paths import (
    DECODE_TOKENS,
    NARROW,
    decode_config,
    linear_launcher,
    linear_refuses,
    linear_schedule,
    split_config,
    vector_config,
)
from tetris.tolerances import relative_error, tolerance

BASELINE = "cublas"
SHORT_TOKENS = 1024
"""Up to here a case runs from a CUDA graph with a cold L2."""

DISTURBED = 1.05
"""A median this far above the fastest tenth of the runs says that something else held the GPU or the host up. Torch's
BSR waits for the host most of all: its launch takes longer than the timer queues ahead."""

Run = Callable[[], torch.Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="instead of the cases' own")
    parser.add_argument("--match", default="", help="only cases whose name contains this; the CSV keeps the others")
    parser.add_argument("--sweep", type=int, default=8, help="torch BSR configurations tried")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--compile", choices=("first", "only", "never"), default="first",
        help="compile all kernels in parallel before measuring, or do nothing else, or trust the compiler's cache",
    )  # fmt: skip


def case_problem(case: Case, operands: Operands) -> LinearProblem:
    """The case as the kernels' configs know it."""
    layer = case.layer
    return LinearProblem(
        layer.tokens, layer.in_features, layer.out_features, case.block, case.dtype, operands.layout.n_blocks
    )


def tetris_callable(case: Case, operands: Operands, config: LinearConfig) -> Run:
    """Our layer with that config, its schedule made beforehand."""
    layout, x = operands.layout, operands.x
    sm_count = device_info(x.device).sm_count
    schedule = linear_schedule(case_problem(case, operands), config, layout.indptr, layout.indices, sm_count)
    extra = {} if schedule is None else {"schedule": schedule.tensors}
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
    """Few configs that a tuner would try: two tiles of each kernel that takes the problem."""
    if problem.tokens <= DECODE_TOKENS:
        base = decode_config(problem, info) if problem.tokens > 1 else vector_config(problem, info)
        shapes = [(16, 256, 4, 1), (64, 128, 4, 5), (64, 256, 4, 3)]
        found = [
            replace(base, tile_out=out, tile_k=k, num_warps=warps, num_stages=stages)
            for out, k, warps, stages in shapes
            if k >= base.tile_k // 2
        ] + [split_config(problem, info)]
        return [config for config in found if linear_refuses(problem, info, config) is None]
    found = [LinearConfig(kernel="hopper", tile_tokens=tile) for tile in (256, 128)]
    if problem.tokens > SHORT_TOKENS:
        found += NARROW
    if problem.tokens <= SHORT_TOKENS:
        found += [replace(split_config(problem, info), tile_tokens=tile) for tile in (128, 64)]
    portable = default_linear_config(problem, info)
    sizes = (256, 128) if problem.tokens >= 4096 else (128, 64)
    tiles = [tile for tile in sizes if tile <= max(64, problem.tokens) and tile * portable.tile_out <= 16384]
    found += [replace(portable, tile_tokens=tile, num_stages=10 if tile == 64 else 7) for tile in tiles]
    return [config for config in found if linear_refuses(problem, info, config) is None]


def tetris_cpu_callable(operands: Operands) -> Run:
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


def fastest(runs: dict[str, Run], device: str, short: bool) -> str:
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


@dataclass
class Contest:
    """Who takes part in a case.

    Attributes:
        runs: provider -> its product.
        tried: provider -> config -> product, for those of which the fastest config takes part.
        notes: provider -> its config.
        missing: provider -> why it does not take part.
    """

    runs: dict[str, Run]
    tried: dict[str, dict[str, Run]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def choose(self, device: str, short: bool) -> None:
        """The fastest config of every provider in ``tried`` takes part."""
        for name, runs in self.tried.items():
            best = fastest(runs, device, short)
            self.runs[name], self.notes[name] = runs[best], best


def contest(case: Case, operands: Operands, device: str, sweep: int) -> Contest:
    """cuBLAS, our layer as layers run it and with the best of some configs, torch's BSR by default and swept."""
    made = Contest({BASELINE: lambda: F.linear(operands.x, operands.dense)})
    if device == "cpu":
        made.runs["tetris"] = tetris_cpu_callable(operands)
        return made
    info, problem = device_info(device), case_problem(case, operands)
    chosen = LinearConfig.from_key(linear_launch(problem, operands.layout.indptr, operands.layout.indices).config)
    made.runs["tetris"], made.notes["tetris"] = tetris_callable(case, operands, chosen), chosen.to_key()
    configs = dict.fromkeys([chosen, *candidates(problem, info)])
    made.tried["tetris tuned"] = {config.to_key(): tetris_callable(case, operands, config) for config in configs}
    made.missing["stanford-stk"] = stk_status(case)
    if case.layer.tokens < 16:
        made.missing["torch BSR"] = "skipped: it takes 16 tokens and more"
        return made
    try:  # a peer that cannot run a case gets a row that says why
        plain = bsr_callable(operands, None)
        short = case.layer.tokens <= SHORT_TOKENS
        time_us({"torch BSR": plain}, device=device, warmup=1, repeats=1, cuda_graph=short)
        made.runs["torch BSR"] = plain
        metas = bsr_metas(case.layer.tokens, sweep)
        if metas:
            made.tried["torch BSR swept"] = {str(meta): bsr_callable(operands, meta) for meta in metas}
    except Exception as error:
        made.missing["torch BSR"] = f"failed: {type(error).__name__}: {str(error)[:80]}"
    return made


def compile_one(job: tuple[Case, int]) -> None:
    """Run everything of a case once, in a process of its own: leaves the kernels in the compiler's cache on disk."""
    case, sweep = job
    torch.set_num_threads(1)
    try:
        contest(case, Operands.of(case, "cuda"), "cuda", sweep).choose("cuda", short=False)
    except Exception as error:  # the measurement will meet it again and write it down
        print(f"{case.name}: not compiled ahead: {type(error).__name__}: {error}"[:200], flush=True)


def compile_jobs(cases: Sequence[Case], sweep: int) -> list[tuple[Case, int]]:
    """What to compile: every case, torch's BSR with all launch parameters once for each of its kernels."""
    jobs, seen = [], set()
    for case in cases:
        kernel = (case.block, case.dtype, case.layer.tokens, case.layer.in_features)
        jobs.append((case, 0 if kernel in seen else sweep))
        seen.add(kernel)
    return jobs


def compile_all(cases: Sequence[Case], sweep: int) -> None:
    """Compile what the cases run, in parallel."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(15, max(1, (os.cpu_count() or 2) - 1)), mp_context=context) as pool:
        list(pool.map(compile_one, compile_jobs(cases, sweep)))


def measure(case: Case, args: argparse.Namespace, ceilings: Ceilings | None) -> list[Row]:
    """The rows of one case."""
    operands = Operands.of(case, args.device)
    on_gpu = args.device == "cuda"
    short = on_gpu and case.layer.tokens <= SHORT_TOKENS
    made = contest(case, operands, args.device, args.sweep)
    made.choose(args.device, short)
    allowed = tolerance(operands.x.dtype, torch.backends.cuda.matmul.allow_tf32)
    errors: dict[str, float] = {}
    for name, run in made.runs.items():
        reference = operands.dense_reference() if name == BASELINE else operands.reference
        errors[name] = relative_error(run()[operands.rows], reference)
    right = {name: run for name, run in made.runs.items() if errors[name] <= allowed}
    times = time_us(right, device=args.device, repeats=args.repeats, cuda_graph=short, cold_l2=short)
    kept = operands.layout.kept_fraction
    flop, size = case.layer.flop(kept), case.layer.bytes(kept, operands.x.element_size())
    base = Row(
        "linear", case.name, BASELINE, flop=flop, bytes=size, device=device_name(args.device), versions=versions(),
        extra={"tokens": case.layer.tokens, "block": f"{case.block[0]}x{case.block[1]}", "kept": kept,
               "layout": case.layout, "floor": case.floor, "target": case.target, "dtype": case.dtype},
    )  # fmt: skip
    rows = [replace(base, provider=name, status=why) for name, why in made.missing.items()]
    for name, error in errors.items():
        extra = base.extra | {"note": made.notes.get(name, "")}
        row = replace(base, provider=name, error=error, status="ok" if name in right else "wrong", extra=extra)
        if name in times:
            t = times[name]
            least = ceilings.least_us(flop, size) if ceilings else math.nan
            row = replace(
                row, median_us=t.median_us, p10_us=t.p10_us, p90_us=t.p90_us, roofline_fraction=least / t.median_us,
                status="disturbed" if on_gpu and t.median_us > DISTURBED * t.p10_us else "ok",
                speedup=times[BASELINE].median_us / t.median_us if BASELINE in times else math.nan,
            )  # fmt: skip
        rows.append(row)
    return sorted(rows, key=lambda row: row.provider != BASELINE)


def run(args: argparse.Namespace) -> list[Row]:
    """Measure all cases (those that match), print each as it is done."""
    cases = [case for case in (QUICK_CASES if args.quick or args.device == "cpu" else CASES) if args.match in case.name]
    if args.dtype:
        cases = [replace(case, dtype=args.dtype) for case in cases]
    if args.device == "cuda" and args.compile != "never":
        compile_all(cases, args.sweep)
        if args.compile == "only":
            raise SystemExit(0)
    ceilings: dict[str, Ceilings] = {}
    rows: list[Row] = []
    everything: list[Row] = []
    for case in cases:
        if args.device == "cuda" and case.dtype not in ceilings:
            ceilings[case.dtype] = measure_ceilings(args.device, getattr(torch, case.dtype))
        try:
            rows += measure(case, args, ceilings.get(case.dtype))
        except Exception as error:  # the other cases are worth having; this one is shown as failed
            rows.append(Row("linear", case.name, "tetris", status=f"failed: {type(error).__name__}: {error}"[:200]))
        found = {row.provider: row for row in rows if row.case == case.name}
        print(case.name, *(f"{name} {row.speedup:.2f}x" for name, row in found.items()), sep="  ", flush=True)
        everything = replaced(args.out / "linear.csv", rows) if args.match else rows
        write_csv(args.out / "linear.csv", everything)  # after every case: a run that is cut short keeps its rows
    return everything


def show(rows: list[Row]) -> str:
    """The table of a run."""
    return table(rows, extra=("floor", "target"))
