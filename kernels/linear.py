"""Block-sparse linear layer, y = activation(x W^T + bias + residual), in portable Triton.

A program computes TILE_OUT features of one block row for TILE_M tokens; its loop runs over that row's kept blocks
only. Two kernels, as for convolutions: one loads by descriptor, the other by pointer and takes everything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tetris.kernels.configs import LinearConfig, is_power_of_two_tile, next_power_of_two
from tetris.kernels.descriptors import describable, describe
from tetris.kernels.epilogue import activate, add_bias, program_tile, scale_rows, store_rows
from tetris.kernels.permute import permute_channels
from tetris.kernels.recording import launch
from tetris.kernels.widen import widen
from tetris.layout import ceil_div


@triton.jit
def linear_descriptor_kernel(
    x_desc,  # [M, K], boxes [TILE_M, TILE_K]
    w_desc,  # [n_blocks * BLOCK_OUT, BLOCK_IN], boxes [TILE_OUT, TILE_K]
    y_desc,  # [M, N], boxes [TILE_M, TILE_OUT]; None = by pointer
    y_ptr,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    indptr,
    indices,
    output_permutation_ptr,
    M,
    N,
    n_out_tiles,
    n_tiles,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Blocks that are powers of two. Grid: output tiles x tiles of TILE_M tokens."""
    SPLIT_OUT: tl.constexpr = BLOCK_OUT // TILE_OUT
    SPLIT_K: tl.constexpr = BLOCK_IN // TILE_K
    out_tile, tile = program_tile(tl.program_id(0), n_out_tiles, n_tiles, GROUP)
    row = out_tile // SPLIT_OUT
    m0 = tile * TILE_M

    begin = tl.load(indptr + row) * SPLIT_K
    end = tl.load(indptr + row + 1) * SPLIT_K
    tl.assume(end > begin)  # a loop that may not run at all makes ptxas serialise every wgmma (Triton 3.6, C7515)
    acc = tl.zeros((TILE_OUT, TILE_M), tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        block = step // SPLIT_K
        k = (step % SPLIT_K) * TILE_K
        x = x_desc.load([m0, tl.load(indices + block) * BLOCK_IN + k])  # [TILE_M, TILE_K]
        w = w_desc.load([block * BLOCK_OUT + (out_tile % SPLIT_OUT) * TILE_OUT, k])  # [TILE_OUT, TILE_K]
        acc = tl.dot(widen(w, x.dtype), x.T, acc, input_precision=PRECISION)

    o0 = out_tile * TILE_OUT
    offs_o = o0 + tl.arange(0, TILE_OUT)
    mask_o = offs_o < N
    acc = add_bias(scale_rows(acc, scales_ptr, offs_o, mask_o), bias_ptr, offs_o, mask_o)
    if y_desc is not None:
        y_desc.store([m0, o0], activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty).T)
    else:
        offs_m = m0 + tl.arange(0, TILE_M)
        store_rows(acc, y_ptr, residual_ptr, output_permutation_ptr, offs_m, offs_m < M, offs_o, mask_o, N, ACTIVATION)


