"""The paper's figures 1a and 7 on one GPU: speedup against sparsity and block, and layer by layer of VGG16.

Figure 1a: the flagship layer (512 -> 512 channels at 28 x 28, batch 128) at sparsities 0 to 95 % for every block shape.
Figure 7: VGG16's convolutions at the paper's pruning rates for every block shape. Both over cuDNN on dense weights, on
layouts that reordering gives.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from tetris.bench.cases import VGG16_CONVS
from tetris.bench.conv_bench import conv_ceilings
from tetris.bench.conv_cases import FLAGSHIP, Case
from tetris.bench.conv_measure import add_compile_argument, compile_all, measure
from tetris.bench.report import table
from tetris.bench.rows import Row, write_csv

BLOCKS = ((32, 32), (64, 16), (64, 32), (64, 64), (128, 64), (128, 128))
SPARSITIES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TITLES = {
    "figure 1a": "512 -> 512 channels at 28 x 28, 128 images, float16",
    "figure 7": "VGG16 at the paper's pruning rates, 128 images, float16",
}
TICKS = (1, 2, 4, 8, 16)
"""Speedups."""


def figure_1a() -> list[Case]:
    """The flagship layer at every sparsity and block."""
    return [
        Case(replace(FLAGSHIP, kept=1 - sparsity), block, "reordered" if sparsity else "random")
        for block in BLOCKS
        for sparsity in SPARSITIES
    ]


def figure_7(batch: int = 128) -> list[Case]:
    """VGG16's convolutions but the first, at the paper's rates, for every block that divides their channels."""
    return [
        Case(layer.at(batch), block, "reordered")
        for layer in VGG16_CONVS
        for block in BLOCKS
        if layer.c_in >= block[1] and layer.c_in > 3 and layer.c_out >= block[0]
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--candidates", type=int, default=1, help="configs tried a case")
    parser.add_argument("--repeats", type=int, default=5)
    add_compile_argument(parser)


def run(args: argparse.Namespace) -> list[Row]:
    """Measure both figures' cases and draw them beside the CSV."""
    if args.device != "cuda":
        return [Row("conv_figures", "all", "tetris", status="skipped: needs a Hopper GPU")]
    torch.backends.cudnn.benchmark = True
    figures = {"figure 1a": figure_1a(), "figure 7": figure_7()}
    if args.quick:
        figures = {name: cases[:2] for name, cases in figures.items()}
    if args.compile != "never":
        compile_all([case for cases in figures.values() for case in cases], args.candidates)
    if args.compile == "only":
        raise SystemExit(0)
    ceilings = conv_ceilings("float16")
    rows: list[Row] = []
    for name, cases in figures.items():
        for case in cases:
            extra = {"figure": name, "layer": case.layer.name}
            measured = measure(case, ceilings, args.candidates, args.repeats)
            rows += [replace(row, bench="conv_figures", extra=row.extra | extra) for row in measured]
            write_csv(Path(args.out) / "conv_figures.csv", rows)  # a run that is cut short keeps what it measured
        torch.cuda.empty_cache()
    draw(rows, Path(args.out))
    return rows


def draw(rows: list[Row], folder: Path) -> None:
    """Both figures as PNG files in ``folder``."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    ours = [row for row in rows if row.provider == "tetris tuned" and row.status == "ok"]
    for name, x_of, label in (
        ("figure 1a", lambda row: 100 * (1 - row.extra["kept"]), "sparsity, %"),
        ("figure 7", lambda row: row.extra["layer"], "layer"),
    ):
        figure = Figure(figsize=(8.0, 4.5), layout="constrained")
        axes = figure.subplots()
        for block in BLOCKS:
            found = [
                row for row in ours if row.extra["figure"] == name and row.extra["block"] == f"{block[0]}x{block[1]}"
            ]
            axes.plot(
                [x_of(row) for row in found], [row.speedup for row in found], "o-", label=f"{block[0]}x{block[1]}"
            )
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xlabel=label, ylabel="speedup over cuDNN, dense", title=f"{TITLES[name]}, {rows[0].device}")
        if name == "figure 1a":
            percents = range(0, 96)
            axes.plot(percents, [100 / (100 - p) for p in percents], "k--", linewidth=0.8, label="1 / kept")
            axes.set_yscale("log", base=2)
            axes.set_yticks(TICKS, [str(tick) for tick in TICKS])
        else:
            axes.tick_params("x", rotation=45)
        axes.legend(title="block (out x in)")
        figure.savefig(folder / f"conv_{name.replace(' ', '_')}.png", dpi=120)


def show(rows: list[Row]) -> str:
    """The table of a run, without the baseline's lines."""
    return table([row for row in rows if row.provider != "cudnn"])
