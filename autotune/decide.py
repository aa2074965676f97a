"""The planner's decisions as pure functions over measurements: no model, no device, no clock.

:func:`choose_block` finds a layer's critical point (the paper's Figure 7): the block that runs fastest when every
block keeps the same importance. :func:`allocate` spreads a budget over the layers of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tetris.errors import TetrisError
from tetris.plans import Block, Candidate, LayerPlan, block_label

MARGIN = 0.02
"""A block must beat the dense layer by this fraction of its time; less is within the noise of a measurement."""

TIE = 0.02
"""Two blocks within this fraction of each other's time are equal; the one that retains more is taken."""


def time_at_retained(points: Sequence[Candidate], retained: float) -> float:
    """Microseconds at which one block keeps ``retained`` importance: linear between its measured points.

    Outside of them the nearest two are extended; a single point answers with its own time.
    """
    ordered = sorted(points, key=lambda point: point.retained)
    if len(ordered) == 1 or ordered[0].retained == ordered[-1].retained:
        return ordered[0].time_us
    above = next((i for i, point in enumerate(ordered) if point.retained >= retained), len(ordered) - 1)
    left, right = ordered[max(above, 1) - 1], ordered[max(above, 1)]
    if right.retained == left.retained:
        return right.time_us
    share = (retained - left.retained) / (right.retained - left.retained)
    return max(left.time_us + share * (right.time_us - left.time_us), 0.0)


def choose_block(
    candidates: Sequence[Candidate], sparsity: float, margin: float = MARGIN
) -> tuple[Block | None, float, str]:
    """The block for one layer at the asked sparsity: (block or None for dense, sparsity, reason).

    The importance to keep is what the best block keeps at that sparsity; blocks that keep less are charged the time
    at which they would keep as much. Blocks that do not beat the dense layer at the asked sparsity are out.

    Args:
        candidates: the dense layer and, for each block, a point at ``sparsity`` (and others, to interpolate with).
        sparsity: the asked fraction of pruned blocks.
        margin: the least gain over dense.
    """
    dense = next((c for c in candidates if c.block is None), None)
    asked = {c.block: c for c in candidates if c.block is not None and c.sparsity == sparsity}
    if not asked:
        return None, 0.0, "no block was measured"
    quickest = min(asked.values(), key=lambda c: c.time_us)
    contenders = {b: c for b, c in asked.items() if dense is None or c.time_us < dense.time_us * (1 - margin)}
    if not contenders:
        assert dense is not None
        ratio = dense.time_us / quickest.time_us
        return None, 0.0, f"dense wins: the best block, {quickest.label}, runs at {ratio:.2f}x"
    goal = max(c.retained for c in contenders.values())
    times = {b: time_at_retained([c for c in candidates if c.block == b], goal) for b in contenders}
    best_time = min(times.values())
    level = [b for b, time in times.items() if time <= best_time * (1 + TIE)]
    block = max(level, key=lambda b: (contenders[b].retained, -times[b]))
    others = sorted((time, block_label(b)) for b, time in times.items() if b != block)
    if dense is None:
        return block, sparsity, "fastest at equal retained importance; the dense layer was not measured"
    reason = f"fastest when all blocks retain {goal:.3f}: {dense.time_us / times[block]:.2f}x"
    if others:
        reason += f"; next {others[0][1]} {dense.time_us / max(others[0][0], 1e-9):.2f}x"
    return block, sparsity, reason


@dataclass(frozen=True)
class Option:
    """One way to run a layer: its time, what it loses, and the candidate behind it."""

    time_us: float
    loss: float
    candidate: Candidate


def options_of(layer: LayerPlan, margin: float = MARGIN) -> list[Option]:
    """The layer's efficient choices, from dense to fastest, each at the least lost importance per microsecond saved.

    Candidates slower than dense, dominated ones and those above the lower convex hull of (time, loss) are left out.
    """
    dense = layer.dense
    if dense is None:
        raise TetrisError(f"plan: layer {layer.name} has no dense measurement; measure it before spreading a budget")
    gained = [c for c in layer.candidates if c.block is not None and c.time_us < dense.time_us * (1 - margin)]
    points = [Option(c.time_us, layer.importance * (1 - c.retained), c) for c in gained]
    hull = [Option(dense.time_us, 0.0, dense)]
    while True:
        ahead = [p for p in points if p.time_us < hull[-1].time_us and p.loss >= hull[-1].loss]
        if not ahead:
            return hull
        hull.append(min(ahead, key=lambda p: (_price(hull[-1], p), p.time_us)))


