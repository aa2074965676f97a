"""Which layers deserve an order of channels of their own: a data movement against what it lets them prune.

Sharing one permutation among all layers of a channel group moves nothing at run time. Where a layer is the only pruned
one of a group the others are *folded* into its order, with several it is *shared*. A layer whose own order of inputs or
outputs retains more importance may have it instead: *grouped*, in whole groups of 16 channels that the convolution's
store moves on its way, or *separate*, by a kernel of its own. It is worth that where, at equal retained importance, the
blocks that it can prune more would save more time than the movement takes. But they are not pruned: the layer keeps the
sparsity that was asked for, retains more, and the movement makes the network slower. So all movements together may take
MOVED_SHARE of the layers' time, and :mod:`tetris.autotune.never_slower` looks again at the network as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from tetris.autotune.device import device_info
from tetris.autotune.measure import DenseLayer, Epilogue, ReorderedBlocks
from tetris.autotune.problems import LayerInput, problem_at
from tetris.autotune.space import default_config
from tetris.autotune.timer import time_us
from tetris.errors import UnsupportedError
from tetris.graph import channel_groups
from tetris.importance import channel_importance, importance_of
from tetris.joint_reordering import JointProblem, reorder_jointly
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, conv2d_output_size
from tetris.kernels.hopper.heuristics import supports
from tetris.layers import pair, supported_padding
from tetris.masking import prune, reorderings
from tetris.ops import permute_channels
from tetris.permutation import apply, expand
from tetris.plans import GROUP, GROUPED, SEPARATE, LayerPlan, ModelPlan
from tetris.reordering import Reordering
from tetris.specs import prunable_layers
from tetris.tracing import ExampleInputs

MARGIN = 0.02
"""An own order must save this fraction of the layer's time beyond its cost; less is within the noise."""
MOVED_SHARE = 0.01
"""Of the layers' time, what all movements of a network together may take."""
GROUPED_COST = 0.16
"""What storing groups of GROUP channels apart costs, of the time that a kernel of its own would take to move them: 16.6
of 103.8 us where it was measured (``python -m tetris.bench conv --match permuted``)."""
OUTPUT, INPUT = 0, 1
"""A weight's dimensions."""

MoveTime = Callable[[tuple[int, ...]], float]
"""Microseconds that permuting the channels of a tensor of a shape takes."""


StoresGroups = Callable[[LayerPlan, DenseLayer, LayerInput, Epilogue], bool]


@dataclass(frozen=True)
class OwnOrder:
    """One layer's own order along one dimension.

    Attributes:
        dim: OUTPUT or INPUT.
        kind: GROUPED or SEPARATE.
        retained: importance kept with it at the layer's sparsity.
        saved_us: at most, by the blocks that it no longer needs to retain what it retains in the shared order.
        cost_us: of the data movement.
    """

    dim: int
    kind: str
    retained: float
    saved_us: float
    cost_us: float

    @property
    def gain_us(self) -> float:
        """Microseconds won at equal retained importance; negative where the movement costs more."""
        return self.saved_us - self.cost_us

    def __str__(self) -> str:
        side = "outputs" if self.dim == OUTPUT else "inputs"
        return f"{self.kind} order of {side}: saves {self.saved_us:.1f} us, costs {self.cost_us:.1f}"


def best_order(options: Sequence[OwnOrder], layer_us: float, margin: float = MARGIN) -> OwnOrder | None:
    """The own order that gains most, if it gains more than ``margin`` of the layer's time; None = share."""
    best = max(options, key=lambda option: option.gain_us, default=None)
    return best if best is not None and best.gain_us > margin * layer_us else None


def saved_us(layer: LayerPlan, needed: float) -> float:
    """What a measured layer's time would fall by with ``needed`` of its blocks instead of those that it keeps.

    At most in proportion to them, and at most along the line from the dense layer, which has all of them: a part of
    the time is not theirs.
    """
    assert layer.chosen is not None
    kept, time_us = layer.kept_fraction, layer.chosen.time_us
    fewer = max(0.0, kept - needed)
    if layer.dense is None or kept >= 1.0:
        return time_us * fewer / kept
    return fewer * max(0.0, min(time_us / kept, (layer.dense.time_us - time_us) / (1.0 - kept)))


def within_share(plan: ModelPlan, options: Mapping[str, Sequence[OwnOrder]], share: float = MOVED_SHARE) -> ModelPlan:
    """The plan with own orders: those that gain most first, as long as all movements take ``share`` of its time.

    Args:
        plan: measured; its layers' chosen times are what the share is of.
        options: the own orders that each layer may have.
    """
    left = share * plan.planned_us

    def most(name: str) -> float:
        return max((option.gain_us for option in options[name]), default=0.0)

    for name in sorted(options, key=most, reverse=True):
        layer = plan[name]
        assert layer.chosen is not None
        chosen = best_order([option for option in options[name] if option.cost_us <= left], layer.chosen.time_us)
        if chosen is not None:
            left -= chosen.cost_us
            plan = plan.with_layer(with_order(layer, chosen))
    return plan


def with_order(layer: LayerPlan, chosen: OwnOrder | None) -> LayerPlan:
    """The layer's plan with an own order, which its reason explains."""
    if chosen is None:
        return layer
    sides = {"output_order": chosen.kind} if chosen.dim == OUTPUT else {"input_order": chosen.kind}
    return replace(layer, reason=f"{layer.reason}; {chosen}", **sides)  # type: ignore[arg-type]


