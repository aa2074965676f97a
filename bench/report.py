"""Tables and plots of bench rows: what a run prints and what the notes show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tetris.bench.rows import OK, Row


def best_speedups(rows: Sequence[Row]) -> dict[str, Row]:
    """case -> its row with the highest speedup among those that are right."""
    best: dict[str, Row] = {}
    for row in rows:
        timed = row.status == OK and not math.isnan(row.speedup)
        if timed and (row.case not in best or row.speedup > best[row.case].speedup):
            best[row.case] = row
    return best


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(log v)) over the finite entries; NaN without any."""
    logs = [math.log(v) for v in values if v > 0 and math.isfinite(v)]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def _cell(value: float, digits: int = 2) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def table(rows: Sequence[Row], extra: Sequence[str] = (), style: str = "simple") -> str:
    """One line a row; ``extra`` names columns of ``Row.extra`` to show. ``style`` is one of tabulate's."""
    from tabulate import tabulate

    head = ["case", *extra, "provider", "us", "p10-p90", "TFLOP/s", "roofline", "speedup", "error", "status"]
    lines = [
        [
            row.case,
            *(row.extra.get(name, "") for name in extra),
            row.provider,
            _cell(row.median_us, 1),
            "" if math.isnan(row.p10_us) else f"{row.p10_us:.1f}-{row.p90_us:.1f}",
            _cell(row.tflops, 0 if row.tflops >= 10 else 3),
            _cell(row.roofline_fraction),
            _cell(row.speedup),
            "" if math.isnan(row.error) else f"{row.error:.1e}",
            row.status,
        ]
        for row in rows
    ]
    return tabulate(lines, headers=head, tablefmt=style, disable_numparse=True)


def pivot(rows: Sequence[Row], value: str = "speedup", style: str = "simple") -> str:
    """Cases down, providers across, one value in each cell; a cell without a value shows the row's status."""
    from tabulate import tabulate

    providers = list(dict.fromkeys(row.provider for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        number = float(getattr(row, value))
        cells.setdefault(row.case, {})[row.provider] = row.status if math.isnan(number) else f"{number:.2f}"
    lines = [[case, *(found.get(provider, "") for provider in providers)] for case, found in cells.items()]
    return tabulate(lines, headers=["case", *providers], tablefmt=style, disable_numparse=True)


def plot_speedups(path: str | Path, rows: Sequence[Row], title: str = "") -> Path:
    """Grouped bars of speedup over the baseline, cases across, one colour a provider; a line at 1. Returns the path."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if not math.isnan(row.speedup)]
    cases = list(dict.fromkeys(row.case for row in timed))
    providers = list(dict.fromkeys(row.provider for row in timed))
    figure = Figure(figsize=(max(6.0, 0.9 * len(cases)), 4.0), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(providers), 1)
    for index, provider in enumerate(providers):
        found = {row.case: row.speedup for row in timed if row.provider == provider}
        axes.bar(
            [x + index * width for x in range(len(cases))], [found.get(c, 0.0) for c in cases], width, label=provider
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(cases))], cases, rotation=35, ha="right")
    axes.set_ylabel("speedup over dense")
    axes.set_title(title)
    axes.legend(fontsize="small")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
