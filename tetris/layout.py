"""Which blocks of a weight are kept: the block layout, a CSR of the block grid over (output, input) channels.

A layout speaks about the *reordered* weight. The grid covers the channels with blocks of ``block`` = (out, in);
the last block of a row or column may reach past the channels and is padded with zeros when packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from tetris.errors import ShapeError


def ceil_div(a: int, b: int) -> int:
    """The number of blocks of size ``b`` that cover ``a`` channels."""
    return -(-a // b)


def grid_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """(block rows, block columns) of a (out, in) channel shape."""
    return ceil_div(shape[0], block[0]), ceil_div(shape[1], block[1])


def block_row_of(size: int, block: int, device: torch.device | None = None) -> torch.Tensor:
    """The block index of every channel; int64 of shape (size,)."""
    return torch.arange(size, device=device) // block


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Kept blocks of a (C_OUT, C_IN) weight in compressed sparse rows.

    Attributes:
        shape: channels (C_OUT, C_IN), without padding.
        block: the sparsity block (BLOCK_OUT, BLOCK_IN).
        indptr: int32 [block rows + 1]; row r keeps blocks ``indptr[r]:indptr[r + 1]``.
        indices: int32 [kept blocks]; their block columns, ascending within a row.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    indptr: torch.Tensor
    indices: torch.Tensor

    @staticmethod
    def from_mask(block_mask: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> BlockLayout:
        """From a bool [block rows, block columns] mask, True = kept."""
        if tuple(block_mask.shape) != grid_shape(shape, block):
            raise ShapeError(
                f"layout: a {shape} weight in {block} blocks wants a block mask of {grid_shape(shape, block)}; "
                f"got {tuple(block_mask.shape)}"
            )
        indptr = torch.zeros(block_mask.shape[0] + 1, dtype=torch.int32, device=block_mask.device)
        indptr[1:] = block_mask.sum(1).cumsum(0)
        return BlockLayout(shape, block, indptr, block_mask.nonzero()[:, 1].int())

    @property
    def grid(self) -> tuple[int, int]:
        """(block rows, block columns)."""
        return grid_shape(self.shape, self.block)

    @property
    def n_blocks(self) -> int:
        """Number of kept blocks."""
        return len(self.indices)

    @cached_property
    def kept_fraction(self) -> float:
        """Kept blocks / all blocks."""
        return self.n_blocks / (self.grid[0] * self.grid[1])

    @cached_property
    def rows(self) -> torch.Tensor:
        """Block row of every kept block; int64 [kept blocks]."""
        blocks = torch.arange(self.n_blocks, dtype=torch.int32, device=self.indptr.device)
        return torch.searchsorted(self.indptr, blocks, right=True) - 1

    def to_mask(self) -> torch.Tensor:
        """bool [block rows, block columns], True = kept."""
        mask = torch.zeros(self.grid, dtype=torch.bool, device=self.indices.device)
        mask[self.rows, self.indices.long()] = True
        return mask

    def without_empty_rows(self) -> BlockLayout:
        """The same layout in which every block row holds at least one (zero) block, as the kernels require."""
        mask = self.to_mask()
        mask[~mask.any(1), 0] = True
        return BlockLayout.from_mask(mask, self.shape, self.block)
