"""The search of one suite of the tuning bench, and the check of choices in another layout; rows are written at once."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from tetris.autotune.compile_ahead import LATE, Compiled, default_workers
from tetris.autotune.compile_server import CompileServer
from tetris.autotune.device import device_info
from tetris.autotune.layer_bench import LayerBench
from tetris.autotune.steps import Steps
from tetris.autotune.store import TuningStore
from tetris.autotune.tune_problems import Outcome, Search, Wanted
from tetris.bench.rows import Row
from tetris.bench.tuning_cases import TuningCase
from tetris.bench.tuning_rows import Book, Checked, failure_rows, job_rows, layer_rows, suite_rows

REPEATS = 15
DTYPE = torch.float16
KERNELS = "TRITON_CACHE_DIR"
LAYOUTS = ("reordered", "random")
"""Where choices are searched, and where they are checked."""


@dataclass
class SuiteSearch:
    """A suite's layers, each searched but for failures that are known, and compared with what runs untuned."""

    suite: str
    cases: list[TuningCase]
    budget: int | None
    args: argparse.Namespace
    book: Book
    known: dict[tuple[str, str], str]
    outcomes: list[Outcome] = field(init=False, default_factory=list)

    def run(self) -> None:
        """Search all layers, then sum up."""
        made_at, cold = time.monotonic(), self.suite in self.args.cold
        wanted = wanted_of([(case, self.budget) for case in self.cases], self.args.device)
        layers_seconds = time.monotonic() - made_at
        with empty_cache() if cold else nullcontext():
            extra = self.search(
                wanted, cold or self.args.stage == "both", math.inf if cold else self.args.compile_seconds
            )
        extra |= {"layers_seconds": layers_seconds, "cache": "empty" if cold else "filled"}
        self.book.add([Row("tuning", self.suite, "search", extra=extra)])
        self.book.add(self.sums())

    def sums(self) -> list[Row]:
        """The rows of the networks."""
        names = dict.fromkeys(case.suite for case in self.cases)
        parts = {name: [case for case in self.cases if case.suite == name] for name in names}
        return [row for name, cases in parts.items() for row in suite_rows(name, cases, self.book.rows)]

    def search(self, wanted: list[Wanted], compiles: bool, compile_seconds: float) -> dict[str, object]:
        """Compile, where asked to, and measure; returns what that took."""
        started = time.monotonic()
        with CompileServer(self.args.device) if compiles else nullcontext() as server:  # it imports meanwhile
            self.found = Search(wanted, device_info(self.args.device))
            if compiles:
                self.found.compile(self.args.workers, compile_seconds, server)
        if compiles:
            self.book.log(job_rows(self.found, started) if self.args.log else [])
        for item in wanted:
            tried = self.found.tried[item.key]
            reasons = [self.known.get((item.name, config.to_key()), "") for config in tried]
            if any(reasons) and not compiles:
                self.found.compiled[item.key] = [Compiled(reason, 0.0) for reason in reasons]
        compiled_at = time.monotonic()
        self.found.measure(TuningStore(), self.on_outcome)
        parts = Steps()
        for outcome in self.outcomes:
            for name, seconds in outcome.steps.seconds.items():
                parts.add(name, seconds)
        return {
            "seconds": time.monotonic() - started,
            "compile_wall_seconds": compiled_at - started,
            "compile_seconds": sum(outcome.compile_seconds for outcome in self.outcomes),
            "measured_seconds": sum(outcome.measured_seconds for outcome in self.outcomes),
            **{f"{name}_seconds": seconds for name, seconds in (self.found.steps.seconds | parts.seconds).items()},
            "workers": default_workers() if self.args.workers is None else self.args.workers,
            "layers": len(self.cases),
            "budget": self.budget or "full",
            "tried": sum(map(len, self.found.tried.values())),
            "ruled_out": sum(self.found.ruled_out.values()),
            "compiled": sum(len(outcome.steps.kernels) for outcome in self.outcomes),
            "failed": sum(len(outcome.failures) for outcome in self.outcomes),
            "late": sum(r.endswith(LATE.reason) for outcome in self.outcomes for r in outcome.failures.values()),
        }

    def on_outcome(self, outcome: Outcome) -> None:
        """Write a layer's rows."""
        self.outcomes.append(outcome)
        self.book.add(self.rows(outcome, None), failure_rows(self.case(outcome), outcome))

    def rows(self, outcome: Outcome, checked: Checked | None) -> list[Row]:
        key = outcome.wanted.key
        return layer_rows(self.case(outcome), outcome, self.found.defaults[key], checked, self.found.ruled_out[key])

    def case(self, outcome: Outcome) -> TuningCase:
        return next(case for case in self.cases if case.name == outcome.wanted.name)


def check(suites: list[SuiteSearch], args: argparse.Namespace) -> None:
    """Time all choices in random layouts, too, beside what runs there where nobody tuned; rows are written again."""
    outcomes = {outcome.wanted.name: (suite, outcome) for suite in suites for outcome in suite.outcomes}
    cases: list[tuple[TuningCase, int | None]]
    cases = [(suite.case(outcome), 1) for suite, outcome in outcomes.values() if outcome.entry]
    search = Search(wanted_of(cases, args.device, LAYOUTS[1]), device_info(args.device))
    for item in search.wanted:
        entry = outcomes[item.name][1].entry
        assert entry is not None
        search.tried[item.key] = list(dict.fromkeys([*search.defaults[item.key], entry.config]))
    search.compile(args.workers, args.compile_seconds)
    for item in search.wanted:
        suite, outcome = outcomes[item.name]
        bench = LayerBench(item.layer, item.x, search.outcome(item).failures)
        checked = Checked(search.defaults[item.key], bench.final(search.tried[item.key], REPEATS))
        suite.book.replace(suite.rows(outcome, checked))
    for suite in suites:
        suite.book.replace(suite.sums())


def wanted_of(cases: list[tuple[TuningCase, int | None]], device: str, layout_kind: str = LAYOUTS[0]) -> list[Wanted]:
    """The cases' layers, each with its budget."""
    return [case.wanted(device, DTYPE, layout_kind, budget) for case, budget in cases]


@contextmanager
def empty_cache() -> Iterator[None]:
    """Within it, this process and those that it starts compile into a new folder, as on a new machine."""
    before = os.environ.get(KERNELS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[KERNELS] = folder
        try:
            yield
        finally:
            os.environ.pop(KERNELS)
            os.environ |= {} if before is None else {KERNELS: before}


def compile_suites(cases: list[tuple[TuningCase, int | None]], args: argparse.Namespace, book: Book) -> None:
    """Leave all kernels in the compiler's cache, and a list of those that failed."""
    by_name = {case.name: case for case, _ in cases}
    wanted = wanted_of(cases, args.device)
    started = time.monotonic()
    search = Search(wanted, device_info(args.device))
    results = search.compile(args.workers, args.compile_seconds)
    book.log(job_rows(search, started) if args.log else [])
    book.add([], [row for item in wanted for row in failure_rows(by_name[item.name], search.outcome(item))])
    extra = {"compile_wall_seconds": time.monotonic() - started, "tried": len(results)}
    extra |= {"compile_seconds": sum(done.seconds for done in results), "failed": len(book.failures)}
    book.add([Row("tuning", "all", "compile", extra=extra)])
