"""Pruning methods P: W -> mask (the paper's eq. 4), kept apart from reordering (eq. 5).

A pruning method looks at the importance of a weight and a sparsity and answers with the elements to keep. Its mask
minimises the pruned importance under the method's structural constraint. Here ``True`` means *kept*; the paper's M
marks the pruned elements and is the negation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from tetris.errors import ShapeError, TetrisError, describe
from tetris.importance import channel_importance
from tetris.layout import ceil_div, grid_shape

Block = int | tuple[int, int]


class PruningMethod(Protocol):
    """P(W): importance of a weight, sparsity -> keep mask."""

    def keep_mask(self, importance: torch.Tensor, sparsity: float) -> torch.Tensor:
        """bool of importance's shape, True = kept. ``sparsity`` in [0, 1) is the fraction of units to prune."""
        ...


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Return it as a float in [0, 1); raises TetrisError otherwise."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise TetrisError(
            f"{name}: wanted a number in [0, 1), the fraction to prune; got {describe(sparsity)}; 0.73 keeps 27 %"
        )
    return float(sparsity)


def fit_block(block: Block, shape: tuple[int, int]) -> tuple[int, int]:
    """The (out, in) block that is used for channels ``shape``.

    A block larger than a dimension shrinks so that the dimension holds at least two blocks, as in the paper
    (64x3x3x3 gets 32x3x3x3 blocks); a dimension of one channel keeps one.
    """
    pair = (block, block) if isinstance(block, int) and not isinstance(block, bool) else block
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(b, int) and b >= 1 for b in pair)):
        raise ShapeError(f"block: wanted a positive int or a pair (out, in); got {describe(block)}; try block=(64, 32)")
    out, inner = (b if b < size else max(1, ceil_div(size, 2)) for b, size in zip(pair, shape))
    return out, inner


def units_to_keep(n_units: int, sparsity: float) -> int:
    """How many of ``n_units`` prunable units survive: the nearest count, at least one."""
    return max(1, round(n_units * (1 - check_sparsity(sparsity))))


def keep_largest(scores: torch.Tensor, n_keep: int) -> torch.Tensor:
    """bool mask of the ``n_keep`` largest entries; ties go to the lowest index, so the choice is deterministic."""
    order = scores.flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:n_keep]] = True
    return mask.view(scores.shape)


def block_sums(matrix: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Sum of every block of a [C_OUT, C_IN] matrix: [block rows, block columns]; tail blocks sum what they hold."""
    rows, columns = grid_shape((matrix.shape[0], matrix.shape[1]), block)
    padded = torch.nn.functional.pad(
        matrix, (0, columns * block[1] - matrix.shape[1], 0, rows * block[0] - matrix.shape[0])
    )
    return padded.view(rows, block[0], columns, block[1]).sum((1, 3))


def expand_block_mask(block_mask: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """Block mask -> element mask of a weight of ``shape``; taps of one (out, in) pair share their fate."""
    mask = block_mask.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]
    return mask.reshape(*mask.shape, *(1 for _ in shape[2:])).expand(shape)


@dataclass(frozen=True)
class BlockPruning:
    """The paper's study case: blocks over (output, input) channels and all kernel taps; importance is a block's sum."""

    block: tuple[int, int]

    def block_mask(self, importance: torch.Tensor, sparsity: float) -> torch.Tensor:
        """bool [block rows, block columns], True = kept."""
        sums = block_sums(channel_importance(importance), self.block)
        return keep_largest(sums, units_to_keep(sums.numel(), sparsity))

    def keep_mask(self, importance: torch.Tensor, sparsity: float) -> torch.Tensor:
        return expand_block_mask(self.block_mask(importance, sparsity), tuple(importance.shape), self.block)


@dataclass(frozen=True)
class ElementPruning:
    """Every element by itself (the paper's 1x1): the most that any structure can retain."""

    def keep_mask(self, importance: torch.Tensor, sparsity: float) -> torch.Tensor:
        return keep_largest(importance, units_to_keep(importance.numel(), sparsity))


@dataclass(frozen=True)
class SlicePruning:
    """Whole slices along ``dim``: 0 prunes filters (output channels), 1 input channels."""

    dim: int

    def keep_mask(self, importance: torch.Tensor, sparsity: float) -> torch.Tensor:
        scores = importance.transpose(0, self.dim).flatten(1).sum(1)
        keep = keep_largest(scores, units_to_keep(len(scores), sparsity))
        return keep.view(-1, *(1 for _ in importance.shape[1:])).transpose(0, self.dim).expand(importance.shape)


@dataclass(frozen=True)
class VectorPruning:
    """Rows or columns of the GEMM matrix within groups of channels: vectors of ``length`` along ``dim``, taps apart.

    With ``dim=0`` a unit is ``length`` output channels at one (input channel, tap); with ``dim=1`` it is ``length``
    input channels at one (output channel, tap). ``length=0`` takes the whole dimension: column and row pruning.
    """

    dim: int
    length: int = 0

    def keep_mask(self, importance: torch.Tensor, sparsity: float) -> torch.Tensor:
        moved = importance.transpose(0, self.dim)
        size = moved.shape[0]
        length = min(self.length or size, size)
        groups = torch.arange(size, device=importance.device) // length
        scores = moved.new_zeros(int(groups[-1]) + 1, *moved.shape[1:]).index_add(0, groups, moved)
        return keep_largest(scores, units_to_keep(scores.numel(), sparsity))[groups].transpose(0, self.dim)


@dataclass(frozen=True)
class NofMPruning:
    """N:M along the input channels: the N most important of every M neighbours survive, whatever the sparsity asked.

    ``sparsity`` is ignored (it is 1 - N/M by construction). A tail group shorter than M keeps min(N, its size).
    """

    n: int = 2
    m: int = 4

    def keep_mask(self, importance: torch.Tensor, sparsity: float) -> torch.Tensor:
        c_in = importance.shape[1]
        padded = torch.nn.functional.pad(importance.transpose(1, -1), (0, -c_in % self.m), value=-1.0)
        groups = padded.reshape(*padded.shape[:-1], -1, self.m)
        rank = groups.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        return (rank < self.n).reshape(padded.shape)[..., :c_in].transpose(1, -1)


METHODS: dict[str, Callable[[tuple[int, int]], PruningMethod]] = {
    "block": BlockPruning,
    "element": lambda block: ElementPruning(),
    "filter": lambda block: SlicePruning(0),
    "channel": lambda block: SlicePruning(1),
    "row": lambda block: VectorPruning(1, block[1]),
    "column": lambda block: VectorPruning(0, block[0]),
    "2:4": lambda block: NofMPruning(2, 4),
}


def pruning_method(structure: str | PruningMethod, block: tuple[int, int]) -> PruningMethod:
    """The pruning method of a name, or the object itself; block-shaped methods take ``block``."""
    if not isinstance(structure, str):
        return structure
    if structure not in METHODS:
        raise TetrisError(f"structure: wanted one of {', '.join(METHODS)} or a PruningMethod; got {structure!r}")
    return METHODS[structure](block)
