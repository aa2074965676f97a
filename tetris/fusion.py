"""Fusing a traced model: batch norms into convolutions; activations, residual adds and pooling into epilogues."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from tetris.layers import BlockSparseConv2d, BlockSparseLayer, FusedLayer

ACTIVATION_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.GELU: "gelu"}
ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.silu: "silu", F.gelu: "gelu",
}  # fmt: skip
ADDITIONS: set[Callable | str] = {operator.add, operator.iadd, torch.add, "add", "add_"}


def called_once(traced: fx.GraphModule) -> set[str]:
    """Names of the modules that the graph calls exactly once; only those may change for one call's sake."""
    calls = Counter(str(n.target) for n in traced.graph.nodes if n.op == "call_module")
    return {name for name, count in calls.items() if count == 1}


def single_user(node: fx.Node) -> fx.Node | None:
    """The only node that reads ``node``, if there is just one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def fold_batch_norms(traced: fx.GraphModule) -> dict[str, str]:
    """Scale and shift of every evaluation-mode BatchNorm2d that directly follows a convolution go into the latter.

    Works in float32 and stores in the convolution's dtype. Returns {convolution: batch norm} by name.
    """
    modules, once = dict(traced.named_modules()), called_once(traced)
    folded = {}
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.BatchNorm2d):
            continue
        source, norm = node.args[0], modules[str(node.target)]
        if not (isinstance(source, fx.Node) and source.op == "call_module" and single_user(source) is node):
            continue
        conv = modules[str(source.target)]
        if (
            type(conv) is not nn.Conv2d
            or norm.running_mean is None
            or not {str(source.target), str(node.target)} <= once
        ):
            continue
        _fold(conv, norm)
        folded[str(source.target)] = str(node.target)
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
    return folded


def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    dtype = conv.weight.dtype
    bias = None if conv.bias is None else conv.bias.float()
    scale = None if norm.weight is None else norm.weight.float()  # type: ignore[union-attr]
    shift = None if norm.bias is None else norm.bias.float()  # type: ignore[union-attr]
    weight, bias = fuse_conv_bn_weights(
        conv.weight.float(), bias, norm.running_mean.float(), norm.running_var.float(), norm.eps, scale, shift  # type: ignore[arg-type,union-attr]
    )  # fmt: skip
    conv.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)


def fuse_epilogues(traced: fx.GraphModule) -> dict[str, list[str]]:
    """Let the layers' epilogues do what follows them: residual adds, activations, pooling. {layer: what was fused}."""
    modules, once = dict(traced.named_modules()), called_once(traced)
    fused: dict[str, list[str]] = {}

    def fused_layer(node: Any) -> FusedLayer | None:
        if not (isinstance(node, fx.Node) and node.op == "call_module" and str(node.target) in once):
            return None
        module = modules[str(node.target)]
        return module if isinstance(module, FusedLayer) else None

    def block_sparse(node: Any) -> BlockSparseLayer | None:
        layer = fused_layer(node)
        return layer if isinstance(layer, BlockSparseLayer) else None

    for node in list(traced.graph.nodes):
        if node.op in ("call_function", "call_method") and node.target in ADDITIONS:
            _fuse_addition(traced, node, block_sparse, fused)
        elif _is_max_pool(node, modules):
            layer, source = block_sparse(node.args[0]), node.args[0]
            if isinstance(layer, BlockSparseConv2d) and not layer.max_pool and single_user(source) is node:
                layer.max_pool = True
                fused.setdefault(str(source.target), []).append("2x2 max-pool")
                node.replace_all_uses_with(source)
                source.meta = dict(node.meta)
                traced.graph.erase_node(node)
        elif (activation := _activation(node, modules)) is not None:
            source = node.args[0]
            layer = fused_layer(source)
            if layer is not None and layer.activation == "none" and not _pools(layer) and single_user(source) is node:
                layer.activation = activation
                fused.setdefault(str(source.target), []).append(activation)
                node.replace_all_uses_with(source)
                traced.graph.erase_node(node)
    return fused


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.GELU) and module.approximate != "none":
            return None
        return ACTIVATION_MODULES.get(type(module))
    if node.op in ("call_function", "call_method") and node.kwargs.get("approximate", "none") == "none":
        return ACTIVATION_FUNCTIONS.get(node.target)
    return None


def _pools(layer: FusedLayer) -> bool:
    return isinstance(layer, BlockSparseConv2d) and layer.max_pool


def _is_max_pool(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is plain 2x2 max-pooling with stride 2."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if node.op == "call_module" and type(module := modules[str(node.target)]) is nn.MaxPool2d:
        settings = [getattr(module, name) for name in names]
    elif node.op == "call_function" and node.target in (F.max_pool2d, torch.max_pool2d):
        given = dict(zip(names, (None, None, 0, 1, False, False))) | dict(zip(names, node.args[1:])) | node.kwargs
        settings = [given[name] for name in names]
        settings[1] = settings[1] or settings[0]
    else:
        return False
    return [tuple(v) if isinstance(v, list) else v for v in settings] in (
        [2, 2, 0, 1, False, False],
        [(2, 2), (2, 2), 0, 1, False, False],
        [(2, 2), (2, 2), (0, 0), (1, 1), False, False],
    )


def _fuse_addition(traced: fx.GraphModule, node: fx.Node, block_sparse: Callable, fused: dict[str, list[str]]) -> None:
    """x + layer(y) -> layer(y, residual=x), called where the addition stood; the later of two layers takes the sum."""
    if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) and _shape(a) for a in node.args):
        return
    position = {n: i for i, n in enumerate(traced.graph.nodes)}
    for source in sorted(node.args, key=position.__getitem__, reverse=True):  # type: ignore[arg-type]
        other = node.args[1] if source is node.args[0] else node.args[0]
        layer = block_sparse(source)
        fits = other is not source and _shape(other) == _shape(source)
        if (
            layer is None
            or layer.activation != "none"
            or _pools(layer)
            or source.kwargs
            or single_user(source) is not node
            or not fits
        ):
            continue
        with traced.graph.inserting_before(node):
            call = traced.graph.call_module(str(source.target), source.args, {"residual": other})
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        traced.graph.erase_node(node)
        traced.graph.erase_node(source)
        fused.setdefault(str(source.target), []).append("residual")
        return


def _shape(node: Any) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if hasattr(meta, "shape") else None
