"""Searches for permutations: what they retain and how long they take.

How long is in :mod:`tetris.bench.reorder_times`.

Share of the gap = (retained - retained without reordering) / (element-wise top-k - retained without reordering), at the
same kept fraction; gain = that share / the paper's method's. Times are wall-clock times of the search on a weight that
is already on the device, after a first run that compiles.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from tetris.autotune.device import device_name, versions
from tetris.bench.reorder_cases import ReorderCase, quality_cases, vgg16_layers
from tetris.bench.reorder_compile import compile_ahead, problems_of
from tetris.bench.reorder_times import METHODS, measure_vgg16
from tetris.bench.report import geometric_mean
from tetris.bench.rows import Row, replaced, write_csv
from tetris.bench.trained import TRAINED
from tetris.importance import channel_importance
from tetris.pruning import keep_largest
from tetris.reordering import Reordering, reorder

SECONDS_BETWEEN_FILES = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--seeds", type=int, default=3, help="random matrices of every kind")
    parser.add_argument("--part", choices=("all", "quality", "vgg16", "compile"), default="all", help="what to measure")
    parser.add_argument("--matrices", nargs="+", help="only these kinds of matrix, such as gaussian or planted")
    parser.add_argument("--blocks", nargs="+", help="only these blocks, such as 32x32")
    parser.add_argument("--sigmas", nargs="+", type=float, default=[0.0, 0.6], help="spread of VGG16's channels")
    parser.add_argument("--trained", type=Path, help="file of the trained weights: read, or written if it is not there")


def run(args: argparse.Namespace) -> list[Row]:
    """Speed over VGG16, then quality over the suite. The CSV grows as rows come, so that a run cut short leaves one.

    ``--part compile`` measures nothing: it trains the networks and compiles what the other parts launch on a GPU.
    """
    rows: list[Row] = []
    alone = args.part == "vgg16"  # the file keeps what it says of the quality
    if args.part == "compile":
        cases = quality_cases(args.device, 1, args.quick, args.matrices, args.blocks, args.trained)
        if args.device != "cpu":
            compile_ahead(problems_of(cases, [] if args.quick else vgg16_layers()))
    if args.part in ("all", "vgg16") and not args.quick:
        for sigma in args.sigmas:
            for found in measure_vgg16(sigma, args.device):
                rows += found
                write_csv(args.out / "reorder.csv", replaced(args.out / "reorder.csv", rows) if alone else rows)
    if args.part in ("all", "quality"):
        cases = quality_cases(args.device, args.seeds, args.quick, args.matrices, args.blocks, args.trained)
        compiled: set[tuple] = set()
        written = time.perf_counter()
        for case in cases:
            kernels = (tuple(case.weight.shape), case.block)
            if args.device != "cpu" and kernels not in compiled:
                compile_searches(case, args.device)
                compiled.add(kernels)
            rows += measure_quality(case, args.device, args.quick)
            if case is cases[-1] or time.perf_counter() - written > SECONDS_BETWEEN_FILES:
                write_csv(args.out / "reorder.csv", rows + summaries(rows))
                written = time.perf_counter()
        rows += summaries(rows)
    return replaced(args.out / "reorder.csv", rows) if alone else rows


def retained_by_elements(case: ReorderCase, kept_fraction: float) -> float:
    """The most that any mask with this kept fraction retains: the largest (out, in) pairs, taps together."""
    matrix = channel_importance(case.weight.abs().float())
    mask = keep_largest(matrix, round(kept_fraction * matrix.numel()))
    return float(matrix[mask].sum(dtype=torch.float64) / matrix.sum(dtype=torch.float64))


def compile_searches(case: ReorderCase, device: str) -> None:
    """Run every search once, briefly, so that no row's time holds a compiler's."""
    for method in dict.fromkeys(method for _, method, _ in METHODS):
        reorder(case.weight.to(device), case.block, case.sparsity, method, steps=2)


def measure_quality(case: ReorderCase, device: str, quick: bool) -> list[Row]:
    """One row a method."""
    weight = case.weight.to(device)
    found: dict[str, Reordering] = {}
    for provider, method, steps in METHODS:
        found[provider] = reorder(
            weight, case.block, case.sparsity, method, seed=case.seed, steps=min(steps, 10) if quick else steps
        )
    base, paper = found["none"].retained, found["paper"].retained
    ceiling = retained_by_elements(case, found["none"].kept_fraction)
    return [
        Row(
            bench="reorder",
            case=case.name,
            provider=provider,
            median_us=r.seconds * 1e6,
            speedup=found["paper"].seconds / r.seconds,
            device=device_name(device),
            versions=versions(),
            extra={
                "matrix": case.matrix,
                "shape": "x".join(map(str, case.weight.shape)),
                "block_out": case.block[0],
                "block_in": case.block[1],
                "sparsity": case.sparsity,
                "seed": case.seed,
                "kept_fraction": r.kept_fraction,
                "retained": r.retained,
                "elementwise": ceiling,
                "share_of_gap": (r.retained - base) / (ceiling - base) if ceiling > base else math.nan,
                "gain": (r.retained - base) / (paper - base) if paper > base else math.nan,
                "planted": "" if case.ceiling is None else int(r.retained >= case.ceiling - 1e-6),
                "swaps": r.n_swaps,
            },
        )
        for provider, r in found.items()
    ]


def doubled_edge(rows: list[Row], provider: str, equally_many: bool = False) -> list[float]:
    """What ``provider`` retains in blocks of twice the edge / what the paper's method retains, square blocks.

    ``equally_many``: only where both keep as many elements; of a few large blocks, rounding drops up to a tenth.
    """
    squares = [row for row in rows if "gain" in row.extra and row.extra["block_out"] == row.extra["block_in"]]

    def place(row: Row, factor: int) -> tuple:
        extra = row.extra
        return extra["matrix"], extra["sparsity"], extra["seed"], factor * extra["block_out"]

    paper = {place(row, 2): row.extra for row in squares if row.provider == "paper"}
    found = []
    for row in squares:
        key = place(row, 1)
        if row.provider != provider or key not in paper or row.extra["matrix"] == "planted":
            continue
        if not equally_many or math.isclose(row.extra["kept_fraction"], paper[key]["kept_fraction"], rel_tol=0.005):
            found.append(row.extra["retained"] / paper[key]["retained"])
    return found


def summaries(rows: list[Row]) -> list[Row]:
    """A row a method and group of matrices: geometric mean of the gain, the worst gain, mean share of the gap."""
    measured = [row for row in rows if "gain" in row.extra and row.extra["matrix"] != "planted"]
    groups = {"all but planted": measured, "trained": [r for r in measured if r.extra["matrix"] in TRAINED]}
    for kind in dict.fromkeys(row.extra["matrix"] for row in measured):
        groups.setdefault(kind, [row for row in measured if row.extra["matrix"] == kind])
    found = []
    for group, members in groups.items():
        for provider, _, _ in METHODS:
            mine = [row for row in members if row.provider == provider]
            gains = [row.extra["gain"] for row in mine if not math.isnan(row.extra["gain"])]
            if not gains:
                continue
            extra = {
                "matrices": group,
                "cases": len(mine),
                "mean_gain": geometric_mean(gains),
                "worst_gain": min(gains),
                "mean_share": sum(row.extra["share_of_gap"] for row in mine) / len(mine),
                "twice_the_edge": geometric_mean(doubled_edge(mine + _paper_of(members), provider)),
                "twice_the_edge_equally_many": geometric_mean(doubled_edge(mine + _paper_of(members), provider, True)),
            }
            microseconds = geometric_mean([row.median_us for row in mine])
            first = mine[0]
            case = f"suite: {group}"
            found.append(
                Row("reorder", case, provider, microseconds, device=first.device, versions=first.versions, extra=extra)
            )
    return found


def _paper_of(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.provider == "paper"]


def show(rows: list[Row]) -> str:
    """Geometric means of the gain by kind of matrix, planted recoveries, and VGG16's times."""
    from tabulate import tabulate

    kinds = list(dict.fromkeys(row.extra["matrix"] for row in rows if "gain" in row.extra))
    groups = {kind: [kind] for kind in kinds if kind != "planted"}
    groups["trained"] = [kind for kind in kinds if kind.startswith(("lenet", "vgg"))]
    groups["all"] = kinds
    lines = []
    for provider, _, _ in METHODS:
        mine = [row for row in rows if row.provider == provider and "gain" in row.extra]
        if not mine:
            continue
        gains = {g: [row.extra["gain"] for row in mine if row.extra["matrix"] in kinds] for g, kinds in groups.items()}
        planted = [int(row.extra["planted"]) for row in mine if row.extra["planted"] != ""]
        worst = min((g for g in gains["all"] if not math.isnan(g)), default=math.nan)
        share = [row.extra["share_of_gap"] for row in mine if not math.isnan(row.extra["share_of_gap"])]
        milliseconds = geometric_mean([row.median_us / 1e3 for row in mine])
        line = [provider, f"{sum(share) / len(share):.3f}", *(f"{geometric_mean(g):.3f}" for g in gains.values())]
        twice = doubled_edge(rows, provider)
        lines.append([*line, f"{worst:.3f}", f"{geometric_mean(twice):.3f}", f"{sum(planted)}/{len(planted)}"])
        lines[-1].append(f"{milliseconds:.1f}")
    head = [
        "method",
        "share of gap",
        *(f"gain {group}" for group in groups),
        "worst gain",
        "twice the edge",
        "planted",
        "ms",
    ]
    text = tabulate(lines, headers=head, disable_numparse=True)
    totals = [row for row in rows if row.case.startswith(("VGG16 all", "VGG16 fc6", "VGG16 together"))]
    times = [[row.case, row.provider, f"{row.median_us / 1e3:.1f}", row.extra["swaps"]] for row in totals]
    return text + ("\n\n" + tabulate(times, headers=["case", "method", "ms", "swaps"]) if times else "")
