"""The last check of a plan: the converted network as a whole must not be slower than the dense one.

Layers are chosen one by one; what lies between them (a compiler's fusions that a custom operation interrupts, launches,
permutations at run time) shows only in the whole network. The rule is a pure function of the measurement that it is
given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tetris.plans import EndToEnd, LayerPlan, ModelPlan

NOISE = 0.01
"""A converted network within this fraction of the dense one's time counts as not slower."""

MeasureWhole = Callable[[ModelPlan], EndToEnd]
"""Times the network under a plan, dense and converted."""


def gain_us(layer: LayerPlan) -> float:
    """Microseconds that a layer's choice saves by its own measurement; infinite for a choice that was never measured.

    What a user set by hand is given up last.
    """
    if layer.chosen is None or layer.dense is None:
        return float("inf")
    return layer.dense.time_us - layer.chosen.time_us


def never_slower(plan: ModelPlan, measure: MeasureWhole, noise: float = NOISE) -> ModelPlan:
    """The plan with its end-to-end measurement, and with as many layers dense as it takes not to be slower.

    Where layers move their channels at run time the network is measured without that, too, and that it stays unless the
    movements cost less than the noise. Then, while the converted network is slower, the half of its sparse layers that
    gain least become dense and it is measured again: a network is compiled for every measurement, so there are at most
    log2(layers) + 2 of them.

    Args:
        plan: decided layer by layer.
        measure: times the whole network under a plan.
        noise: how much slower still counts as equal.
    """
    if not plan.blocks:
        return plan
    plan, whole = _without_dear_movements(plan, measure, noise)
    dropped: list[str] = []
    while plan.blocks and whole.converted_us > whole.dense_us * (1 + noise):
        sparse = sorted((layer for layer in plan if layer.block is not None), key=gain_us)
        for layer in sparse[: (len(sparse) + 1) // 2]:
            reason = f"dense: the network as a whole ran at {whole.speedup:.2f}x and this layer gained among the least"
            plan = plan.with_layer(layer.with_choice(None, 0.0, reason))
            dropped.append(layer.name)
        whole = measure(plan) if plan.blocks else replace(whole, converted_us=whole.dense_us)
    note = f"{', '.join(dropped)} dense: with them the network as a whole was slower" if dropped else ""
    if not plan.blocks:
        note = "every layer dense: the converted network as a whole was slower"
    return replace(plan, end_to_end=replace(whole, note=note))


def _without_dear_movements(plan: ModelPlan, measure: MeasureWhole, noise: float) -> tuple[ModelPlan, EndToEnd]:
    """The plan and its measurement; its layers in shared orders where moving their channels costs more than noise."""
    whole = measure(plan)
    moving = [layer for layer in plan if layer != layer.without_movements()]
    if not moving:
        return plan, whole
    still = plan
    for layer in moving:
        reason = f"{layer.reason}; shared after all: the network as a whole is slower with it"
        still = still.with_layer(replace(layer.without_movements(), reason=reason))
    alone = measure(still)
    return (plan, whole) if whole.converted_us <= alone.converted_us * (1 + noise) else (still, alone)
