"""``python -m tetris.bench.readme``: fill the tables of FILES from the committed CSV files, so that no number is typed.

A table stands between ``<!-- table NAME -->`` and ``<!-- end NAME -->``; TABLES says which CSV and columns make it.
The README shows what a reader needs to judge, ``bench/TABLES.md`` the same tables with every row. ``--check`` changes
nothing and fails where a file differs from what the CSV files say.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetris.bench.rows import Row, read_csv
from tetris.errors import FileFormatError
from tetris.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FILES = (ROOT / "README.md", ROOT / "bench" / "TABLES.md")

Format = Callable[[Any], str]


def percent(value: Any) -> str:
    """0.734 -> "73.4 %"."""
    return _number(value, lambda v: f"{100 * v:.1f} %")


def percent_0(value: Any) -> str:
    """0.734 -> "73 %"."""
    return _number(value, lambda v: f"{100 * v:.0f} %")


def times(value: Any) -> str:
    """1.234 -> "1.23x"; what was not measured is a dash."""
    return _number(value, lambda v: f"{v:.2f}x")


def microseconds(value: Any) -> str:
    """1234.5 -> "1234"; small ones keep a digit."""
    return _number(value, lambda v: f"{v:.0f}" if v >= 100 else f"{v:.1f}")


def milliseconds(value: Any) -> str:
    """1234.5 us -> "1.2"; from 100 ms on without a digit."""
    return _number(value, lambda v: f"{v / 1e3:.0f}" if v >= 1e5 else f"{v / 1e3:.1f}")


def scientific(value: Any) -> str:
    """0.000578 -> "5.8e-04"."""
    return _number(value, lambda v: f"{v:.1e}")


def _number(value: Any, show: Callable[[float], str]) -> str:
    if not isinstance(value, (int, float)) or math.isnan(value):
        return "-"
    return show(value)


@dataclass(frozen=True)
class ReadmeTable:
    """One table of the README or of ``bench/TABLES.md``.

    Attributes:
        csv: file of bench rows, relative to ``bench/results``.
        columns: (heading, column of the row, format), left to right.
        keep: which rows are shown.
    """

    csv: str
    columns: tuple[tuple[str, str, Format], ...]
    keep: Callable[[Row], bool] = lambda row: True


METHODS = {"element": "element-wise", "none": "blocks", "sort": "blocks, sorted", "paper": "blocks, TETRIS"}


def method(value: Any) -> str:
    """The README's name of a method."""
    return METHODS.get(value, f"blocks, {value}")


RUN_AS = {"tetris graph": "CUDA graph", "tetris compile+graph": "compiled, CUDA graph"}


def how_run(value: Any) -> str:
    """How a converted network was run."""
    return RUN_AS[value]


def block(value: Any) -> str:
    """32 -> "32x32"."""
    return f"{value}x{value}"


