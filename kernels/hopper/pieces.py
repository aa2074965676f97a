"""Into how many pieces the rows of a small convolution are cut along the inputs, for several programs to sum.

At batch 1 a layer has fewer tiles than the GPU has multiprocessors, or the row that keeps most blocks decides when it
ends. Each piece leaves its sums in memory; the one that ends last adds them all (``pieces_device``).
"""

from __future__ import annotations

from collections.abc import Sequence

from tetris.kernels.hopper.geometry import WGMMA_ROWS, ConvTile
from tetris.kernels.splitting import PartCosts, choose_parts

STEP_CYCLES_64 = 9216.0
"""Cycles of the unit of all costs here, a 64 x 64 block of a 3 x 3 kernel on 512 pixels."""
FEW_TILES = 4
"""Tiles per multiprocessor up to which rows are cut."""
SMALL_TILE_COST = 0.35
"""Fixed cost of a tile where tiles are few: their loads begin and end apart."""
SYNCHRONISE_CYCLES, MERGE_BYTES_PER_CYCLE = 1500.0, 64.0
"""The fence, the counter and the first of the other pieces' sums; then what L2 gives of them."""


def part_costs(tile: ConvTile) -> PartCosts:
    """What a piece costs beside its products."""
    merge = 4 * WGMMA_ROWS * tile.tile_h * tile.row_pixels / MERGE_BYTES_PER_CYCLE
    return PartCosts(SMALL_TILE_COST, SYNCHRONISE_CYCLES / STEP_CYCLES_64, merge / STEP_CYCLES_64)


def piece_cost(row_cost: float, parts: int, tile: ConvTile) -> float:
    """Of a piece of a row, without the fixed cost of every tile."""
    return part_costs(tile).of_part(row_cost, parts) - SMALL_TILE_COST


def row_pieces(
    costs: Sequence[float], entries: Sequence[int], spatial: int, programs: int, tile: ConvTile
) -> list[int]:
    """Pieces of every row of tiles, at least 1.

    Args:
        costs: of a tile of every row.
        entries: blocks that the row keeps, its most pieces; 0 = its tiles take no program's time.
        spatial: tiles of one row.
        programs: that run at the same time.
    """
    busy = [row for row, count in enumerate(entries) if count]
    parts = [1] * len(costs)
    found = choose_parts([costs[r] for r in busy], [entries[r] for r in busy], spatial, programs, part_costs(tile))
    for row, n in zip(busy, found):
        parts[row] = n
    return parts
