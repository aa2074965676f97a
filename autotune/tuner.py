"""``tetris tune``: time kernel configurations for a converted model's layers and remember the best.

Nothing here runs in a forward pass. A layer's choice is a key at ``layer.config``: set once by :func:`apply_tuned` (a
look-up) or :func:`tune_model` (a search), constant afterwards, so CUDA graphs and torch.compile are safe.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tetris.autotune.compile_ahead import start_workers
from tetris.autotune.device import device_info
from tetris.autotune.problems import Problem, SparseLayer, capture_inputs, flop, pools, problem_of
from tetris.autotune.space import is_valid
from tetris.autotune.store import Entry, Match, TuningStore, problem_key
from tetris.autotune.tune_problem import LayerBench, first_jobs, tune_problem
from tetris.errors import TetrisError, UnsupportedError
from tetris.graph import ExampleInputs
from tetris.layers import BlockSparseConv2d, BlockSparseLinear

Progress = Callable[[str, int, int], None]


@dataclass
class Tuning:
    """What :func:`tune_model` did. ``print`` it.

    Attributes:
        entries: the choice for every distinct problem of the model, in the order of its layers.
        layers: names of the layers by problem key.
        reused: keys that were in the store already.
        failures: configurations that did not run or answered wrongly, with the reason.
    """

    entries: list[Entry] = field(default_factory=list)
    layers: dict[str, list[str]] = field(default_factory=dict)
    reused: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)

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
        table = tabulate(rows, headers=head, disable_numparse=True)
        return table + (f"\n{len(self.failures)} configurations failed or were wrong" if self.failures else "")


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun tells them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_gpu() -> str:
    """The GPU of this process: ``cuda:LOCAL_RANK`` under torchrun, otherwise ``cuda``."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def require_gpu(devices: Sequence[torch.device]) -> None:
    """Refuse layers elsewhere: only GPU kernels have configurations."""
    if any(device.type != "cuda" for device in devices):
        raise UnsupportedError("tune: wanted a model on a GPU; the CPU path has nothing to tune; move it with .cuda()")


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The block-sparse layers of a converted model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseConv2d | BlockSparseLinear)}


def use_config(layer: SparseLayer, key: str) -> None:
    """Give a layer a configuration; launches prepared with another one are forgotten."""
    layer.config = key
    layer._launches.clear()


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
            use_config(layers[name], match.config.to_key())
            found[name] = match.distance
    return found


def tune_model(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    store: TuningStore | None = None,
    budget: int = 24,
    again: bool = False,
    share: tuple[int, int] = (0, 1),
    processes: int | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Search a configuration for every distinct problem of a converted model; store it and set it on the layers.

    Every finished problem is stored at once: an interrupted run goes on where it stopped.

    Args:
        model: from :func:`tetris.convert`, on a GPU; only its layers' ``config`` changes.
        example_inputs: a tensor, tuple or dict at the batch and dtype to tune for.
        store: where choices go; None = the user's.
        budget: configurations measured for each problem.
        again: search problems that the store already holds for this device and Triton version.
        share: (rank, world): this process and how many share the work, one GPU each (see :func:`rank_and_world`);
            it takes every world-th problem, the most expensive dealt out first. Its layers alone get a config.
        processes: compile the first proposals of all problems in so many processes beforehand; None = a sensible
            number, 0 = none.
        progress: called as ``progress(layer, problems done, problems in all)``.
    Returns:
        what was chosen and tried.
    Raises:
        UnsupportedError: the model does not run on a GPU: nothing to tune.
    Cost: about ``budget`` compilations and 15 runs of each, for every distinct problem.
    """
    store, layers = store or TuningStore(), sparse_layers(model)
    if not layers:
        raise TetrisError("tune: wanted a converted model with block-sparse layers; it has none; call tetris.convert")
    inputs = capture_inputs(model, example_inputs, layers)
    require_gpu([x.device for x in inputs.values()])
    tuning = Tuning()
    problems: dict[str, tuple[str, Problem]] = {}
    for name, x in inputs.items():
        problem = problem_of(layers[name], x)
        key = problem_key(problem, pools(layers[name]))
        problems.setdefault(key, (name, problem))
        tuning.layers.setdefault(key, []).append(name)
    rank_, world = share
    dealt = list(problems.items()) if world == 1 else sorted(problems.items(), key=lambda item: -flop(item[1][1]))
    mine = dealt[rank_::world]
    if processes != 0 and mine:
        gpu = inputs[mine[0][1][0]].device
        known = {key for key, (name, problem) in mine if _known(store, problem, gpu, layers[name]) and not again}
        wanted = [(problem, layers[name]) for key, (name, problem) in mine if key not in known]
        start_workers(first_jobs(wanted, device_info(gpu), budget), str(gpu), processes).wait()
    for done, (key, (name, problem)) in enumerate(mine):
        if progress:
            progress(name, done, len(mine))
        device, pooled = device_info(inputs[name].device), pools(layers[name])
        match = _known(store, problem, inputs[name].device, layers[name])
        if match and not again:
            tuning.reused.add(key)
            tuning.entries.append(match.entry)
        else:
            bench = LayerBench(layers[name], inputs[name], problem, tuning.failures)
            entry = tune_problem(problem, device, bench, budget, pooled)
            store.put([entry])
            tuning.entries.append(entry)
        for layer in tuning.layers[key]:
            use_config(layers[layer], tuning.entries[-1].config.to_key())
    if progress and mine:
        progress(mine[-1][1][0], len(mine), len(mine))
    return tuning


def _known(store: TuningStore, problem: Problem, gpu: torch.device, layer: SparseLayer) -> Match | None:
    """The store's entry for this very problem, device and version."""
    return store.lookup(problem, device_info(gpu), farthest=0, max_pool=pools(layer))
