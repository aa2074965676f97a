"""Which of the convolution kernels runs a problem: a pure function of problem and device, and a table of launchers.

The Hopper kernel where the GPU and the shapes allow it, the portable one everywhere else. The choice is data in the
config; no path is tried and given up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, DeviceInfo, default_conv2d_config
from tetris.kernels.hopper.heuristics import complete_tile, supports, tile_count


TILES = tuple(
    (n, h, w, order)
    for order, images in (("images", (8, 16, 32)), ("copies", (1, 2, 4)))
    for n in images
    for h in (2, 4, 7, 8)
    for w in (1, 2, 4, 8, 16, 32)
)
"""Candidate (images, rows, columns, input order) of the Hopper kernel's tiles."""


def hopper_config(
    problem: Conv2dProblem, device: DeviceInfo, *, max_pool: bool = False, allow_tf32: bool = False
) -> Conv2dConfig | None:
    """The tile that should end first: rounds of tiles on all multiprocessors times input and output pixels of one."""
    best: tuple[float, Conv2dConfig] | None = None
    if supports(problem, device, None, max_pool=max_pool, allow_tf32=allow_tf32) is not None:
        return None
    for n, h, w, order in TILES:
        if (order == "copies") != (problem.batch < 8) or h > 2 * problem.output_size[0]:
            continue
        config = Conv2dConfig(kernel="hopper", tile_n=n, tile_h=h, tile_w=w, tile_k=0, input_order=order)
        if supports(problem, device, config, max_pool=max_pool, allow_tf32=allow_tf32) is not None:
            continue
        tile = complete_tile(problem, config, max_pool=max_pool)
        rounds = max(1.0, tile_count(problem, tile) / device.sm_count)
        pixels = n * h * w
        cost = rounds * (pixels + 0.1 * tile.stage_groups * 8 + 40)
        if best is None or cost < best[0]:
            best = cost, config
    return best[1] if best else None


def choose_conv2d_config(
    problem: Conv2dProblem, device: DeviceInfo, *, max_pool: bool = False, allow_tf32: bool = False
) -> Conv2dConfig:
    """The config for a problem nobody tuned.

    Args:
        max_pool: whether a 2 x 2 max-pool follows and may be fused.
        allow_tf32: whether float32 products may be rounded to tf32.
    """
    config = hopper_config(problem, device, max_pool=max_pool, allow_tf32=allow_tf32)
    return config if config is not None else default_conv2d_config(problem, device)


def conv2d_launcher(kernel: str) -> Callable[..., torch.Tensor]:
    """The launcher of a config's ``kernel``; imports Triton."""
    if kernel == "hopper":
        from tetris.kernels.hopper.conv2d import block_sparse_conv2d as launch
    else:
        from tetris.kernels.conv2d import block_sparse_conv2d as launch
    return launch
