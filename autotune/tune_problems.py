"""A search over many problems: first all kernels are compiled and tried, in all processors, then the GPU measures.

Not both at once: trials of compiled kernels made times on the same GPU up to three times too long; but schedules, which
take Python longer than measuring takes the GPU, are made while kernels compile. Several processes, each with a GPU,
share everything. What is measured is stored at once and what is compiled stays in the compiler's cache, so
that an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import torch

from tetris.autotune.candidates import candidates
from tetris.autotune.compile_ahead import Compiled, CompilePool
from tetris.autotune.compile_job import Job, kernel_of
from tetris.autotune.compile_server import CompileServer
from tetris.autotune.cost import compile_seconds, estimate_us
from tetris.autotune.layer_bench import LayerBench, launched_ahead, warm_up
from tetris.autotune.problems import LayerInput, Problem, SparseLayer, fresh_config, pools, problem_of
from tetris.autotune.space import Config, config_space
from tetris.autotune.steps import Steps
from tetris.autotune.store import TuningStore
from tetris.autotune.team import Team
from tetris.autotune.timer import Timing
from tetris.kernels.configs import Conv2dConfig, DeviceInfo, LinearConfig, LinearProblem
from tetris.tuned_choices import Entry, problem_key, shipped_choice

TRIAL_SECONDS = 0.02
"""About what running a compiled kernel once takes a worker."""
AHEAD_BYTES = 2 << 30
"""Of copies of weights that launches prepared ahead may hold on the GPU at most."""
BAND = 6
"""Where compiling is limited in time, the first so many of every problem go before the next."""
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

    @cached_property
    def problem(self) -> Problem:
        return problem_of(self.layer, self.x)

    @cached_property
    def key(self) -> str:
        """Equal for layers that share a choice."""
        return problem_key(self.problem, pools(self.layer))

    def defaults(self, device: DeviceInfo) -> list[Config]:
        """What the layer runs where nobody tuned it, with the package's table and without; mostly the same."""
        tables = (True, False) if shipped_choice(self.problem, device, pools(self.layer)) else (False,)
        return list(dict.fromkeys(fresh_config(self.layer, self.problem, device, shipped) for shipped in tables))

    def jobs(self, configs: Sequence[Config]) -> list[Job]:
        """What compiles and tries the layer's kernels in another process."""
        layer = self.layer
        holds = torch.ones(0) if isinstance(self.problem, LinearProblem) else (layer.blocks != 0).flatten(1).any(1)
        base = Job(
            self.problem, "", layer.activation, pools(layer), layer.bias is not None,
            indptr=tuple(layer.indptr.tolist()), indices=tuple(layer.indices.tolist()),
            zeros=tuple((~holds.bool()).nonzero().flatten().tolist()),
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
        steps: what these went into.
    """

    wanted: Wanted
    entry: Entry | None
    times: dict[Config, Timing] = field(default_factory=dict)
    failures: dict[Config, str] = field(default_factory=dict)
    compile_seconds: float = 0.0
    measured_seconds: float = 0.0
    steps: Steps = field(default_factory=Steps)


@dataclass
class Search:
    """A search over distinct problems; ``compile``, then ``measure``.

    Attributes:
        wanted: the problems; the same list in every process of the team.
        team: processes that share the work; None = this one.
        defaults: what runs where nobody tuned, as ``Wanted.defaults`` tells, by the problems' keys.
        tried: what will be measured, the defaults first.
        ruled_out: how many valid configurations of each will not.
        ahead: layers whose launches were prepared while others compiled.
        steps: what compiling took on the clock.
    """

    wanted: Sequence[Wanted]
    device: DeviceInfo
    team: Team = field(default_factory=Team.alone)
    progress: Progress | None = None
    defaults: dict[str, list[Config]] = field(init=False, default_factory=dict)
    tried: dict[str, list[Config]] = field(init=False, default_factory=dict)
    ruled_out: dict[str, int] = field(init=False, default_factory=dict)
    compiled: dict[str, list[Compiled]] = field(init=False, default_factory=dict)
    ahead: dict[str, dict[Config, SparseLayer]] = field(init=False, default_factory=dict)
    steps: Steps = field(init=False, default_factory=Steps)

    def __post_init__(self) -> None:
        names = [f"candidates {index}" for index in range(len(self.wanted))]
        for index in self.team.share("candidates", names):
            self.team.announce(names[index], json.dumps(self._candidates(self.wanted[index])))
        for item, text in zip(self.wanted, self.team.wait_for(names)):
            kind = LinearConfig if isinstance(item.problem, LinearProblem) else Conv2dConfig
            defaults, tried, self.ruled_out[item.key] = json.loads(text)
            self.defaults[item.key] = [kind.from_key(key) for key in defaults]
            self.tried[item.key] = [kind.from_key(key) for key in tried]
        self.wanted = sorted(self.wanted, key=lambda item: -predicted_us(item, self.device, self.tried[item.key]))

    def _candidates(self, item: Wanted) -> tuple[list[str], list[str], int]:
        """The keys of a problem's defaults, of what will be measured, and how many valid configurations will not."""
        space = config_space(item.problem, self.device, pools(item.layer))
        chosen = candidates(item.problem, self.device, pools(item.layer), item.budget, space)
        defaults = item.defaults(self.device)
        tried = list(dict.fromkeys([*defaults, *chosen]))
        return [c.to_key() for c in defaults], [c.to_key() for c in tried], len(set(space) - set(tried))

    def compile(
        self, workers: int | None = None, seconds: float = math.inf, server: CompileServer | None = None
    ) -> list[Compiled]:
        """Compile and try all configurations; what is left out here compiles when it is measured.

        Args:
            workers: processes; None = a sensible number, 0 = none: nothing is compiled.
            seconds: what is not compiled by then counts as failed; the most promising of every problem come first.
            server: what starts the workers, if it was started earlier; it is closed.
        """
        if not self.wanted or workers == 0:
            return []
        jobs = {item.key: item.jobs(self.tried[item.key]) for item in self.wanted}
        batches = self.batches(jobs, None if seconds == math.inf else BAND)
        queue = [job for batch in batches for job in batch]
        with self.steps.timed("start"):
            pool = CompilePool(batches, str(self.wanted[0].x.device), self.team, workers, server)
            warm_up(self.wanted[0].x.device)
        try:
            with self.steps.timed("wait"):
                results = pool.results(
                    lambda done: self._report("compile", done, len(queue)), seconds, self._launches_ahead()
                )
        finally:
            with self.steps.timed("close"):
                pool.close()
        by_job = dict(zip(queue, results))
        self.compiled = {key: [by_job[job] for job in mine] for key, mine in jobs.items()}
        return results

    def _launches_ahead(self) -> Iterator[None]:
        """Make the schedules that measuring will need, one a step, starting with what this process will measure.

        What fails here will fail again when it is measured, and is noted there.
        """
        at_hand = AHEAD_BYTES
        for turn in range(self.team.world):
            for item in self.wanted[(self.team.rank + turn) % self.team.world :: self.team.world]:
                copies = len(self.tried[item.key]) * item.layer.values.nbytes
                if item.x.device.type != "cuda" or copies > at_hand:
                    continue
                at_hand -= copies
                made = self.ahead.setdefault(item.key, {})
                for config in self.tried[item.key]:
                    with suppress(Exception):
                        made[config] = launched_ahead(item.layer, item.x, config)
                    yield

    def batches(self, jobs: dict[str, list[Job]], band: int | None = None) -> list[list[Job]]:
        """All jobs, those of one kernel together, because two workers at once would both compile it; the longest first.

        With ``band`` what holds one of so many first jobs of a problem comes before the rest, and defaults before all,
        because time may run out.
        """
        most = max(map(len, jobs.values()))
        kernels: dict[tuple[object, ...], list[Job]] = {}
        turns: dict[tuple[object, ...], tuple[int, bool, float]] = {}
        for rank, item in [(rank, item) for rank in range(most) for item in self.wanted if rank < len(jobs[item.key])]:
            job, config = jobs[item.key][rank], self.tried[item.key][rank]
            kernel = kernel_of(job, self.device)
            kernels.setdefault(kernel, []).append(job)
            first = (rank // band, rank > 0) if band else (0, False)
            group, late, seconds = turns.setdefault(kernel, (*first, -compile_seconds(config)))
            turns[kernel] = group, late, seconds - TRIAL_SECONDS
        return [kernels[kernel] for kernel in sorted(kernels, key=turns.__getitem__)]

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

        for index in self.team.share("problem", names, report):
            report()
            item = self.wanted[index]
            with torch.cuda.device(item.x.device if item.x.device.type == "cuda" else -1):
                outcome = self.outcome(item)
                ahead = self.ahead.pop(item.key, {})
                find(outcome, self.device, self.tried[item.key], len(self.defaults[item.key]), ahead)
            if outcome.entry:
                store.put([outcome.entry])
            on_outcome(outcome)
            self.team.announce(names[index], json.dumps(outcome.entry.to_json() if outcome.entry else None))
        found = [json.loads(text) for text in self.team.wait_for(names)]
        report()
        return [Entry.from_json(data, "tune") for data in found if data is not None]

    def _report(self, name: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(name, done, total)


def predicted_us(wanted: Wanted, device: DeviceInfo, tried: list[Config]) -> float:
    """What measuring a problem's configurations will about take; only ratios count."""
    return len(tried) * (500.0 + estimate_us(wanted.problem, device, tried[0]))


def find(
    outcome: Outcome,
    device: DeviceInfo,
    tried: list[Config],
    n_defaults: int = 1,
    ahead: Mapping[Config, SparseLayer] = MappingProxyType({}),
) -> None:
    """Race the configurations that compiled, then time the leaders beside the defaults, the first ``n_defaults``.

    ``ahead``: the layer in configurations whose launches are prepared.
    """
    started, wanted = time.monotonic(), outcome.wanted
    bench = LayerBench(wanted.layer, wanted.x, outcome.failures, outcome.steps, ahead)
    raced = bench.race(tried)
    leaders = sorted(raced, key=raced.__getitem__)[:FINALISTS]
    times = bench.final(list(dict.fromkeys([*tried[:n_defaults], *leaders])))
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
