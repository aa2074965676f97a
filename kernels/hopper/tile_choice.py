"""The Hopper convolution's tiles of a problem, the likeliest first: an analytic model of one multiprocessor's cycles.

A step of TILE_K channels costs its products or its loads, whichever take longer; a tile adds a fixed cost. Tiles that
are few per multiprocessor cost their unevenness. The constants were fitted on an H200.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tetris.kernels.configs import ITEM_SIZE, Conv2dConfig, Conv2dProblem, DeviceInfo
from tetris.kernels.hopper.geometry import GROUP, WEIGHT_ROW_BYTES, ConvTile
from tetris.kernels.hopper.heuristics import complete_tile, supports
from tetris.layout import ceil_div

IMAGES = {"images": (8, 16, 32), "copies": (1, 2, 4)}
ROWS = (2, 4, 6, 7, 8)
COLUMNS = (1, 2, 4, 8, 16, 32)
ROW_CYCLES, LOAD_BYTES_PER_CYCLE = 2.1, 32.0
"""What the copy engine takes for a row of a box, 32 to 128 bytes, and what L2 gives while all multiprocessors load."""
MEMORY_BYTES_PER_CYCLE = 19.0
"""Its share of 4.27 TB/s at 1.7 GHz."""
TILE_CYCLES, PIXEL_CYCLES = 1200.0, 2.0
"""Cost of a tile beside its steps: pipeline fill, and the epilogue of each pixel."""
TAP_CYCLES = 40.0
"""Issuing one tap's instructions, where its products are too short to hide it."""
STEP_CYCLES = 150.0
"""Barriers of a step: steps of 64 channels were 3 to 5 % faster than twice as many of 32 at batch 8."""
UNEVEN = 0.4
"""Part of a tile that the busiest multiprocessor has more than the mean."""
LONGEST = 2.6
"""A tile of the longest row over the mean tile: where tiles are few, one of those ends last."""
SECTORS_BYTES = 1e8
"""Inputs of twice the L2 cache's size come from memory."""
MOST_WASTE = 1.6
"""Tiles that compute more pixels than this times the output's are not considered."""


def ranked_configs(
    problem: Conv2dProblem, device: DeviceInfo, *, max_pool: bool = False, allow_tf32: bool = False
) -> list[Conv2dConfig]:
    """Configs that run the problem, the one with the lowest estimate first; empty where :func:`supports` refuses it.

    Args:
        problem: the convolution.
        device: where; its number of multiprocessors decides how large tiles may be.
        max_pool, allow_tf32: as for :func:`supports`.
    Cost: some milliseconds on the CPU.
    """
    if supports(problem, device, None, max_pool=max_pool, allow_tf32=allow_tf32) is not None:
        return []
    found: list[tuple[tuple[float, float], int, Conv2dConfig]] = []
    for config in _tiles(problem):
        if supports(problem, device, config, max_pool=max_pool, allow_tf32=allow_tf32) is None:
            tile = complete_tile(problem, config, max_pool=max_pool)
            estimate = estimated_cycles(problem, tile, device, max_pool=max_pool)
            found.append(((estimate, busiest_cycles(problem, tile, device.sm_count)), len(found), config))
    fetch = "sectors" if _wants_sectors(problem) else "lines"
    return [replace(config, fetch=fetch) for _, _, config in sorted(found)]


def _wants_sectors(problem: Conv2dProblem) -> bool:
    """Whether half of a large input or less is read: with one block row it shows in the number of blocks.

    On an H200, 64 -> 64 channels at 224 x 224, a quarter kept in 64x16 blocks: 381 instead of 475 us.
    """
    columns = ceil_div(problem.c_in, problem.block[1])
    size = ITEM_SIZE[problem.dtype] * problem.batch * problem.height * problem.width * problem.c_in
    few = problem.block_rows == 1 and 2 * problem.n_blocks <= columns
    return few and size >= SECTORS_BYTES and problem.stride[1] == 1


