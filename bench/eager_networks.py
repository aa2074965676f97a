"""Whole networks as one may run them without a CUDA graph, and with one: is the CPU fast enough for the GPU?"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tetris
from tetris.autotune.device import device_name, short_name, versions
from tetris.autotune.measure import cudnn_search
from tetris.autotune.timer import graphed, time_us
from tetris.autotune.tuner import apply_tuned
from tetris.autotune.whole_network import dense_baseline
from tetris.bench.host_time import host_us
from tetris.bench.networks import NETWORKS, NetworkCase, trained_like
from tetris.bench.rows import Row
from tetris.plans import ModelPlan
from tetris.tolerances import relative_error

CALLS = 20
"""In a row, of a network that launches some twenty kernels: as many launches as a GPU's queue holds without waiting."""


@torch.no_grad()
def network_rows(name: str, args: argparse.Namespace) -> list[Row]:
    """Eight rows a batch: dense and converted, each eager, compiled (twice, see :func:`ways`), and from a CUDA graph.

    ``median_us`` is the time of a call, the GPU's included; ``cpu_us`` what the CPU alone takes to issue it; ``error``
    the relative difference from the same network eager. On a CPU there are no graphs.
    """
    case, dtype = NETWORKS[name], torch.float16 if args.device == "cuda" else torch.float32
    model = trained_like(case, args.device, dtype)
    rows = []
    for batch in args.batch:
        x = case.inputs(batch, args.device, dtype)
        networks = {"dense": dense_baseline(model, x), "tetris": converted(case, model, x)}
        expected = {label: network(x) for label, network in networks.items()}
        with cudnn_search():
            runs = {key: call for label, network in networks.items() for key, call in ways(label, network, x, args)}
            errors = {key: relative_error(call(), expected[key.split()[0]]) for key, call in runs.items()}
            times = time_us(
                {key: graphed(call) if key.endswith("graph") else call for key, call in runs.items()},
                device=args.device, repeats=args.repeats, queue_ahead=False, budget_s=10.0,
            )  # fmt: skip
            cpu = {key: host_us(partial(_call, call), x, args.repeats, CALLS) for key, call in runs.items()}
        for key, timing in times.items():
            rows.append(
                Row(
                    "eager",
                    f"{name} b{batch}",
                    key,
                    timing.median_us,
                    timing.p10_us,
                    timing.p90_us,
                    speedup=times["dense eager"].median_us / timing.median_us,
                    error=errors[key],
                    device=device_name(args.device),
                    versions=versions(),
                    extra={"cpu_us": math.nan if key.endswith("graph") else cpu[key].median_us},
                )
            )
        taken = (f"{row.provider} {row.median_us:.0f} (CPU {row.extra['cpu_us']:.0f})" for row in rows[-len(times) :])
        print(f"{name} b{batch}:", *taken, flush=True)
    return rows


def converted(case: NetworkCase, model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The converted network: by the plan that the network bench has saved for this device and batch, if it has."""
    file = plans_folder(x.device.type) / f"{case.name}_b{len(x)}.json"
    if file.is_file():
        plan = ModelPlan.load(file)
        pruned = tetris.prune(model, plan=plan, method="sort", example_inputs=x)
        fast = tetris.convert(pruned, example_inputs=x, plan=plan)
    else:
        blocks = {layers: candidates[0] for layers, candidates in case.blocks.items()}
        fast = tetris.convert(tetris.prune(model, case.sparsity, blocks, "sort", example_inputs=x), example_inputs=x)
    if x.is_cuda:
        apply_tuned(fast, x)
    return fast


def plans_folder(device: str) -> Path:
    """Where the network bench saves its plans."""
    return Path(__file__).resolve().parent / "results" / short_name(device) / "plans"


def ways(
    label: str, network: nn.Module, x: torch.Tensor, args: argparse.Namespace
) -> list[tuple[str, Callable[[], torch.Tensor]]]:
    """(name, call) of the ways to run a network; none is graphed yet. The network meets its input before a compiler.

    "unguarded": torch.compile does not look at every call whether the network's modules are what they were.
    """
    network(x)
    found: list[tuple[str, Callable[[], torch.Tensor]]] = [(f"{label} eager", partial(network, x))]
    if args.backend != "none":
        compiled = torch.compile(network, fullgraph=True, dynamic=False, backend=args.backend)
        found.append((f"{label} compiled", partial(compiled, x)))
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        if args.backend == "inductor":
            unguarded = torch.compile(network, fullgraph=True, dynamic=False, options=options)
            found.append((f"{label} compiled, unguarded", partial(unguarded, x)))
        if x.is_cuda:
            found.append((f"{label} compiled, graph", partial(compiled, x)))
    return found


def _call(call: Callable[[], torch.Tensor], x: torch.Tensor) -> object:
    return call()
