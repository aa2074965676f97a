"""One measurement = one Row = one CSV line. Everything that a table or a plot shows comes from such lines.

A provider whose result is wrong or that cannot run gets a row without a time: slower, wrong and impossible cases are
shown, never dropped.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tetris.errors import FileFormatError
from tetris.files import atomic_file

OK, WRONG, FAILED, SKIPPED = "ok", "wrong", "failed", "skipped"


@dataclass(frozen=True)
class Row:
    """One provider on one case.

    Attributes:
        bench: the subcommand that measured it ("conv", "linear", ...).
        case: the problem's name, the same for every provider of it.
        provider: who ran ("cudnn", "tetris", "bsr swept", ...).
        median_us, p10_us, p90_us: time in microseconds; NaN where there is none.
        flop: floating-point operations that the kept weights need (a multiply-add counts two).
        bytes: the least traffic with device memory: every operand once.
        roofline_fraction: least possible time on this device (see ``autotune.ceilings``) / median; NaN = unknown.
        speedup: baseline's median / this median in the same run; NaN = no baseline.
        error: ||y - ref|| / ||ref|| against the float64 reference; NaN = not compared.
        status: "ok", "wrong" (result outside the tolerance: no time), "failed: why" or "skipped: why".
        device, versions: where it was measured.
        extra: further columns (batch, block, sparsity, ...).
    """

    bench: str
    case: str
    provider: str
    median_us: float = math.nan
    p10_us: float = math.nan
    p90_us: float = math.nan
    flop: float = math.nan
    bytes: float = math.nan
    roofline_fraction: float = math.nan
    speedup: float = math.nan
    error: float = math.nan
    status: str = OK
    device: str = ""
    versions: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tflops(self) -> float:
        """Useful TFLOP/s: kept work over the median."""
        return self.flop / self.median_us / 1e6

    def to_columns(self) -> dict[str, str]:
        """Column name -> text; ``extra`` flattened behind the fixed columns."""
        columns = {name: _text(getattr(self, name)) for name in FIXED_COLUMNS}
        clash = set(self.extra) & set(FIXED_COLUMNS)
        if clash:
            raise ValueError(f"row: extra columns {sorted(clash)} have the names of fixed ones; rename them")
        return columns | {name: _text(value) for name, value in self.extra.items()}

    @staticmethod
    def from_columns(columns: dict[str, str]) -> Row:
        """The inverse of :meth:`to_columns`; empty numbers become NaN, extra columns numbers where they read so."""
        fixed: dict[str, Any] = {}
        for name, kind in _KINDS.items():
            value = columns.get(name, "")
            fixed[name] = (float(value) if value else math.nan) if kind == "float" else value
        extra = {name: _parse(value) for name, value in columns.items() if name not in _KINDS and value != ""}
        return Row(**fixed, extra=extra)


_KINDS = {f.name: str(f.type) for f in fields(Row) if f.name != "extra"}
FIXED_COLUMNS = tuple(_KINDS)


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _parse(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def write_csv(path: str | Path, rows: Iterable[Row]) -> Path:
    """Write the rows atomically (a reader sees the old file or the new one); makes the folder. Returns the path."""
    path = Path(path)
    lines = [row.to_columns() for row in rows]
    names = list(dict.fromkeys([*FIXED_COLUMNS, *(name for line in lines for name in line)]))
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(lines)
    return path


def replaced(path: str | Path, rows: list[Row]) -> list[Row]:
    """The rows of the file with those of the measured cases, in their places; what is new stands at the end.

    For a bench that runs some of its cases: the file keeps what it says of the others.
    """
    measured = {row.case for row in rows}
    new = {(row.case, row.provider): row for row in rows}
    old = read_csv(path) if Path(path).is_file() else []
    kept = [row if row.case not in measured else new.pop((row.case, row.provider), None) for row in old]
    return [row for row in kept if row is not None] + list(new.values())


def read_csv(path: str | Path) -> list[Row]:
    """The rows of a file that :func:`write_csv` wrote. Raises FileFormatError if it is missing or another table."""
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"bench: wanted a CSV of rows at {path}; there is no such file; run the bench first")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = {"bench", "case", "provider", "median_us"} - set(reader.fieldnames or ())
        if missing:
            raise FileFormatError(f"bench: {path} lacks the columns {sorted(missing)}; it is not a table of bench rows")
        return [Row.from_columns(line) for line in reader]