def _price(old: Option, new: Option) -> float:
    """Importance lost for every microsecond saved by moving from old to new."""
    return (new.loss - old.loss) / (old.time_us - new.time_us)


def allocate(
    layers: Sequence[LayerPlan], *, target_speedup: float | None = None, max_importance_loss: float | None = None
) -> list[LayerPlan]:
    """Choose block and sparsity of every layer under one budget for the model.

    Moves along each layer's efficient choices, always the move that loses the least importance for the time it saves,
    until the target is met or the loss is spent; then gives back what the last moves overshot.

    Args:
        layers: measured at several (block, sparsity) points; their decisions are ignored.
        target_speedup: sum of dense times / sum of chosen times to reach, at the least lost importance.
        max_importance_loss: fraction of the model's importance that may go, at the highest speed.
    Returns:
        The layers with decisions and reasons.
    Raises:
        TetrisError: not exactly one budget, or a target that no measured choice reaches.
    """
    if (target_speedup is None) == (max_importance_loss is None):
        raise TetrisError("plan: wanted exactly one budget, target_speedup or max_importance_loss; got both or none")
    hulls = [options_of(layer) for layer in layers]
    chosen = [0] * len(layers)
    total_dense = sum(hull[0].time_us for hull in hulls)
    allowed_us = total_dense / target_speedup if target_speedup else 0.0
    allowed_loss = float("inf")
    if max_importance_loss is not None:
        allowed_loss = max_importance_loss * sum(layer.importance for layer in layers)
    if target_speedup:
        fastest = sum(hull[-1].time_us for hull in hulls)
        if fastest > allowed_us:
            raise TetrisError(
                f"plan: wanted {target_speedup:.2f}x; the fastest measured choices reach {total_dense / fastest:.2f}x; "
                "allow higher sparsities, other blocks, or ask for less"
            )
    while sum(hull[i].time_us for hull, i in zip(hulls, chosen)) > allowed_us:
        lost = sum(hull[i].loss for hull, i in zip(hulls, chosen))
        moves = [
            (_price(hull[i], hull[i + 1]), n)
            for n, (hull, i) in enumerate(zip(hulls, chosen))
            if i + 1 < len(hull) and lost + hull[i + 1].loss - hull[i].loss <= allowed_loss
        ]
        if not moves:
            break
        chosen[min(moves)[1]] += 1
    if target_speedup:
        _give_back(hulls, chosen, allowed_us)
    budget = f"{target_speedup:g}x" if target_speedup else f"{max_importance_loss:.1%} lost"
    return [_decided(layer, hull, i, budget) for layer, hull, i in zip(layers, hulls, chosen)]


def _give_back(hulls: list[list[Option]], chosen: list[int], allowed_us: float) -> None:
    """Undo moves that the target does not need, the most costly in importance first; changes ``chosen``."""
    while True:
        slack = allowed_us - sum(hull[i].time_us for hull, i in zip(hulls, chosen))
        undo = [
            (hull[i].loss - hull[i - 1].loss, n)
            for n, (hull, i) in enumerate(zip(hulls, chosen))
            if i and hull[i - 1].time_us - hull[i].time_us <= slack
        ]
        if not undo:
            return
        chosen[max(undo)[1]] -= 1


def _decided(layer: LayerPlan, hull: list[Option], i: int, budget: str) -> LayerPlan:
    choice = hull[i].candidate
    if choice.block is None:
        reason = "dense wins at every point" if len(hull) == 1 else f"dense: {budget} costs less importance elsewhere"
    else:
        reason = f"{hull[0].time_us / choice.time_us:.2f}x for {budget}, at {_price(hull[i - 1], hull[i]):.3g} per us"
    return layer.with_choice(choice.block, choice.sparsity, reason)
