"""Block-sparse linear layer for few tokens (up to 16): bound by reading the kept weights once.

y[m, o] = activation(sum over kept blocks of W[o, k] x[m, k] + bias[o] + residual[m, o]), as in ``linear``.

A program computes TILE_OUT output features of one block row for all tokens, so nothing is summed across programs; a
step takes TILE_K / BLOCK_IN kept blocks at once, so that enough loads are in flight. Products are matrix instructions':
the weights on the left, from shared memory. One-byte weights stand on the right, where a thread holds 4 neighbours and
not 2, because they must pass through registers (H200, 16 tokens, 4096 -> 14336 at 27 %: int8 15.9 us instead of 18.9,
float8 14.3 instead of 15.5; float16 16.5 instead of 14.5).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tetris.kernels.configs import LinearConfig, next_power_of_two
from tetris.kernels.epilogue import activate
from tetris.kernels.recording import launch
from tetris.kernels.widen import widen
from tetris.layout import ceil_div


@triton.jit
def linear_decode_kernel(
    x_ptr,  # [M, K], rows stride_xm apart
    w_ptr,  # [n_blocks, BLOCK_OUT, BLOCK_IN]
    y_ptr,  # [M, N]
    scales_ptr,
    bias_ptr,
    residual_ptr,
    indptr,
    indices,
    input_permutation_ptr,
    output_permutation_ptr,
    M,
    N,
    K,
    stride_xm,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: block rows x slices of TILE_OUT features."""
    ONE_BYTE: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth == 8
    SLICES: tl.constexpr = (BLOCK_OUT + TILE_OUT - 1) // TILE_OUT
    row = tl.program_id(0) // SLICES
    row_o = (tl.program_id(0) % SLICES) * TILE_OUT + tl.arange(0, TILE_OUT)  # within the block row
    offs_k = tl.arange(0, TILE_K)
    offs_m = tl.arange(0, TILE_M)
    mask_m = offs_m < M
    offs_o = row * BLOCK_OUT + row_o
    mask_o = (row_o < BLOCK_OUT) & (offs_o < N)
    # Asked for now: behind the loop each would be a wait of its own.
    if scales_ptr is not None:
        scale = tl.load(scales_ptr + offs_o, mask=mask_o, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)
    begin = tl.load(indptr + row) * BLOCK_IN
    end = tl.load(indptr + row + 1) * BLOCK_IN
    tl.assume(end > begin)
    if ONE_BYTE:
        acc = tl.zeros((TILE_M, TILE_OUT), tl.float32)
    else:
        acc = tl.zeros((TILE_OUT, TILE_M), tl.float32)
    for k0 in tl.range(begin, end, TILE_K, num_stages=STAGES):
        kept = k0 + offs_k < end
        if TILE_K % BLOCK_IN == 0:  # a step begins with a block: the compiler sees which addresses are neighbours
            block = k0 // BLOCK_IN + offs_k // BLOCK_IN
            k = offs_k % BLOCK_IN
        else:
            block = (k0 + offs_k) // BLOCK_IN
            k = (k0 + offs_k) % BLOCK_IN
        w_offsets = block.to(tl.int64) * (BLOCK_OUT * BLOCK_IN) + k
        mask_w = (row_o < BLOCK_OUT)[:, None] & kept[None, :]
        w = tl.load(w_ptr + row_o[:, None] * BLOCK_IN + w_offsets[None, :], mask=mask_w, other=0.0)
        channel = tl.load(indices + block, mask=kept, other=0) * BLOCK_IN + k
        mask_k = kept & (channel < K)
        if input_permutation_ptr is not None:
            channel = tl.load(input_permutation_ptr + channel, mask=mask_k, other=0)
        x_offsets = offs_m[:, None] * stride_xm + channel[None, :]
        x = tl.load(x_ptr + x_offsets, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [TILE_M, TILE_K]
        if ONE_BYTE:
            acc = tl.dot(x, widen(w, x.dtype).T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(w, x.T, acc, input_precision=PRECISION)
    sums = acc.T if ONE_BYTE else acc

    if scales_ptr is not None:
        sums *= scale[:, None]
    if bias_ptr is not None:
        sums += bias[:, None]
    stored_o = offs_o
    if output_permutation_ptr is not None:
        stored_o = tl.load(output_permutation_ptr + offs_o, mask=mask_o, other=0)
    offsets = offs_m[None, :] * N + stored_o[:, None]  # [TILE_OUT, TILE_M]
    mask = mask_o[:, None] & mask_m[None, :]
    if residual_ptr is not None:
        sums += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, activate(sums, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


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
) -> torch.Tensor:
    """As :func:`tetris.kernels.linear.block_sparse_linear`, for at most 16 tokens.

    Args:
        config: ``tile_out`` features a program (0 = the block row's), ``tile_k`` inputs a step (a multiple of the
            block's joins several kept blocks), ``num_warps``, ``num_stages``.
    Cost:
        2 * tokens * kept weights FLOP; reads the kept weights once.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    tokens, in_features = rows.shape
    y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    output = y.view(*x.shape[:-1], out_features)
    if y.numel() == 0:
        return output
    block_out, block_in = values.shape[-2:]
    tile_out = next_power_of_two(min(config.tile_out or block_out, block_out), 16)
    launch(
        linear_decode_kernel,
        ((len(indptr) - 1) * ceil_div(block_out, tile_out),),
        rows,
        values,
        y,
        scales,
        bias,
        None if residual is None else residual.reshape(tokens, out_features).contiguous(),
        indptr,
        indices,
        input_permutation,
        output_permutation,
        tokens,
        out_features,
        in_features,
        rows.stride(0),
        BLOCK_OUT=block_out,
        BLOCK_IN=block_in,
        TILE_M=next_power_of_two(tokens, 16),
        TILE_OUT=tile_out,
        TILE_K=config.tile_k or next_power_of_two(block_in, 16),
        ACTIVATION=activation,
        PRECISION="tf32" if allow_tf32 else "ieee",
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return output
