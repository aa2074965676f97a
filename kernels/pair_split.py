"""A round-robin tournament between groups of slices, many turns a launch: the M-step of batched and annealed search.

In a turn every group meets one other. The two sort their members by what each would gain on the other side; the k-th
best leavers of both change places as long as that gains. Pairs of a turn are disjoint, so their gains add exactly; a
grid-wide barrier separates the turns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tetris.kernels.configs import next_power_of_two
from tetris.kernels.grid_barrier import grid_barrier


@triton.jit
def _sorted_leavers(values_ptr, order_ptr, begin, end, R, here, there, LOWEST: tl.constexpr, TILE: tl.constexpr):
    """Members at positions begin..end-1 by descending gain of moving there: (gains, positions, slices), each [TILE]."""
    lane = tl.arange(0, TILE)
    position = begin + lane
    mask = position < end
    slice = tl.load(order_ptr + position, mask=mask, other=0, cache_modifier=".cg")
    row = values_ptr + slice.to(tl.int64) * R
    gain = tl.load(row + there, mask=mask, other=0.0) - tl.load(row + here, mask=mask, other=0.0)
    gain = tl.where(mask, gain, LOWEST)
    ahead = (gain[None, :] > gain[:, None]) | ((gain[None, :] == gain[:, None]) & (lane[None, :] < lane[:, None]))
    rank = tl.sum(ahead.to(tl.int32), axis=1)
    chosen = rank[:, None] == lane[None, :]  # [member, rank], one True in every column
    gains = tl.sum(tl.where(chosen, gain[:, None], 0.0), axis=0)
    positions = tl.sum(tl.where(chosen, position[:, None], 0), axis=0)
    slices = tl.sum(tl.where(chosen, slice[:, None], 0), axis=0)
    return gains, positions, slices


@triton.jit
def tournament_kernel(
    values_ptr,
    order_ptr,
    offsets_ptr,
    players_ptr,
    swaps_ptr,
    counter_ptr,
    epsilon_ptr,
    R,
    n_even,
    first_turn,
    turns,
    PROGRAMS: tl.constexpr,
    LOWEST: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: PROGRAMS, all running at once. ``order`` changes in place; ``swaps`` counts."""
    program = tl.program_id(0)
    epsilon = tl.load(epsilon_ptr)
    lane = tl.arange(0, TILE)
    total = 0
    for step in range(0, turns):
        turn = (first_turn + step) % (n_even - 1)
        for k in range(program, n_even // 2, PROGRAMS):
            a = tl.where(k == 0, n_even - 1, (turn + k) % (n_even - 1))
            b = (turn + n_even - 1 - k) % (n_even - 1)
            if (a < R) & (b < R):
                g = tl.load(players_ptr + a)
                h = tl.load(players_ptr + b)
                begin_g, end_g = tl.load(offsets_ptr + g), tl.load(offsets_ptr + g + 1)
                begin_h, end_h = tl.load(offsets_ptr + h), tl.load(offsets_ptr + h + 1)
                gain_g, at_g, who_g = _sorted_leavers(values_ptr, order_ptr, begin_g, end_g, R, g, h, LOWEST, TILE)
                gain_h, at_h, who_h = _sorted_leavers(values_ptr, order_ptr, begin_h, end_h, R, h, g, LOWEST, TILE)
                fits = (lane < end_g - begin_g) & (lane < end_h - begin_h)
                swap = fits & (gain_g + gain_h > epsilon)
                tl.store(order_ptr + at_g, who_h, mask=swap)
                tl.store(order_ptr + at_h, who_g, mask=swap)
                total += tl.sum(swap.to(tl.int32), axis=0)
        if PROGRAMS > 1:
            grid_barrier(counter_ptr, (step + 1) * PROGRAMS)
        else:
            tl.debug_barrier()
    tl.atomic_add(swaps_ptr, total)


def play_tournament(
    values: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    players: torch.Tensor,
    first_turn: int,
    turns: int,
    epsilon: float,
    capacity: int,
    programs: int,
) -> torch.Tensor:
    """Turns of a tournament; ``order`` changes in place.

    Args:
        values: float32 or float64 [n, R], contiguous; what each slice keeps in each group.
        order: int32 [n]; the slice at every position.
        offsets: int32 [R + 1]; group g owns positions offsets[g]:offsets[g + 1].
        players: int32 [R]; the group behind every contestant.
        first_turn, turns: of the R - 1 (R even) or R turns of a full tournament; they wrap around.
        epsilon: smallest gain worth a swap.
        capacity: the size of the largest group.
        programs: how many run, at most the number of multiprocessors; 1 in the interpreter.
    Returns:
        int32 [1] on the device: the number of swaps.
    Cost:
        about 4 n scattered reads a turn; a barrier a turn.
    """
    R = values.shape[1]
    counts = torch.zeros(2, dtype=torch.int32, device=values.device)
    limit = torch.full((1,), epsilon, dtype=values.dtype, device=values.device)
    tile = next_power_of_two(capacity)
    n_even = R + R % 2
    programs = max(1, min(programs, n_even // 2))
    tournament_kernel[(programs,)](
        values,
        order,
        offsets,
        players,
        counts,
        counts[1:],
        limit,
        R,
        n_even,
        first_turn,
        turns,
        PROGRAMS=programs,
        LOWEST=-1e30,
        TILE=tile,
        num_warps=max(1, min(32, tile * tile // 1024)),
        launch_cooperative_grid=programs > 1,
    )
    return counts[:1]
