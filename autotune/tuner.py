"""``tetris tune``: time kernel configurations for a converted model's layers and remember the best.

Nothing here runs in a forward pass. A layer's choice is a key at ``layer.config``: set once by :func:`apply_tuned` (a
look-up) or :func:`tune_model` (a search), constant afterwards, so CUDA graphs and torch.compile are safe.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tetris.autotune.compile_server import CompileServer
from tetris.autotune.device import device_info
from tetris.autotune.problems import SparseLayer, capture_inputs, pools, problem_of
from tetris.autotune.space import is_valid
from tetris.autotune.store import TuningStore
from tetris.autotune.team import Team
from tetris.autotune.tune_problems import Outcome, Progress, Search, Wanted
from tetris.errors import TetrisError, UnsupportedError
from tetris.kernels.configs import DeviceInfo
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.tracing import ExampleInputs, call_once
from tetris.tuned_choices import Entry, problem_key


@dataclass
class Tuning:
    """What :func:`tune_model` did. ``print`` it.

    Attributes:
        entries: the choice for every distinct problem of the model, in the order of its layers.
        layers: names of the layers by problem key.
        reused: keys that were in the store already.
        ruled_out: how many valid configurations the cost model (or the budget) left out.
        failures: configurations that did not run or answered wrongly in this process, with the reason.
        compile_seconds, measured_seconds: this process's share of the work: processor seconds of compiling, and seconds
            on the GPU.
        seconds: on the clock, everything included.
    """

    entries: list[Entry] = field(default_factory=list)
    layers: dict[str, list[str]] = field(default_factory=dict)
    reused: set[str] = field(default_factory=set)
    ruled_out: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    compile_seconds: float = 0.0
    measured_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count what a search in this process took and where it failed."""
        self.compile_seconds += outcome.compile_seconds
        self.measured_seconds += outcome.measured_seconds
        self.failures |= {config.to_key(): reason for config, reason in outcome.failures.items()}

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = []
        for entry in self.entries:
            key = problem_key(entry.problem, entry.max_pool)
            gain = entry.default_us / entry.time_us
            state = "known" if key in self.reused else f"{entry.tried} tried"
            names = self.layers.get(key, [])
            label = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else ""
            rows.append(
                [label, entry.config.kernel, f"{entry.default_us:.1f}", f"{entry.time_us:.1f}", f"{gain:.2f}", state]
            )
        head = ["layer", "kernel", "default us", "tuned us", "gain", ""]
        lines = [tabulate(rows, headers=head, disable_numparse=True)]
        lines += [f"{key}: no configuration runs" for key in self.layers if key not in self.keys()]
        lines += [f"{self.ruled_out} configurations ruled out without a try"] if self.ruled_out else []
        lines += [f"{len(self.failures)} configurations failed or were wrong"] if self.failures else []
        return "\n".join([*lines, f"{self.seconds:.1f} s, of which {self.measured_seconds:.1f} s on the GPU"])

    def keys(self) -> set[str]:
        """The problems that have a choice."""
        return {problem_key(entry.problem, entry.max_pool) for entry in self.entries}


def require_gpu(devices: Sequence[torch.device]) -> None:
    """Refuse layers elsewhere: only GPU kernels have configurations."""
    if any(device.type != "cuda" for device in devices):
        raise UnsupportedError("tune: wanted a model on a GPU; the CPU path has nothing to tune; move it with .cuda()")


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The block-sparse layers of a converted model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseConv2d | BlockSparseLinear)}


def apply_tuned(model: nn.Module, example_inputs: ExampleInputs, store: TuningStore | None = None) -> dict[str, float]:
    """Give every layer of a converted model its stored configuration for these inputs; measures nothing.

    Takes the exact or the nearest entry that is valid for the layer; layers without one keep the analytic default.

    Returns:
        layer name -> distance of the entry that was taken (0 = tuned for this very problem).
    """
    store, layers, found = store or TuningStore(), sparse_layers(model), {}
    for name, x in capture_inputs(model, example_inputs, layers).items():
        if x.device.type != "cuda":
            continue
        problem, device, pooled = problem_of(layers[name], x), device_info(x.device), pools(layers[name])
        match = store.lookup(problem, device, max_pool=pooled)
        if match and is_valid(problem, device, match.config, pooled):
            layers[name].use_config(match.config.to_key())
            found[name] = match.distance
    if found:
        call_once(model, example_inputs)  # makes the schedules, which compilers only read
    return found


def tune_model(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    store: TuningStore | None = None,
    budget: int | None = 24,
    again: bool = False,
    team: Team | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    server: CompileServer | None = None,
) -> Tuning:
    """Search a configuration for every distinct problem of a converted model; store it and set it on the layers.

    Every finished problem is stored at once: an interrupted run goes on where it stopped.

    Args:
        model: from :func:`tetris.convert`, on a GPU; only its layers' ``config`` changes.
        example_inputs: a tensor, tuple or dict at the batch and dtype to tune for.
        store: where choices go; None = the user's.
        budget: configurations measured for each problem; None = a full search.
        again: search problems that the store already holds for this device and Triton version.
        team: processes that share the work, each with the same model on its own GPU; None = this one alone.
        workers: processes that compile for this one; None = a sensible number, 0 = none.
        progress: called as ``progress(layer, problems done, problems in all)``.
        server: what starts the workers, if it was started earlier; it is closed. It takes seconds to start: none of
            them is lost if that happens while the model is loaded.
    Returns:
        what was chosen and tried.
    Raises:
        UnsupportedError: the model does not run on a GPU: nothing to tune.
    Cost: about ``budget`` compilations, spread over the processors, and 5 to 40 runs, for every distinct problem.
    """
    started = time.monotonic()
    store, team, layers = store or TuningStore(), team or Team.alone(), sparse_layers(model)
    if not layers:
        raise TetrisError("tune: wanted a converted model with block-sparse layers; it has none; call tetris.convert")
    inputs = capture_inputs(model, example_inputs, layers)
    require_gpu([x.device for x in inputs.values()])
    tuning = Tuning()
    distinct: dict[str, Wanted] = {}
    for name, x in inputs.items():
        item = Wanted(name, layers[name], x, budget)
        distinct.setdefault(item.key, item)
        tuning.layers.setdefault(item.key, []).append(name)
    device = device_info(next(iter(inputs.values())).device)
    known = {} if again else {key: _known(store, item, device) for key, item in distinct.items()}
    missing = json.loads(team.agree("missing", json.dumps([key for key in distinct if known.get(key) is None])))
    if missing and workers != 0:
        server = server or CompileServer(next(iter(inputs.values())).device.type)
    try:
        search = Search([distinct[key] for key in missing], device, team, progress)
        tuning.ruled_out = sum(search.ruled_out.values())
        search.compile(workers, server=server)
    finally:
        if server:
            server.close()
    found = search.measure(store, tuning.add)
    by_key = {problem_key(entry.problem, entry.max_pool): entry for entry in found}
    for key, names in tuning.layers.items():
        entry = by_key.get(key) or known.get(key)
        if entry is not None:
            tuning.entries.append(entry)
            for name in names:
                layers[name].use_config(entry.config.to_key())
    call_once(model, example_inputs)  # makes the schedules, which compilers only read
    tuning.reused = set(distinct) - set(missing)
    tuning.seconds = time.monotonic() - started
    return tuning


def _known(store: TuningStore, item: Wanted, device: DeviceInfo) -> Entry | None:
    """The store's entry for this very problem, device and version."""
    match = store.lookup(item.problem, device, farthest=0, max_pool=pools(item.layer))
    return match.entry if match else None
