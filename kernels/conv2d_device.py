"""Device code of the portable block-sparse convolution; ``conv2d`` launches it and holds the formula.

A program computes TILE_OUT channels of one block row at a tile of pixels; its loop runs over that row's kept
(block, tap) pairs only. Two kernels: one loads boxes of pixels by descriptor, whose out-of-bounds zeros are the
padding; the other computes addresses and masks, and takes everything (strides, odd channel counts, gathered inputs).
"""

import triton
import triton.language as tl

from tetris.kernels.epilogue import activate, add_bias, program_tile, store_rows


@triton.jit
def conv2d_descriptor_kernel(
    x_desc,  # [N, H, W, C_IN], boxes [TILE_N, TILE_H, TILE_W, TILE_K]
    w_desc,  # [n_blocks * TAPS * BLOCK_OUT, BLOCK_IN], boxes [TILE_OUT, TILE_K]
    y_desc,  # [N, OH, OW, C_OUT], boxes [TILE_N, TILE_H, TILE_W, TILE_OUT]; None = by pointer
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
    SPLIT_K: tl.constexpr = BLOCK_IN // TILE_K
    out_tile, tile = program_tile(tl.program_id(0), n_out_tiles, n_tiles, GROUP)
    row = out_tile // SPLIT_OUT
    row_o = (out_tile % SPLIT_OUT) * TILE_OUT + tl.arange(0, TILE_OUT)  # within the block row
    mask_row = row_o < BLOCK_OUT
    offs_m = tile.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    mask_m = offs_m < M
    iw = (offs_m % OW).to(tl.int32) * STRIDE_W - PAD_W
    ih = (offs_m // OW % OH).to(tl.int32) * STRIDE_H - PAD_H
    n = offs_m // OW // OH
    x_row_ptr = x_ptr + (n * stride_xn + ih.to(tl.int64) * stride_xh + iw.to(tl.int64) * stride_xw)  # may lie outside
    w_row_ptr = w_ptr + row_o * BLOCK_IN
    offs_k = tl.arange(0, TILE_K)

    first_unit = tl.load(indptr + row) * TAPS  # units are the kept (block, tap) pairs
    n_units = tl.load(indptr + row + 1) * TAPS - first_unit
    n_steps = (n_units * BLOCK_IN + TILE_K - 1) // TILE_K
    tl.assume(n_steps > 0)  # a loop that may not run at all makes ptxas serialise every wgmma (Triton 3.6, C7515)
    acc = tl.zeros((TILE_OUT, TILE_M), tl.float32)
    for step in tl.range(0, n_steps, num_stages=STAGES):
        if BLOCK_IN % TILE_K == 0:
            unit = first_unit + step // SPLIT_K
            k = (step % SPLIT_K) * TILE_K + offs_k
            tap = unit % TAPS
            dh = (tap // KW) * DILATION_H
            dw = (tap % KW) * DILATION_W
            channel = tl.load(indices + unit // TAPS) * BLOCK_IN + k
            mask_k = channel < C_IN
            inside = mask_m & (ih + dh >= 0) & (ih + dh < H) & (iw + dw >= 0) & (iw + dw < W)
            mask_x = mask_k[:, None] & inside[None, :]
            if input_permutation_ptr is not None:
                channel = tl.load(input_permutation_ptr + channel, mask=mask_k, other=0)
            mask_w = mask_row[:, None]
        else:
            unit = (step * TILE_K + offs_k) // BLOCK_IN
            k = (step * TILE_K + offs_k) % BLOCK_IN
            kept = unit < n_units
            unit += first_unit
            tap = unit % TAPS
            dh = (tap // KW) * DILATION_H
            dw = (tap % KW) * DILATION_W
            channel = tl.load(indices + unit // TAPS, mask=kept, other=0) * BLOCK_IN + k
            mask_k = kept & (channel < C_IN)
            h = ih[None, :] + dh[:, None]
            w = iw[None, :] + dw[:, None]
            mask_x = (mask_k[:, None] & mask_m[None, :]) & ((h >= 0) & (h < H)) & ((w >= 0) & (w < W))
            if input_permutation_ptr is not None:
                channel = tl.load(input_permutation_ptr + channel, mask=mask_k, other=0)
            mask_w = mask_row[:, None] & kept[None, :]
        x_offsets = dh * stride_xh + dw * stride_xw + channel
        w_offsets = unit * (BLOCK_OUT * BLOCK_IN) + k
        x = tl.load(x_row_ptr[None, :] + x_offsets[:, None], mask=mask_x, other=0.0)  # [TILE_K, TILE_M]
        w = tl.load(w_row_ptr[:, None] + w_offsets[None, :], mask=mask_w, other=0.0)  # [TILE_OUT, TILE_K]
        acc = tl.dot(w, x, acc, input_precision=PRECISION)

    offs_o = row * BLOCK_OUT + row_o
    mask_o = mask_row & (offs_o < C_OUT)
    acc = add_bias(acc, bias_ptr, offs_o, mask_o)
    store_rows(acc, y_ptr, residual_ptr, output_permutation_ptr, offs_m, mask_m, offs_o, mask_o, C_OUT, ACTIVATION)
