"""Which of the convolution kernels runs a problem: a pure function of problem and device, and a table of launchers.

The Hopper kernel where the GPU and the shapes allow it, the Hopper linear kernel for 1x1 convolutions, the portable
kernel everywhere else. The choice is data in the config; no path is tried and given up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, DeviceInfo, default_conv2d_config
from tetris.kernels.hopper.heuristics import supports as hopper_supports
from tetris.kernels.hopper.pointwise_conv2d import as_linear, fastest_pointwise, is_pointwise
from tetris.kernels.hopper.pointwise_conv2d import supports as pointwise_supports
from tetris.kernels.hopper.tile_choice import ranked_configs
from tetris.layout import ceil_div


def conv2d_refuses(
    problem: Conv2dProblem,
    device: DeviceInfo,
    config: Conv2dConfig,
    *,
    max_pool: bool = False,
    allow_tf32: bool = False,
) -> str | None:
    """Why the config's kernel does not take the problem; None = it does."""
    if config.kernel == "hopper":
        return hopper_supports(problem, device, config, max_pool=max_pool, allow_tf32=allow_tf32)
    if config.kernel == "hopper_linear":
        return pointwise_supports(problem, device, config)
    return None


def pointwise_config(problem: Conv2dProblem, device: DeviceInfo) -> Conv2dConfig | None:
    """The linear kernel for a 1x1 convolution that it suits: many pixels, and two strips of outputs at least.

    The pixels of a task are those for an unknown layout; a layer chooses by its own (:func:`config_for_layout`).

    Tasks of 256 pixels where there are nearly three for two multiprocessors and a task is long, else of 128: the
    schedule cuts what would be left over. H200, batch 128, a quarter kept in 64x32 blocks, random / reordered, us with
    128, with 256, on the convolution kernel: 1024 -> 256 at 14 x 14 25.1, 24.3, 25.7 / 20.2, 17.5, 22.4; 128 -> 512 at
    28 x 28 45.2, 45.5, 49.1 / 44.9, 45.4, 47.1; 64 -> 256 at 56 x 56 82.8, 85.4, 89.4 / 80.0, 81.1, 90.5; 2048 -> 512
    at 7 x 7 19.7, 23.0, 20.8 / 21.7, 23.8, 23.8; but 256 -> 64 at 56 x 56 46.3, 47.4, 42.6. Batch 8, 1024 -> 256 at
    14 x 14: 11.0 on the linear kernel, 9.7 on the convolution kernel.
    """
    if not is_pointwise(problem) or problem.c_in < 64 or problem.c_out < 128:
        return None
    layer = as_linear(problem)
    pairs = ceil_div(layer.out_features, 128)
    wide = problem.c_in > 128 and pairs * ceil_div(layer.tokens, 256) >= 1.4 * device.sm_count
    tile_tokens = 256 if wide else 128
    if pairs * ceil_div(layer.tokens, tile_tokens) < device.sm_count:
        return None
    config = Conv2dConfig(kernel="hopper_linear", tile_n=1, tile_h=1, tile_w=tile_tokens)
    return config if conv2d_refuses(problem, device, config) is None else None


def choose_conv2d_config(
    problem: Conv2dProblem,
    device: DeviceInfo,
    *,
    max_pool: bool = False,
    allow_tf32: bool = False,
    permuted: bool = False,
) -> Conv2dConfig:
    """The config for a problem nobody tuned.

    Args:
        max_pool: whether a 2 x 2 max-pool follows and may be fused.
        allow_tf32: whether float32 products may be rounded to tf32.
        permuted: whether output channels move in groups, which the convolution kernel does in its store.
    """
    config = pointwise_config(problem, device)
    if config is not None and not max_pool and not permuted:
        return config
    ranked = ranked_configs(problem, device, max_pool=max_pool, allow_tf32=allow_tf32)
    return ranked[0] if ranked else default_conv2d_config(problem, device)


def config_for_layout(
    config: Conv2dConfig, problem: Conv2dProblem, device: DeviceInfo, indptr: torch.Tensor, indices: torch.Tensor
) -> Conv2dConfig:
    """What a layer with this layout runs where a rule or a table, which know no layout, say ``config``."""
    if config.kernel == "hopper_linear":
        return fastest_pointwise(problem, config, indptr, indices, device.sm_count)[0]
    return config


def conv2d_launcher(kernel: str) -> Callable[..., torch.Tensor]:
    """The launcher of a config's ``kernel``; imports Triton."""
    if kernel == "hopper":
        from tetris.kernels.hopper import conv2d as hopper

        return hopper.block_sparse_conv2d
    if kernel == "hopper_linear":
        from tetris.kernels.hopper import pointwise_conv2d

        return pointwise_conv2d.block_sparse_conv2d
    from tetris.kernels import conv2d as portable

    return portable.block_sparse_conv2d
