"""Channel permutation, y[..., j, ...] = x[..., permutation[j], ...], as a kernel of its own.

The last resort: a permutation is free when it is folded into the neighbouring layers' weights. Where it cannot be,
rows of channels come in by scattered loads that hit the cache, or in order to be shuffled between lanes, and leave in
order. On an H200 (fp16, 128 images): 128 channels @112 take .201 ms, 256 @56 .143 and 512 @28 .071, where a copy takes
.197, .100 and .052; ``index_select`` along the contiguous dimension takes .355 for the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tetris.kernels.configs import next_power_of_two
from tetris.kernels.recording import launch
from tetris.layout import ceil_div

SHUFFLED_CHANNELS = 256
"""Widest rows that are shuffled between the lanes of a warp: the work grows with the square of the width (at 512
channels shuffles take twice the time of scattered loads, and half a minute of compilation)."""

SHUFFLED_TILE_BYTES, SCATTERED_TILE_BYTES = 2048, 4096
"""One warp a program, few rows: with 4 warps and 4 rows, 512 channels @28 take .110 ms instead of .071."""


@triton.jit
def permute_rows_kernel(
    x_ptr, y_ptr, permutation_ptr, M, stride_xm, C: tl.constexpr, TILE_M: tl.constexpr, TILE_C: tl.constexpr
):
    """Rows [M, C] whole: coalesced load, shuffle between lanes, coalesced store. Grid: tiles of rows."""
    offs_m = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    offs_c = tl.arange(0, TILE_C)
    mask_c = offs_c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    source = tl.load(permutation_ptr + offs_c, mask=mask_c, other=0).to(tl.int32)
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c[None, :], mask=mask, other=0.0)  # [TILE_M, TILE_C]
    y = tl.gather(x, tl.broadcast_to(source[None, :], (TILE_M, TILE_C)), axis=1)
    tl.store(y_ptr + offs_m[:, None] * C + offs_c[None, :], y, mask=mask)


@triton.jit
def gather_rows_kernel(x_ptr, y_ptr, permutation_ptr, C, stride_xm, tiles_c, TILE_C: tl.constexpr):
    """Scattered loads that hit the cache, coalesced stores. Grid: rows x tiles of channels."""
    row = (tl.program_id(0) // tiles_c).to(tl.int64)
    offs_c = (tl.program_id(0) % tiles_c) * TILE_C + tl.arange(0, TILE_C)
    mask_c = offs_c < C
    source = tl.load(permutation_ptr + offs_c, mask=mask_c, other=0)
    y = tl.load(x_ptr + row * stride_xm + source, mask=mask_c, other=0.0)  # [TILE_C]
    tl.store(y_ptr + row * C + offs_c, y, mask=mask_c)


def permute_channels(x: torch.Tensor, permutation: torch.Tensor, *, dim: int) -> torch.Tensor:
    """y[..., j, ...] = x[..., permutation[j], ...] along ``dim``.

    Args:
        x: any shape whose dimension ``dim`` is the contiguous one: [..., K] with dim=-1, or a channels_last image
            [N, C, H, W] with dim=1. Otherwise ``dim`` indexes contiguous slices and torch's ``index_select`` is
            already bound by memory: it is used.
        permutation: int [C], sources.
    Returns:
        A new tensor with x's shape, dtype and memory format.
    Cost:
        x read once, y written once.
    """
    dim %= x.dim()
    moved = x.movedim(dim, -1)
    if not moved.is_contiguous():
        return x.index_select(dim, permutation)
    channels = moved.shape[-1]
    rows = moved.reshape(-1, channels)
    y = torch.empty_like(rows)
    if y.numel():
        item, tile_c = x.element_size(), next_power_of_two(channels)
        operands, row_stride = (rows, y, permutation), rows.stride(0)
        if channels <= SHUFFLED_CHANNELS:
            tile_m = max(1, SHUFFLED_TILE_BYTES // (tile_c * item))
            grid, tile = (ceil_div(len(rows), tile_m),), (tile_m, tile_c)
            launch(permute_rows_kernel, grid, *operands, len(rows), row_stride, channels, *tile, num_warps=1)
        else:
            tile_c = min(tile_c, SCATTERED_TILE_BYTES // item)
            tiles_c = ceil_div(channels, tile_c)
            grid = (len(rows) * tiles_c,)
            launch(gather_rows_kernel, grid, *operands, channels, row_stride, tiles_c, tile_c, num_warps=1)
    return y.view(moved.shape).movedim(-1, dim)