@dataclass(frozen=True)
class OrderChooser:
    """Looks for own orders of pruned layers.

    Attributes:
        move_time: what a movement takes.
        method: of :func:`tetris.reorder`.
        importance: "l1" or "l2".
        stores_groups: whether a layer's kernel stores groups of channels in another order.
        seed: of the search.
    """

    move_time: MoveTime
    method: str = "sort"
    importance: str = "l1"
    stores_groups: StoresGroups = lambda plan, layer, x, epilogue: False
    seed: int = 0

    def options(
        self, plan: LayerPlan, layer: DenseLayer, x: LayerInput, shared: Reordering, epilogue: Epilogue,
        fixed_output: bool,
    ) -> list[OwnOrder]:  # fmt: skip
        """The own orders that a layer may have, and what each would save and cost; none if it is not pruned.

        Args:
            plan: pruned, measured.
            layer: dense.
            x: its input.
            shared: its reordering along with the rest of the model.
            epilogue: what is fused behind it; a residual is moved, too.
            fixed_output: whether its outputs keep the original order otherwise.
        """
        if plan.chosen is None or plan.sparsity == 0.0:
            return []
        scores = channel_importance(importance_of(layer.weight.detach(), self.importance))
        moved_out = self.move_time(output_shape(layer, x, epilogue.max_pool)) * (2 if epilogue.residual else 1)
        kinds = [(INPUT, SEPARATE, self.move_time(x.shape)), (OUTPUT, SEPARATE, moved_out)]
        if fixed_output and self.stores_groups(plan, layer, x, epilogue):
            kinds.append((OUTPUT, GROUPED, GROUPED_COST * moved_out))
        return [self._option(plan, scores, shared, *kind) for kind in kinds]

    def _option(
        self, plan: LayerPlan, scores: torch.Tensor, shared: Reordering, dim: int, kind: str, cost: float
    ) -> OwnOrder:
        """Search the order along ``dim`` alone, the other dimension in the shared one."""
        repeats = GROUP if kind == GROUPED else 1
        other = {1 - dim: shared.permutations[1 - dim]} if 1 - dim in shared.permutations else {}
        problem = JointProblem(
            apply(scores, other), shared.block, shared.sparsity,
            groups=("own", None) if dim == OUTPUT else (None, "own"), repeats=(repeats, 1),
        )  # fmt: skip
        found = reorder_jointly([problem], self.method, self.seed)
        order = expand(found.permutations["own"], repeats)
        blocks = ReorderedBlocks.of_scores(scores, replace(shared, permutations={**other, dim: order}))
        needed = 1.0 - blocks.sparsity_retaining(shared.retained)
        return OwnOrder(dim, kind, found.retained[0], saved_us(plan, needed), cost)


def own_orders(
    model: nn.Module, example_inputs: ExampleInputs, plan: ModelPlan, chooser: OrderChooser,
    inputs: Mapping[str, LayerInput], epilogues: Mapping[str, Epilogue],
) -> ModelPlan:  # fmt: skip
    """The plan with own orders for the pruned layers that gain by them; as it is where the model cannot be traced.

    Cost: one joint search of the model, and two or three searches of one dimension a layer.
    """
    try:
        graph = channel_groups(model, example_inputs)
    except UnsupportedError:
        return plan
    pruned = prune(model, plan=plan, method=chooser.method, example_inputs=example_inputs, seed=chooser.seed)
    layers, options = prunable_layers(model), {}
    for name, shared in reorderings(pruned).items():
        fixed = any(graph.groups[group].fixed for group in graph.outputs[name].groups)
        epilogue = epilogues.get(name, Epilogue())
        options[name] = chooser.options(plan[name], layers[name], inputs[name], shared, epilogue, fixed)
    return within_share(plan, {name: found for name, found in options.items() if found})


def stores_groups(plan: LayerPlan, layer: DenseLayer, x: LayerInput, epilogue: Epilogue) -> bool:
    """Whether the convolution that would run keeps the vendor's layout while it stores groups of GROUP channels apart.

    That is the Hopper convolution without a residual, which would have to be read in the other order, too.
    """
    wide = isinstance(layer, nn.Conv2d) and layer.out_channels % GROUP == 0
    if not wide or plan.block is None or x.device.type != "cuda" or epilogue.residual:
        return False
    problem, device = problem_at(layer, x, plan.block, plan.sparsity), device_info(x.device)
    config = default_config(problem, device, epilogue.max_pool)
    if not isinstance(problem, Conv2dProblem) or not isinstance(config, Conv2dConfig) or config.kernel != "hopper":
        return False
    return supports(problem, device, replace(config, output_group=GROUP), max_pool=epilogue.max_pool) is None


def output_shape(layer: DenseLayer, x: LayerInput, max_pool: bool) -> tuple[int, ...]:
    """The shape that a layer stores."""
    if isinstance(layer, nn.Linear):
        return (*x.shape[:-1], layer.out_features)
    geometry = pair(layer.kernel_size), pair(layer.stride), supported_padding(layer), pair(layer.dilation)
    height, width = conv2d_output_size((x.shape[2], x.shape[3]), *geometry)
    return (x.shape[0], layer.out_channels, *((height // 2, width // 2) if max_pool else (height, width)))


def measured_moves(x: LayerInput, repeats: int) -> MoveTime:
    """Times permutations of channels on the device, with the dtype and memory format of ``x``; a shape once."""
    known: dict[tuple[int, ...], float] = {}

    def move_time(shape: tuple[int, ...]) -> float:
        if shape not in known:
            dim = 1 if len(shape) == 4 else len(shape) - 1
            sample = replace(x, shape=shape).random(x.device, channels_last=True)
            order = torch.randperm(shape[dim], generator=torch.Generator().manual_seed(0)).to(x.device)
            run = {"move": lambda: permute_channels(sample, order, dim)}
            on_gpu = x.device.type == "cuda"
            known[shape] = time_us(run, device=x.device, repeats=repeats, cold_l2=on_gpu)["move"].median_us
        return known[shape]

    return move_time
