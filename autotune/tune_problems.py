"""A search over many problems: kernels compile in all processors while the GPU measures the problems that are ready.

Several processes, each with a GPU, share the problems and the compiling. What is finished is stored at once, so that an
interrupted search goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tetris.autotune.candidates import candidates
from tetris.autotune.compile_ahead import CompilePool
from tetris.autotune.compile_job import Job
from tetris.autotune.cost import estimate_us
from tetris.autotune.layer_bench import LayerBench
from tetris.autotune.problems import LayerInput, Problem, SparseLayer, pools, problem_of
from tetris.autotune.space import Config
from tetris.autotune.store import TuningStore
from tetris.autotune.team import Team
from tetris.kernels.configs import DeviceInfo
from tetris.tuned_choices import Entry, problem_key

FINALISTS = 4
"""So many of a race are timed again, beside the default."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """A layer to tune: its name, itself and what it gets."""

    name: str
    layer: SparseLayer
    x: LayerInput

    @property
    def problem(self) -> Problem:
        return problem_of(self.layer, self.x)

    @property
    def key(self) -> str:
        """Equal for layers that share a choice."""
        return problem_key(self.problem, pools(self.layer))

    def job(self, config: Config) -> Job:
        """What compiles and tries the layer's kernel in another process."""
        layer = self.layer
        return Job(self.problem, config.to_key(), layer.activation, pools(layer), layer.bias is not None)


@dataclass
class Outcome:
    """What the search of one problem found.

    Attributes:
        entry: the choice; None where no configuration ran.
        leaders: the last race's configurations, the fastest first, the default among them.
        failures: configurations that did not run or answered wrongly, with the reason.
        compile_seconds: of all its kernels, on one processor.
        waited_seconds, measured_seconds: until its kernels were there, and then on the GPU.
    """

    wanted: Wanted
    entry: Entry | None
    leaders: list[Config] = field(default_factory=list)
    failures: dict[Config, str] = field(default_factory=dict)
    compile_seconds: float = 0.0
    waited_seconds: float = 0.0
    measured_seconds: float = 0.0


def tune_problems(
    wanted: Sequence[Wanted],
    device: DeviceInfo,
    store: TuningStore,
    *,
    budget: int | None = None,
    team: Team | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Entry]:
    """Search a configuration for every problem; store each as soon as it is found.

    Args:
        wanted: distinct problems that the store does not hold; the same list in every process of the team.
        budget: configurations to measure of each; None = a full search (see ``candidates``).
        team: processes that share the work; None = this one.
        workers: processes that compile; None = a sensible number, 0 = none: kernels compile when they are measured.
        progress: called with (layer, problems done by the team, problems in all).
        on_outcome: called with every outcome of this process.
    Returns:
        the choices of the whole team; problems that nothing runs are absent.
    """
    team = team or Team.alone()
    tried = {item.key: candidates(item.problem, device, pools(item.layer), budget) for item in wanted}
    todo = sorted(
        wanted, key=lambda item: -predicted_us(item, device, tried[item.key])
    )  # the longest first: it evens out
    configs = [tried[item.key] for item in todo]
    jobs = [item.job(config) for item in todo for config in tried[item.key]]
    pool = CompilePool(jobs, str(todo[0].x.device), team, workers) if todo and workers != 0 else None

    def report() -> None:
        if progress and todo:
            done = [item.name for index, item in enumerate(todo) if team.heard(f"problem {index}") is not None]
            progress(done[-1] if done else "compile", len(done), len(todo))

    try:
        first = [sum(map(len, configs[:index])) for index in range(len(todo))]
        while (index := team.claim("problem")) < len(todo):
            report()
            gpu = todo[index].x.device
            with torch.cuda.device(gpu if gpu.type == "cuda" else -1):
                outcome = search(todo[index], device, configs[index], pool, first[index])
            if outcome.entry:
                store.put([outcome.entry])
            on_outcome(outcome)
            team.announce(f"problem {index}", json.dumps(outcome.entry.to_json() if outcome.entry else None))
        texts = team.wait_for((f"problem {index}" for index in range(len(todo))), report)
    finally:
        if pool:
            pool.close()
    report()
    return [Entry.from_json(data, "tune") for data in map(json.loads, texts) if data is not None]


def predicted_us(wanted: Wanted, device: DeviceInfo, tried: list[Config]) -> float:
    """What measuring a problem's configurations will about take; only ratios count."""
    return len(tried) * (500.0 + estimate_us(wanted.problem, device, tried[0]))


def search(wanted: Wanted, device: DeviceInfo, tried: list[Config], pool: CompilePool | None, first: int) -> Outcome:
    """Race what compiled, then time the leaders beside the default (``tried[0]``)."""
    started = time.monotonic()
    outcome = Outcome(wanted, None)
    if pool:
        compiled = dict(zip(tried, pool.results(range(first, first + len(tried)))))
        outcome.failures = {config: done.reason for config, done in compiled.items() if done.reason}
        outcome.compile_seconds = sum(done.seconds for done in compiled.values())
    ready = time.monotonic()
    outcome.waited_seconds = ready - started
    bench = LayerBench(wanted.layer, wanted.x, outcome.failures)
    raced = bench.race(tried)
    leaders = sorted(raced, key=raced.__getitem__)[:FINALISTS]
    times = {config: time.median_us for config, time in bench.final([tried[0], *leaders]).items()}
    outcome.leaders = sorted(times, key=times.__getitem__)
    if times:
        best = outcome.leaders[0]
        outcome.entry = Entry(
            device.name, device.capability, device.triton_version, wanted.problem, best, times[best],
            times.get(tried[0], math.nan), len(raced), pools(wanted.layer),
        )  # fmt: skip
    outcome.measured_seconds = time.monotonic() - ready
    if wanted.x.device.type == "cuda":
        torch.cuda.empty_cache()
    return outcome
