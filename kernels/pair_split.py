"""A round-robin tournament between groups of slices, many turns a launch: the M-step of batched and annealed search.

In a turn every group meets one other, and the two are split anew: of all their members, those that gain most on the
other side end up there. Pairs of a turn are disjoint, so their gains add exactly.

No barrier separates the turns. A group's members travel to the program that needs them next as 64-bit words, the turn
in the upper and the slice in the lower half: who reads a word with the right turn has its slice, no fence needed. A
pair thus waits for the two pairs that its groups come from, and for nobody else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tetris.kernels.configs import next_power_of_two
from tetris.layout import ceil_div

COMPARISONS_PER_WARP = 2048
"""Of a turn's 4 * pairs * tile^2: 64 a thread, which spills nothing."""
RESIDENT_WARPS = 8
"""What a multiprocessor certainly runs at the same time, however many registers they use."""


@triton.jit
def _contestants(players_ptr, k, turn, n_even, R):
    """The groups of the k-th pairs of a turn (circle method) and whether each exists."""
    a = tl.where(k == 0, n_even - 1, (turn + k) % (n_even - 1))
    b = (turn + n_even - 1 - k) % (n_even - 1)
    has_a = (k < n_even // 2) & (a < R)
    has_b = (k < n_even // 2) & (b < R)
    first = tl.load(players_ptr + a, mask=has_a, other=0).to(tl.int32)
    second = tl.load(players_ptr + b, mask=has_b, other=0).to(tl.int32)
    return first, second, has_a, has_b


@triton.jit
def _extent(offsets_ptr, group, exists, n, EDGE: tl.constexpr):
    """First position and size of every group; size 0 where there is none. EDGE as in the kernel."""
    if EDGE > 0:
        begin = group * EDGE
        end = tl.minimum(begin + EDGE, n)
    else:
        begin = tl.load(offsets_ptr + group).to(tl.int32)
        end = tl.load(offsets_ptr + group + 1).to(tl.int32)
    return begin, tl.where(exists, end - begin, 0)


@triton.jit
def tournament_kernel(
    values_ptr,  # [n, R]
    order_ptr,  # int64 [n]: receives the slices at the end
    mail_ptr,  # int64 [n]: turn * 2^32 + slice at every position; the order at first
    offsets_ptr,
    players_ptr,
    swaps_ptr,  # int64 [1]: rises by the number of swaps
    epsilon_ptr,
    n,
    R,
    n_even,
    first_turn,
    turns,
    PAIRS: tl.constexpr,
    EDGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: any that runs at once and holds all pairs, PAIRS pairs a program.

    EDGE is the size of all groups but the last, 0 where ``offsets`` must tell. Lanes 0 .. TILE - 1 of a pair hold the
    members of its second group h, the others those of its first group g.
    """
    epsilon = tl.load(epsilon_ptr)
    lane = tl.arange(0, 2 * TILE)[None, :]
    in_h = lane < TILE
    k = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    swaps = tl.sum(tl.zeros((1,), tl.int32), axis=0)
    for step in range(0, turns):
        g, h, has_g, has_h = _contestants(players_ptr, k, (first_turn + step) % (n_even - 1), n_even, R)
        begin_g, size_g = _extent(offsets_ptr, g, has_g, n, EDGE)
        begin_h, size_h = _extent(offsets_ptr, h, has_h, n, EDGE)
        here = tl.where(in_h, begin_h[:, None] + lane, begin_g[:, None] + lane - TILE)
        mask = tl.where(in_h, lane < size_h[:, None], lane - TILE < size_g[:, None])
        mail = tl.load(mail_ptr + here, mask=mask, other=0, volatile=True)
        while tl.min(tl.min(tl.where(mask, mail >> 32, step), axis=1), axis=0) < step:
            mail = tl.load(mail_ptr + here, mask=mask, other=0, volatile=True)
        slice = mail & 0xFFFFFFFF
        row = values_ptr + slice * R
        known = mask & (has_g & has_h)[:, None]
        gain = tl.load(row + h[:, None], mask=known, other=0.0) - tl.load(row + g[:, None], mask=known, other=0.0)
        gain = tl.where(mask, gain + tl.where(in_h, epsilon, 0.0), -1e30)  # of a place in h; who is there has the edge
        most = tl.max(tl.where(in_h, -1e30, gain), axis=1)
        least = tl.min(tl.where(in_h & mask, gain, 1e30), axis=1)
        slice32 = slice.to(tl.int32)
        into_h = in_h & mask
        there = here
        if tl.max((most > least).to(tl.int32), axis=0) > 0:
            # ties: who is in h stays, slices of low numbers leave first
            age = tl.where(in_h, ~slice32, slice32)
            ahead = (gain[:, None, :] > gain[:, :, None]) | (
                (gain[:, None, :] == gain[:, :, None]) & (age[:, None, :] < age[:, :, None])
            )
            into_h = mask & (tl.sum(ahead.to(tl.int32), axis=2) < size_h[:, None])
            before = tl.cumsum(into_h.to(tl.int32), axis=1) - into_h.to(tl.int32)
            members_before = tl.minimum(lane, size_h[:, None]) + tl.maximum(lane - TILE, 0)
            there = tl.where(into_h, begin_h[:, None] + before, begin_g[:, None] + members_before - before)
            swaps += tl.sum(tl.sum((into_h & ~in_h).to(tl.int32), axis=1), axis=0)
        if step < turns - 1:
            stamp = (tl.zeros((1, 1), tl.int64) + step + 1) << 32
            tl.store(mail_ptr + there, slice | stamp, mask=mask, cache_modifier=".cg")
        else:  # each group in the order of its slices' numbers, so that nothing tells who went where when
            lower = (slice32[:, None, :] < slice32[:, :, None]) & mask[:, None, :]
            rank = tl.sum((lower & (into_h[:, None, :] == into_h[:, :, None])).to(tl.int32), axis=2)
            tl.store(order_ptr + tl.where(into_h, begin_h[:, None], begin_g[:, None]) + rank, slice, mask=mask)
    tl.atomic_add(swaps_ptr, swaps.to(tl.int64))


def _warps(pairs: int, tile: int) -> int:
    """Of a program with so many pairs; at most one thread a member: a word that two read might be two words."""
    return max(1, min(16, pairs * tile // 16, 4 * pairs * tile * tile // COMPARISONS_PER_WARP))


def play_tournament(
    values: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    players: torch.Tensor,
    first_turn: int,
    turns: int,
    epsilon: torch.Tensor,
    capacity: int,
    processors: int,
    uniform: bool = True,
) -> torch.Tensor:
    """Turns of a tournament; ``order`` changes in place.

    Ties go to the slice of the lowest number; every group that played ends up in the order of its slices' numbers.

    Args:
        values: float32 or float64 [n, R], contiguous; what each slice keeps in each group.
        order: int64 [n]; the slice at every position.
        offsets: int64 [R + 1]; group g owns positions offsets[g]:offsets[g + 1].
        players: int64 [R]; the group behind every contestant.
        first_turn, turns: of the R - 1 (R even) or R turns of a full tournament; they wrap around.
        epsilon: one number of values' dtype on the device; smallest gain worth a swap.
        capacity: the size of the largest group.
        processors: multiprocessors of the device.
        uniform: whether all groups but a smaller last one have ``capacity`` members; it saves loads.
    Returns:
        int64 [] on the device: the number of swaps; nothing waits for it.
    Cost:
        about 4 n scattered reads a turn, and one trip of the members through the L2 cache.
    """
    n, R = values.shape
    tile = next_power_of_two(capacity)
    n_even = R + R % 2
    resident = processors * max(1, RESIDENT_WARPS // _warps(1, tile))
    pairs = next_power_of_two(ceil_div(n_even // 2, resident), at_least=max(1, 16 // tile))
    grid = ceil_div(n_even // 2, pairs)
    swaps = torch.zeros((), dtype=torch.int64, device=values.device)
    tournament_kernel[(grid,)](
        values,
        order,
        order.clone(),
        offsets,
        players,
        swaps,
        epsilon,
        n,
        R,
        n_even,
        first_turn,
        turns,
        PAIRS=pairs,
        EDGE=capacity if uniform else 0,
        TILE=tile,
        num_warps=_warps(pairs, tile),
        launch_cooperative_grid=grid > 1,
    )
    return swaps
