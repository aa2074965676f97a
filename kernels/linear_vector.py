"""Block-sparse linear layer for one token: sums of products without matrix instructions, bound by latency and memory.

y[o] = activation(sum over kept blocks of W[o, k] x[k] + bias[o] + residual[o]), as in ``linear``.

A program computes TILE_OUT output features of one block row, or of a part of it where rows are long
(``vector_schedule``); a step takes TILE_K / BLOCK_IN kept blocks at once, so that enough loads are in flight. A row
that was not cut is finished at once; of a cut row every part leaves its sums in fp32, and the program that arrives last
adds them in the order of the inputs: one launch, and the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tetris.kernels.arrival import arrive
from tetris.kernels.configs import LinearConfig
from tetris.kernels.device import device_info
from tetris.kernels.epilogue import activate
from tetris.kernels.recording import launch
from tetris.kernels.vector_schedule import MOST_PARTS, make_vector_schedule, step_inputs, vector_tile
from tetris.kernels.widen import widen


@triton.jit
def linear_vector_kernel(
    x_ptr,  # [K]
    w_ptr,  # [n_blocks, BLOCK_OUT, BLOCK_IN]
    y_ptr,  # [N]
    scales_ptr,
    bias_ptr,
    residual_ptr,
    indices,
    input_permutation_ptr,
    output_permutation_ptr,
    parts,  # [n_parts, 8], see VectorSchedule
    counters,
    workspace,  # fp32 [places, TILE_OUT]
    N,
    K,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_K: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: the parts."""
    SLICES: tl.constexpr = (BLOCK_OUT + TILE_OUT - 1) // TILE_OUT
    record = parts + tl.program_id(0) * 8
    tile = tl.load(record)
    begin = tl.load(record + 1) * BLOCK_IN
    end = begin + tl.load(record + 2) * BLOCK_IN
    siblings = tl.load(record + 3)
    first_place = tl.load(record + 4)
    place = tl.load(record + 5)
    row_o = (tile % SLICES) * TILE_OUT + tl.arange(0, TILE_OUT)  # within the block row
    if BLOCK_OUT % TILE_OUT == 0:  # the same, in fewer registers
        offs_o = tile * TILE_OUT + tl.arange(0, TILE_OUT)
        mask_o = offs_o < N
    else:
        offs_o = (tile // SLICES) * BLOCK_OUT + row_o
        mask_o = (row_o < BLOCK_OUT) & (offs_o < N)
    # Asked for now: behind the loop each would be a wait of its own.
    if scales_ptr is not None:
        scale = tl.load(scales_ptr + offs_o, mask=mask_o, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)
    offs_k = tl.arange(0, TILE_K)
    tl.assume(end > begin)
    acc = tl.zeros((TILE_OUT, TILE_K), tl.float32)
    for k0 in tl.range(begin, end, TILE_K, num_stages=STAGES):
        kept = k0 + offs_k < end
        if TILE_K % BLOCK_IN == 0:  # a step begins with a block: the compiler sees which addresses are neighbours
            block = k0 // BLOCK_IN + offs_k // BLOCK_IN
            k = offs_k % BLOCK_IN
        else:
            block = (k0 + offs_k) // BLOCK_IN
            k = (k0 + offs_k) % BLOCK_IN
        w_offsets = block.to(tl.int64) * (BLOCK_OUT * BLOCK_IN) + k
        mask_w = kept[None, :]
        if BLOCK_OUT % TILE_OUT != 0:
            mask_w &= (row_o < BLOCK_OUT)[:, None]
        w = tl.load(w_ptr + row_o[:, None] * BLOCK_IN + w_offsets[None, :], mask=mask_w, other=0.0)
        channel = tl.load(indices + block, mask=kept, other=0) * BLOCK_IN + k
        mask_k = kept & (channel < K)
        if input_permutation_ptr is not None:
            channel = tl.load(input_permutation_ptr + channel, mask=mask_k, other=0)
        x = tl.load(x_ptr + channel, mask=mask_k, other=0.0)  # [TILE_K]
        acc += widen(w, tl.float32) * x.to(tl.float32)[None, :]
    sums = tl.sum(acc, 1)

    finish = True
    if siblings > 1:
        offs = tl.arange(0, TILE_OUT)
        tl.store(workspace + place * TILE_OUT + offs, sums)
        finish = arrive(counters + first_place, siblings)
        if finish:
            part = tl.arange(0, MOST_PARTS)
            others = workspace + (first_place + part)[:, None] * TILE_OUT + offs[None, :]
            sums = tl.sum(tl.load(others, mask=(part < siblings)[:, None], other=0.0, cache_modifier=".cg"), 0)
    if finish:
        if scales_ptr is not None:
            sums *= scale
        if bias_ptr is not None:
            sums += bias
        stored_o = offs_o
        if output_permutation_ptr is not None:
            stored_o = tl.load(output_permutation_ptr + offs_o, mask=mask_o, other=0)
        if residual_ptr is not None:
            sums += tl.load(residual_ptr + stored_o, mask=mask_o, other=0.0).to(tl.float32)
        tl.store(y_ptr + stored_o, activate(sums, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask_o)


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
    """As :func:`tetris.kernels.linear.block_sparse_linear`, for one token, in exact products whatever the dtype.

    Args:
        config: ``tile_out`` features a program (0 = the block row's), ``tile_k`` inputs a step (a multiple of the
            block's joins several kept blocks), ``num_warps``, ``num_stages``.
        schedule: of this layout and config (:func:`make_vector_schedule`); made anew, which costs far more than the
            product, when missing. Launches that share one must run one after the other.
    Cost:
        2 * kept weights FLOP; reads the kept weights once.
    """
    row = x.reshape(-1)
    if row.stride(0) != 1:
        row = row.contiguous()
    output = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    if output.numel() == 0:
        return output
    block_out, block_in = values.shape[-2:]
    tile_out = vector_tile(config, block_out)
    if schedule is None:
        sm_count = device_info(x.device).sm_count if x.is_cuda else 1
        schedule = make_vector_schedule(indptr, (block_out, block_in), config, sm_count).tensors
    parts, counters = schedule
    workspace = torch.empty((counters.numel(), tile_out), dtype=torch.float32, device=x.device)
    launch(
        linear_vector_kernel,
        (len(parts),),
        row,
        values,
        output,
        scales,
        bias,
        None if residual is None else residual.reshape(-1).contiguous(),
        indices,
        input_permutation,
        output_permutation,
        parts,
        counters,
        workspace,
        out_features,
        row.numel(),
        BLOCK_OUT=block_out,
        BLOCK_IN=block_in,
        TILE_OUT=tile_out,
        TILE_K=step_inputs(config, block_in),
        MOST_PARTS=MOST_PARTS,
        ACTIVATION=activation,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return output
