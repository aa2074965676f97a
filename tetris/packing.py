"""Dense weight + layout <-> packed blocks, the format that every kernel reads.

Packed values are ``[n_blocks, KH * KW, BLOCK_OUT, BLOCK_IN]`` for convolutions and ``[n_blocks, BLOCK_OUT, BLOCK_IN]``
for linear layers, contiguous, blocks in the layout's order, taps row by row; channels past the weight's are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tetris.errors import ShapeError
from tetris.layout import BlockLayout


def _blocked(weight: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """View of the zero-padded weight as [block rows, block columns, taps, BLOCK_OUT, BLOCK_IN]."""
    c_out, c_in = weight.shape[:2]
    (rows, columns), (block_out, block_in) = layout.grid, layout.block
    taps = weight.reshape(c_out, c_in, -1).permute(2, 0, 1)
    padded = F.pad(taps, (0, columns * block_in - c_in, 0, rows * block_out - c_out))
    return padded.reshape(-1, rows, block_out, columns, block_in).permute(1, 3, 0, 2, 4)


def pack(weight: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """The kept blocks of a *reordered* weight [C_OUT, C_IN, ...] in the packed format.

    Args:
        weight: [C_OUT, C_IN] or [C_OUT, C_IN, KH, KW], channels already in the layout's order.
        layout: its kept blocks.
    Returns:
        [n_blocks, BLOCK_OUT, BLOCK_IN] for a matrix, else [n_blocks, taps, BLOCK_OUT, BLOCK_IN]; weight's dtype.
    """
    if tuple(weight.shape[:2]) != layout.shape:
        raise ShapeError(f"pack: the layout is for channels {layout.shape}; got a weight of {tuple(weight.shape)}")
    values = _blocked(weight, layout)[layout.rows, layout.indices.long()]
    return (values.squeeze(1) if weight.dim() == 2 else values).contiguous()


def unpack(values: torch.Tensor, layout: BlockLayout, kernel_size: tuple[int, ...] = ()) -> torch.Tensor:
    """The dense reordered weight [C_OUT, C_IN, *kernel_size]; pruned blocks are zero. The inverse of :func:`pack`."""
    (rows, columns), (block_out, block_in) = layout.grid, layout.block
    taps = values.shape[1] if values.dim() == 4 else 1
    values = values.reshape(layout.n_blocks, taps, block_out, block_in)
    blocked = values.new_zeros(rows, columns, values.shape[1], block_out, block_in)
    blocked[layout.rows, layout.indices.long()] = values
    dense = blocked.permute(0, 3, 1, 4, 2).reshape(rows * block_out, columns * block_in, -1)
    return dense[: layout.shape[0], : layout.shape[1]].reshape(*layout.shape, *kernel_size).contiguous()


def pack_stem(weight: torch.Tensor) -> torch.Tensor:
    """[C_OUT, C_IN, KH, KW] -> [C_OUT, KH * KW * C_IN]: the order of an NHWC patch, channels fastest."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).contiguous()


def unpack_stem(packed: torch.Tensor, c_in: int, kernel_size: tuple[int, int]) -> torch.Tensor:
    """The inverse of :func:`pack_stem`, as a view."""
    return packed.view(-1, *kernel_size, c_in).permute(0, 3, 1, 2)
