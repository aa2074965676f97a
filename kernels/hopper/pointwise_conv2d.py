"""1x1 convolutions on the Hopper linear kernel: a channels_last image is a matrix [N * H * W, C].

A convolution without neighbours has nothing for the convolution kernel's halo tiles to reuse; in the linear kernel two
strips of output channels share the input tiles that both keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, DeviceInfo, LinearConfig, LinearProblem
from tetris.kernels.hopper import linear
from tetris.kernels.hopper.linear_schedule import LinearSchedule, make_linear_schedule


def is_pointwise(problem: Conv2dProblem) -> bool:
    """Whether every output pixel depends on the input pixel at its own place only."""
    return problem.kernel_size == (1, 1) and problem.stride == (1, 1) and problem.padding == (0, 0)


def as_linear(problem: Conv2dProblem) -> LinearProblem:
    """The linear layer over all pixels that a pointwise convolution is."""
    pixels = problem.batch * problem.height * problem.width
    return LinearProblem(pixels, problem.c_in, problem.c_out, problem.block, problem.dtype, problem.n_blocks)


def linear_config(config: Conv2dConfig) -> LinearConfig:
    """The linear kernel's config: a tile's pixels are its tokens."""
    return LinearConfig(kernel="hopper", tile_tokens=config.tile_pixels, x_stages=config.x_stages)


def supports(problem: Conv2dProblem, device: DeviceInfo, config: Conv2dConfig) -> str | None:
    """Why this problem cannot run here with this config; None = it can."""
    if not is_pointwise(problem):
        return f"takes 1x1 convolutions of stride 1 without padding; got {problem.kernel_size}, stride {problem.stride}"
    return linear.supports(as_linear(problem), device, linear_config(config))


def pointwise_schedule(
    problem: Conv2dProblem, config: Conv2dConfig, indptr: torch.Tensor, indices: torch.Tensor, sm_count: int
) -> LinearSchedule:
    """The linear kernel's offline schedule for all pixels, on the device of ``indptr``."""
    return make_linear_schedule(
        indptr, indices, block=problem.block, tokens=as_linear(problem).tokens, tile_tokens=config.tile_pixels,
        n_programs=sm_count,
    )  # fmt: skip


def fastest_pointwise(
    problem: Conv2dProblem, config: Conv2dConfig, indptr: torch.Tensor, indices: torch.Tensor, sm_count: int
) -> tuple[Conv2dConfig, LinearSchedule]:
    """Of a config with any number of pixels a task those whose schedules promise to end first on a layout."""
    configs = [replace(config, tile_w=tile_pixels) for tile_pixels in sorted(linear.TILE_TOKENS)]
    made = [(config, pointwise_schedule(problem, config, indptr, indices, sm_count)) for config in configs]
    return min(made, key=lambda choice: choice[1].clocks)


def block_sparse_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    c_out: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str = "none",
    residual: torch.Tensor | None = None,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
    allow_tf32: bool = False,
    config: Conv2dConfig,
    schedule: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """As :func:`tetris.kernels.conv2d.block_sparse_conv2d`, for problems that :func:`supports` takes.

    Args:
        schedule: of :func:`pointwise_schedule`; made anew when missing.
    Raises:
        UnsupportedError: permutations were given.
    """
    y = linear.block_sparse_linear(
        x.permute(0, 2, 3, 1),
        values[:, 0],
        indptr,
        indices,
        bias,
        out_features=c_out,
        activation=activation,
        residual=None if residual is None else residual.permute(0, 2, 3, 1),
        input_permutation=input_permutation,
        output_permutation=output_permutation,
        config=linear_config(config),
        schedule=schedule,
    )
    return y.permute(0, 3, 1, 2)