@triton.jit
def linear_pointer_kernel(
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
    n_out_tiles,
    n_tiles,
    stride_xm,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Anything. A step multiplies TILE_K consecutive entries of the row's kept (block, feature) pairs.

    Where TILE_K divides BLOCK_IN, a step lies within one block and loads one index; elsewhere every entry looks up
    its own block, so that small blocks fill the matrix instruction. Grid: output tiles x tiles of TILE_M tokens.
    """
    SPLIT_OUT: tl.constexpr = (BLOCK_OUT + TILE_OUT - 1) // TILE_OUT
    SPLIT_K: tl.constexpr = BLOCK_IN // TILE_K
    out_tile, tile = program_tile(tl.program_id(0), n_out_tiles, n_tiles, GROUP)
    row = out_tile // SPLIT_OUT
    row_o = (out_tile % SPLIT_OUT) * TILE_OUT + tl.arange(0, TILE_OUT)  # within the block row
    mask_row = row_o < BLOCK_OUT
    offs_m = tile.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    mask_m = offs_m < M
    x_row_ptr = x_ptr + offs_m * stride_xm
    w_row_ptr = w_ptr + row_o * BLOCK_IN
    offs_k = tl.arange(0, TILE_K)

    first_block = tl.load(indptr + row)
    n_blocks = tl.load(indptr + row + 1) - first_block
    n_steps = (n_blocks * BLOCK_IN + TILE_K - 1) // TILE_K
    tl.assume(n_steps > 0)  # a loop that may not run at all makes ptxas serialise every wgmma (Triton 3.6, C7515)
    acc = tl.zeros((TILE_OUT, TILE_M), tl.float32)
    for step in tl.range(0, n_steps, num_stages=STAGES):
        if BLOCK_IN % TILE_K == 0:
            block = first_block + step // SPLIT_K
            k = (step % SPLIT_K) * TILE_K + offs_k
            channel = tl.load(indices + block) * BLOCK_IN + k
            mask_k = channel < K
            mask_w = mask_row[:, None]
        else:
            block = (step * TILE_K + offs_k) // BLOCK_IN
            k = (step * TILE_K + offs_k) % BLOCK_IN
            kept = block < n_blocks
            block += first_block
            channel = tl.load(indices + block, mask=kept, other=0) * BLOCK_IN + k
            mask_k = kept & (channel < K)
            mask_w = mask_row[:, None] & kept[None, :]
        if input_permutation_ptr is not None:
            channel = tl.load(input_permutation_ptr + channel, mask=mask_k, other=0)
        w_offsets = block * (BLOCK_OUT * BLOCK_IN) + k
        mask_x = mask_k[:, None] & mask_m[None, :]
        x = tl.load(x_row_ptr[None, :] + channel[:, None], mask=mask_x, other=0.0)  # [TILE_K, TILE_M]
        w = tl.load(w_row_ptr[:, None] + w_offsets[None, :], mask=mask_w, other=0.0)  # [TILE_OUT, TILE_K]
        acc = tl.dot(widen(w, x.dtype), x, acc, input_precision=PRECISION)

    offs_o = row * BLOCK_OUT + row_o
    mask_o = mask_row & (offs_o < N)
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
) -> torch.Tensor:
    """Launch the linear layer; the caller has checked shapes, dtypes and devices.

    Args:
        x: [..., K]; fp16, bf16 or fp32.
        values: packed blocks [n_blocks, BLOCK_OUT, BLOCK_IN] of x's dtype, or quantised; contiguous.
        indptr, indices: the layout; every block row holds at least one block.
        bias: [out_features] in the order of the block rows, fp32 or x's dtype.
        out_features: features of the output, without padding.
        activation: "none", "relu", "relu6", "silu" or "gelu".
        residual: shape and feature order of the stored output, x's dtype.
        input_permutation: int [K]; computes from x[..., input_permutation].
        output_permutation: int [out_features]; computed feature j is stored at output_permutation[j].
        allow_tf32: round fp32 products to tf32.
        scales: fp32 [out_features] in the order of the block rows, of quantised values; the sums are multiplied by it.
        config: tile sizes; descriptors are used where it asks for them and the operands allow them.
    Returns:
        [..., out_features], contiguous, x's dtype.
    Cost:
        2 * tokens * n_blocks * BLOCK_OUT * BLOCK_IN FLOP.
    """
    if input_permutation is not None and config.permute_first:
        x, input_permutation = permute_channels(x, input_permutation, dim=-1), None
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    tokens, in_features = rows.shape
    y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    output = y.view(*x.shape[:-1], out_features)
    if y.numel() == 0:
        return output
    if residual is not None:
        residual = residual.reshape(tokens, out_features).contiguous()
    block_out, block_in = values.shape[-2:]
    tile_out = next_power_of_two(min(config.tile_out or block_out, block_out), 16)
    n_out_tiles = (len(indptr) - 1) * ceil_div(block_out, tile_out)
    n_tiles = ceil_div(tokens, config.tile_tokens)
    grid = (n_out_tiles * n_tiles,)
    common = dict(
        BLOCK_OUT=block_out,
        BLOCK_IN=block_in,
        TILE_M=config.tile_tokens,
        TILE_OUT=tile_out,
        GROUP=0 if config.group_rows >= n_out_tiles else config.group_rows,
        ACTIVATION=activation,
        PRECISION="tf32" if allow_tf32 else config.precision,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    tile_k = config.tile_k or next_power_of_two(block_in, 16)
    if (
        config.descriptors
        and input_permutation is None
        and is_power_of_two_tile(block_out)
        and is_power_of_two_tile(tile_k)
        and block_in % tile_k == 0
        and describable(rows)
        and describable(values)
    ):
        store_box = output_permutation is None and residual is None and describable(y)
        launch(
            linear_descriptor_kernel,
            grid,
            describe(rows, [config.tile_tokens, tile_k]),
            describe(values.view(-1, block_in), [tile_out, tile_k]),
            describe(y, [config.tile_tokens, tile_out]) if store_box else None,
            y,
            scales,
            bias,
            residual,
            indptr,
            indices,
            output_permutation,
            tokens,
            out_features,
            n_out_tiles,
            n_tiles,
            TILE_K=tile_k,
            **common,
        )
        return output

    launch(
        linear_pointer_kernel,
        grid,
        rows,
        values,
        y,
        scales,
        bias,
        residual,
        indptr,
        indices,
        input_permutation,
        output_permutation,
        tokens,
        out_features,
        in_features,
        n_out_tiles,
        n_tiles,
        rows.stride(0),
        TILE_K=tile_k,
        **common,
    )
    return output
