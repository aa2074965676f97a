"""What the tuning bench writes: rows of layers, of suites, and of configurations that failed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tetris.autotune.compile_ahead import LATE
from tetris.autotune.space import Config
from tetris.autotune.timer import Timing
from tetris.autotune.tune_problems import Outcome, Search
from tetris.bench.rows import FAILED, OK, Row, read_csv, write_csv
from tetris.bench.tuning_cases import TuningCase

PROVIDERS = ("analytic", "default", "tuned")
ROWS, FAILURES, JOBS = "tuning.csv", "tuning_failures.csv", "tuning_jobs.csv"


@dataclass
class Book:
    """The rows so far; written with every addition, so that a run that is cut off loses nothing."""

    out: Path
    device: str
    versions: str
    rows: list[Row] = field(default_factory=list)
    failures: list[Row] = field(default_factory=list)
    jobs: list[Row] = field(default_factory=list)

    def log(self, rows: Iterable[Row]) -> None:
        """Take and write rows of compilations."""
        self.jobs += rows
        if self.jobs:
            write_csv(self.out / JOBS, self.jobs)

    def add(self, rows: Iterable[Row], failures: Iterable[Row] = ()) -> None:
        """Take rows, print and write them."""
        new, failed = (
            [replace(row, device=self.device, versions=self.versions) for row in given] for given in (rows, failures)
        )
        self.rows += new
        self.failures += failed
        self._write(new)
        for row in failed:
            print(f"{row.case} FAILED {row.extra['config']} {row.status}", flush=True)

    def replace(self, rows: Iterable[Row]) -> None:
        """Put rows in the places of those of the same case and provider."""
        new = [replace(row, device=self.device, versions=self.versions) for row in rows]
        by_name = {(row.case, row.provider): row for row in new}
        self.rows = [by_name.get((row.case, row.provider), row) for row in self.rows]
        self._write(new)

    def _write(self, new: list[Row]) -> None:
        write_csv(self.out / ROWS, self.rows)
        write_csv(self.out / FAILURES, self.failures)
        for row in new:
            facts = " ".join(f"{name}={value}" for name, value in row.extra.items() if name != "config")
            print(f"{row.case} {row.provider} {row.median_us:.1f} {facts}", flush=True)


@dataclass(frozen=True)
class Checked:
    """A search's choice in another layout, and what runs there where nobody tuned."""

    defaults: list[Config]
    times: dict[Config, Timing]


def layer_rows(
    case: TuningCase, outcome: Outcome, defaults: list[Config], checked: Checked | None, ruled_out: int = 0
) -> list[Row]:
    """Three rows: what runs with nothing tuned and no table ("analytic"), with the package's ("default"), the choice.

    ``fraction``: the choice's time / this one. ``random_us``, ``random_fraction``: in a random layout, where the
    fastest of the three counts as 1. ``ruled_out``: valid configurations that the cost model left out;
    ``late``: of the failures those that were not compiled in time; ``compiled``: kernels that no worker had compiled.
    """
    entry, extra = outcome.entry, {"suite": case.suite, "count": case.layer.count, "failed": len(outcome.failures)}
    if entry is None:
        return [Row("tuning", case.name, "tuned", status=f"{FAILED}: nothing ran", extra=extra)]
    extra |= {"n_blocks": entry.problem.n_blocks, "tried": entry.tried, "ruled_out": ruled_out}
    extra |= {"late": sum(reason.endswith(LATE.reason) for reason in outcome.failures.values())}
    extra |= {"compiled": len(outcome.steps.kernels), "seconds": outcome.measured_seconds}
    extra |= {"compile_seconds": outcome.compile_seconds}
    best_us = min((time.median_us for time in checked.times.values()), default=math.nan) if checked else math.nan
    rows = []
    for provider, config in (("analytic", defaults[-1]), ("default", defaults[0]), ("tuned", entry.config)):
        if config not in outcome.times:
            rows.append(Row("tuning", case.name, provider, status=f"{FAILED}: {outcome.failures[config]}", extra=extra))
            continue
        time = outcome.times[config]
        more = {"kernel": config.kernel, "config": config.to_key(), "fraction": entry.time_us / time.median_us}
        if checked:
            there = {"analytic": checked.defaults[-1], "default": checked.defaults[0], "tuned": config}[provider]
            if there in checked.times:
                random_us = checked.times[there].median_us
                more |= {"random_us": random_us, "random_fraction": best_us / random_us}
        rows.append(
            Row("tuning", case.name, provider, time.median_us, time.p10_us, time.p90_us, extra={**extra, **more})
        )
    return rows


def suite_rows(suite: str, cases: list[TuningCase], rows: list[Row]) -> list[Row]:
    """All layers of a suite, each as often as the network has it."""
    names = {case.name for case in cases}
    found = []
    for provider in PROVIDERS:
        mine = [row for row in rows if row.case in names and row.provider == provider and row.status == OK]
        us, fraction = weighted([(row.extra["count"] * row.median_us, row.extra["fraction"]) for row in mine])
        checked = [row.extra for row in mine if "random_us" in row.extra]
        random_us, random_fraction = weighted([(e["count"] * e["random_us"], e["random_fraction"]) for e in checked])
        extra = {"fraction": fraction, "layers": len(mine)}
        extra |= {"random_us": random_us, "random_fraction": random_fraction} if checked else {}
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


def job_rows(search: Search, started: float) -> list[Row]:
    """A row a compilation: worker, when, and what its seconds went into (``compile_job.PARTS``)."""
    rows = []
    for item in search.wanted:
        for config, done in zip(search.tried[item.key], search.compiled.get(item.key, [])):
            parts = dict(done.parts or {})
            since: dict[str, object] = {
                name: parts.pop(name) - started for name in ("started", "ready", "began") if name in parts
            }
            extra = since | {"seconds": done.seconds, **parts, "kernel": config.kernel, "config": config.to_key()}
            rows.append(Row("tuning", item.name, "job", status=done.reason or OK, extra=extra))
    return rows


def known_failures(out: Path) -> dict[tuple[str, str], str]:
    """(case, configuration) -> reason, as an earlier run left them in the folder."""
    path = out / FAILURES
    return {(row.case, str(row.extra["config"])): row.status for row in read_csv(path)} if path.exists() else {}
