"""``tetris.plan``: measure every layer, dense and in candidate blocks, and decide which block each should take.

Each block is timed on the device, at the user's batch and dtype, with the layout that reordering and pruning this very
weight would give (a random layout is easier on a kernel). The dense layer runs interleaved with them, on dense random
weights. The decisions themselves are pure functions of the measurements; see :mod:`tetris.autotune.decide`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from tetris.autotune.decide import allocate, choose_block
from tetris.autotune.device import device_name, versions
from tetris.autotune.measure import Epilogue, LayerTimer
from tetris.autotune.never_slower import never_slower
from tetris.autotune.own_orders import OrderChooser, measured_moves, own_orders, stores_groups
from tetris.autotune.problems import LayerInput, capture_inputs
from tetris.autotune.store import TuningStore
from tetris.autotune.unpruned import UnprunedLayers
from tetris.autotune.whole_network import WholeNetwork, best_way
from tetris.block_sparse_layer import BlockSparseLayer
from tetris.conversion import Conversion, convert
from tetris.errors import TetrisError, describe
from tetris.importance import importance_of
from tetris.masking import masked_layers, prune
from tetris.ops import dtype_name
from tetris.plans import LayerPlan, ModelPlan
from tetris.pruning import Block
from tetris.specs import SparsitySpec, match, prunable_layers, resolve_sparsity, worth_pruning
from tetris.tracing import ExampleInputs

AUTO_SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Measured for ``sparsity="auto"``, where a budget chooses each layer's rate."""

Progress = Callable[[str, int, int], None]


def plan(
    model: nn.Module,
    example_inputs: ExampleInputs,
    sparsity: SparsitySpec | str = 0.73,
    blocks: Sequence[Block] | Mapping[str, Sequence[Block]] | None = None,
    method: str = "sort",
    *,
    importance: str = "l1",
    target_speedup: float | None = None,
    max_importance_loss: float | None = None,
    device: str | torch.device | None = None,
    store: TuningStore | None = None,
    repeats: int = 15,
    seconds_per_layer: float = 2.0,
    seed: int = 0,
    permutations: str = "auto",
    whole: str | None = "auto",
    epilogues: Mapping[str, Epilogue] | None = None,
    progress: Progress | None = None,
) -> ModelPlan:
    """Decide block and sparsity of every layer from measurements.

    >>> plan = tetris.plan(model, x, sparsity=0.73)                         # each layer at its critical point
    >>> plan = tetris.plan(model, x, sparsity="auto", target_speedup=2.0)   # 2x at the least lost importance
    >>> pruned = tetris.prune(model, plan=plan, example_inputs=x)

    Args:
        model: dense; not changed. Layers are measured where the model lies, or on ``device``.
        example_inputs: a tensor, tuple or dict to call it with; its batch is what the plan is for.
        sparsity: as for :func:`tetris.prune`, or "auto": rates of 50 to 90 % are measured and a budget chooses. With a
            budget, given rates are the most that may be pruned.
        blocks: candidates, edges or pairs (out, in); a dict by layer name (globs) of these; None takes a set that
            suits the device.
        method: the reordering that makes the measured layouts, see :func:`tetris.reorder`. "sort" takes milliseconds
            and crowds the kept blocks as the slower methods do.
        importance: "l1" or "l2".
        target_speedup: over the sum of the prunable layers' times; reached at the least lost importance.
        max_importance_loss: fraction of the model's importance that may go; spent for the highest speed.
        device: where to measure; None = the model's.
        store: tuned kernel configurations to measure with; None = the user's and the package's.
        repeats, seconds_per_layer: timed runs of every candidate, fewer once a layer has taken that long.
        seed: of the reordering and the random inputs.
        permutations: "shared": no layer's channels are moved at run time; "auto": a layer has its own order where that
            lets it prune so much more that it pays for moving them, see :mod:`tetris.autotune.own_orders`.
        whole: how to run the whole network, dense and converted, for the last check: "eager", "graph" (CUDA graph),
            "compile" (with a CUDA graph on a GPU), "auto" (compile on a GPU, else eager) or None to leave it out.
            While the converted network is slower, the layers that gain least go back to dense, and the plan says so.
        epilogues: what conversion fuses behind each layer, where :func:`fused_epilogues` was asked before, which takes
            seconds for a large model; None asks it.
        progress: called as ``progress(layer, layers done, layers in all)``.
    Returns:
        a ModelPlan; ``print`` it. A layer on which no block beats the dense one by 2 % stays dense, and the converted
        network as a whole is not slower than the dense one, see :func:`tetris.autotune.never_slower.never_slower`.
    Raises:
        TetrisError: a pruned model, "auto" without a budget, a target that nothing measured reaches.
    Cost: (candidates + 1) x (repeats + 3) runs of every layer, compilation, and one reordering a block and layer; then
        compiling and timing the whole network once, more often where it is slower than the dense one.
    """
    if masked_layers(model):
        raise TetrisError("plan: wanted a dense model; this one is pruned already; plan the original")
    if target_speedup is not None and max_importance_loss is not None:
        raise TetrisError("plan: wanted one budget, target_speedup or max_importance_loss; got both")
    layers = prunable_layers(model)
    rates = _sparsities(sparsity, layers, has_budget=target_speedup is not None or max_importance_loss is not None)
    inputs = capture_inputs(model, example_inputs, layers)
    if not inputs:
        raise TetrisError("plan: wanted example inputs that reach a Conv2d or Linear layer; these reach none")
    first = next(iter(inputs.values()))
    where = torch.device(device) if device is not None else first.device
    timer = LayerTimer(None, method, importance, where, store or TuningStore(), repeats, seconds_per_layer, seed)
    candidates = match(blocks, list(layers), "blocks") if isinstance(blocks, Mapping) else dict.fromkeys(layers, blocks)
    on_gpu = where.type == "cuda"
    if epilogues is None:
        asked = [n for n, layer in layers.items() if n in rates or (on_gpu and worth_pruning(layer.weight.shape))]
        epilogues = fused_epilogues(model, example_inputs, asked)
    unpruned = UnprunedLayers(timer)
    plans = []
    names = [*inputs, *(name for name in layers if name not in inputs)]
    for done, name in enumerate(names):
        if progress:
            progress(name, done, len(names))
        mine = replace(timer, blocks=candidates.get(name))
        x, epilogue = inputs.get(name), epilogues.get(name)
        found = _described(name, layers[name], x, importance)
        if x is None:
            plans.append(replace(found, reason="dense: the example inputs do not reach it"))
        elif name in rates:
            measured = mine.measure(layers[name], x, rates[name], epilogue)
            plans.append(replace(found, candidates=measured.candidates, failures=measured.failures))
        else:
            plans.append(unpruned.decide(found, layers[name], x, epilogue))
    if progress:
        progress(names[-1], len(names), len(names))
    budget = ""
    if target_speedup is not None or max_importance_loss is not None:
        plans = within_budget(plans, target_speedup=target_speedup, max_importance_loss=max_importance_loss)
        budget = f"target {target_speedup}x" if target_speedup else f"at most {max_importance_loss:.1%} lost"
    else:
        plans = [_at_critical_point(p, rates[p.name][0]) if p.name in rates and p.candidates else p for p in plans]
    decided = ModelPlan(tuple(plans), device_name(where), versions(), dtype_name(first.dtype), method, budget)
    if where != first.device:
        return decided
    if permutations == "auto" and decided.blocks:
        chooser = OrderChooser(measured_moves(first, repeats), method, importance, stores_groups, seed)
        decided = own_orders(model, example_inputs, decided, chooser, inputs, epilogues)
    if whole is None:
        return decided
    how = best_way(where) if whole == "auto" else whole
    return never_slower(decided, WholeNetwork(model, example_inputs, how, method, repeats, seed))