TABLES: dict[str, ReadmeTable] = {
    "demo": ReadmeTable(
        csv="cpu/demo/demo.csv",
        columns=(
            ("pruned", "sparsity", percent_0),
            ("block", "block", block),
            ("method", "provider", method),
            ("importance kept", "retained", percent),
            ("accuracy, pruned", "accuracy_before", percent),
            ("fine-tuned", "accuracy_after", percent),
            ("speedup", "speedup", times),
            ("ideal", "ideal", times),
        ),
        keep=lambda row: row.extra["sparsity"] in (0.73, 0.9) and row.extra["block"] in (1, 32),
    ),
    "cpu-layers": ReadmeTable(
        csv="cpu/cpu.csv",
        columns=(
            ("layer", "case", str),
            ("block", "block", str),
            ("us", "median_us", microseconds),
            ("p10", "p10_us", microseconds),
            ("p90", "p90_us", microseconds),
            ("speedup", "speedup", times),
        ),
        keep=lambda row: row.provider == "tetris" and row.extra["layout"] == "reordered",
    ),
    "cpu-reorder": ReadmeTable(
        csv="cpu/reorder.csv",
        columns=(
            ("matrices", "matrices", str),
            ("method", "provider", str),
            ("share of the gap closed", "mean_share", percent),
            ("gain / the paper's", "mean_gain", times),
            ("worst case", "worst_gain", times),
            ("retained at twice the edge / the paper's", "twice_the_edge", percent),
            ("ms", "median_us", milliseconds),
        ),
        keep=lambda row: row.case in ("suite: all but planted", "suite: trained") and row.provider != "none",
    ),
    "h200-reorder": ReadmeTable(
        csv="h200/reorder.csv",
        columns=(("search", "case", str), ("method", "provider", str), ("ms", "median_us", milliseconds)),
        keep=lambda row: row.case.startswith("VGG16 all"),
    ),
    "h200-reorder-all": ReadmeTable(
        csv="h200/reorder.csv",
        columns=(("search", "case", str), ("method", "provider", str), ("ms", "median_us", milliseconds)),
        keep=lambda row: row.case.startswith(("VGG16 all", "VGG16 fc6", "VGG16 together")),
    ),
    "h200-reorder-quality": ReadmeTable(
        csv="h200/reorder.csv",
        columns=(
            ("matrices", "matrices", str),
            ("method", "provider", str),
            ("gain / the paper's", "mean_gain", times),
            ("worst case", "worst_gain", times),
            ("ms", "median_us", milliseconds),
        ),
        keep=lambda row: row.case in ("suite: gaussian", "suite: trained") and row.provider not in ("none", "sort"),
    ),
    "h200-linear": ReadmeTable(
        csv="h200/linear.csv",
        columns=(
            ("tokens x layer, block, kept, layout", "case", str),
            ("us", "median_us", microseconds),
            ("speedup over cuBLAS", "speedup", times),
        ),
        keep=lambda row: row.provider == "tetris" and row.status == "ok",
    ),
    "h200-linear-all": ReadmeTable(
        csv="h200/linear.csv",
        columns=(
            ("tokens x layer, block, kept, layout", "case", str),
            ("", "provider", str),
            ("us", "median_us", microseconds),
            ("speedup over cuBLAS", "speedup", times),
        ),
        keep=lambda row: row.provider in ("tetris", "torch BSR swept") and row.status == "ok",
    ),
    "h200-conv": ReadmeTable(
        csv="h200/conv.csv",
        columns=(
            ("layer, batch, block, kept, layout", "case", str),
            ("us", "median_us", microseconds),
            ("of the roofline", "roofline_fraction", percent_0),
            ("speedup", "speedup", times),
        ),
        keep=lambda row: row.provider == "tetris tuned",
    ),
    "h200-network": ReadmeTable(
        csv="h200/network.csv",
        columns=(
            ("network, batch", "case", str),
            ("dense, the fastest: us", "dense_us", microseconds),
            ("converted", "provider", how_run),
            ("us", "median_us", microseconds),
            ("speedup", "speedup", times),
            ("error", "error", scientific),
            ("permutations' share of the time", "permutation_share", percent),
        ),
        keep=lambda row: row.provider in RUN_AS,
    ),
    "h200-tuning": ReadmeTable(
        csv="h200/shipped.csv",
        columns=(
            ("network, batch or tokens", "case", str),
            ("layers", "layers", str),
            ("full search: us", "best_us", microseconds),
            ("of it by formula", "analytic_fraction", percent),
            ("with the shipped table", "fraction", percent),
            ("choices shipped", "shipped", str),
        ),
    ),
    "cpu-permutations": ReadmeTable(
        csv="cpu/permutations.csv",
        columns=(
            ("network", "case", str),
            ("pruned layers", "layers", str),
            ("importance kept, shared", "retained", percent),
            ("share of the gain", "gain_kept", percent_0),
        ),
        keep=lambda row: row.provider == "shared",
    ),
    "cpu-permutations-all": ReadmeTable(
        csv="cpu/permutations.csv",
        columns=(
            ("network", "case", str),
            ("permutations", "provider", str),
            ("pruned layers", "layers", str),
            ("importance kept", "retained", percent),
            ("share of the gain", "gain_kept", percent_0),
        ),
    ),
}


def markdown(table: ReadmeTable, rows: Sequence[Row]) -> str:
    """The kept rows as a Markdown table."""
    from tabulate import tabulate

    lines = []
    for row in filter(table.keep, rows):
        columns = {**row.extra, **{name: getattr(row, name) for name in ("case", "provider", "median_us", "speedup")}}
        columns |= {name: getattr(row, name) for name in ("p10_us", "p90_us", "roofline_fraction", "error", "status")}
        lines.append([show(columns.get(name, math.nan)) for _, name, show in table.columns])
    heads = [head for head, _, _ in table.columns]
    return tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True)


def fill(text: str, tables: dict[str, ReadmeTable], results: Path) -> str:
    """``text`` with every marked table written anew.

    Raises:
        FileFormatError: a marker without a table of that name or without its end, or a CSV that is missing.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in tables:
            raise FileFormatError(f"readme: no table is called {name!r}; there are {', '.join(tables)}")
        body = markdown(tables[name], read_csv(results / tables[name].csv))
        return f"<!-- table {name} -->\n{body}\n<!-- end {name} -->"

    filled = re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end \1 -->", replaced, text, flags=re.DOTALL)
    begun, ended = (len(re.findall(rf"<!-- {word} [\w-]+ -->", filled)) for word in ("table", "end"))
    if begun != ended:
        raise FileFormatError(f"readme: {begun} tables begin and {ended} end; look for a lost marker")
    return filled


def main(arguments: list[str] | None = None) -> int:
    """Fill or check; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tetris.bench.readme", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a file is out of date")
    parser.add_argument("--file", type=Path, action="append", help="only this one; may be repeated")
    args = parser.parse_args(arguments)
    outdated = False
    for path in args.file or FILES:
        text = path.read_text(encoding="utf-8")
        filled = fill(text, TABLES, RESULTS)
        outdated = outdated or filled != text
        if not args.check:
            write_text(path, filled)
    return int(args.check and outdated)


if __name__ == "__main__":
    sys.exit(main())
