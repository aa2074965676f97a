"""Tuning: what a full search finds beyond the analytic defaults, how long it takes, and which kernels fail.

The choices go to the user's store (``$TETRIS_CACHE_DIR``): ``tetris tuned --export autotune/tables/h200.json`` makes
the shipped table of them. Choices are searched in layouts from reordering, whose block rows are uneven; with
``--check`` they are timed in random ones, too: what holds in one layout only is luck.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from tetris.autotune.device import device_name, versions
from tetris.bench.report import table
from tetris.bench.rows import SKIPPED, Row, read_csv
from tetris.bench.tuning_cases import FULL, QUICK, SUITES, TuningCase
from tetris.bench.tuning_rows import ROWS, Book, known_failures
from tetris.bench.tuning_suite import SuiteSearch, check, compile_suites

WITHOUT_CONFIGURATIONS = ("cpu",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    names = ", ".join(sorted(SUITES))
    parser.add_argument("--suite", nargs="+", type=suite_and_budget, help=f"{names}; NAME:6 measures 6 choices a layer")
    parser.add_argument(
        "--stage", choices=("both", "compile", "measure"), default="both", help="measure: after a run that compiled"
    )
    parser.add_argument("--workers", type=int, help="processes that compile; default: the processors but one")
    parser.add_argument(
        "--compile-seconds",
        type=float,
        default=math.inf,
        help="leave out what is not compiled by then; not of a cold suite",
    )
    parser.add_argument("--cold", nargs="+", default=[], help="suites that are compiled, too, into an empty cache")
    parser.add_argument("--check", action="store_true", help="time the choices in a random layout, too")
    parser.add_argument("--layers", help="only layers whose name contains this")
    parser.add_argument("--keep", action="store_true", help="keep what the folder's CSV says of other suites")
    parser.add_argument("--log", action="store_true", help="write tuning_jobs.csv: what every compilation took")


def run(args: argparse.Namespace) -> list[Row]:
    """Every suite: rows of each layer as it is finished, then rows of the suite. Failures have a CSV of their own."""
    book = Book(args.out, device_name(args.device), versions())
    if args.device in WITHOUT_CONFIGURATIONS:
        book.add([Row("tuning", "all", "search", status=f"{SKIPPED}: the CPU path has no configurations")])
        return book.rows
    suites = args.suite or [(name, None) for name in (QUICK if args.quick else FULL)]
    searches = [(name, chosen(name, args.layers), budget) for name, budget in suites]
    if args.keep:
        book.rows = rows_of_others(args.out, searches)
    if args.stage == "compile":
        compile_suites([(case, budget) for _, cases, budget in searches for case in cases], args, book)
        return book.rows
    known = known_failures(args.out) if args.stage == "measure" else {}
    found = [SuiteSearch(suite, cases, budget, args, book, known) for suite, cases, budget in searches]
    for search in found:
        search.run()
    if args.check:
        check(found, args)
    return book.rows


def rows_of_others(out: Path, searches: list[tuple[str, list[TuningCase], int | None]]) -> list[Row]:
    """The rows that an earlier run left in the folder, but for those of these suites."""
    path = out / ROWS
    mine = {name for suite, cases, _ in searches for case in cases for name in (suite, case.suite, case.name)}
    return [row for row in read_csv(path) if row.case not in mine] if path.exists() else []


def suite_and_budget(text: str) -> tuple[str, int | None]:
    """ "resnet50:6" -> ("resnet50", 6); without a number None: a full search."""
    name, _, budget = text.partition(":")
    if name not in SUITES:
        raise argparse.ArgumentTypeError(f"wanted one of {', '.join(sorted(SUITES))}; got {name!r}")
    return name, int(budget) if budget else None


def chosen(suite: str, part: str | None) -> list[TuningCase]:
    """The layers of a suite whose name contains ``part``."""
    return [case for case in SUITES[suite] if part is None or part in case.name]


def show(rows: list[Row]) -> str:
    """Fractions of the best time per layer, then per suite."""
    return table(rows, extra=["fraction", "random_fraction", "kernel", "tried", "failed", "seconds"])
