"""Tables of bench rows, as a run prints them, and the mean of speedups."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tetris.bench.rows import Row


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
