"""Block-sparse 2-D convolution as an implicit GEMM over the kept blocks, in portable Triton.

    y[n, h, w, o] = activation(sum over kept blocks, taps (i, j), channels c of
                    W[o, c, i, j] x[n, h s + i d - p, w s + j d - p, c] + bias[o] + residual[n, h, w, o])

A program computes TILE_OUT channels of one block row at a tile of pixels; its loop runs over that row's kept
(block, tap) pairs only. Two kernels: one loads boxes of pixels by descriptor, whose out-of-bounds zeros are the
padding; the other computes addresses and masks, and takes everything (strides, odd channel counts, gathered inputs).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tetris.kernels.configs import Conv2dConfig, conv2d_output_size, is_power_of_two_tile, next_power_of_two
from tetris.kernels.descriptors import describable, describe
from tetris.kernels.epilogue import activate, add_bias, program_tile, store_rows
from tetris.layout import ceil_div


@triton.jit
def conv2d_descriptor_kernel(
    x_desc,  # [N, H, W, C_IN], boxes [TILE_N, TILE_H, TILE_W, TILE_K]
    w_desc,  # [n_blocks * TAPS * BLOCK_OUT, BLOCK_IN], boxes [TILE_OUT, TILE_K]
    y_desc,  # [N, OH, OW, C_OUT], boxes [TILE_N, TILE_H, TILE_W, TILE_OUT]; None = store by pointer
    residual_desc,  # as y_desc
    y_ptr,
    bias_ptr,
    residual_ptr,
    indptr,
    indices,
    output_permutation_ptr,
    N,
    OH,
    OW,
    C_OUT,
    n_out_tiles,
    tiles_h,
    tiles_w,
    n_tiles,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Stride 1, blocks that are powers of two. Grid: output tiles x pixel boxes."""
    TILE_M: tl.constexpr = TILE_N * TILE_H * TILE_W
    SPLIT_OUT: tl.constexpr = BLOCK_OUT // TILE_OUT
    SPLIT_K: tl.constexpr = BLOCK_IN // TILE_K
    out_tile, tile = program_tile(tl.program_id(0), n_out_tiles, n_tiles, GROUP)
    row = out_tile // SPLIT_OUT
    w0 = (tile % tiles_w) * TILE_W
    h0 = (tile // tiles_w % tiles_h) * TILE_H
    n0 = (tile // (tiles_w * tiles_h)) * TILE_N

    begin = tl.load(indptr + row) * (TAPS * SPLIT_K)
    end = tl.load(indptr + row + 1) * (TAPS * SPLIT_K)
    tl.assume(end > begin)  # a loop that may not run at all makes ptxas serialise every wgmma (Triton 3.6, C7515)
    acc = tl.zeros((TILE_OUT, TILE_M), tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        unit = step // SPLIT_K  # a kept (block, tap) pair
        k = (step % SPLIT_K) * TILE_K
        tap = unit % TAPS
        channel = tl.load(indices + unit // TAPS) * BLOCK_IN + k
        y0 = h0 + (tap // KW) * DILATION_H - PAD_H
        x0 = w0 + (tap % KW) * DILATION_W - PAD_W
        x = x_desc.load([n0, y0, x0, channel]).reshape(TILE_M, TILE_K)  # [TILE_M, TILE_K]
        w = w_desc.load([unit * BLOCK_OUT + (out_tile % SPLIT_OUT) * TILE_OUT, k])  # [TILE_OUT, TILE_K]
        acc = tl.dot(w, x.T, acc, input_precision=PRECISION)

    o0 = out_tile * TILE_OUT
    offs_o = o0 + tl.arange(0, TILE_OUT)
    mask_o = offs_o < C_OUT
    acc = add_bias(acc, bias_ptr, offs_o, mask_o)
    if y_desc is not None:
        if residual_desc is not None:
            acc += residual_desc.load([n0, h0, w0, o0]).reshape(TILE_M, TILE_OUT).to(tl.float32).T
        result = activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty)
        y_desc.store([n0, h0, w0, o0], result.T.reshape(TILE_N, TILE_H, TILE_W, TILE_OUT))
    else:
        offs = tl.arange(0, TILE_M)
        n = n0 + offs // (TILE_H * TILE_W)
        h = h0 + offs // TILE_W % TILE_H
        w = w0 + offs % TILE_W
        offs_m = (n.to(tl.int64) * OH + h) * OW + w
        mask_m = (n < N) & (h < OH) & (w < OW)
        store_rows(acc, y_ptr, residual_ptr, output_permutation_ptr, offs_m, mask_m, offs_o, mask_o, C_OUT, ACTIVATION)


@triton.jit
def conv2d_pointer_kernel(
    x_ptr,  # [N, H, W, C_IN], any strides but the last
    w_ptr,  # [n_blocks, TAPS, BLOCK_OUT, BLOCK_IN]
    y_ptr,  # [N * OH * OW, C_OUT]
    bias_ptr,
    residual_ptr,
    indptr,
    indices,
    input_permutation_ptr,
    output_permutation_ptr,
    M,
    H,
    W,
    OH,
    OW,
    C_IN,
    C_OUT,
    n_out_tiles,
    n_tiles,
    stride_xn,
    stride_xh,
    stride_xw,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
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
    """Anything. A step multiplies TILE_K consecutive entries of the row's kept (block, tap, channel) triples.

    Where TILE_K divides BLOCK_IN, a step lies within one (block, tap) and its tap is a scalar; elsewhere every entry
    has its own tap and mask: more address arithmetic, but small blocks fill the matrix instruction.
    Grid: output tiles x tiles of TILE_M consecutive output pixels.
    """
    SPLIT_OUT: tl.constexpr = (BLOCK_OUT + TILE_OUT - 1) // TILE_OUT
    out_tile, tile = program_tile(tl.program_id(0), n_out_tiles, n_tiles, GROUP)
    row = out_tile // SPLIT_OUT
    row_o = (out_tile % SPLIT_OUT) * TILE_OUT + tl.arange(0, TILE_OUT)  # within the block row
    offs_m = tile.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    mask_m = offs_m < M
    iw = (offs_m % OW).to(tl.int32) * STRIDE_W - PAD_W
    ih = (offs_m // OW % OH).to(tl.int32) * STRIDE_H - PAD_H
    n = offs_m // OW // OH
    x_row_ptr = x_ptr + (n * stride_xn + ih.to(tl.int64) * stride_xh + iw.to(tl.int64) * stride_xw)  # may lie outside
    w_row_ptr = w_ptr + row_o * BLOCK_IN
    offs_k = tl.arange(0, TILE_K)

    begin = tl.load(indptr + row) * (TAPS * BLOCK_IN)
    end = tl.load(indptr + row + 1) * (TAPS * BLOCK_IN)
    tl.assume(end > begin)  # a loop that may not run at all makes ptxas serialise every wgmma (Triton 3.6, C7515)
    acc = tl.zeros((TILE_OUT, TILE_M), tl.float32)
    for k0 in tl.range(begin, end, TILE_K, num_stages=STAGES):
        if BLOCK_IN % TILE_K == 0:
            unit = k0 // BLOCK_IN  # a kept (block, tap) pair
            k = k0 % BLOCK_IN + offs_k
            tap = unit % TAPS
            dh = (tap // KW) * DILATION_H
            dw = (tap % KW) * DILATION_W
            channel = tl.load(indices + unit // TAPS) * BLOCK_IN + k
            mask_k = channel < C_IN
            inside = mask_m & (ih + dh >= 0) & (ih + dh < H) & (iw + dw >= 0) & (iw + dw < W)
            mask_x = inside[:, None] & mask_k[None, :]
            tap_offset = dh * stride_xh + dw * stride_xw
            if input_permutation_ptr is not None:
                channel = tl.load(input_permutation_ptr + channel, mask=mask_k, other=0)
            x_offsets = (tap_offset + channel)[None, :]
            w_offsets = (unit * (BLOCK_OUT * BLOCK_IN) + k)[None, :]
            mask_w = (row_o < BLOCK_OUT)[:, None]
        else:
            unit = (k0 + offs_k) // BLOCK_IN
            k = (k0 + offs_k) % BLOCK_IN
            tap = unit % TAPS
            dh = (tap // KW) * DILATION_H
            dw = (tap % KW) * DILATION_W
            kept = k0 + offs_k < end
            channel = tl.load(indices + unit // TAPS, mask=kept, other=0) * BLOCK_IN + k
            mask_k = kept & (channel < C_IN)
            h = ih[:, None] + dh[None, :]
            w = iw[:, None] + dw[None, :]
            mask_x = (mask_m[:, None] & mask_k[None, :]) & ((h >= 0) & (h < H)) & ((w >= 0) & (w < W))
            tap_offset = dh * stride_xh + dw * stride_xw
            if input_permutation_ptr is not None:
                channel = tl.load(input_permutation_ptr + channel, mask=mask_k, other=0)
            x_offsets = (tap_offset + channel)[None, :]
            w_offsets = (unit * (BLOCK_OUT * BLOCK_IN) + k)[None, :]
            mask_w = (row_o < BLOCK_OUT)[:, None] & kept[None, :]
        x = tl.load(x_row_ptr[:, None] + x_offsets, mask=mask_x, other=0.0)  # [TILE_M, TILE_K]
        w = tl.load(w_row_ptr[:, None] + w_offsets, mask=mask_w, other=0.0)  # [TILE_OUT, TILE_K]
        acc = tl.dot(w, x.T, acc, input_precision=PRECISION)

    offs_o = row * BLOCK_OUT + row_o
    mask_o = (row_o < BLOCK_OUT) & (offs_o < C_OUT)
    acc = add_bias(acc, bias_ptr, offs_o, mask_o)
    store_rows(acc, y_ptr, residual_ptr, output_permutation_ptr, offs_m, mask_m, offs_o, mask_o, C_OUT, ACTIVATION)


def block_sparse_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    c_out: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "none",
    residual: torch.Tensor | None = None,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
    allow_tf32: bool = False,
    config: Conv2dConfig,
) -> torch.Tensor:
    """Launch the convolution; the caller has checked shapes, dtypes and devices.

    Args:
        x: [N, C_IN, H, W], channels_last memory; fp16, bf16 or fp32.
        values: packed blocks [n_blocks, KH * KW, BLOCK_OUT, BLOCK_IN] of x's dtype, contiguous.
        indptr, indices: the layout; every block row holds at least one block.
        bias: [C_OUT] in the order of the block rows, fp32 or x's dtype.
        c_out: output channels without padding.
        activation: "none", "relu", "relu6", "silu" or "gelu".
        residual: shape and channel order of the stored output, x's dtype.
        input_permutation: int [C_IN]; computes from x[:, input_permutation].
        output_permutation: int [C_OUT]; computed channel j is stored at output_permutation[j].
        allow_tf32: round fp32 products to tf32.
        config: tile sizes; descriptors are used where it asks for them and the operands allow them.
    Returns:
        [N, C_OUT, OH, OW], channels_last, x's dtype.
    Cost:
        2 * N * OH * OW * KH * KW * n_blocks * BLOCK_OUT * BLOCK_IN FLOP.
    """
    x = x.permute(0, 2, 3, 1)
    if x.stride(3) != 1:
        x = x.contiguous()
    batch, height, width, c_in = x.shape
    out_h, out_w = conv2d_output_size((height, width), kernel_size, stride, padding, dilation)
    y = torch.empty((batch, out_h, out_w, c_out), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y.permute(0, 3, 1, 2)
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1).contiguous()
    block_out, block_in = values.shape[-2:]
    tile_out = next_power_of_two(min(config.tile_out or block_out, block_out), 16)
    tile_k = config.tile_k or next_power_of_two(block_in, 16)
    taps = kernel_size[0] * kernel_size[1]
    n_out_tiles = (len(indptr) - 1) * ceil_div(block_out, tile_out)
    common = dict(
        KW=kernel_size[1],
        TAPS=taps,
        PAD_H=padding[0],
        PAD_W=padding[1],
        DILATION_H=dilation[0],
        DILATION_W=dilation[1],
        BLOCK_OUT=block_out,
        BLOCK_IN=block_in,
        TILE_OUT=tile_out,
        GROUP=0 if config.group_rows >= n_out_tiles else config.group_rows,
        ACTIVATION=activation,
        PRECISION="tf32" if allow_tf32 else "ieee",
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )

    pointwise = kernel_size == (1, 1) and padding == (0, 0)
    if pointwise:  # a matrix product: skip the pixels that the stride skips
        x, stride = x[:, :: stride[0], :: stride[1]], (1, 1)
    use_descriptors = (
        config.descriptors
        and stride == (1, 1)
        and input_permutation is None
        and is_power_of_two_tile(block_out)
        and is_power_of_two_tile(tile_k)
        and block_in % tile_k == 0
        and describable(x)
        and describable(values)
    )
    if use_descriptors:
        images, tile_h, tile_w = config.tile_n, config.tile_h, config.tile_w
        y_view, x_view, residual_view = y, x, residual
        if pointwise and x.is_contiguous():  # one long row of pixels: no box is cut by an image's edge
            x_view, y_view = x.view(1, 1, -1, c_in), y.view(1, 1, -1, c_out)
            residual_view = None if residual is None else residual.view(1, 1, -1, c_out)
            images, tile_h, tile_w = 1, 1, config.tile_pixels
        n, h, w = y_view.shape[:3]
        tiles_h, tiles_w = ceil_div(h, tile_h), ceil_div(w, tile_w)
        n_tiles = ceil_div(n, images) * tiles_h * tiles_w
        box = [images, tile_h, tile_w]
        store_box = output_permutation is None and describable(y) and (residual is None or describable(residual))
        conv2d_descriptor_kernel[(n_out_tiles * n_tiles,)](
            describe(x_view, [*box, tile_k]),
            describe(values.view(-1, block_in), [tile_out, tile_k]),
            describe(y_view, [*box, tile_out]) if store_box else None,
            describe(residual_view, [*box, tile_out]) if store_box and residual_view is not None else None,
            y,
            bias,
            residual,
            indptr,
            indices,
            output_permutation,
            n,
            h,
            w,
            c_out,
            n_out_tiles,
            tiles_h,
            tiles_w,
            n_tiles,
            TILE_N=images,
            TILE_H=tile_h,
            TILE_W=tile_w,
            TILE_K=tile_k,
            **common,
        )
        return y.permute(0, 3, 1, 2)

    n_tiles = ceil_div(batch * out_h * out_w, config.tile_pixels)
    conv2d_pointer_kernel[(n_out_tiles * n_tiles,)](
        x,
        values,
        y,
        bias,
        residual,
        indptr,
        indices,
        input_permutation,
        output_permutation,
        batch * out_h * out_w,
        x.shape[1],
        x.shape[2],
        out_h,
        out_w,
        c_in,
        c_out,
        n_out_tiles,
        n_tiles,
        *x.stride()[:3],
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        TILE_M=config.tile_pixels,
        TILE_K=tile_k,
        **common,
    )
    return y.permute(0, 3, 1, 2)
