"""Block-sparse linear layer for some dozens to some hundreds of tokens: block rows cut into parts along the inputs.

y[m, o] = activation(sum over kept blocks of W[o, k] x[m, k] + bias[o] + residual[m, o]), as in ``linear``.

There are fewer tiles of the output than multiprocessors, or they differ too much. A program computes one part of a
block row (``split_schedule``) for TILE_M tokens. A row that was not cut is finished at once; of a cut row every part
leaves its sums in fp32, and the program that arrives last adds them in the order of the inputs and finishes the tile:
one launch, and the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tetris.kernels.arrival import arrive
from tetris.kernels.configs import LinearConfig
from tetris.kernels.descriptors import describable_rows, describe
from tetris.kernels.device import device_info
from tetris.kernels.epilogue import add_bias, scale_rows, store_rows
from tetris.kernels.recording import launch
from tetris.kernels.split_schedule import HEAD_FIELDS, PAST, TURNS, make_split_schedule, merge_stages
from tetris.kernels.widen import widen
from tetris.layout import ceil_div


@triton.jit(do_not_specialize=["n_cut_parts", "record_fields"])  # they differ from layer to layer
def linear_split_kernel(
    x_desc,  # [M, K], boxes [TILE_M, BOX_K]: TILE_K or the block's inputs, if those are fewer
    w_desc,  # [n_blocks * BLOCK_OUT, BLOCK_IN], boxes [TILE_OUT, BOX_K]
    y_ptr,  # [M, N]
    scales_ptr,
    bias_ptr,
    residual_ptr,
    output_permutation_ptr,
    parts,  # [n_parts, record_fields], see SplitSchedule
    counters,
    workspace,  # fp32 [token tiles * n_cut_parts, TILE_OUT, TILE_M]
    M,
    N,
    n_cut_parts,
    record_fields,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_K: tl.constexpr,
    HEAD: tl.constexpr,
    PAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
):
    """Grid: parts, tiles of TILE_M tokens."""
    SPLIT_OUT: tl.constexpr = BLOCK_OUT // TILE_OUT
    JOIN: tl.constexpr = max(TILE_K // BLOCK_IN, 1)  # blocks of a step
    BOX_K: tl.constexpr = TILE_K // JOIN
    SPLIT_K: tl.constexpr = BLOCK_IN // BOX_K
    tile = tl.program_id(1)
    record = parts + tl.program_id(0) * record_fields
    out_tile = tl.load(record)
    first_block = tl.load(record + 1)
    n_blocks = tl.load(record + 2)
    siblings = tl.load(record + 3)
    first_place = tl.load(record + 4)
    place = tl.load(record + 5)
    m0 = tile * TILE_M

    # a loop that may not run at all makes ptxas serialise every wgmma (Triton 3.6, C7515)
    tl.assume(n_blocks > 0)
    acc = tl.zeros((TILE_OUT, TILE_M), tl.float32)
    for step in tl.range(0, tl.cdiv(n_blocks, JOIN) * SPLIT_K, num_stages=STAGES):
        for i in tl.static_range(JOIN):
            block = (step // SPLIT_K) * JOIN + i
            k = (step % SPLIT_K) * BOX_K
            w_row = (first_block + block) * BLOCK_OUT + (out_tile % SPLIT_OUT) * TILE_OUT
            if JOIN > 1:  # behind the last block TMA reads zeros: those columns are PAST the inputs
                w_row = tl.where(block < n_blocks, w_row, PAST)
            x = x_desc.load([m0, tl.load(record + HEAD + block) + k])  # [TILE_M, BOX_K]
            w = w_desc.load([w_row, k])
            acc = tl.dot(widen(w, x.dtype), x.T, acc, input_precision=PRECISION)

    offs_o = out_tile * TILE_OUT + tl.arange(0, TILE_OUT)
    offs_m = m0 + tl.arange(0, TILE_M)
    mask_o, mask_m = offs_o < N, offs_m < M
    finish = True
    if siblings > 1:
        offsets = tl.arange(0, TILE_OUT)[:, None] * TILE_M + tl.arange(0, TILE_M)[None, :]
        first = tile * n_cut_parts + first_place
        sums = workspace + first.to(tl.int64) * (TILE_OUT * TILE_M)
        tl.store(sums + (place - first_place) * (TILE_OUT * TILE_M) + offsets, acc)
        finish = arrive(counters + first, siblings)
        acc = tl.zeros((TILE_OUT, TILE_M), tl.float32)
        if finish:
            for part in tl.range(0, siblings, num_stages=MERGE_STAGES):
                acc += tl.load(sums + part * (TILE_OUT * TILE_M) + offsets, cache_modifier=".cg")
    if finish:
        acc = add_bias(scale_rows(acc, scales_ptr, offs_o, mask_o), bias_ptr, offs_o, mask_o)
        store_rows(acc, y_ptr, residual_ptr, output_permutation_ptr, offs_m, mask_m, offs_o, mask_o, N, ACTIVATION)


def block_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
    allow_tf32: bool = False,
    scales: torch.Tensor | None = None,
    config: LinearConfig,
    schedule: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """As :func:`tetris.kernels.linear.block_sparse_linear`, for what ``split_schedule.supports`` takes.

    Args:
        config: ``tile_k`` inputs a step: a part of the block's, or several blocks one after the other.
        input_permutation: moved through by a kernel of its own, before.
        schedule: of this layout, number of tokens and config (:func:`make_split_schedule`); made anew, which costs far
            more than the product, when missing. Launches that share one must run one after the other.
    """
    from tetris.kernels.permute import permute_channels

    if input_permutation is not None:
        x = permute_channels(x, input_permutation, dim=-1)
    rows = describable_rows(x)
    tokens = rows.shape[0]
    y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    output = y.view(*x.shape[:-1], out_features)
    if y.numel() == 0:
        return output
    block_out, block_in = values.shape[-2:]
    if schedule is None:
        sm_count = device_info(x.device).sm_count
        schedule = make_split_schedule(
            indptr, indices, block=(block_out, block_in), tokens=tokens, tile_tokens=config.tile_tokens,
            tile_out=config.tile_out, n_programs=sm_count, turns=TURNS,
        ).tensors  # fmt: skip
    parts, counters = schedule
    tiles = ceil_div(tokens, config.tile_tokens)
    n_cut_parts, box_k = counters.shape[1], min(config.tile_k, block_in)
    workspace = torch.empty(
        (n_cut_parts * tiles, config.tile_out, config.tile_tokens), dtype=torch.float32, device=x.device
    )
    launch(
        linear_split_kernel,
        (len(parts), tiles),
        describe(rows, [config.tile_tokens, box_k]),
        describe(values.view(-1, block_in), [config.tile_out, box_k]),
        y,
        scales,
        bias,
        None if residual is None else residual.reshape(tokens, out_features).contiguous(),
        output_permutation,
        parts,
        counters,
        workspace,
        tokens,
        out_features,
        n_cut_parts,
        parts.shape[1],
        BLOCK_OUT=block_out,
        BLOCK_IN=block_in,
        TILE_M=config.tile_tokens,
        TILE_OUT=config.tile_out,
        TILE_K=config.tile_k,
        HEAD=HEAD_FIELDS,
        PAST=PAST,
        ACTIVATION=activation,
        PRECISION="tf32" if allow_tf32 else config.precision,
        STAGES=config.num_stages,
        MERGE_STAGES=merge_stages(config.tile_tokens, config.tile_out),
        num_warps=config.num_warps,
    )
    return output
