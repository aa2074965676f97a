"""Which program computes which tiles, and in which order: decided offline, because the sparsity pattern is static.

Block rows keep different numbers of blocks, so tiles cost differently and a round-robin leaves multiprocessors idle at
the end. Greedy list scheduling in *spatial* order keeps programs that run at the same time on the same part of the
image (their input tiles meet in L2); the last few rounds are handed out longest first, which evens the ends out, and
swaps even out what is left.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tetris.kernels.hopper.balance import even_out
from tetris.kernels.hopper.pairing import PairedRows

TILE_COST = 0.35
"""Fixed cost of a tile (first loads, epilogue) in steps of one 64 x 64 block; 0.15 to 0.5 were alike on an H200."""
BALANCED_ROUNDS = 4
"""Rounds at the end (tiles per program) that are handed out longest first; more lose locality, fewer lose balance."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tiles of every program: program p computes ``order[program_ptr[p]:program_ptr[p + 1]]``, at least one.

    A tile is ``spatial * rows + row`` with ``spatial`` over (images, rows, columns) of tiles, columns fastest.

    Attributes:
        program_ptr: int32 [programs + 1].
        order: int32 [tiles].
        work: int32 [tiles, 4], what the kernel reads of each tile, see :meth:`records`; None while no layout is known.
        makespan: estimated end of the busiest program / mean; 1 = perfectly even.
        pairs: how block rows of 32 output channels share tiles of 64; None for taller blocks.
        weights: a copy of the packed blocks in the order of the kernel's steps, see ``weights.arranged_weights``; None
            where that is their own order, or is left to the launch.
    """

    program_ptr: torch.Tensor
    order: torch.Tensor
    makespan: float
    work: torch.Tensor | None = None
    pairs: PairedRows | None = None
    weights: torch.Tensor | None = None

    def records(self, indptr: torch.Tensor, indices: torch.Tensor, halves: int) -> torch.Tensor:
        """int32 [tiles, 4] on the CPU: tile, its row's first entry, one past its last, and the first one's input block.

        Args:
            indptr, indices: the block layout, of pairs of rows where they run in pairs.
            halves: rows of tiles in a block row.
        """
        begin, end = (bounds.repeat_interleave(halves) for bounds in (indptr.cpu()[:-1], indptr.cpu()[1:]))
        row = self.order % len(begin)
        first = indices.cpu()[begin[row].long().clamp(max=len(indices) - 1)]  # rows without entries read none
        return torch.stack([self.order, begin[row], end[row], first], 1).int()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Its tensors, for interfaces that take nothing else; the layout must be known."""
        pairs = self.pairs
        assert self.work is not None
        return [
            self.program_ptr,
            self.work,
            *([] if pairs is None else [pairs.indptr, pairs.indices, pairs.blocks, pairs.rows]),
            *([] if self.weights is None else [self.weights]),
        ]

    @staticmethod
    def from_tensors(tensors: Sequence[torch.Tensor]) -> Schedule:
        """The schedule of :attr:`tensors`; its makespan is forgotten (NaN)."""
        program_ptr, work, *rest = tensors
        weights = rest.pop() if len(rest) in (1, 5) else None
        return Schedule(program_ptr, work[:, 0], math.nan, work, PairedRows(*rest) if rest else None, weights)

    @property
    def programs(self) -> int:
        return len(self.program_ptr) - 1

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with its tensors on ``device``."""
        return replace(
            self,
            program_ptr=self.program_ptr.to(device),
            order=self.order.to(device),
            work=None if self.work is None else self.work.to(device),
            pairs=None if self.pairs is None else self.pairs.to(device),
            weights=None if self.weights is None else self.weights.to(device),
        )


def make_schedule(
    row_costs: list[float],
    spatial_tiles: int,
    programs: int,
    *,
    tile_cost: float = TILE_COST,
    balanced_rounds: int = BALANCED_ROUNDS,
    swaps: bool = True,
) -> Schedule:
    """Distribute ``spatial_tiles`` x ``len(row_costs)`` tiles over ``programs`` programs.

    Args:
        row_costs: cost of a tile of every row, in any unit that makes ``tile_cost`` the fixed cost of a tile.
        spatial_tiles: tiles of one row.
        programs: persistent programs; fewer are used when there are fewer tiles.
        tile_cost: fixed cost of a tile.
        balanced_rounds: tiles per program, at the end, that go longest first.
        swaps: whether swaps even out what is left; they move tiles to any time, away from their neighbours.
    Returns:
        The schedule, on the CPU. Every tile occurs once.
    Cost: O(tiles log programs) on the CPU, about 1 us a tile.
    """
    rows = len(row_costs)
    costs = [cost + tile_cost for cost in row_costs]
    tiles = rows * spatial_tiles
    programs = max(1, min(programs, tiles))
    by_cost = sorted(range(rows), key=lambda row: -costs[row])
    tail_tiles = -(-min(tiles, balanced_rounds * programs) // rows)  # spatial tiles in the tail
    head = [spatial * rows + row for spatial in range(spatial_tiles - tail_tiles) for row in by_cost]
    tail = [spatial * rows + row for row in by_cost for spatial in range(spatial_tiles - tail_tiles, spatial_tiles)]
    heap = [(0.0, program) for program in range(programs)]
    lists: list[list[int]] = [[] for _ in range(programs)]
    for tile in head + tail:
        load, program = heap[0]
        lists[program].append(tile)
        heapq.heapreplace(heap, (load + costs[tile % rows], program))
    if swaps:
        even_out(lists, costs)
    program_ptr = torch.tensor([0, *(len(tiles) for tiles in lists)]).cumsum(0).int()
    order = torch.tensor([tile for tiles in lists for tile in tiles], dtype=torch.int32)
    loads = [sum(costs[tile % rows] for tile in tiles) for tiles in lists]
    return Schedule(program_ptr, order, max(loads) * programs / max(sum(loads), 1e-9))


def round_robin(rows: int, spatial_tiles: int, programs: int) -> Schedule:
    """Tile t to program t mod ``programs``: the schedule to compare with."""
    tiles = rows * spatial_tiles
    programs = max(1, min(programs, tiles))
    lists = [range(program, tiles, programs) for program in range(programs)]
    program_ptr = torch.tensor([0, *(len(tiles) for tiles in lists)]).cumsum(0).int()
    return Schedule(program_ptr, torch.cat([torch.tensor(tiles, dtype=torch.int32) for tiles in lists]), 1.0)
