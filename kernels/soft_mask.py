"""The soft mask of an annealing step in one launch: a noisy sigmoid around the threshold that keeps K blocks' worth.

The threshold is bisected by programs that hold their part of the block sums in registers and add up what they keep
through memory, a grid-wide barrier each time: one launch instead of the hundred that tensor operations take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tetris.kernels.configs import next_power_of_two
from tetris.kernels.grid_barrier import grid_barrier
from tetris.layout import ceil_div

HALVINGS = 26
TILE = 4096
"""Sums that a program holds, unless there would be more programs than multiprocessors."""


@triton.jit
def _over_all(
    x, parts_ptr, counter_ptr, meeting, LARGEST: tl.constexpr, PROGRAMS: tl.constexpr, TILE_PROGRAMS: tl.constexpr
):
    """Sum, or largest, of every program's x; ``meeting`` counts the calls."""
    if PROGRAMS > 1:
        part_ptr = parts_ptr + (meeting % 2) * PROGRAMS
        tl.store(part_ptr + tl.program_id(0), x)
        grid_barrier(counter_ptr, (meeting + 1) * PROGRAMS)
        everyone = tl.arange(0, TILE_PROGRAMS)
        other: tl.constexpr = float("-inf") if LARGEST else 0.0
        parts = tl.load(part_ptr + everyone, mask=everyone < PROGRAMS, other=other, cache_modifier=".cg")
        x = tl.max(parts, axis=0) if LARGEST else tl.sum(parts, axis=0)
    return x


@triton.jit
def soft_mask_kernel(
    sums_ptr,
    noise_ptr,
    mask_ptr,
    temperature_ptr,
    parts_ptr,  # float32 [2, PROGRAMS]
    counter_ptr,  # int32 [1], zero
    N,
    n_keep,
    noisiness,
    HALVINGS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE_PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: PROGRAMS, all running at once."""
    temperature = tl.load(temperature_ptr)
    offs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = offs < N
    x = tl.load(sums_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    mean = _over_all(tl.sum(x, axis=0), parts_ptr, counter_ptr, 0, False, PROGRAMS, TILE_PROGRAMS) / N
    squares = tl.sum(tl.where(inside, (x - mean) * (x - mean), 0.0), axis=0)
    variance = _over_all(squares, parts_ptr, counter_ptr, 1, False, PROGRAMS, TILE_PROGRAMS) / N
    spread = tl.maximum(temperature * tl.sqrt(variance), 1e-30)
    most = tl.max(tl.where(inside, x, float("-inf")), axis=0)
    least = tl.max(tl.where(inside, -x, float("-inf")), axis=0)
    top = _over_all(most, parts_ptr, counter_ptr, 2, True, PROGRAMS, TILE_PROGRAMS) + 20.0 * spread
    bottom = -_over_all(least, parts_ptr, counter_ptr, 3, True, PROGRAMS, TILE_PROGRAMS) - 20.0 * spread
    for step in range(HALVINGS):
        middle = 0.5 * (bottom + top)
        mine = tl.sum(tl.where(inside, tl.sigmoid((x - middle) / spread), 0.0), axis=0)
        more = _over_all(mine, parts_ptr, counter_ptr, 4 + step, False, PROGRAMS, TILE_PROGRAMS) > n_keep
        bottom = tl.where(more, middle, bottom)
        top = tl.where(more, top, middle)
    noise = tl.load(noise_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    weight = tl.sigmoid((x - 0.5 * (bottom + top)) / spread) * (1.0 + noisiness * temperature * noise)
    tl.store(mask_ptr + offs, weight, mask=inside)


def soft_mask(
    block_sums: torch.Tensor,
    noise: torch.Tensor,
    n_keep: int,
    temperature: torch.Tensor,
    noisiness: float,
    processors: int = 1,
) -> torch.Tensor:
    """sigmoid((B - tau) / (t std(B))) * (1 + noisiness t noise), t the temperature, tau so that the sigmoids sum to K.

    Args:
        block_sums: float [R, C]; noise: the same shape and device, contiguous.
        n_keep: K.
        temperature: float32 [1] on the device: a captured launch can then be replayed at another one.
        processors: programs that may run at the same time; 1 in the interpreter.
    Returns:
        [R, C], the dtype of ``block_sums``.
    Cost:
        one read of B, and for more than 4096 blocks 30 barriers.
    """
    block_sums = block_sums.contiguous()
    mask = torch.empty_like(block_sums)
    N, device = block_sums.numel(), block_sums.device
    tile = next_power_of_two(ceil_div(N, processors), at_least=min(TILE, next_power_of_two(N)))
    programs = ceil_div(N, tile)
    counter = torch.zeros if programs > 1 else torch.empty
    soft_mask_kernel[(programs,)](
        block_sums,
        noise,
        mask,
        temperature,
        torch.empty(2, programs, dtype=torch.float32, device=device),
        counter(1, dtype=torch.int32, device=device),
        N,
        n_keep,
        noisiness,
        HALVINGS=HALVINGS,
        PROGRAMS=programs,
        TILE_PROGRAMS=next_power_of_two(programs),
        TILE=tile,
        num_warps=max(1, min(16, tile // 256)),
        launch_cooperative_grid=programs > 1,
    )
    return mask
