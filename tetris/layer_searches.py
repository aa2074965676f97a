"""The searches behind ``tetris.prune``: one for all layers that share channels, or one for each layer by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tetris.channels import Channels, ModelGraph
from tetris.importance import Importance, channel_importance, importance_of
from tetris.joint_reordering import Concatenation, Group, JointProblem, JointReordering, reorder_jointly
from tetris.permutation import apply, expand, inverse
from tetris.plans import GROUP, GROUPED, SHARED, ModelPlan
from tetris.pruning import expand_block_mask
from tetris.reordering import Reordering, reorder
from tetris.search.alternation import Progress

AT_ONCE = 2**28
"""Weights whose layers are searched together on a GPU; it bounds the memory for their importances."""
LayerProgress = Callable[[str, int, int], None]
"""Called with what is searched, layers done, layers in all."""


@dataclass(frozen=True)
class Request:
    """One layer to prune: its importance (over channels for block structures), block and rate."""

    name: str
    weight: torch.Tensor
    importance: Importance
    block: tuple[int, int]
    sparsity: float


def search_separately(
    requests: list[Request], structure: Any, options: dict[str, Any], progress: LayerProgress | None
) -> dict[str, Reordering]:
    """Permutations and a mask for every weight by itself, by layer name. ``options``: of :func:`tetris.reorder`."""
    found: dict[str, Reordering] = {}
    together = structure == "block" and options["method"] == "annealed"  # the others wait for each other too often
    for batch in _batches(requests) if together else [[r] for r in requests]:
        if progress:
            progress(batch[0].name, len(found), len(requests))
        if len(batch) > 1:
            found |= _side_by_side(batch, options, _steps(progress, batch[0].name, len(found), len(requests)))
            continue
        for r in batch:
            found[r.name] = reorder(
                r.weight, r.block, r.sparsity, importance=r.importance, structure=structure,
                progress=_steps(progress, r.name, len(found), len(requests)), **options,
            )  # fmt: skip
    if progress and requests:
        progress(requests[-1].name, len(requests), len(requests))
    return found


def _batches(requests: list[Request]) -> list[list[Request]]:
    """Layers in order, one each; on a GPU as many as have AT_ONCE weights: small searches leave most of it idle."""
    batches: list[list[Request]] = []
    for r in requests:
        at_once = batches and r.weight.is_cuda and batches[-1][-1].weight.device == r.weight.device
        if at_once and sum(other.weight.numel() for other in batches[-1]) + r.weight.numel() <= AT_ONCE:
            batches[-1].append(r)
        else:
            batches.append([r])
    return batches


def _steps(progress: LayerProgress | None, name: str, done: int, total: int) -> Progress | None:
    """A search's callback that names its step: large layers take minutes on a CPU."""
    if progress is None:
        return None
    return lambda step, retained: progress(f"{name}, step {step}", done, total)


def _side_by_side(requests: list[Request], options: dict[str, Any], progress: Progress | None) -> dict[str, Reordering]:
    """What :func:`tetris.reorder` finds for every layer, in one search of all of them."""
    problems = [
        JointProblem(
            channel_importance(importance_of(r.weight, r.importance)),
            r.block,
            r.sparsity,
            ((r.name, "output"), (r.name, "input")),
        )
        for r in requests
    ]
    joint = reorder_jointly(problems, progress=progress, **options)
    return {
        r.name: _from_joint(r, problem, joint, i, options["method"])
        for i, (r, problem) in enumerate(zip(requests, problems))
    }


def search_shared(
    requests: list[Request],
    graph: ModelGraph,
    plan: ModelPlan | None,
    options: dict[str, Any],
    progress: LayerProgress | None,
) -> dict[str, Reordering]:
    """One permutation for every free channel group and a mask for every weight, by layer name, in one search.

    A layer to which the plan gives an order of its own shares nothing on that side. ``options``: as above.
    """
    free = {group.index for group in graph.groups if group.fixed is None}

    def group_of(slots: dict[str, Channels], name: str, order: str) -> tuple[Group, int]:
        if order != SHARED:
            return (name, "output" if slots is graph.outputs else "input"), GROUP if order == GROUPED else 1
        channels = slots.get(name)
        if channels is None:  # a layer that the trace never calls shares nothing
            return None, 1
        parts = tuple((index if index in free else None, graph.groups[index].size) for index in channels.groups)
        return (parts[0][0] if len(parts) == 1 else Concatenation(parts)), channels.repeats

    problems = []
    for r in requests:
        planned = plan[r.name] if plan is not None else None
        row, row_repeats = group_of(graph.outputs, r.name, planned.output_order if planned else SHARED)
        column, column_repeats = group_of(graph.inputs, r.name, planned.input_order if planned else SHARED)
        importance = channel_importance(importance_of(r.weight, r.importance))
        importance = importance / importance.sum().clamp(min=torch.finfo(importance.dtype).tiny)  # layers weigh alike
        problems.append(JointProblem(importance, r.block, r.sparsity, (row, column), (row_repeats, column_repeats)))
    if progress and requests:
        progress("all layers together", 0, len(requests))
    joint = reorder_jointly(problems, progress=_steps(progress, "all layers together", 0, len(requests)), **options)
    if progress and requests:
        progress("all layers together", len(requests), len(requests))
    return {
        r.name: _from_joint(r, problem, joint, i, options["method"])
        for i, (r, problem) in enumerate(zip(requests, problems))
    }


def _from_joint(request: Request, problem: JointProblem, joint: JointReordering, index: int, method: str) -> Reordering:
    """The part of a joint answer that concerns one weight, as a reordering of its own."""
    weight, layout = request.weight, joint.layouts[index]
    permutations = {
        dim: expand(joint.order(group, weight.shape[dim] // repeats), repeats)
        for dim, (group, repeats) in enumerate(zip(problem.groups, problem.repeats))
    }
    block_mask = layout.to_mask()
    ordered = expand_block_mask(block_mask, tuple(weight.shape[:2]), layout.block)
    pairs = apply(ordered, {dim: inverse(p) for dim, p in permutations.items()}).to(weight.device)
    return Reordering(
        shape=tuple(weight.shape), block=layout.block, sparsity=request.sparsity, method=method,
        permutations=permutations, block_mask=block_mask,
        keep_mask=pairs.reshape(*pairs.shape, *(1 for _ in weight.shape[2:])).expand(weight.shape),
        retained=joint.retained[index], n_swaps=joint.n_swaps, seconds=joint.seconds,
    )  # fmt: skip
