"""A search over many problems: first all kernels are compiled and tried, in all processors, then the GPU measures.

Not both at once: trials of compiled kernels made times on the same GPU up to three times too long. Several processes,
each with a GPU, share both. What is measured is stored at once and what is compiled stays in the compiler's cache, so
that an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from tetris.autotune.candidates import candidates
from tetris.autotune.compile_ahead import Compiled, CompilePool
from tetris.autotune.compile_job import Job
from tetris.autotune.cost import estimate_us
from tetris.autotune.layer_bench import LayerBench
from tetris.autotune.problems import LayerInput, Problem, SparseLayer, pools, problem_of
from tetris.autotune.space import Config
from tetris.autotune.store import TuningStore
from tetris.autotune.team import Team
from tetris.autotune.timer import Timing
from tetris.kernels.configs import DeviceInfo
from tetris.tuned_choices import Entry, problem_key

TOGETHER = 4
"""Jobs of one problem in a row: a worker makes the layer once for all of them."""
FINALISTS = 4
"""So many of a race are timed again, beside the default."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """A layer to tune: its name, itself, what it gets, and how many configurations to measure (None: a full search)."""

    name: str
    layer: SparseLayer
    x: LayerInput
    budget: int | None = None

    @property
    def problem(self) -> Problem:
        return problem_of(self.layer, self.x)

    @property
    def key(self) -> str:
        """Equal for layers that share a choice."""
        return problem_key(self.problem, pools(self.layer))

    def jobs(self, configs: Sequence[Config]) -> list[Job]:
        """What compiles and tries the layer's kernels in another process."""
        layer = self.layer
        base = Job(
            self.problem, "", layer.activation, pools(layer), layer.bias is not None,
            indptr=tuple(layer.indptr.tolist()), indices=tuple(layer.indices.tolist()),
        )  # fmt: skip
        return [replace(base, config=config.to_key()) for config in configs]


@dataclass
class Outcome:
    """What the search of one problem found.

    Attributes:
        entry: the choice; None where no configuration ran.
        times: of the default and of the race's leaders, the fastest first.
        failures: configurations that did not run or answered wrongly, with the reason.
        compile_seconds: of all its kernels, on one processor.
        measured_seconds: on the GPU.
    """

    wanted: Wanted
    entry: Entry | None
    times: dict[Config, Timing] = field(default_factory=dict)
    failures: dict[Config, str] = field(default_factory=dict)
    compile_seconds: float = 0.0
    measured_seconds: float = 0.0


@dataclass
class Search:
    """A search over distinct problems; ``compile``, then ``measure``.

    Attributes:
        wanted: the problems; the same list in every process of the team.
        team: processes that share the work; None = this one.
        tried: what will be measured, by the problems' keys.
    """

    wanted: Sequence[Wanted]
    device: DeviceInfo
    team: Team = field(default_factory=Team.alone)
    progress: Progress | None = None
    tried: dict[str, list[Config]] = field(init=False)
    compiled: dict[str, list[Compiled]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.tried = {
            item.key: candidates(item.problem, self.device, pools(item.layer), item.budget) for item in self.wanted
        }
        self.wanted = sorted(self.wanted, key=lambda item: -predicted_us(item, self.device, self.tried[item.key]))

    def compile(self, workers: int | None = None, seconds: float = math.inf) -> list[Compiled]:
        """Compile and try all configurations; what is left out here compiles when it is measured.

        Args:
            workers: processes; None = a sensible number, 0 = none: nothing is compiled.
            seconds: what is not compiled by then counts as failed; the most promising of every problem come first.
        """
        if not self.wanted or workers == 0:
            return []
        jobs = {item.key: item.jobs(self.tried[item.key]) for item in self.wanted}
        most = max(map(len, jobs.values()))
        order = [(item.key, first) for first in range(0, most, TOGETHER) for item in self.wanted]
        queue = [job for key, first in order for job in jobs[key][first : first + TOGETHER]]
        pool = CompilePool(queue, str(self.wanted[0].x.device), self.team, workers)
        try:
            results = pool.results(lambda done: self._report("compile", done, len(queue)), seconds)
        finally:
            pool.close()
        by_job = dict(zip(queue, results))
        self.compiled = {key: [by_job[job] for job in mine] for key, mine in jobs.items()}
        return results

    def outcome(self, item: Wanted) -> Outcome:
        """What compiling alone says of a problem."""
        compiled = self.compiled.get(item.key, [])
        failures = {config: done.reason for config, done in zip(self.tried[item.key], compiled) if done.reason}
        return Outcome(item, None, failures=failures, compile_seconds=sum(done.seconds for done in compiled))

    def measure(self, store: TuningStore, on_outcome: Callable[[Outcome], None] = lambda outcome: None) -> list[Entry]:
        """Find and store the problems' choices, the longest problem first.

        Args:
            store: where each choice goes as soon as it is found.
            on_outcome: called with every outcome of this process.
        Returns:
            the choices of the whole team; problems that nothing runs are absent.
        """
        names = [f"problem {index}" for index in range(len(self.wanted))]

        def report() -> None:
            done = [item.name for item, name in zip(self.wanted, names) if self.team.heard(name) is not None]
            self._report(done[-1] if done else "measure", len(done), len(names))

        while (index := self.team.claim("problem")) < len(names):
            report()
            item = self.wanted[index]
            with torch.cuda.device(item.x.device if item.x.device.type == "cuda" else -1):
                outcome = self.outcome(item)
                find(outcome, self.device, self.tried[item.key])
            if outcome.entry:
                store.put([outcome.entry])
            on_outcome(outcome)
            self.team.announce(names[index], json.dumps(outcome.entry.to_json() if outcome.entry else None))
        found = [json.loads(text) for text in self.team.wait_for(names, report)]
        report()
        return [Entry.from_json(data, "tune") for data in found if data is not None]

    def _report(self, name: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(name, done, total)


def predicted_us(wanted: Wanted, device: DeviceInfo, tried: list[Config]) -> float:
    """What measuring a problem's configurations will about take; only ratios count."""
    return len(tried) * (500.0 + estimate_us(wanted.problem, device, tried[0]))


def find(outcome: Outcome, device: DeviceInfo, tried: list[Config]) -> None:
    """Race the configurations that compiled, then time the leaders beside the default (``tried[0]``)."""
    started, wanted = time.monotonic(), outcome.wanted
    bench = LayerBench(wanted.layer, wanted.x, outcome.failures)
    raced = bench.race(tried)
    leaders = sorted(raced, key=raced.__getitem__)[:FINALISTS]
    times = bench.final([tried[0], *leaders])
    outcome.times = dict(sorted(times.items(), key=lambda item: item[1].median_us))
    if times:
        best = next(iter(outcome.times))
        default_us = times[tried[0]].median_us if tried[0] in times else math.nan
        outcome.entry = Entry(
            device.name, device.capability, device.triton_version, wanted.problem, best, times[best].median_us,
            default_us, len(raced), pools(wanted.layer),
        )  # fmt: skip
    outcome.measured_seconds = time.monotonic() - started
    if wanted.x.device.type == "cuda":
        torch.cuda.empty_cache()
