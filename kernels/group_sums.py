"""Sums over groups of rows or columns of a matrix, in any order: the only passes of a search over the whole weight.

Bandwidth-bound. Rows of a group come in whole. Columns are gathered: a program stays on a few rows, so that the
scattered loads of one row hit the cache that its first loads filled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tetris.kernels.configs import next_power_of_two
from tetris.layout import ceil_div

TILE_COLUMNS = 512
GATHERED = 4096
ROWS_IN_CACHE = 2
"""Long rows that a multiprocessor works on at a time: more would evict each other from its cache."""
SHORT_ROW_BYTES = 32768
NARROWED = 4096
"""An order longer than this is worth a launch that halves its bytes."""


@triton.jit
def row_groups_kernel(x_ptr, order_ptr, y_ptr, M, N, GROUP: tl.constexpr, TILE_N: tl.constexpr):
    """y[g, n] = sum of x[order[p], n] over the positions p of group g. Grid: groups x tiles of columns."""
    g = tl.program_id(0)
    offs_n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    mask_n = offs_n < N
    total = tl.zeros((TILE_N,), dtype=y_ptr.dtype.element_ty)
    end = tl.minimum(g * GROUP + GROUP, M)
    for p in range(g * GROUP, end):
        row = tl.load(order_ptr + p).to(tl.int64)
        total += tl.load(x_ptr + row * N + offs_n, mask=mask_n, other=0.0)
    tl.store(y_ptr + g.to(tl.int64) * N + offs_n, total, mask=mask_n)


@triton.jit
def column_groups_kernel(
    x_ptr, order_ptr, y_ptr, M, N, n_groups, GROUP: tl.constexpr, TILE_GROUP: tl.constexpr, TILE_G: tl.constexpr
):
    """y[m, g] = sum of x[m, order[p]] over the positions p of group g. Grid: any; a program walks whole rows."""
    inside = tl.arange(0, TILE_GROUP)
    first = tl.program_id(0).to(tl.int64)
    for start_m in range(0, M, tl.num_programs(0)):
        m = start_m + first
        for start in range(0, n_groups, TILE_G):
            groups = start + tl.arange(0, TILE_G)
            positions = groups[:, None] * GROUP + inside[None, :]  # [TILE_G, TILE_GROUP]
            mask = (inside < GROUP)[None, :] & (positions < N) & (m < M)
            columns = tl.load(order_ptr + positions, mask=mask, other=0)
            x = tl.load(x_ptr + m * N + columns, mask=mask, other=0.0)
            tl.store(y_ptr + m * n_groups + groups, tl.sum(x, axis=1), mask=(groups < n_groups) & (m < M))


def group_sums(x: torch.Tensor, order: torch.Tensor, group: int, *, dim: int, processors: int = 1) -> torch.Tensor:
    """Sums over groups of ``group`` consecutive positions of ``order`` along ``dim``.

    Args:
        x: float32 or float64 [M, N], contiguous.
        order: int [M] or [N], a permutation: the row or column at every position.
        group: positions a group; the last group may be smaller.
        dim: 0 sums rows, 1 columns.
        processors: multiprocessors of the device.
    Returns:
        [groups, N] or [M, groups], x's dtype.
    Cost:
        one read of x.
    """
    M, N = x.shape
    n_groups = ceil_div(x.shape[dim], group)
    if len(order) > NARROWED:
        order = order.to(torch.int32)
    if dim == 0:
        y = x.new_empty(n_groups, N)
        tile = min(TILE_COLUMNS, next_power_of_two(N))
        row_groups_kernel[(n_groups, ceil_div(N, tile))](x, order, y, M, N, GROUP=group, TILE_N=tile, num_warps=4)
        return y
    y = x.new_empty(M, n_groups)
    tile_group = next_power_of_two(group)
    tile_g = max(1, min(next_power_of_two(n_groups), GATHERED // tile_group))
    programs = min(M, ROWS_IN_CACHE * processors) if N * x.element_size() > SHORT_ROW_BYTES else M
    column_groups_kernel[(programs,)](
        x,
        order,
        y,
        M,
        N,
        n_groups,
        GROUP=group,
        TILE_GROUP=tile_group,
        TILE_G=tile_g,
        num_warps=max(1, min(16, tile_g * tile_group // 256)),
    )
    return y
