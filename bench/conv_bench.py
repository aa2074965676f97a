"""Block-sparse convolutions against cuDNN: every case with a goal, and VGG16's convolutions as a chain.

cuDNN convolves dense random weights (on pruned ones it draws less power and runs faster), channels_last, with
``benchmark`` on. Each alternative is captured in a CUDA graph, all are interleaved. "tetris" runs the config that the
analytic model chooses, "tetris tuned" the fastest of the model's ``--candidates`` first ones, three times as many at
batches up to 8.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch

from tetris.autotune.ceilings import Ceilings, measure_ceilings
from tetris.bench.conv_cases import CASES, QUICK_CASES, vgg16_cases
from tetris.bench.conv_chain import CHAIN_BATCH, CHAIN_BLOCK, chain_name, chain_rows
from tetris.bench.conv_measure import add_compile_argument, compile_all, measure
from tetris.bench.conv_permuted import PERMUTED_NAME, permuted_configs, permuted_rows
from tetris.bench.report import table
from tetris.bench.rows import Row, replaced, write_csv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--match", default="", help="only cases whose name contains this; the CSV keeps the others")
    parser.add_argument("--candidates", type=int, default=4, help="configs tried a case")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-chain", action="store_true", help="leave out VGG16's convolutions as a chain")
    add_compile_argument(parser)


def run(args: argparse.Namespace) -> list[Row]:
    """Measure all cases (those that match); prints each as it is done."""
    if args.device != "cuda":
        row = Row("conv", "all", "tetris", status="skipped: needs a Hopper GPU")
        return [row]
    torch.backends.cudnn.benchmark = True
    cases = [case for case in (QUICK_CASES if args.quick else CASES) if args.match in case.name]
    permuted = args.match in PERMUTED_NAME and not args.quick
    chain = args.match in chain_name(CHAIN_BATCH) and not (args.quick or args.no_chain)
    if args.compile != "never":
        chained = vgg16_cases(CHAIN_BATCH, CHAIN_BLOCK) if chain else ()
        compile_all([*cases, *chained], args.candidates, permuted_configs() if permuted else ())
    if args.compile == "only":
        raise SystemExit(0)
    ceilings: dict[str, Ceilings] = {}
    rows: list[Row] = []

    def save() -> list[Row]:  # after every case: a run that is cut short keeps what it measured
        everything = replaced(args.out / "conv.csv", rows) if args.match else rows
        write_csv(args.out / "conv.csv", everything)
        return everything

    for case in cases:
        if case.dtype not in ceilings:
            ceilings[case.dtype] = conv_ceilings(case.dtype)
        rows += measure(case, ceilings[case.dtype], args.candidates, args.repeats)
        print(f"{case.name}: {rows[-1].speedup:.2f} (floor {case.floor}, target {case.target})", flush=True)
        save()
        torch.cuda.empty_cache()
    if permuted:
        rows += permuted_rows(args.repeats)
        save()
    if chain:
        rows += chain_rows(args.candidates, args.repeats, ceilings.get("float16") or conv_ceilings("float16"))
    everything = save()
    draw(everything, args.out)
    return everything


def draw(rows: list[Row], folder: Path) -> Path:
    """The tuned configs' speedups as bars with their floors and targets, ``conv.png`` in ``folder``."""
    from matplotlib.figure import Figure

    ours = [row for row in rows if row.provider == "tetris tuned"][::-1]
    places = range(len(ours))
    figure = Figure(figsize=(8.0, 0.24 * len(ours) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(places, [row.speedup for row in ours], color="#4c78a8")
    for name, mark in (("floor", "|"), ("target", "D")):
        axes.scatter(
            [float(row.extra.get(name, math.nan)) for row in ours], places, marker=mark, c="black", s=18, label=name
        )
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(places, [row.case for row in ours], fontsize="small")
    axes.set(xlabel="speedup over cuDNN on dense weights (last line: torch.compile)", ylim=(-0.6, len(ours) - 0.4))
    axes.legend(loc="center right")
    path = folder / "conv.png"
    figure.savefig(path, dpi=110)
    return path


def conv_ceilings(dtype: str) -> Ceilings:
    """The device's limits for convolutions of that dtype, float32 through tf32 as cuDNN runs it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return measure_ceilings("cuda", getattr(torch, dtype))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def show(rows: list[Row]) -> str:
    """The table of a run."""
    return table([replace(row, extra=_short(row.extra)) for row in rows], extra=("floor", "target", "ideal"))


def _short(extra: dict[str, object]) -> dict[str, object]:
    return {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in extra.items()}