def _sparsities(
    sparsity: SparsitySpec | str, layers: dict[str, nn.Conv2d | nn.Linear], has_budget: bool
) -> dict[str, tuple[float, ...]]:
    """The sparsities to measure by layer name; absent layers stay dense."""
    if not isinstance(sparsity, str):
        return {name: (rate,) for name, rate in resolve_sparsity(sparsity, layers).items()}
    if sparsity != "auto" or not has_budget:
        raise TetrisError(
            "plan: wanted rates, or sparsity='auto' with target_speedup or max_importance_loss; "
            f"got {describe(sparsity)}{'' if has_budget else ' without a budget'}"
        )
    return {name: AUTO_SPARSITIES for name, layer in layers.items() if worth_pruning(layer.weight.shape)}


def fused_epilogues(model: nn.Module, example_inputs: ExampleInputs, names: Sequence[str]) -> dict[str, Epilogue]:
    """What conversion will fuse behind each layer that may be pruned; nothing where the model cannot be traced."""
    if not names:
        return {}
    pruned = prune(model, dict.fromkeys(names, 0.5), block=16, method="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model that cannot be traced is warned about when it is converted
        fast = convert(pruned, example_inputs)
    record = cast(Conversion, fast.conversion)
    return {
        name: Epilogue(
            module.activation,
            module.max_pool,
            module.bias is not None,
            "residual" in record.layers[name].fused,
        )
        for name, module in fast.named_modules()
        if isinstance(module, BlockSparseLayer)
    }


def _described(name: str, layer: nn.Conv2d | nn.Linear, x: LayerInput | None, importance: str) -> LayerPlan:
    """The layer before anything is measured: its shapes and its importance."""
    kind = "linear" if isinstance(layer, nn.Linear) else "conv2d"
    total = float(importance_of(layer.weight.detach(), importance).sum(dtype=torch.float64))
    return LayerPlan(name, kind, tuple(layer.weight.shape), importance=total, input_shape=x.shape if x else ())


def _at_critical_point(layer: LayerPlan, sparsity: float) -> LayerPlan:
    block, rate, reason = choose_block(layer.candidates, sparsity)
    if layer.failures:
        reason += f"; {len(layer.failures)} did not run ({layer.failures[0]})"
    return layer.with_choice(block, rate, reason)


def within_budget(
    layers: Sequence[LayerPlan], *, target_speedup: float | None = None, max_importance_loss: float | None = None
) -> list[LayerPlan]:
    """Decide the measured layers under a budget (see :func:`tetris.autotune.decide.allocate`); the others stay."""
    decided = {
        layer.name: layer
        for layer in allocate(
            [layer for layer in layers if any(c.sparsity > 0 for c in layer.candidates)],
            target_speedup=target_speedup,
            max_importance_loss=max_importance_loss,
        )
    }
    return [decided.get(layer.name, layer) for layer in layers]
