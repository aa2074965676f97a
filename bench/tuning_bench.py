"""Tuning: what a full search finds beyond the analytic defaults, how long it takes, and which kernels fail.

The choices go to the user's store (``$TETRIS_CACHE_DIR``): ``tetris tuned --export autotune/tables/h200.json`` makes
the shipped table of them. Choices are searched in layouts from reordering, whose block rows are uneven; with
``--check`` they are timed in random ones, too: what holds in one layout only is luck.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from tetris.autotune.compile_ahead import Compiled, default_workers
from tetris.autotune.device import device_info, device_name, versions
from tetris.autotune.layer_bench import LayerBench
from tetris.autotune.space import Config
from tetris.autotune.steps import Steps
from tetris.autotune.store import TuningStore
from tetris.autotune.tune_problems import Outcome, Search, Wanted
from tetris.bench.report import table
from tetris.bench.rows import SKIPPED, Row, read_csv
from tetris.bench.tuning_cases import FULL, QUICK, SUITES, TuningCase
from tetris.bench.tuning_rows import ROWS, Book, Checked, failure_rows, job_rows, known_failures, layer_rows, suite_rows
from tetris.kernels.configs import DeviceInfo

REPEATS = 15
DTYPE = torch.float16
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
        "--compile-seconds", type=float, default=math.inf, help="leave out what is not compiled by then"
    )
    parser.add_argument("--check", action="store_true", help="time the leaders in a random layout, too")
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
    for suite, cases, budget in searches:
        tune_suite(suite, cases, budget, args, book, known)
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


def wanted_of(cases: list[tuple[TuningCase, int | None]], args: argparse.Namespace) -> list[Wanted]:
    """The cases' layers, each with its budget."""
    return [case.wanted(args.device, DTYPE, budget=budget) for case, budget in cases]


def compile_suites(cases: list[tuple[TuningCase, int | None]], args: argparse.Namespace, book: Book) -> None:
    """Leave all kernels in the compiler's cache, and a list of those that failed."""
    wanted = wanted_of(cases, args)
    started = time.monotonic()
    search = Search(wanted, device_info(args.device))
    results = search.compile(args.workers, args.compile_seconds)
    by_name = {case.name: case for case, _ in cases}
    book.log(job_rows(search, started) if args.log else [])
    for item in search.wanted:
        book.add([], failure_rows(by_name[item.name], search.outcome(item)))
    extra = {"compile_wall_seconds": time.monotonic() - started, "tried": len(results)}
    extra |= {"compile_seconds": sum(done.seconds for done in results), "failed": len(book.failures)}
    book.add([Row("tuning", "all", "compile", extra=extra)])


def tune_suite(
    suite: str,
    cases: list[TuningCase],
    budget: int | None,
    args: argparse.Namespace,
    book: Book,
    known: dict[tuple[str, str], str],
) -> None:
    """Search all layers of a suite, but for failures that are known, and compare the choices with the defaults."""
    by_name = {case.name: case for case in cases}
    outcomes: list[Outcome] = []
    checked_seconds = 0.0

    def on_outcome(outcome: Outcome) -> None:
        nonlocal checked_seconds
        started = time.monotonic()
        case = by_name[outcome.wanted.name]
        outcomes.append(outcome)
        key = outcome.wanted.key
        checked = check(case, list(outcome.times), args.device, search.device) if args.check else None
        rows = layer_rows(case, outcome, search.defaults[key], checked, search.ruled_out[key])
        book.add(rows, failure_rows(case, outcome))
        checked_seconds += time.monotonic() - started

    made_at = time.monotonic()
    wanted = wanted_of([(case, budget) for case in cases], args)
    started = time.monotonic()
    search = Search(wanted, device_info(args.device))
    if args.stage == "both":
        search.compile(args.workers, args.compile_seconds)
        book.log(job_rows(search, started) if args.log else [])
    for item in search.wanted:
        tried = search.tried[item.key]
        if any((item.name, config.to_key()) in known for config in tried):
            search.compiled[item.key] = [Compiled(known.get((item.name, config.to_key()), ""), 0.0) for config in tried]
    compiled_at = time.monotonic()
    search.measure(TuningStore(), on_outcome)
    parts = Steps()
    for outcome in outcomes:
        for name, seconds in outcome.steps.seconds.items():
            parts.add(name, seconds)
    extra = {
        "seconds": time.monotonic() - started - checked_seconds,
        "layers_seconds": started - made_at,
        "compile_wall_seconds": compiled_at - started,
        "checked_seconds": checked_seconds,
        "compile_seconds": sum(outcome.compile_seconds for outcome in outcomes),
        "measured_seconds": sum(outcome.measured_seconds for outcome in outcomes),
        "workers": default_workers() if args.workers is None else args.workers,
        "layers": len(cases),
        "budget": budget or "full",
        "tried": sum(map(len, search.tried.values())),
        "ruled_out": sum(search.ruled_out.values()),
        **{f"{name}_seconds": seconds for name, seconds in (search.steps.seconds | parts.seconds).items()},
        "failed": sum(len(outcome.failures) for outcome in outcomes),
    }
    rows = [Row("tuning", suite, "search", extra=extra)]
    for name in dict.fromkeys(case.suite for case in cases):
        rows += suite_rows(name, [case for case in cases if case.suite == name], book.rows)
    book.add(rows)


def check(case: TuningCase, configs: list[Config], where: str, device: DeviceInfo) -> Checked:
    """Times in a random layout, beside what runs there where nobody tuned."""
    other = case.wanted(where, DTYPE, "random")
    defaults = other.defaults(device)
    return Checked(
        defaults, LayerBench(other.layer, other.x).final(list(dict.fromkeys([*defaults, *configs])), REPEATS)
    )
