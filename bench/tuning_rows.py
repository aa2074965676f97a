"""What the tuning bench writes: rows of layers, of suites, and of configurations that failed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tetris.autotune.timer import Timing
from tetris.autotune.tune_problems import Outcome
from tetris.bench.rows import FAILED, OK, Row, read_csv, write_csv
from tetris.bench.tuning_cases import TuningCase

FAILURES = "tuning_failures.csv"


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
        write_csv(self.out / FAILURES, self.failures)
        for row in new:
            facts = " ".join(f"{name}={value}" for name, value in row.extra.items() if name != "config")
            print(f"{row.case} {row.provider} {row.median_us:.1f} {facts}", flush=True)
        for row in failed:
            print(f"{row.case} FAILED {row.extra['config']} {row.status}", flush=True)


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


def known_failures(out: Path) -> dict[tuple[str, str], str]:
    """(case, configuration) -> reason, as an earlier run left them in the folder."""
    path = out / FAILURES
    return {(row.case, str(row.extra["config"])): row.status for row in read_csv(path)} if path.exists() else {}
