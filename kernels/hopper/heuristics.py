"""Which Hopper convolutions run, and on which tile: pure functions of the problem and the device."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from tetris.kernels.configs import ITEM_SIZE, Conv2dConfig, Conv2dProblem, DeviceInfo
from tetris.kernels.hopper.geometry import ConvTile

SHARED_BYTES = 232448
"""Shared memory of a program on compute capability 9.0."""
MOST_X_STAGES, MOST_W_BYTES, MOST_Y_STAGES = 4, 49152, 4


@lru_cache(maxsize=4096)
def supports(
    problem: Conv2dProblem,
    device: DeviceInfo,
    config: Conv2dConfig | None = None,
    *,
    max_pool: bool = False,
    allow_tf32: bool = False,
) -> str | None:
    """Why the Hopper kernel cannot run a problem; None = it can.

    Args:
        problem: the convolution.
        device: where; asks its capability and Triton version.
        config: a config to check too; None checks the problem only.
        max_pool: with the fused 2 x 2 max-pool.
        allow_tf32: whether float32 may run through tf32.
    """
    if device.capability != (9, 0) or device.backend != "cuda":
        return f"it needs compute capability 9.0; {device.name} has {device.capability}"
    version = tuple(int(part) for part in device.triton_version.split(".")[:2])
    if not (3, 6) <= version < (3, 9):
        return f"it is written for Triton 3.6 to 3.8; this is {device.triton_version}"
    if problem.dtype not in ITEM_SIZE or (problem.dtype == "float32" and not allow_tf32):
        return f"it multiplies float16, bfloat16 and, where tf32 is allowed, float32; got {problem.dtype}"
    item = ITEM_SIZE[problem.dtype]
    if problem.c_in * item % 16 or problem.c_out * item % 16:
        return f"channels {problem.c_in} -> {problem.c_out} are no multiples of 16 bytes"
    if not {*problem.stride} <= {1, 2}:
        return f"stride {problem.stride} is neither 1 nor 2"
    if problem.block[0] % 64 and problem.block[0] != 32:
        return f"blocks of {problem.block[0]} output channels are neither 32 nor a multiple of 64"
    if problem.block[1] * item < 32 or problem.block[1] & (problem.block[1] - 1):
        return f"blocks of {problem.block[1]} input channels are not 32 bytes times a power of two"
    if problem.width < problem.stride[1] or min(problem.output_size) < 1:
        return f"an image of {problem.height} x {problem.width} leaves no output"
    if config is not None:
        if config.fetch == "sectors" and problem.stride[1] > 1:
            return "it fetches sectors only where the width's stride is 1"
        if config.output_group * item % 16:
            return f"it permutes channels in groups of 16 bytes, not of {config.output_group} channels"
        if config.output_group and config.tile_n * problem.c_out * math.prod(problem.output_size) >= 2**31:
            return f"{config.tile_n} images of {problem.output_size} are too large to permute with 32-bit offsets"
        try:
            tile = complete_tile(problem, config, max_pool=max_pool)
        except ValueError as error:
            return str(error)
        if tile.shared_bytes > SHARED_BYTES:
            return f"its tile takes {tile.shared_bytes} bytes of shared memory, {SHARED_BYTES} are there ({tile})"
        if max_pool and not tile.can_pool:
            return f"a tile of {tile.tile_h} x {tile.tile_w} cannot pool in registers"
    return None


@lru_cache(maxsize=4096)
def complete_tile(problem: Conv2dProblem, config: Conv2dConfig, *, max_pool: bool = False) -> ConvTile:
    """The tile that a config means for a problem: zeros filled in by what shared memory holds.

    Raises:
        ShapeError: no kernel can have that geometry.
    """
    item = ITEM_SIZE[problem.dtype]
    taps = problem.taps
    tile_k = config.tile_k or min(problem.block[1], 64 // item)
    tile = ConvTile(
        block=problem.block,
        kernel_size=problem.kernel_size,
        stride=problem.stride,
        padding=problem.padding,
        dilation=problem.dilation,
        tile_n=config.tile_n,
        tile_h=config.tile_h,
        tile_w=config.tile_w,
        tile_k=tile_k,
        copies=config.input_order == "copies",
        x_stages=config.x_stages or 2,
        w_stages=config.w_stages or 2,
        w_taps=config.w_taps or _weight_taps(taps, 64 * tile_k * item),
        y_stages=config.y_stages or 1,
        item_size=item,
    ).checked()
    if not config.y_stages and tile.y_step_bytes <= 8192:
        tile = replace(tile, y_stages=2)
    if not config.w_stages:
        whole = replace(tile, w_stages=max(2, taps // tile.w_taps))
        tile = whole if whole.shared_bytes <= SHARED_BYTES else tile
    if not config.x_stages:
        spare = (SHARED_BYTES - tile.shared_bytes) // tile.x_step_bytes
        tile = replace(tile, x_stages=max(1, min(MOST_X_STAGES, 2 + spare)))
    if not config.y_stages and tile.y_stages == 1 and tile.turns and not max_pool:  # the store then waits for no copy
        twice = replace(tile, y_stages=2)
        tile = twice if twice.shared_bytes <= SHARED_BYTES else tile
    if not config.w_stages:
        spare = (SHARED_BYTES - tile.shared_bytes) // tile.w_step_bytes
        most = max(tile.w_stages, MOST_W_BYTES // tile.w_step_bytes)
        tile = replace(tile, w_stages=max(1, min(most, tile.w_stages + spare)))
    if not config.y_stages:
        spare = (SHARED_BYTES - tile.shared_bytes) // (2 * tile.y_step_bytes)
        tile = replace(tile, y_stages=max(1, min(MOST_Y_STAGES, tile.y_stages + spare)))
    return tile


def _weight_taps(taps: int, tap_bytes: int) -> int:
    """Taps of a weight stage: the divisor of ``taps`` nearest to 12 KiB, a quarter of the usual ring."""
    divisors = [n for n in range(1, taps + 1) if taps % n == 0]
    return min(divisors, key=lambda n: abs(n * tap_bytes - 12288))
