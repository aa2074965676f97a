"""Block-sparse convolution on a CPU: one native dense convolution per group of block rows, on the inputs it keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tetris.kernels.cpu.epilogue import finish_
from tetris.kernels.cpu.grouping import RowGroup, dense_groups, merge_similar
from tetris.layout import BlockLayout
from tetris.permutation import inverse, is_identity

OVERHEAD = 0.3


@dataclass(frozen=True)
class PreparedConv2d:
    """A layer's weight, repacked once for :func:`run`.

    Attributes:
        groups: the dense convolutions.
        gather: int64 [C_OUT] that brings their concatenated outputs into the stored order; None = they are in order.
    """

    groups: list[RowGroup]
    gather: torch.Tensor | None


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
) -> PreparedConv2d:
    """Repack the blocks [n_blocks, KH*KW, BLOCK_OUT, BLOCK_IN]; permutations are folded in."""
    block = (values.shape[-2], values.shape[-1])
    layout = BlockLayout((c_out, c_in), block, indptr, indices)
    groups = dense_groups(values, layout, merge_similar(layout.to_mask(), OVERHEAD), kernel_size, input_permutation)
    computed = torch.cat([group.outputs for group in groups])
    stored = computed if output_permutation is None else output_permutation.cpu()[computed]
    return PreparedConv2d(groups, None if is_identity(stored) else inverse(stored))


def run(
    prepared: PreparedConv2d,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(conv2d(x, W) + bias + residual) for x [N, C_IN, H, W]; bias in the order of the block rows."""
    parts = []
    for group in prepared.groups:
        narrowed = group.input_slice
        inputs = x[:, narrowed] if narrowed is not None else x.index_select(1, group.inputs)
        part_bias = None if bias is None else bias[group.outputs].to(x.dtype)
        parts.append(F.conv2d(inputs, group.weight, part_bias, stride, padding, dilation))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if prepared.gather is not None:
        y = y.index_select(1, prepared.gather)
    return finish_(y, residual, activation).contiguous(memory_format=torch.channels_last)


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
