"""Block-sparse 2-D convolution as an implicit GEMM over the kept blocks, in portable Triton.

y[n, h, w, o] = activation(sum over kept blocks, taps (i, j), channels c of
                W[o, c, i, j] x[n, h s + i d - p, w s + j d - p, c] + bias[o] + residual[n, h, w, o])
"""

from __future__ import annotations

import torch

from tetris.kernels.configs import Conv2dConfig, conv2d_output_size, is_power_of_two_tile, next_power_of_two
from tetris.kernels.conv2d_device import conv2d_descriptor_kernel, conv2d_pointer_kernel
from tetris.kernels.descriptors import describable, describe
from tetris.kernels.permute import permute_channels
from tetris.kernels.recording import launch
from tetris.layout import ceil_div


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
    if input_permutation is not None and config.permute_first:
        x, input_permutation = permute_channels(x, input_permutation, dim=1), None
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
        PRECISION="tf32" if allow_tf32 else config.precision,
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
        x_view, y_view = x, y
        if pointwise and x.is_contiguous():  # one long row of pixels: no box is cut by an image's edge
            x_view, y_view = x.view(1, 1, -1, c_in), y.view(1, 1, -1, c_out)
            images, tile_h, tile_w = 1, 1, config.tile_pixels
        n, h, w = y_view.shape[:3]
        tiles_h, tiles_w = ceil_div(h, tile_h), ceil_div(w, tile_w)
        n_tiles = ceil_div(n, images) * tiles_h * tiles_w
        box = [images, tile_h, tile_w]
        store_box = output_permutation is None and residual is None and describable(y)
        launch(
            conv2d_descriptor_kernel,
            (n_out_tiles * n_tiles,),
            describe(x_view, [*box, tile_k]),
            describe(values.view(-1, block_in), [tile_out, tile_k]),
            describe(y_view, [*box, tile_out]) if store_box else None,
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
    launch(
        conv2d_pointer_kernel,
        (n_out_tiles * n_tiles,),
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
