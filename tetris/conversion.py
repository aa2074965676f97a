"""``tetris.convert``: a pruned model -> the same function with block-sparse layers, permutations folded away.

The model is traced, every channel group gets a storage order (``tetris.orders``), parameters follow it, batch norms,
activations and residual adds are fused (``tetris.fusion``), and pruned layers become block-sparse layers. What cannot
be traced keeps its own code; its layers then permute their inputs and outputs themselves.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn

from tetris.block_sparse_layer import BlockSparseLayer
from tetris.channels import ModelGraph
from tetris.errors import TetrisError, UnsupportedError, describe
from tetris.fusion import fold_batch_norms, fold_residual_biases, fuse_epilogues
from tetris.graph import channel_groups
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.masking import bake_masks, reorderings
from tetris.orders import feature_order, input_gather, output_scatter, storage_orders
from tetris.permutation import is_identity
from tetris.plans import Block, ModelPlan
from tetris.quantization import stored_dtype
from tetris.reordering import Reordering, reorder
from tetris.specs import match, prunable_layers, unprunable_layers
from tetris.stem import StemConv2d
from tetris.tracing import ExampleInputs, call_once


@dataclass
class ConvertedLayer:
    """What became of one convolution, linear layer or embedding.

    Attributes:
        name: qualified name.
        kind: "block-sparse", "dense", or "dense blocks": not pruned, on the block kernel.
        block, kept_fraction: of a block-sparse layer; None and 1.0 for a dense one.
        permutes: "", "input", "output" or "input, output": data movements left at run time.
        fused: what the epilogue does besides the bias.
        batch_norm: name of the batch norm folded into it.
        input_order, output_order: storage orders of its input and output channels; None = original.
        reason: why it is dense.
        weight_dtype: "int8" or "float8_e4m3fn" for quantised weights; "" = the activations'.
        bias_of: the dense layer whose result it adds as a residual and whose bias it therefore adds with its own.
    """

    name: str
    kind: str
    block: tuple[int, int] | None = None
    kept_fraction: float = 1.0
    permutes: str = ""
    fused: list[str] = field(default_factory=list)
    batch_norm: str | None = None
    input_order: torch.Tensor | None = None
    output_order: torch.Tensor | None = None
    reason: str = ""
    weight_dtype: str = ""
    bias_of: str | None = None


@dataclass
class Conversion:
    """The record of a conversion, at ``fast.conversion``; ``print`` it for a table."""

    layers: dict[str, ConvertedLayer]
    traced: bool

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                f"{layer.kind}, {layer.weight_dtype} weights" if layer.weight_dtype else layer.kind,
                f"{layer.block[0]}x{layer.block[1]}" if layer.block else "",
                f"{layer.kept_fraction:.3f}",
                layer.permutes or "nothing",
                ", ".join((["batch norm"] if layer.batch_norm else []) + layer.fused),
                layer.reason,
            )
            for layer in self.layers.values()
        ]
        head = ("layer", "runs", "block", "kept", "permutes at run time", "fused", "note")
        return tabulate(rows, headers=head, disable_numparse=True)


def convert(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    dense: Sequence[str] = (),
    plan: ModelPlan | None = None,
    fuse: bool = True,
    weight_dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """Replace the pruned layers of ``model`` by block-sparse ones; the result computes the masked model's outputs.

    >>> fast = tetris.convert(pruned, example_inputs=x)
    >>> print(fast.conversion)

    Args:
        model: from :func:`tetris.prune`, possibly fine-tuned; not changed.
        example_inputs: to trace the model with, on its device, and to call the result with once, so that it can be
            compiled or exported for inputs of that shape. Without them (or when tracing fails, with a warning)
            every layer permutes its own inputs and outputs and nothing is fused.
        dense: glob patterns of pruned layers to run dense, for example where measuring says that dense is faster.
        plan: kernel configs by layer, from :func:`tetris.plan`; layers it calls dense run dense, layers that it gives a
            block without pruning them run on the block kernel with all blocks kept (traced models only).
        fuse: fold batch norms and fuse activations and residual adds (needs tracing).
        weight_dtype: "int8" or "float8_e4m3fn" store the weights of block-sparse linear layers in one byte, with a
            scale an output channel (``tetris.quantization``): half the bytes of float16, which is what few tokens wait
            for. Convolutions and dense layers keep theirs, and so do all layers with None.
    Returns:
        a model for inference (evaluation mode, no gradients), drop-in for the same inputs and outputs; its channel
        order is the original at the network's inputs and outputs. ``fast.conversion`` says what became of each layer.
    Raises:
        TetrisError: nothing in the model is pruned by blocks, or ``weight_dtype`` has no linear layer to apply to.
    """
    if not isinstance(model, nn.Module):
        raise TetrisError(f"convert: wanted an nn.Module; got {describe(model)}")
    stored = None if weight_dtype is None else stored_dtype(weight_dtype)
    masked = reorderings(model)
    found = {n: r for n, r in masked.items() if r.block_mask is not None}
    if not found and plan is None:
        raise TetrisError(
            "convert: wanted a model with layers pruned by blocks; got none; "
            "call tetris.prune(model, sparsity=...) first"
        )
    model = copy.deepcopy(model).eval().requires_grad_(False)
    chosen_dense = set(match(dict.fromkeys(dense, True), list(masked), "dense")) if dense else set()
    chosen_dense |= {n for n in found if plan is not None and n in plan and plan[n].block is None}
    sparse = {n: r for n, r in found.items() if n not in chosen_dense}
    graph = None
    if example_inputs is not None:
        try:
            graph = channel_groups(model, example_inputs)
        except UnsupportedError as error:
            warnings.warn(f"convert: {error}; every layer keeps its own permutations, nothing is fused", stacklevel=2)
    full = plan.full_layers if plan is not None and graph is not None and fuse else {}
    full = {n: block for n, block in full.items() if n not in masked}
    configs = {n: plan[n].config for n in [*sparse, *full] if plan is not None and n in plan}
    bake_masks(model)
    converter = _Converter(model, graph, sparse, full, configs, fuse, stored)
    converted = converter.run()
    if stored is not None and not any(layer.weight_dtype for layer in converter.layers.values()):
        raise TetrisError(
            "convert: weight_dtype is for block-sparse linear layers; the model has none; leave it out or prune one"
        )
    for name in masked.keys() - sparse.keys():
        converter.layers[name].reason = "chosen dense" if name in chosen_dense else "not pruned by blocks"
    converted.eval()
    if example_inputs is not None:
        call_once(converted, example_inputs)  # packs weights and makes schedules, which compilers only read
    return converted


def to_channels_last(model: nn.Module) -> None:
    """Store 4-D parameters in channels_last, in place; a model without convolutions stays as it is."""
    if any(isinstance(m, nn.Conv2d | BlockSparseConv2d) for m in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's overloads leave it out


class _Converter:
    """One conversion: orders, folded norms, replaced layers, fused epilogues."""

    def __init__(
        self,
        model: nn.Module,
        graph: ModelGraph | None,
        sparse: dict[str, Reordering],
        full: dict[str, Block],
        configs: dict[str, str],
        fuse: bool,
        stored: torch.dtype | None,
    ) -> None:
        self.graph, self.sparse, self.full, self.configs, self.fuse = graph, sparse, full, configs, fuse
        self.stored = stored
        self.target: nn.Module = graph.module if graph else model
        self.layers = {n: ConvertedLayer(n, "dense") for n in prunable_layers(self.target)}
        for name, reason in unprunable_layers(self.target).items():
            self.layers[name] = ConvertedLayer(name, "dense", reason=reason)

    def run(self) -> nn.Module:
        if self.graph is None:
            for name, reordering in self.sparse.items():
                self.replace(name, reordering, reordering.permutations.get(1), reordering.permutations.get(0))
        else:
            self.run_traced(self.graph)
        to_channels_last(self.target)
        self.target.conversion = Conversion(self.layers, self.graph is not None)  # type: ignore[assignment]
        return self.target

    def run_traced(self, graph: ModelGraph) -> None:
        traced = graph.module
        if self.fuse:
            for name, norm in fold_batch_norms(traced).items():
                if name in self.layers:
                    self.layers[name].batch_norm = norm
        orders = storage_orders(graph, self.sparse)
        for name, channels in graph.per_channel.items():
            _permute_parameters(traced.get_submodule(name), feature_order(channels, orders))
        for name in self.layers:
            if name not in graph.inputs:
                continue  # registered but never called
            order_in = feature_order(graph.inputs[name], orders)
            order_out = feature_order(graph.outputs[name], orders)
            record = self.layers[name]
            record.input_order = None if is_identity(order_in) else order_in
            record.output_order = None if is_identity(order_out) else order_out
            if name in self.sparse:
                own = self.sparse[name].permutations
                gather = input_gather(order_in, own.get(1, torch.arange(len(order_in))))
                scatter = output_scatter(order_out, own.get(0, torch.arange(len(order_out))))
                self.replace(name, self.sparse[name], gather, scatter)
            else:
                module = _permute_dense(traced.get_submodule(name), order_out, order_in)
                if name in self.full:
                    everything = reorder(module.weight, self.full[name], 0.0, "none")
                    self.replace(name, everything, None, None)
                else:
                    self.replace_stem(name)
        if self.fuse:
            for name, operations in fuse_epilogues(traced).items():
                self.layers[name].fused = operations
            for name, source in fold_residual_biases(traced).items():
                self.layers[name].bias_of = source
        _reshape_views(traced)
        _clean(traced)

    def replace_stem(self, name: str) -> None:
        """A dense convolution of few channels is bound by its output: it gets a kernel with a fused epilogue."""
        module = self.target.get_submodule(name)
        if self.fuse and isinstance(module, nn.Conv2d) and StemConv2d.supports(module):
            self.target.set_submodule(name, StemConv2d.from_dense(module))

    def replace(
        self, name: str, reordering: Reordering, gather: torch.Tensor | None, scatter: torch.Tensor | None
    ) -> None:
        module, record = self.target.get_submodule(name), self.layers[name]
        assert isinstance(module, nn.Conv2d | nn.Linear)
        options: dict[str, Any] = {
            "input_permutation": gather, "output_permutation": scatter, "config": self.configs.get(name, "")
        }  # fmt: skip
        layer: BlockSparseLayer
        try:
            if isinstance(module, nn.Conv2d):
                layer = BlockSparseConv2d.from_dense(module, reordering, **options)
            else:
                layer = BlockSparseLinear.from_dense(module, reordering, **options, weight_dtype=self.stored)
                record.weight_dtype = layer.weight_dtype
        except UnsupportedError as error:
            raise UnsupportedError(f"convert: {name}: {error}; pass dense=[{name!r}]") from error
        self.target.set_submodule(name, layer)
        moved = [
            w for w, p in (("input", layer.input_permutation), ("output", layer.output_permutation)) if p is not None
        ]
        record.kind = "dense blocks" if name in self.full else "block-sparse"
        record.block, record.permutes = layer.block, ", ".join(moved)
        record.kept_fraction = layer.kept_fraction


def _permute_parameters(module: nn.Module, order: torch.Tensor) -> None:
    """Per-channel parameters and statistics (norms, depthwise convolutions, embeddings) follow their group's order."""
    if isinstance(module, nn.Embedding):  # a new tensor: a language model's last layer may share the old one
        module.weight = nn.Parameter(module.weight.data[:, order.to(module.weight.device)], requires_grad=False)
        return
    for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        if tensor.dim() >= 1 and tensor.shape[0] == len(order):
            tensor.data = tensor.data[order.to(tensor.device)]


def _permute_dense(module: nn.Module, order_out: torch.Tensor, order_in: torch.Tensor) -> nn.Conv2d | nn.Linear:
    """Put a dense layer's weight in the storage orders of its output and input channels; returns the layer."""
    assert isinstance(module, nn.Conv2d | nn.Linear)
    weight = module.weight.data
    module.weight.data = weight[order_out.to(weight.device)][:, order_in.to(weight.device)]
    if module.bias is not None:
        module.bias.data = module.bias.data[order_out.to(weight.device)]
    return module


def _reshape_views(traced: fx.GraphModule) -> None:
    """``x.view(sizes)`` becomes ``x.reshape(sizes)``: images are channels_last now, which few views can follow."""
    for node in traced.graph.nodes:
        if node.op == "call_method" and node.target == "view":
            given = [*node.args[1:], *node.kwargs.values()]
            if not any(isinstance(argument, torch.dtype) for argument in given):
                node.target = "reshape"


def _clean(traced: fx.GraphModule) -> None:
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
