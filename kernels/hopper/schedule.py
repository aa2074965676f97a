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
from itertools import pairwise

import torch

from tetris.kernels.hopper.balance import even_out
from tetris.kernels.hopper.pairing import PairedRows
from tetris.kernels.splitting import cut

TILE_COST = 0.15
"""Fixed cost of a tile (first loads, what does not hide of its epilogue) in steps of one 64 x 64 block. On an H200 with
0.15, 0.35, 0.6 and 0.9: 512 -> 512 at 28 x 28 169.0, 172.4, 174.1, 178.8 us; 256 -> 256 at 56 x 56 184.2, 190.0, 193.0,
198.2."""
EMPTY_TILE_COST = 0.3
"""Cost of a tile whose row keeps no block: nothing hides its epilogue."""
BALANCED_ROUNDS = 4
"""Rounds at the end (tiles per program) that are handed out longest first; more lose locality, fewer lose balance."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tiles of every program: program p computes ``order[program_ptr[p]:program_ptr[p + 1]]``, at least one.

    Where programs take tiles, see :attr:`takes`, all are in program 0's list and the others' are empty.

    Those from ``ends[p]`` on belong to rows that keep no block; a launch may store their channels in another way. A
    tile is ``spatial * rows + row`` with ``spatial`` over (images, rows, columns) of tiles, columns fastest.

    Attributes:
        program_ptr: int32 [programs + 1].
        order: int32 [tiles].
        work: int32 [tiles, WORK_FIELDS], what the kernel reads of each, see :meth:`with_work`; None without a layout.
        makespan: estimated end of the busiest program / mean; 1 = perfectly even.
        ends: int32 [programs], where each program's tiles of rows with blocks end.
        fill: int32 [1 + strips], see ``fill.fill_tensor``; empty where all rows have blocks.
        counters: int32 [tiles that are cut into pieces, 2 warpgroups], zeros: pieces that are done; where it ``takes``,
            [1, 1], tiles that were taken. A launch counts them up and back to zero: two launches with the same schedule
            must not run at the same time.
        pairs: how block rows of 32 output channels share tiles of 64; None for taller blocks.
        weights: a copy of the packed blocks in the order of the kernel's steps, see ``weights.arranged_weights``; None
            where that is their own order, or is left to the launch.
    """

    program_ptr: torch.Tensor
    order: torch.Tensor
    makespan: float
    ends: torch.Tensor
    fill: torch.Tensor
    counters: torch.Tensor
    work: torch.Tensor | None = None
    pairs: PairedRows | None = None
    weights: torch.Tensor | None = None

    def with_work(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        halves: int,
        parts: Sequence[int] | None = None,
        grid: tuple[int, int] = (1, 1),
        extent: tuple[int, int, int] = (1, 1, 1),
    ) -> Schedule:
        """The same schedule with its ``work``, and ``order`` and ``counters`` to match; on the CPU.

        A record is: tile, its row's first entry, one past its last, the first one's input block; then for a tile that
        is cut, into how many pieces, which counter, the tile's first place in the workspace, and the piece's number;
        then its row and the pixel (y, x, image) where it begins: divided out on the GPU, they took 1 to 3 %.

        Args:
            indptr, indices: the block layout, of pairs of rows where they run in pairs.
            halves: rows of tiles in a block row.
            parts: into how many pieces every row of tiles is cut along its entries; None = none is. The rows of this
                schedule's ``order`` are then these pieces, one row's after the other's.
            grid: (rows, columns) of tiles in an image.
            extent: (rows, columns, images) of a tile.
        """
        bounds = [(a, b) for a, b in pairwise(indptr.tolist()) for _ in range(halves)]
        pieces, groups, places = [], 0, 0
        for row, ((begin, end), n) in enumerate(zip(bounds, parts or [1] * len(bounds))):
            for piece, (a, b) in enumerate(cut(end - begin, n)):
                pieces.append([row, begin + a, begin + b, n, groups, places, piece])
            groups, places = (groups + 1, places + n) if n > 1 else (groups, places)
        row, begin, end, n, group, place, piece = torch.tensor(pieces)[self.order % len(pieces)].T
        spatial = self.order // len(pieces)
        first = indices.cpu()[begin.clamp(max=len(indices) - 1)]  # rows without entries read none
        tile = spatial * len(bounds) + row
        grid_place = [spatial // grid[1] % grid[0], spatial % grid[1], spatial // math.prod(grid)]
        origin = [index * size for index, size in zip(grid_place, extent)]
        sums = [n, spatial * groups + group, spatial * places + place, piece]
        work = torch.stack([tile, begin, end, first, *sums, row, *origin], 1)
        counters = torch.zeros(groups * len(self.order) // len(pieces), 2, dtype=torch.int32)
        return replace(self, order=tile.int(), work=work.int(), counters=self.counters if self.takes else counters)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Its tensors, for interfaces that take nothing else; the layout must be known."""
        pairs = self.pairs
        assert self.work is not None
        return [
            self.program_ptr,
            self.work,
            self.ends,
            self.fill,
            self.counters,
            *([] if pairs is None else [pairs.indptr, pairs.indices, pairs.blocks, pairs.rows]),
            *([] if self.weights is None else [self.weights]),
        ]

    @staticmethod
    def from_tensors(tensors: Sequence[torch.Tensor]) -> Schedule:
        """The schedule of :attr:`tensors`; its makespan is forgotten (NaN)."""
        program_ptr, work, ends, fill, counters, *rest = tensors
        weights = rest.pop() if len(rest) in (1, 5) else None
        pairs = PairedRows(*rest) if rest else None
        return Schedule(program_ptr, work[:, 0], math.nan, ends, fill, counters, work, pairs, weights)

    @property
    def takes(self) -> bool:
        """Whether programs take the tiles of one list when they need them, the first by their number."""
        return self.counters.shape[1] == 1

    @property
    def programs(self) -> int:
        return len(self.program_ptr) - 1

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with its tensors on ``device``."""
        return replace(
            self,
            program_ptr=self.program_ptr.to(device),
            order=self.order.to(device),
            ends=self.ends.to(device),
            fill=self.fill.to(device),
            counters=self.counters.to(device),
            work=None if self.work is None else self.work.to(device),
            pairs=None if self.pairs is None else self.pairs.to(device),
            weights=None if self.weights is None else self.weights.to(device),
        )


def make_schedule(
    row_costs: list[float],
    spatial_tiles: int,
    programs: int,
    *,
    idle: Sequence[int] = (),
    tile_cost: float = TILE_COST,
    balanced_rounds: int = BALANCED_ROUNDS,
    swaps: bool = True,
) -> Schedule:
    """Distribute ``spatial_tiles`` x ``len(row_costs)`` tiles over ``programs`` programs.

    Args:
        row_costs: cost of a tile of every row, in any unit that makes ``tile_cost`` the fixed cost of a tile.
        spatial_tiles: tiles of one row.
        programs: persistent programs; fewer are used when there are fewer tiles.
        idle: rows without blocks, not all of them; their tiles go evenly to the ends of the programs' lists, for free.
        tile_cost: fixed cost of a tile.
        balanced_rounds: tiles per program, at the end, that go longest first.
        swaps: whether swaps even out what is left; they move tiles to any time, away from their neighbours.
    Returns:
        The schedule, on the CPU. Every tile occurs once.
    Cost: O(tiles log programs) on the CPU, about 1 us a tile.
    """
    rows = len(row_costs)
    costs = [cost + tile_cost for cost in row_costs]
    by_cost = sorted({*range(rows)} - {*idle}, key=lambda row: -costs[row])
    tiles = len(by_cost) * spatial_tiles
    programs = max(1, min(programs, tiles))
    tail_tiles = -(-min(tiles, balanced_rounds * programs) // len(by_cost))  # spatial tiles in the tail
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
    loads = [sum(costs[tile % rows] for tile in tiles) for tiles in lists]
    busy = torch.tensor([len(tiles) for tiles in lists])
    free = [spatial * rows + row for spatial in range(spatial_tiles) for row in idle]
    for program, mine in enumerate(lists):
        mine += free[program * len(free) // programs : (program + 1) * len(free) // programs]
    program_ptr = torch.tensor([0, *(len(tiles) for tiles in lists)]).cumsum(0).int()
    order = torch.tensor([tile for tiles in lists for tile in tiles], dtype=torch.int32)
    ends = (program_ptr[:-1] + busy).int()
    makespan = max(loads) * programs / max(sum(loads), 1e-9)
    return Schedule(program_ptr, order, makespan, ends, _nothing(), _nothing())


def one_list(row_costs: list[float], spatial_tiles: int, programs: int) -> Schedule:
    """All tiles in one list that programs take them from: in spatial order, at each place the longest first.

    For layers that memory decides, where multiprocessors differ in speed and lists made beforehand let the fast ones
    wait: 64 -> 64 channels at 224 x 224, a quarter kept, 392.7 -> 345.3 us on an H200. Programs look a few tiles ahead,
    so elsewhere the last tiles end less evenly: 512 -> 512 at 28 x 28 170.0 -> 176.6, 256 -> 256 at 56 x 56 174.7 ->
    182.7.
    """
    by_cost = sorted(range(len(row_costs)), key=lambda row: -row_costs[row])
    order = torch.tensor([spatial * len(by_cost) + row for spatial in range(spatial_tiles) for row in by_cost]).int()
    programs = max(1, min(programs, len(order)))
    program_ptr = torch.tensor([0, *[len(order)] * programs], dtype=torch.int32)
    return Schedule(program_ptr, order, math.nan, program_ptr[1:].clone(), _nothing(), torch.zeros(1, 1).int())


def _nothing() -> torch.Tensor:
    return torch.zeros(0, 2, dtype=torch.int32)


def round_robin(rows: int, spatial_tiles: int, programs: int) -> Schedule:
    """Tile t to program t mod ``programs``: the schedule to compare with."""
    tiles = rows * spatial_tiles
    programs = max(1, min(programs, tiles))
    lists = [range(program, tiles, programs) for program in range(programs)]
    program_ptr = torch.tensor([0, *(len(tiles) for tiles in lists)]).cumsum(0).int()
    order = torch.cat([torch.tensor(tiles, dtype=torch.int32) for tiles in lists])
    return Schedule(program_ptr, order, 1.0, program_ptr[1:].clone(), _nothing(), _nothing())
