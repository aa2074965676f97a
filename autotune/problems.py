"""From a layer and its input to the problem that configurations, costs and stored choices are about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tetris.dispatch import linear_launch
from tetris.errors import TetrisError
from tetris.kernels.configs import (
    ITEM_SIZE,
    Conv2dConfig,
    Conv2dProblem,
    DeviceInfo,
    LinearConfig,
    LinearProblem,
)
from tetris.kernels.conv2d_paths import choose_conv2d_config, config_for_layout, conv2d_refuses
from tetris.layers import BlockSparseConv2d, BlockSparseLinear, supported_padding
from tetris.layout import grid_shape
from tetris.ops import dtype_name
from tetris.pruning import units_to_keep
from tetris.tracing import ExampleInputs, call_once
from tetris.tuned_choices import shipped_conv2d_choice

Problem = Conv2dProblem | LinearProblem
SparseLayer = BlockSparseConv2d | BlockSparseLinear


@dataclass(frozen=True)
class LayerInput:
    """What reached a layer: shape, dtype, device and whether an image batch was channels_last."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    def random(self, device: torch.device, seed: int = 0, channels_last: bool | None = None) -> torch.Tensor:
        """A standard normal tensor like it."""
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(self.shape, device=device, generator=generator).to(self.dtype)
        images = self.channels_last if channels_last is None else channels_last
        return x.contiguous(memory_format=torch.channels_last) if images and x.dim() == 4 else x


def capture_inputs(
    model: nn.Module, example_inputs: ExampleInputs, layers: Mapping[str, nn.Module]
) -> dict[str, LayerInput]:
    """Run the model once, in eval mode, and note the first input of every layer, in the order of execution.

    Layers that the example does not reach are absent. The model's training mode is restored.
    """
    found: dict[str, LayerInput] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and isinstance(arguments[0], torch.Tensor) and name not in found:
                x = arguments[0]
                last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
                found[name] = LayerInput(tuple(x.shape), x.dtype, x.device, last)

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in layers.items()]
    try:
        call_once(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def problem_of(layer: SparseLayer, x: LayerInput | torch.Tensor) -> Problem:
    """The problem that a block-sparse layer solves for an input like ``x``."""
    dtype = dtype_name(x.dtype)
    if isinstance(layer, BlockSparseConv2d):
        batch, c_in, height, width = x.shape
        return Conv2dProblem(
            batch, c_in, layer.out_channels, height, width, layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, layer.block, dtype, layer.n_blocks,
        )  # fmt: skip
    if isinstance(layer, BlockSparseLinear):
        return LinearProblem(
            math.prod(x.shape[:-1]), layer.in_features, layer.out_features, layer.block, dtype, layer.n_blocks,
            layer.weight_dtype,
        )  # fmt: skip
    raise TetrisError(f"problem_of: wanted a block-sparse layer; got {type(layer).__name__}")


def fresh_config(
    layer: SparseLayer, problem: Problem, device: DeviceInfo, shipped: bool = True
) -> Conv2dConfig | LinearConfig:
    """What a layer with this layout runs where nobody tuned it; ``shipped``: whether the package's table counts."""
    if isinstance(problem, LinearProblem):
        launch = linear_launch(problem, layer.indptr, layer.indices, device=device, shipped=shipped)
        return LinearConfig.from_key(launch.config)
    pooled = pools(layer)
    found = shipped_conv2d_choice(problem, device, pooled) if shipped else None
    if found is None or conv2d_refuses(problem, device, found, max_pool=pooled) is not None:
        found = choose_conv2d_config(problem, device, max_pool=pooled)
    return config_for_layout(found, problem, device, layer.indptr, layer.indices)


def problem_at(layer: nn.Conv2d | nn.Linear, x: LayerInput, block: tuple[int, int], sparsity: float) -> Problem:
    """The problem that a dense layer would be if it were pruned; every block row keeps a block at least."""
    c_out, c_in = layer.weight.shape[:2]
    rows, columns = grid_shape((c_out, c_in), block)
    kept, dtype = max(rows, units_to_keep(rows * columns, sparsity)), dtype_name(x.dtype)
    if isinstance(layer, nn.Linear):
        return LinearProblem(math.prod(x.shape[:-1]), c_in, c_out, block, dtype, kept)
    kernel, stride, dilation = (
        (int(pair[0]), int(pair[1])) for pair in (layer.kernel_size, layer.stride, layer.dilation)
    )
    padding = supported_padding(layer)
    return Conv2dProblem(
        x.shape[0], c_in, c_out, x.shape[2], x.shape[3], kernel, stride, padding, dilation, block, dtype, kept
    )


def pools(layer: SparseLayer) -> bool:
    """Whether the layer's result is max-pooled."""
    return isinstance(layer, BlockSparseConv2d) and layer.max_pool


def flop(problem: Problem) -> float:
    """Operations of the kept blocks, a multiply-add counted twice; incomplete blocks count whole."""
    per_position = 2.0 * problem.n_blocks * problem.block[0] * problem.block[1]
    if isinstance(problem, LinearProblem):
        return per_position * problem.tokens
    height, width = problem.output_size
    return per_position * problem.taps * problem.batch * height * width


def size_bytes(problem: Problem) -> float:
    """Least traffic: input, kept blocks and output once."""
    item = ITEM_SIZE[problem.dtype]
    kept = problem.n_blocks * problem.block[0] * problem.block[1]
    if isinstance(problem, LinearProblem):
        weights = kept * (1 if problem.weight_dtype else item)
        return float(item * problem.tokens * (problem.in_features + problem.out_features) + weights)
    height, width = problem.output_size
    pixels_in, pixels_out = problem.height * problem.width, height * width
    activations = problem.batch * (pixels_in * problem.c_in + pixels_out * problem.c_out)
    return float(item * (activations + kept * problem.taps))