def _tiles(problem: Conv2dProblem) -> list[Conv2dConfig]:
    """All tiles worth an estimate."""
    height, width = problem.output_size
    order = "images" if problem.batch >= 8 else "copies"
    item = ITEM_SIZE[problem.dtype]
    steps = sorted({min(problem.block[1], 64 // item), min(problem.block[1], 128 // item)})
    configs = []
    for n in IMAGES[order]:
        for h in ROWS:
            for w in COLUMNS:
                computed = ceil_div(problem.batch, n) * n * ceil_div(height, h) * h * ceil_div(width, w) * w
                large = min(n * h * w, 512) / 64  # a small problem cannot fill large tiles
                if computed > MOST_WASTE * problem.batch * height * width and large > 1:
                    continue
                configs += [
                    Conv2dConfig(kernel="hopper", tile_n=n, tile_h=h, tile_w=w, tile_k=k, input_order=order)
                    for k in steps
                ]
    return configs


def estimated_cycles(problem: Conv2dProblem, tile: ConvTile, device: DeviceInfo, *, max_pool: bool = False) -> float:
    """Cycles of a launch; good for ranking tiles, not for predicting times."""
    return max(busiest_cycles(problem, tile, device.sm_count), _memory_cycles(problem, device.sm_count, max_pool))


def memory_decides(problem: Conv2dProblem, tile: ConvTile, sm_count: int) -> bool:
    """Whether memory takes longer than the busiest multiprocessor."""
    return _memory_cycles(problem, sm_count) > busiest_cycles(problem, tile, sm_count)


def busiest_cycles(problem: Conv2dProblem, tile: ConvTile, sm_count: int) -> float:
    """Cycles of the busiest multiprocessor, were memory no limit."""
    pixels = tile.tile_h * tile.row_pixels
    block_rows = ceil_div(problem.block_rows, tile.parts)
    columns = ceil_div(problem.c_in, problem.block[1])
    kept = problem.n_blocks / (problem.block_rows * columns)
    blocks = columns * (1 - (1 - kept) ** tile.parts)  # a pair multiplies the union of its rows
    steps = blocks * tile.k_steps
    cycles = steps * step_cycles(tile) + TILE_CYCLES + PIXEL_CYCLES * pixels
    n, h, w = tile.tiles(problem.batch, *problem.output_size)
    rounds = n * h * w * block_rows * tile.halves / sm_count
    return max(LONGEST, rounds + UNEVEN) * cycles


def step_cycles(tile: ConvTile) -> float:
    """Cycles of one step of a tile: its products or its loads, whichever take longer, and its barriers."""
    pixels = tile.tile_h * tile.row_pixels
    rate = 2048.0 * 2 / tile.item_size * _fullness(tile.accumulator_pixels)
    products = pixels * 64 * tile.tile_k * tile.taps / rate
    products = max(products, tile.taps * TAP_CYCLES)
    rows, weight_rows = tile.stage_groups * GROUP, tile.taps * tile.parts * tile.weight_rows
    size = tile.x_step_bytes + weight_rows * WEIGHT_ROW_BYTES
    loads = max((rows + weight_rows) * ROW_CYCLES, size / LOAD_BYTES_PER_CYCLE)
    if tile.x_stages < 2:
        loads += products
    return max(products, loads) + STEP_CYCLES


def _fullness(columns: int) -> float:
    """Share of the peak that wgmma of so many columns reaches with its left operand in registers."""
    return {8: 0.25, 16: 0.5, 32: 0.75, 64: 0.96}.get(columns, 1.0)


def _memory_cycles(problem: Conv2dProblem, sm_count: int, max_pool: bool = False) -> float:
    """Input and output once, in cycles of all multiprocessors."""
    height, width = problem.output_size
    out = height * width * problem.c_out / (4 if max_pool else 1)
    taken = min(problem.height * problem.width, math.prod(problem.output_size) * problem.taps) * problem.c_in
    size = float(ITEM_SIZE[problem.dtype]) * problem.batch * (out + taken)
    return size / sm_count / MEMORY_BYTES_PER_CYCLE
