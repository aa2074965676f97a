"""Tuning: what a full search finds beyond the analytic defaults, how long it takes, and which kernels fail.

The choices go to the user's store (``$TETRIS_CACHE_DIR``): ``tetris tuned --export autotune/tables/h200.json`` makes
the shipped table of them. Choices are searched in layouts from reordering, whose block rows are uneven, and checked in
random ones: what held in one layout only would be luck.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tetris.autotune.compile_ahead import default_workers
from tetris.autotune.device import device_info, device_name, versions
from tetris.autotune.layer_bench import LayerBench
from tetris.autotune.space import Config
from tetris.autotune.store import TuningStore
from tetris.autotune.timer import Timing
from tetris.autotune.tune_problems import Outcome, Search
from tetris.bench.report import table
from tetris.bench.rows import FAILED, OK, SKIPPED, Row, write_csv
from tetris.bench.tuning_cases import FULL, QUICK, SUITES, TuningCase

REPEATS = 15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--suite", nargs="+", choices=sorted(SUITES), help="default: all of the targets")
    parser.add_argument("--budget", type=int, help="configurations to measure a layer; default: a full search")
    parser.add_argument(
        "--stage", choices=("both", "compile", "measure"), default="both", help="kernels may be compiled before"
    )
    parser.add_argument("--workers", type=int, help="processes that compile; default: the processors but one")
    parser.add_argument("--layers", help="only layers whose name contains this")


def run(args: argparse.Namespace) -> list[Row]:
    """Every suite: rows of each layer as it is finished, then rows of the suite. Failures have a CSV of their own."""
    book = Book(args.out, device_name(args.device), versions())
    if args.device == "cpu":
        book.add([Row("tuning", "all", "search", status=f"{SKIPPED}: the CPU path has no configurations")])
        return book.rows
    for suite in args.suite or (QUICK if args.quick else FULL):
        cases = [case for case in SUITES[suite] if args.layers is None or args.layers in case.name]
        tune_suite(suite, cases, args, book)
    return book.rows


def show(rows: list[Row]) -> str:
    """Fractions of the best time per layer, then per suite."""
    return table(rows, extra=["fraction", "search_fraction", "kernel", "tried", "failed", "seconds"])


@dataclass
class Book:
    """The rows so far; written with every addition, so that a run that is cut off loses nothing."""

    out: Path
    device: str
    versions: str
    rows: list[Row] = field(default_factory=list)
    failures: list[Row] = field(default_factory=list)

    def add(self, rows: Iterable[Row], failures: Iterable[Row] = ()) -> None:
        """Take rows, print and write them."""
        new, failed = (
            [replace(row, device=self.device, versions=self.versions) for row in given] for given in (rows, failures)
        )
        self.rows += new
        self.failures += failed
        write_csv(self.out / "tuning.csv", self.rows)
        write_csv(self.out / "tuning_failures.csv", self.failures)
        for row in new:
            facts = " ".join(f"{name}={value}" for name, value in row.extra.items() if name != "config")
            print(f"{row.case} {row.provider} {row.median_us:.1f} {facts}", flush=True)
        for row in failed:
            print(f"{row.case} FAILED {row.extra['config']} {row.status}", flush=True)


def tune_suite(suite: str, cases: list[TuningCase], args: argparse.Namespace, book: Book) -> None:
    """Search all layers of a suite and compare the choices with the defaults."""
    device = device_info(args.device)
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    by_name = {case.name: case for case in cases}
    outcomes: list[Outcome] = []
    checked_seconds = 0.0

    def on_outcome(outcome: Outcome) -> None:
        nonlocal checked_seconds
        started = time.monotonic()
        case = by_name[outcome.wanted.name]
        outcomes.append(outcome)
        times = check(case, outcome.leaders, args.device, dtype) if outcome.entry else {}
        book.add(layer_rows(case, outcome, times), failure_rows(case, outcome))
        checked_seconds += time.monotonic() - started

    started = time.monotonic()
    search = Search([case.wanted(args.device, dtype) for case in cases], device, args.budget)
    workers = default_workers() if args.workers is None else args.workers
    compiled = search.compile(0 if args.stage == "measure" else workers)
    compiled_at = time.monotonic()
    if args.stage == "compile":
        for item in search.wanted:
            results = zip(search.tried[item.key], search.compiled[item.key])
            failures = {config: done.reason for config, done in results if done.reason}
            book.add([], failure_rows(by_name[item.name], Outcome(item, None, failures=failures)))
    else:
        search.measure(TuningStore(), on_outcome)
    ended = time.monotonic()
    extra = {
        "seconds": round(ended - started - checked_seconds, 1),
        "compile_wall_seconds": round(compiled_at - started, 1),
        "checked_seconds": round(checked_seconds, 1),
        "compile_seconds": round(sum(done.seconds for done in compiled), 1),
        "measured_seconds": round(sum(o.measured_seconds for o in outcomes), 1),
        "workers": workers,
        "layers": len(cases),
        "tried": sum(map(len, search.tried.values())),
        "failed": sum(len(o.failures) for o in outcomes) or sum(bool(done.reason) for done in compiled),
    }
    rows = [Row("tuning", suite, "search", extra=extra)]
    for name in dict.fromkeys(case.suite for case in cases):
        rows += suite_rows(name, [case for case in cases if case.suite == name], book.rows)
    book.add(rows)


def check(case: TuningCase, leaders: list[Config], device: str, dtype: torch.dtype) -> dict[str, Timing]:
    """Times in a random layout: of what a fresh layer would run ("default"), of the choice ("tuned"), of the best."""
    other = case.wanted(device, dtype, "random")
    bench = LayerBench(other.layer, other.x)
    fresh = type(leaders[0]).from_key(other.layer.launch(bench.images).config)
    times = bench.final(list(dict.fromkeys([fresh, *leaders])), REPEATS)
    named = {"default": fresh, "tuned": leaders[0]}
    if times:
        named["best"] = min(times, key=lambda config: times[config].median_us)
    return {name: times[config] for name, config in named.items() if config in times}


def layer_rows(case: TuningCase, outcome: Outcome, times: dict[str, Timing]) -> list[Row]:
    """A row for each of :func:`check`'s times, of the default and of the choice also with the search's time.

    ``fraction`` is the best time / this one in the random layout, ``search_fraction`` in the search's own.
    """
    entry = outcome.entry
    extra = {"suite": case.suite, "count": case.layer.count, "failed": len(outcome.failures)}
    if entry is None:
        return [Row("tuning", case.name, "tuned", status=f"{FAILED}: nothing ran", extra=extra)]
    extra |= {
        "tried": entry.tried,
        "kernel": entry.config.kernel,
        "config": entry.config.to_key(),
        "seconds": round(outcome.measured_seconds, 2),
        "compile_seconds": round(outcome.compile_seconds, 1),
    }
    search_us = {"default": entry.default_us, "tuned": entry.time_us, "best": entry.time_us}
    rows = []
    for provider, time_ in times.items():
        more = {
            "fraction": times["best"].median_us / time_.median_us,
            "search_fraction": entry.time_us / search_us[provider],
            "search_us": search_us[provider],
        }
        row = Row("tuning", case.name, provider, time_.median_us, time_.p10_us, time_.p90_us)
        rows.append(replace(row, extra=extra | more))
    return rows


def suite_rows(suite: str, cases: list[TuningCase], rows: list[Row]) -> list[Row]:
    """All layers of a suite, each as often as the network has it."""
    names = {case.name for case in cases}
    found = []
    for provider in ("default", "tuned", "best"):
        mine = [row for row in rows if row.case in names and row.provider == provider and row.status == OK]
        us, fraction = weighted([(row.extra["count"] * row.median_us, row.extra["fraction"]) for row in mine])
        searched_us, search_fraction = weighted(
            [(row.extra["count"] * row.extra["search_us"], row.extra["search_fraction"]) for row in mine]
        )
        extra = {"fraction": fraction, "search_fraction": search_fraction, "search_us": searched_us}
        found += [Row("tuning", suite, provider, us, extra=extra)] if mine else []
    return found


def weighted(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Of (time, best time / time): the times' sum, and the best times' sum / that."""
    total = sum(us for us, _ in pairs)
    return total, sum(us * fraction for us, fraction in pairs) / total if total else math.nan


def failure_rows(case: TuningCase, outcome: Outcome) -> list[Row]:
    """A row a configuration that did not run or answered wrongly."""
    return [
        Row("tuning", case.name, "failure", status=f"{FAILED}: {reason}", extra={"config": config.to_key()})
        for config, reason in outcome.failures.items()
    ]
