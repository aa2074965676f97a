"""Which program computes which tiles, and in which order: decided offline, because the sparsity pattern is static.

Block rows keep different numbers of blocks, so tiles cost differently and a round-robin leaves multiprocessors idle at
the end. Greedy list scheduling in *spatial* order keeps programs that run at the same time on the same part of the
image (their input tiles meet in L2); the last few rounds are handed out longest first, which evens the ends out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tetris.kernels.hopper.pairing import PairedRows

TILE_COST = 0.35
"""Fixed cost of a tile (first loads, epilogue) in steps of one 64 x 64 block; 0.15 to 0.5 were alike on an H200."""
BALANCED_ROUNDS = 4
"""Rounds at the end (tiles per program) that are handed out longest first; more lose locality, fewer lose balance."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tiles of every program: program p computes ``order[program_ptr[p]:program_ptr[p + 1]]``.

    A tile is ``spatial * rows + row`` with ``spatial`` over (images, rows, columns) of tiles, columns fastest.

    Attributes:
        program_ptr: int32 [programs + 1].
        order: int32 [tiles].
        makespan: estimated end of the busiest program / mean; 1 = perfectly even.
        pairs: how block rows of 32 output channels share tiles of 64; None for taller blocks.
    """

    program_ptr: torch.Tensor
    order: torch.Tensor
    makespan: float
    pairs: PairedRows | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Its tensors, for interfaces that take nothing else."""
        pairs = self.pairs
        return [
            self.program_ptr,
            self.order,
            *([] if pairs is None else [pairs.indptr, pairs.indices, pairs.blocks, pairs.rows]),
        ]

    @staticmethod
    def from_tensors(tensors: Sequence[torch.Tensor]) -> Schedule:
        """The schedule of :attr:`tensors`; its makespan is forgotten (NaN)."""
        pairs = PairedRows(*tensors[2:]) if len(tensors) > 2 else None
        return Schedule(tensors[0], tensors[1], math.nan, pairs)

    @property
    def programs(self) -> int:
        return len(self.program_ptr) - 1

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with its tensors on ``device``."""
        pairs = None if self.pairs is None else self.pairs.to(device)
        return Schedule(self.program_ptr.to(device), self.order.to(device), self.makespan, pairs)


def make_schedule(
    row_costs: list[float],
    spatial_tiles: int,
    programs: int,
    *,
    tile_cost: float = TILE_COST,
    balanced_rounds: int = BALANCED_ROUNDS,
) -> Schedule:
    """Distribute ``spatial_tiles`` x ``len(row_costs)`` tiles over ``programs`` programs.

    Args:
        row_costs: cost of a tile of every row, in any unit that makes ``tile_cost`` the fixed cost of a tile.
        spatial_tiles: tiles of one row.
        programs: persistent programs; fewer are used when there are fewer tiles.
        tile_cost: fixed cost of a tile.
        balanced_rounds: tiles per program, at the end, that go longest first.
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
    program_ptr = torch.tensor([0, *(len(tiles) for tiles in lists)]).cumsum(0).int()
    order = torch.tensor([tile for tiles in lists for tile in tiles], dtype=torch.int32)
    loads = [load for load, _ in heap]
    return Schedule(program_ptr, order, max(loads) * programs / max(sum(loads), 1e-9))


def round_robin(rows: int, spatial_tiles: int, programs: int) -> Schedule:
    """Tile t to program t mod ``programs``: the schedule to compare with."""
    tiles = rows * spatial_tiles
    programs = max(1, min(programs, tiles))
    lists = [range(program, tiles, programs) for program in range(programs)]
    program_ptr = torch.tensor([0, *(len(tiles) for tiles in lists)]).cumsum(0).int()
    return Schedule(program_ptr, torch.cat([torch.tensor(tiles, dtype=torch.int32) for tiles in lists]), 1.0)
