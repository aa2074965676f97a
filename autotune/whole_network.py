"""The whole network, timed: dense as a user would run it, against pruned and converted by a plan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn

from tetris.autotune.measure import cudnn_search
from tetris.autotune.timer import graphed, time_us
from tetris.conversion import convert, to_channels_last
from tetris.errors import TetrisError, UnsupportedError
from tetris.fusion import fold_batch_norms
from tetris.masking import prune
from tetris.plans import EndToEnd, ModelPlan
from tetris.tracing import ExampleInputs, as_arguments, trace

WAYS = ("eager", "graph", "compile")
"""How a network is run: as it is, replayed from a CUDA graph, or compiled (on a GPU and replayed from a graph)."""


def best_way(device: torch.device) -> str:
    """What a user who wants speed does: compile on a GPU; on a CPU nothing, a compiler is often not there."""
    return "compile" if device.type == "cuda" else "eager"


@dataclass(frozen=True)
class WholeNetwork:
    """Calling it with a plan times the model, dense and converted: see :func:`tetris.autotune.never_slower`.

    Attributes:
        model: dense; not changed.
        example_inputs: as for :func:`tetris.plan`, on the model's device.
        how: one of WAYS.
        method: the reordering of the converted model.
        repeats: timed runs.
        seed: of the reordering.
    """

    model: nn.Module
    example_inputs: ExampleInputs
    how: str
    method: str = "sort"
    repeats: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        if self.how not in WAYS:
            raise TetrisError(f"plan: wanted to run the whole network in one of {', '.join(WAYS)}; got {self.how!r}")

    @torch.no_grad()
    def __call__(self, plan: ModelPlan) -> EndToEnd:
        pruned = prune(self.model, plan=plan, method=self.method, example_inputs=self.example_inputs, seed=self.seed)
        fast = convert(pruned, self.example_inputs, plan=plan)
        device = next(self.model.parameters()).device
        networks = {"dense": dense_baseline(self.model, self.example_inputs), "converted": fast}
        if device.type != "cuda":
            networks["dense as given"] = copy.deepcopy(self.model).eval()
        with cudnn_search():
            runs = {name: self._runnable(network, device) for name, network in networks.items()}
            times = time_us(runs, device=device, repeats=self.repeats, queue_ahead=False, budget_s=10.0)
        decisive = attrgetter("median_us" if device.type == "cuda" else "p10_us")  # other processes only add time
        dense_us = min(decisive(time) for name, time in times.items() if name.startswith("dense"))
        return EndToEnd(self.how, dense_us, decisive(times["converted"]))

    def _runnable(self, network: nn.Module, device: torch.device) -> Callable[[], object]:
        args, kwargs = as_arguments(self.example_inputs)
        network(*args, **kwargs)  # launches are made eagerly, never while compiling
        called = torch.compile(network, dynamic=False) if self.how == "compile" else network

        def run() -> object:
            return called(*args, **kwargs)

        run()
        return graphed(run) if self.how != "eager" and device.type == "cuda" else run


def dense_baseline(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    """A copy with batch norms folded into convolutions and channels_last weights, as the converted model has them."""
    dense = copy.deepcopy(model).eval().requires_grad_(False)
    try:
        dense = trace(dense, example_inputs)
    except UnsupportedError:  # convert, too, keeps the norms of a model that cannot be traced
        pass
    else:
        fold_batch_norms(dense)
        dense.delete_all_unused_submodules()
        dense.recompile()
    to_channels_last(dense)
    return dense
