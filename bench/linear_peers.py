"""The peers of block-sparse linear layers on a GPU: torch's BSR product, default and swept, and stanford-stk."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from tetris.bench.linear_cases import Case
from tetris.bench.linear_operands import Operands


def bsr_tensor(operands: Operands) -> torch.Tensor:
    """The pruned weight as torch's BSR tensor."""
    layout = operands.layout
    if any(size % block for size, block in zip(layout.shape, layout.block)):
        raise ValueError(f"BSR wants whole blocks; {layout.shape} is no multiple of {layout.block}")
    return torch.sparse_bsr_tensor(layout.indptr, layout.indices, operands.values, size=layout.shape)


def bsr_metas(tokens: int, budget: int) -> list[dict[str, int]]:
    """Launch parameters of torch's BSR kernel, the likeliest first, at most ``budget`` of them."""
    tiles = [tile for tile in (128, 64) if tokens % tile == 0] or [tokens]
    metas = [
        {"SPLIT_N": tokens // tile, "GROUP_SIZE_ROW": group, "num_stages": stages, "num_warps": warps}
        for group in (4, 1, 8)
        for stages in (3, 4, 2, 5)
        for tile in tiles
        for warps in (4, 8)
    ]
    return metas[:budget]


def bsr_callable(operands: Operands, meta: dict[str, int] | None) -> Callable[[], torch.Tensor]:
    """torch's own block-sparse product; ``meta`` None takes its default parameters."""
    from torch.sparse._triton_ops import bsr_dense_addmm

    weight, x = bsr_tensor(operands), operands.x
    columns = x.T
    zero = torch.zeros((), dtype=x.dtype, device=x.device).expand(weight.shape[0], x.shape[0])
    return lambda: bsr_dense_addmm(zero, weight, columns, beta=0, meta=meta).T


def stk_status(case: Case) -> str:
    if importlib.util.find_spec("stk") is None:
        return "skipped: not installed"
    return "skipped: blocks of 128 x 128 only" if case.block != (128, 128) else "skipped: no adapter"
