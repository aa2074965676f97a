"""Block-sparse convolution on a CPU: one native dense convolution per group of block rows, on the inputs it keeps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tetris.kernels.cpu.epilogue import finish_
from tetris.kernels.cpu.grouping import PIXELS, CostModel, Grouping, group_layout
from tetris.layout import BlockLayout

CALL_US = 40.0


def prepare(
    values: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    *,
    c_in: int,
    c_out: int,
    kernel_size: tuple[int, int],
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
    pixels: int = PIXELS,
) -> Grouping:
    """Repack the blocks [n_blocks, KH*KW, BLOCK_OUT, BLOCK_IN] for :func:`run`, once.

    ``pixels`` is about how many output pixels a call will have (batch * height * width); it decides how many block
    rows share an operation, not the result.
    """
    block = (values.shape[-2], values.shape[-1])
    return group_layout(
        values,
        BlockLayout((c_out, c_in), block, indptr, indices),
        CostModel(block, kernel_size[0] * kernel_size[1], pixels, CALL_US),
        kernel_size=kernel_size,
        input_permutation=input_permutation,
        output_permutation=output_permutation,
    )


def run(
    prepared: Grouping,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "none",
    residual: torch.Tensor | None = None,
    max_pool: bool = False,
) -> torch.Tensor:
    """pool(activation(conv2d(x, W) + bias + residual)) for x [N, C_IN, H, W]; bias in the order of the block rows."""
    image = x.permute(0, 2, 3, 1)
    pixels = image.reshape(-1, image.shape[3])  # columns of a matrix are taken 30 times as fast as an image's channels
    parts = []
    for group, part_bias in zip(prepared.groups, prepared.biases(bias, x.dtype)):
        inputs = group.inputs.take(pixels).view(*image.shape[:3], group.weight.shape[1]).permute(0, 3, 1, 2)
        y = F.conv2d(inputs, group.weight, part_bias, stride, padding, dilation).permute(0, 2, 3, 1)
        parts.append(y.reshape(-1, y.shape[3]))
    rows = prepared.join(parts)
    image = rows.view(*y.shape[:3], rows.shape[1]).permute(0, 3, 1, 2)
    return finish_(image, residual, activation, max_pool=max_pool)


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
) -> torch.Tensor:
    """Prepare and run in one call; a layer keeps the prepared operands instead. Arguments as in the GPU launcher."""
    prepared = prepare(
        values,
        indptr,
        indices,
        c_in=x.shape[1],
        c_out=c_out,
        kernel_size=kernel_size,
        input_permutation=input_permutation,
        output_permutation=output_permutation,
    )
    return run(
        prepared,
        x,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=activation,
        residual=residual,
    )
