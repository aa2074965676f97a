"""Channel groups: which weight dimensions of a model must be permuted together.

The model is traced with torch.fx. The channels of every tensor between layers form a group: the producers' output
dimensions, the consumers' input dimensions and the per-channel parameters (batch norm) in between. A permutation of a
group's channels is invisible from outside and free at run time when all its members follow it: that is how the output
permutation of one layer and the input permutation of the next merge (Sec. 4.3 of the paper). After ``torch.cat`` a
dimension holds several groups one after the other, each in its own order. Groups that reach the network's inputs or
outputs, or an operation that is not known to act per channel, are *fixed*: they keep their order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tetris.channels import ChannelGroup, Channels, Member, ModelGraph
from tetris.tracing import ExampleInputs, trace


@dataclass(frozen=True)
class _Label:
    """The channels of a tensor: groups (before unions), the dimension they lie in, features per channel."""

    groups: tuple[int, ...]
    dim: int
    repeats: int = 1


ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Mish, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout,
)  # fmt: skip
POOLING_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d)
ELEMENTWISE_FUNCTIONS: set[Callable] = {
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.silu, F.gelu, F.sigmoid, torch.sigmoid, F.tanh, torch.tanh,
    F.hardtanh, F.hardswish, F.hardsigmoid, F.mish, F.softplus, F.dropout, torch.clamp, torch.abs, torch.square,
    torch.exp,
}  # fmt: skip
POOLING_FUNCTIONS: set[Callable] = {
    F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
}  # fmt: skip
BINARY_FUNCTIONS: set[Callable] = {
    operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv,
    torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum,
}  # fmt: skip
ELEMENTWISE_METHODS = {
    "relu", "relu_", "sigmoid", "tanh", "clamp", "contiguous", "detach", "clone", "float", "half", "abs", "square",
}  # fmt: skip
CONCATENATIONS: set[Callable] = {torch.cat, torch.concat, torch.concatenate}
BINARY_METHODS = {"add", "add_", "sub", "sub_", "mul", "mul_", "div"}


def _asks_for_the_form(node: fx.Node) -> bool:
    """Whether a call reads only shape, dtype or the like of its tensor, not its values."""
    return (node.op == "call_method" and node.target in ("size", "dim")) or (
        node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
    )


class _Grouping:
    """Walks a traced graph once and unites the channel groups."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.modules = dict(traced.named_modules())
        self.labels: dict[fx.Node, _Label] = {}
        self.parent: list[int] = []
        self.groups: list[ChannelGroup] = []
        self.inputs: dict[str, Channels] = {}
        self.outputs: dict[str, Channels] = {}
        self.per_channel: dict[str, Channels] = {}

    # -- groups ---------------------------------------------------------------------------------------------------
    def new_group(self, size: int, fixed: str | None = None) -> int:
        self.parent.append(len(self.parent))
        self.groups.append(ChannelGroup(len(self.groups), size, fixed=fixed))
        return self.parent[-1]

    def find(self, group: int) -> int:
        while self.parent[group] != group:
            self.parent[group] = group = self.parent[self.parent[group]]
        return group

    def fix(self, channels: _Label | Channels | None, reason: str) -> None:
        for group in channels.groups if channels is not None else ():
            root = self.groups[self.find(group)]
            root.fixed = root.fixed or reason

    def sizes(self, channels: _Label | Channels) -> list[int]:
        return [self.groups[group].size for group in channels.groups]

    def unite(self, a: int, b: int) -> None:
        a, b = sorted((self.find(a), self.find(b)))
        if a != b:
            self.parent[b] = a
            self.groups[a].members += self.groups[b].members
            self.groups[a].fixed = self.groups[a].fixed or self.groups[b].fixed

    def match(self, a: _Label | Channels, b: _Label | Channels, reason: str) -> None:
        """Give two dimensions one order: group by group, or where their parts differ the original one."""
        if self.sizes(a) == self.sizes(b) and a.repeats == b.repeats:
            for one, other in zip(a.groups, b.groups):
                self.unite(one, other)
        else:
            self.fix(a, reason)
            self.fix(b, reason)

    def join(self, known: dict[str, Channels], label: _Label, name: str, role: str) -> None:
        """Note a dimension of a module; called twice, both calls share their channels."""
        if name in known:
            self.match(known[name], label, f"{name} is called on different channels")
            return
        known[name] = Channels(label.groups, label.repeats)
        start = 0
        for group, size in zip(label.groups, self.sizes(label)):
            self.groups[self.find(group)].members.append(Member(name, role, label.repeats, start))
            start += size

    # -- nodes ----------------------------------------------------------------------------------------------------
    def shape(self, node: Any) -> tuple[int, ...] | None:
        """The shape of a node's tensor; None for other results and for arguments that are no nodes."""
        return node.meta.get("shape") if isinstance(node, fx.Node) else None

    def tensors(self, node: fx.Node) -> list[fx.Node]:
        """The arguments, by position or keyword, that are tensors of one dimension or more."""
        return [argument for argument in node.all_input_nodes if self.shape(argument)]

    def label_of(self, node: Any) -> _Label | None:
        return self.labels.get(node) if isinstance(node, fx.Node) else None

    def visit(self, node: fx.Node) -> None:
        label: _Label | None
        if node.op == "placeholder":
            label = self.boundary(node, "network input")
        elif node.op == "output":
            for argument in node.all_input_nodes:
                self.fix(self.label_of(argument), "network output")
            return
        elif node.op == "call_module":
            label = self.visit_module(node, str(node.target), self.modules[str(node.target)])
        elif node.op in ("call_function", "call_method"):
            label = self.visit_call(node)
        else:
            label = None
        if label is not None:
            self.labels[node] = label
        elif not _asks_for_the_form(node):
            self.unknown(node)  # also what returns several tensors: they may be parts of the channels

    def boundary(self, node: fx.Node, reason: str) -> _Label | None:
        shape = self.shape(node)
        if shape is None or len(shape) < 2:
            return None
        dim = 1 if len(shape) == 4 else len(shape) - 1
        return _Label((self.new_group(shape[dim], reason),), dim)

    def unknown(self, node: fx.Node) -> None:
        """An operation that may mix channels: what enters keeps its order, what leaves has none to follow."""
        for argument in node.all_input_nodes:
            self.fix(self.label_of(argument), f"{node.name} may mix channels")

    def visit_module(self, node: fx.Node, name: str, module: nn.Module) -> _Label | None:
        x = self.label_of(node.args[0] if node.args else next(iter(node.kwargs.values()), None))
        rank = len(self.shape(node) or ())
        if isinstance(module, nn.Conv2d):
            if module.groups == module.in_channels == module.out_channels and x is not None:
                self.join(self.per_channel, x, name, "per_channel")
                return x
            if module.groups > 1:
                self.unknown(node)
                return _Label((self.new_group(module.out_channels, f"{name} has groups"),), 1)
            return self.weighted(name, x, dim=1, size_in=module.in_channels, size_out=module.out_channels)
        if isinstance(module, nn.Linear):
            return self.weighted(name, x, dim=rank - 1, size_in=module.in_features, size_out=module.out_features)
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and x is not None and x.dim == 1 and x.repeats == 1:
            self.join(self.per_channel, x, name, "per_channel")
            return x
        if (
            isinstance(module, nn.LayerNorm)
            and x is not None
            and x.dim == rank - 1
            and len(module.normalized_shape) == 1
        ):
            self.join(self.per_channel, x, name, "per_channel")
            return x
        if isinstance(module, nn.Embedding):
            rows = _Label((self.new_group(module.embedding_dim),), rank - 1)
            self.join(self.per_channel, rows, name, "per_channel")
            return rows
        if isinstance(module, ELEMENTWISE_MODULES):
            return x
        if isinstance(module, POOLING_MODULES) and x is not None and x.dim == 1:
            return x
        if isinstance(module, nn.Flatten):
            return self.flatten(node, x, module.start_dim, module.end_dim)
        self.unknown(node)
        return None

    def weighted(self, name: str, x: _Label | None, dim: int, size_in: int, size_out: int) -> _Label:
        if x is None or x.dim != dim:
            self.fix(x, f"{name} reads another dimension")
            x = _Label((self.new_group(size_in, "the order of its producer is unknown"),), dim)
        self.join(self.inputs, x, name, "input")
        if name in self.outputs:
            return _Label(self.outputs[name].groups, dim)
        out = _Label((self.new_group(size_out),), dim)
        self.join(self.outputs, out, name, "output")
        return out

    def visit_call(self, node: fx.Node) -> _Label | None:
        target, is_method = node.target, node.op == "call_method"
        x = self.label_of(node.args[0]) if node.args else None
        if target in (BINARY_METHODS if is_method else BINARY_FUNCTIONS):
            return self.binary(node)
        if target in (ELEMENTWISE_METHODS if is_method else ELEMENTWISE_FUNCTIONS):
            return x if len(self.tensors(node)) == 1 else None
        if not is_method and target in POOLING_FUNCTIONS and x is not None and x.dim == 1:
            return x
        if target in ("flatten", torch.flatten):
            given = dict(zip(("start_dim", "end_dim"), node.args[1:])) | node.kwargs
            return self.flatten(node, x, given.get("start_dim", 0), given.get("end_dim", -1))
        if target in ("view", "reshape", torch.reshape):
            return self.reshape(node, x)
        if target in CONCATENATIONS:
            return self.concatenate(node)
        if target in ("mean", torch.mean) and x is not None and x.repeats == 1 and x.dim == 1:
            before, after = self.shape(node.args[0]), self.shape(node)
            over: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            dims = {over} if isinstance(over, int) else set(over or ())
            if before and after and len(after) > 1 and after[:2] == before[:2] and not dims & {1, 1 - len(before)}:
                return x
        return None

    def binary(self, node: fx.Node) -> _Label | None:
        operands = self.tensors(node)
        labels = [self.label_of(a) for a in operands]
        if len(operands) == 1:
            return labels[0]
        if len(operands) != 2:
            return None
        a, b = labels
        shapes = [self.shape(o) or () for o in operands]
        ranks = [len(shape) for shape in shapes]
        same = a and b and (a.dim - ranks[0], a.repeats) == (b.dim - ranks[1], b.repeats)  # broadcasting adds in front
        if a and b and same and shapes[0][a.dim] == shapes[1][b.dim]:
            self.match(a, b, f"{node.name} meets channels that are concatenated in different parts")
            return a if ranks[0] >= ranks[1] else b
        self.unknown(node)
        return None

    def concatenate(self, node: fx.Node) -> _Label | None:
        """Along the channels: the parts' groups one after the other. Along another dimension: all share one order."""
        tensors = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        rank = len(self.shape(node) or ())
        labels = [self.label_of(tensor) for tensor in tensors] if isinstance(tensors, (list, tuple)) else []
        first = labels[0] if labels else None
        alike = first is not None and all(x and (x.dim, x.repeats) == (first.dim, first.repeats) for x in labels)
        if first is None or not alike or not isinstance(dim, int) or not rank:
            self.unknown(node)
            return None
        if dim % rank == first.dim:
            return replace(first, groups=tuple(group for x in labels if x for group in x.groups))
        for x in labels[1:]:
            assert x is not None
            self.match(first, x, f"{node.name} stacks channels that are concatenated in different parts")
        return first

    def flatten(self, node: fx.Node, x: _Label | None, start: Any, end: Any) -> _Label | None:
        shape = self.shape(node.args[0])
        if x is None or shape is None:
            return None
        start, end = start % len(shape), end % len(shape)
        if start == x.dim:
            repeats = int(torch.Size(shape[start + 1 : end + 1]).numel())
            return replace(x, repeats=x.repeats * repeats)
        if start > x.dim:
            return x
        if end < x.dim:
            return replace(x, dim=x.dim - (end - start))
        self.unknown(node)
        return None

    def reshape(self, node: fx.Node, x: _Label | None) -> _Label | None:
        before, after = self.shape(node.args[0]), self.shape(node)
        if x is not None and before and after and x.dim == 1 and after[0] == before[0] and len(after) == 2:
            return self.flatten(node, x, 1, -1)
        if x is not None and before and after and x.dim == len(before) - 1 and after[-1] == before[-1]:
            return replace(x, dim=len(after) - 1)
        self.unknown(node)
        return None

    def result(self) -> ModelGraph:
        for node in self.traced.graph.nodes:
            self.visit(node)
        roots = sorted({self.find(i) for i in range(len(self.groups))})
        roots = [r for r in roots if self.groups[r].members]
        renumber = {root: i for i, root in enumerate(roots)}
        groups = [replace(self.groups[r], index=renumber[r]) for r in roots]

        def final(known: dict[str, Channels]) -> dict[str, Channels]:
            return {
                name: Channels(tuple(renumber[self.find(group)] for group in channels.groups), channels.repeats)
                for name, channels in known.items()
            }

        return ModelGraph(self.traced, groups, final(self.inputs), final(self.outputs), final(self.per_channel))


def channel_groups(model: nn.Module, example_inputs: ExampleInputs) -> ModelGraph:
    """Trace ``model`` and find its channel groups; ``print()`` the result for a table.

    Args:
        model: any module that torch.fx can trace; it is not changed.
        example_inputs: a tensor, a tuple of arguments or a dict of keywords, on the model's device; one forward pass
            in evaluation mode is run on them.
    Raises:
        UnsupportedError: the model cannot be traced.
        TetrisError: it does not run on the inputs.
    """
    return _Grouping(trace(model, example_inputs)).result()
