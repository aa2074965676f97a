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
from tetris.layout import ceil_div

ELEMENTS_PER_WARP = 1024
"""Comparisons of a turn, 2 * pairs * tile^2, that one warp holds: 32 registers a thread."""


@triton.jit
def _sorted_leavers(values_ptr, order_ptr, begin, end, R, here, there, LOWEST: tl.constexpr, TILE: tl.constexpr):
    """Members at positions begin..end-1 by descending gain of moving there.

    begin, end, here, there are [SIDES]. Returns gains, positions and slices, each [SIDES, TILE].
    """
    lane = tl.arange(0, TILE)
    position = begin[:, None] + lane[None, :]  # [SIDES, TILE]
    mask = position < end[:, None]
    slice = tl.load(order_ptr + position, mask=mask, other=0, cache_modifier=".cg")
    row = values_ptr + slice.to(tl.int64) * R
    away = tl.load(row + there[:, None], mask=mask, other=0.0)
    gain = tl.where(mask, away - tl.load(row + here[:, None], mask=mask, other=0.0), LOWEST)
    mine, other = gain[:, :, None], gain[:, None, :]
    ahead = (other > mine) | ((other == mine) & (lane[None, None, :] < lane[None, :, None]))
    rank = tl.sum(ahead.to(tl.int32), axis=2)
    chosen = rank[:, :, None] == lane[None, None, :]  # [SIDES, member, rank], one True in every column
    gains = tl.sum(tl.where(chosen, mine, 0.0), axis=1)
    positions = tl.sum(tl.where(chosen, position[:, :, None], 0), axis=1)
    slices = tl.sum(tl.where(chosen, slice[:, :, None], 0), axis=1)
    return gains, positions, slices


@triton.jit
def _sides(x, PAIRS: tl.constexpr, TILE: tl.constexpr):
    """[2 * PAIRS, TILE] -> the even and the odd rows."""
    return tl.split(tl.permute(tl.reshape(x, (PAIRS, 2, TILE)), (0, 2, 1)))


@triton.jit
def _contestants(players_ptr, k, turn, n_even, R):
    """The groups of the k-th pairs of a turn (circle method) and whether both exist."""
    a = tl.where(k == 0, n_even - 1, (turn + k) % (n_even - 1))
    b = (turn + n_even - 1 - k) % (n_even - 1)
    plays = (k < n_even // 2) & (a < R) & (b < R)
    return tl.load(players_ptr + a, mask=plays, other=0), tl.load(players_ptr + b, mask=plays, other=0), plays


@triton.jit
def tournament_kernel(
    values_ptr,
    order_ptr,
    offsets_ptr,
    players_ptr,
    swaps_ptr,
    counter_ptr,
    epsilon_ptr,
    n,
    R,
    n_even,
    first_turn,
    turns,
    PROGRAMS: tl.constexpr,
    PAIRS: tl.constexpr,
    EDGE: tl.constexpr,
    LOWEST: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: PROGRAMS, all running at once, PAIRS pairs each. ``order`` changes in place; ``swaps`` counts.

    EDGE is the size of all groups but the last, 0 where ``offsets`` must tell.
    """
    epsilon = tl.load(epsilon_ptr)
    lane = tl.arange(0, TILE)
    k = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    total = tl.zeros((PAIRS, TILE), tl.int32)
    g, h, plays = _contestants(players_ptr, k, first_turn % (n_even - 1), n_even, R)
    for step in range(0, turns):
        if EDGE > 0:
            begin_g, begin_h = g * EDGE, h * EDGE
            end_g, end_h = tl.minimum(begin_g + EDGE, n), tl.minimum(begin_h + EDGE, n)
        else:
            begin_g, end_g = tl.load(offsets_ptr + g), tl.load(offsets_ptr + g + 1)
            begin_h, end_h = tl.load(offsets_ptr + h), tl.load(offsets_ptr + h + 1)
        end_g = tl.where(plays, end_g, begin_g)
        end_h = tl.where(plays, end_h, begin_h)
        # both sides of all pairs at once, g at the even places: [2 * PAIRS]
        begin, end = tl.interleave(begin_g, begin_h), tl.interleave(end_g, end_h)
        here, there = tl.interleave(g, h), tl.interleave(h, g)
        gain, at, who = _sorted_leavers(values_ptr, order_ptr, begin, end, R, here, there, LOWEST, TILE)
        gain_g, gain_h = _sides(gain, PAIRS, TILE)
        at_g, at_h = _sides(at, PAIRS, TILE)
        who_g, who_h = _sides(who, PAIRS, TILE)
        fits = (lane[None, :] < (end_g - begin_g)[:, None]) & (lane[None, :] < (end_h - begin_h)[:, None])
        swap = fits & (gain_g + gain_h > epsilon)
        tl.store(order_ptr + at_g, who_h, mask=swap)
        tl.store(order_ptr + at_h, who_g, mask=swap)
        total += swap.to(tl.int32)
        # the next turn's pairs do not depend on this one's outcome: ask for them before the barrier
        g, h, plays = _contestants(players_ptr, k, (first_turn + step + 1) % (n_even - 1), n_even, R)
        if PROGRAMS > 1:
            grid_barrier(counter_ptr, (step + 1) * PROGRAMS)
        else:
            tl.debug_barrier()
    tl.atomic_add(swaps_ptr, tl.sum(tl.sum(total, axis=1), axis=0))


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
    uniform: bool = True,
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
        programs: how many may run at the same time: the number of multiprocessors; 1 in the interpreter.
        uniform: whether all groups but a smaller last one have ``capacity`` members; it saves a load a turn.
    Returns:
        int32 [1] on the device: the number of swaps.
    Cost:
        about 4 n scattered reads a turn; a barrier a turn.
    """
    n, R = values.shape
    counts = torch.zeros(2, dtype=torch.int32, device=values.device)
    limit = torch.full((1,), epsilon, dtype=values.dtype, device=values.device)
    tile = next_power_of_two(capacity)
    n_even = R + R % 2
    pairs = next_power_of_two(ceil_div(n_even // 2, programs))
    programs = ceil_div(n_even // 2, pairs)
    tournament_kernel[(programs,)](
        values,
        order,
        offsets,
        players,
        counts,
        counts[1:],
        limit,
        n,
        R,
        n_even,
        first_turn,
        turns,
        PROGRAMS=programs,
        PAIRS=pairs,
        EDGE=capacity if uniform else 0,
        LOWEST=-1e30,
        TILE=tile,
        num_warps=max(1, min(32, 2 * pairs * tile * tile // ELEMENTS_PER_WARP)),
        launch_cooperative_grid=programs > 1,
    )
    return counts[:1]
