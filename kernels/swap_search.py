"""Algorithm 1's inner loop in one persistent kernel: no host round trip per swap, one grid-wide barrier per swap.

``leave[g, k]`` is the most that a member of group g gains by moving to k and ``who[g, k]`` that member's position; the
best swap of two groups gains leave[g, k] + leave[k, g]. Each program owns some groups k and keeps, for each, the best
of its pairs. After a swap between g and h every program finds, for its k, the best leavers of g and h towards k, and
offers its best pair; all programs read all offers and agree on the next swap.

Each pair {a, b} is held once: by the owner of the group that was swapped longer ago, in ``gain[a, b]``, else by the
owner of the first. So a swap empties rows g and h of the gains, and no row is ever rebuilt. A row whose best pair got
worse keeps the old gain as an upper bound and is searched again only when that bound leads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tetris.kernels.configs import next_power_of_two
from tetris.kernels.grid_barrier import grid_barrier
from tetris.layout import ceil_div

UNKNOWN = -1
"""The key of an upper bound. Keys are i * 2^32 + j of the positions swapped: the smallest wins a tie."""


@dataclass(frozen=True)
class SwapSearchConfig:
    """How the kernel is laid out.

    Attributes:
        groups_per_program: groups that a program owns, a power of two. All of them: one program, no barrier.
        num_warps: of a program.
    """

    groups_per_program: int
    num_warps: int = 4


def default_swap_search_config(n_groups: int, processors: int) -> SwapSearchConfig:
    """At most one program a multiprocessor, as few groups each as that allows.

    H200, 4096 slices in 128 groups: 3.6 us a swap with one group and one warp a program, 4.5 us with four warps; a
    single program without barriers is slower even for 16 groups (6.0 against 5.1 us). 784 groups: 6.9 us with four
    warps, 8.7 us with one.
    """
    groups = next_power_of_two(ceil_div(n_groups, processors))
    return SwapSearchConfig(groups, num_warps=1 if groups == 1 else 4)


@triton.jit
def best_leavers_kernel(
    values_ptr, order_ptr, leave_ptr, who_ptr, n, R, EDGE: tl.constexpr, TILE: tl.constexpr, TILE_R: tl.constexpr
):
    """leave[g, k] and who[g, k] for all pairs. Grid: groups g x tiles of k."""
    g = tl.program_id(0)
    towards = tl.program_id(1) * TILE_R + tl.arange(0, TILE_R)
    mask_k = towards < R
    lane = tl.arange(0, TILE)
    position = g * EDGE + lane
    mask = (lane < EDGE) & (position < n)
    slice = tl.load(order_ptr + position, mask=mask, other=0).to(tl.int64)
    row = values_ptr + slice * R
    there = tl.load(row[:, None] + towards[None, :], mask=mask[:, None] & mask_k[None, :], other=0.0)
    here = tl.load(row + g, mask=mask, other=0.0)
    kind: tl.constexpr = leave_ptr.dtype.element_ty  # float64 differences of float32 values are exact
    gain = tl.where(mask[:, None], there.to(kind) - here.to(kind)[:, None], -1e30)
    best = tl.max(gain, axis=0)
    first = tl.min(tl.where(gain == best[None, :], position[:, None], 2147483647), axis=0)
    tl.store(leave_ptr + g * R + towards, best, mask=mask_k)
    tl.store(who_ptr + g * R + towards, first, mask=mask_k)


@triton.jit
def pair_gains_kernel(leave_ptr, gain_ptr, bound_ptr, R, TILE_R: tl.constexpr):
    """gain[g, h] = leave[g, h] + leave[h, g] for g < h, else -1e30, and every row's maximum. Grid: groups g."""
    g = tl.program_id(0)
    h = tl.arange(0, TILE_R)
    later = (h < R) & (h > g)
    there = tl.load(leave_ptr + g * R + h, mask=later, other=0.0)
    back = tl.load(leave_ptr + h * R + g, mask=later, other=0.0)
    gain = tl.where(later, there + back, -1e30)
    tl.store(gain_ptr + g * R + h, gain, mask=h < R)
    tl.store(bound_ptr + g, tl.max(gain, axis=0))


@triton.jit
def _members(order_ptr, group, i, j, slice_i, slice_j, n, EDGE: tl.constexpr, TILE: tl.constexpr):
    """Slices of a group after positions i and j have changed places, and which lanes hold one."""
    lane = tl.arange(0, TILE)
    position = group * EDGE + lane
    mask = (lane < EDGE) & (position < n)
    slice = tl.load(order_ptr + position, mask=mask, other=0)
    slice = tl.where(position == i, slice_j, tl.where(position == j, slice_i, slice))
    return slice.to(tl.int64), mask


@triton.jit
def _leavers(values_ptr, slice, mask, group, towards, mask_k, R, EDGE: tl.constexpr):
    """(most gained, lowest position that gains it) by the move of a member of ``group`` to each of ``towards``."""
    row = values_ptr + slice * R
    there = tl.load(row[:, None] + towards[None, :], mask=mask[:, None] & mask_k[None, :], other=0.0)
    own = tl.load(row + group, mask=mask, other=0.0)
    gain = tl.where(mask[:, None], there - own[:, None], -1e30)  # [TILE, TILE_K]
    best, at = tl.max(gain, axis=0, return_indices=True)
    return best, group * EDGE + at


@triton.jit
def _pair_key(one, other):
    """i * 2^32 + j of two positions, i < j."""
    return (tl.minimum(one, other).to(tl.int64) << 32) | tl.maximum(one, other).to(tl.int64)


@triton.jit
def swap_search_kernel(
    values_ptr,  # [n, R]
    orders_ptr,  # int32 [PROGRAMS, n]: a private copy each, so that nobody reads what another is writing
    leave_ptr,  # [R, R]
    who_ptr,  # int32 [R, R]
    gain_ptr,  # [R, R]; -1e30 where the pair is held elsewhere
    bound_ptr,  # [R]: the largest entry of every row of gain
    offer_ptr,  # [2, PROGRAMS]
    offer_key_ptr,  # int64 [2, PROGRAMS]
    counter_ptr,  # int32 [1], zero
    swaps_ptr,  # int64 [2]: swaps made, barriers passed
    trace_ptr,  # int64 [trace_length, 2]
    epsilon_ptr,
    trace_length,
    n,
    R,
    PROGRAMS: tl.constexpr,
    TILE_PROGRAMS: tl.constexpr,
    EDGE: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """Grid: PROGRAMS, all running at once; program p owns the groups p * GROUPS .. (p + 1) * GROUPS - 1."""
    program = tl.program_id(0)
    order_ptr = orders_ptr + program.to(tl.int64) * n
    epsilon = tl.load(epsilon_ptr)
    lane = tl.arange(0, GROUPS)
    own = program * GROUPS + lane
    mask_own = own < R
    everyone = tl.arange(0, TILE_PROGRAMS)
    columns = tl.arange(0, TILE_R)
    bound = tl.load(bound_ptr + own, mask=mask_own, other=-1e30)  # best gain of every own row, or an upper bound
    # UNKNOWN where bound is only an upper bound; a program past the last group never searches there
    key = tl.where(mask_own, tl.full((GROUPS,), -1, tl.int64), 4611686018427387904)
    partner = tl.full((GROUPS,), -1, tl.int32)
    rounds = 0
    swaps = 0
    running = True
    while running:
        top = tl.max(bound, axis=0)
        parity = (rounds % 2) * PROGRAMS
        tl.store(offer_ptr + parity + program, top)
        tl.store(offer_key_ptr + parity + program, tl.min(tl.where(bound == top, key, 4611686018427387904), axis=0))
        rounds += 1
        if PROGRAMS > 1:
            grid_barrier(counter_ptr, rounds * PROGRAMS)
        else:
            tl.debug_barrier()
        mask_everyone = everyone < PROGRAMS
        offers = tl.load(offer_ptr + parity + everyone, mask=mask_everyone, other=-1e30, cache_modifier=".cg")
        keys = tl.load(offer_key_ptr + parity + everyone, mask=mask_everyone, other=0, cache_modifier=".cg")
        best = tl.max(offers, axis=0)
        choice = tl.min(tl.where(mask_everyone & (offers == best), keys, 4611686018427387904), axis=0)
        running = best > epsilon
        if running:
            if choice == -1:  # an upper bound leads: every program searches its own leading rows, which costs no more
                for r in range(GROUPS):
                    leads = tl.sum(tl.where((lane == r) & (bound == top) & (key == -1), 1, 0), axis=0)
                    if leads > 0:
                        k = program * GROUPS + r
                        row = tl.load(gain_ptr + k * R + columns, mask=columns < R, other=-1e30, cache_modifier=".cg")
                        most = tl.max(row, axis=0)
                        tied = (row == most) & (columns < R)
                        one = tl.load(who_ptr + k * R + columns, mask=tied, other=0, cache_modifier=".cg")
                        other = tl.load(who_ptr + columns * R + k, mask=tied, other=0, cache_modifier=".cg")
                        row_keys = tl.where(tied, _pair_key(one, other), 4611686018427387904)
                        row_key = tl.min(row_keys, axis=0)
                        at = tl.min(tl.where(row_keys == row_key, columns, 2147483647), axis=0)
                        bound = tl.where(lane == r, most, bound)
                        key = tl.where(lane == r, row_key, key)
                        partner = tl.where(lane == r, at, partner)
            else:
                i = (choice >> 32).to(tl.int32)
                j = (choice & 0xFFFFFFFF).to(tl.int32)
                g = i // EDGE
                h = j // EDGE
                slice_i = tl.load(order_ptr + i)
                slice_j = tl.load(order_ptr + j)
                back_g = tl.load(leave_ptr + own * R + g, mask=mask_own, other=0.0, cache_modifier=".cg")
                back_h = tl.load(leave_ptr + own * R + h, mask=mask_own, other=0.0, cache_modifier=".cg")
                from_g = tl.load(who_ptr + own * R + g, mask=mask_own, other=0, cache_modifier=".cg")
                from_h = tl.load(who_ptr + own * R + h, mask=mask_own, other=0, cache_modifier=".cg")
                in_g, mask_g = _members(order_ptr, g, i, j, slice_i, slice_j, n, EDGE, TILE)
                in_h, mask_h = _members(order_ptr, h, i, j, slice_i, slice_j, n, EDGE, TILE)
                leave_g, who_g = _leavers(values_ptr, in_g, mask_g, g, own, mask_own, R, EDGE)
                leave_h, who_h = _leavers(values_ptr, in_h, mask_h, h, own, mask_own, R, EDGE)
                # the pair {g, h} itself, held in row g
                row_g = values_ptr + in_g * R
                row_h = values_ptr + in_h * R
                across_g = tl.load(row_g + h, mask=mask_g, other=0.0) - tl.load(row_g + g, mask=mask_g, other=0.0)
                across_h = tl.load(row_h + g, mask=mask_h, other=0.0) - tl.load(row_h + h, mask=mask_h, other=0.0)
                across_g = tl.where(mask_g, across_g, -1e30)
                across_h = tl.where(mask_h, across_h, -1e30)
                most_g, first_g = tl.max(across_g, axis=0, return_indices=True)
                most_h, first_h = tl.max(across_h, axis=0, return_indices=True)
                tl.debug_barrier()  # every thread has read the order before it changes
                tl.store(order_ptr + i, slice_j)
                tl.store(order_ptr + j, slice_i)
                if program == 0:  # noqa: SIM102
                    if swaps < trace_length:
                        tl.store(trace_ptr + 2 * swaps, i.to(tl.int64))
                        tl.store(trace_ptr + 2 * swaps + 1, j.to(tl.int64))
                swaps += 1
                tl.store(leave_ptr + g * R + own, leave_g, mask=mask_own)
                tl.store(leave_ptr + h * R + own, leave_h, mask=mask_own)
                tl.store(who_ptr + g * R + own, who_g, mask=mask_own)
                tl.store(who_ptr + h * R + own, who_h, mask=mask_own)
                bystander = mask_own & (own != g) & (own != h)
                gain_g = back_g + leave_g
                gain_h = back_h + leave_h
                key_g = _pair_key(from_g, who_g)
                key_h = _pair_key(from_h, who_h)
                tl.store(gain_ptr + own * R + g, gain_g, mask=bystander)
                tl.store(gain_ptr + own * R + h, gain_h, mask=bystander)
                second = (gain_h > gain_g) | ((gain_h == gain_g) & (key_h < key_g))
                fresh = tl.where(second, gain_h, gain_g)
                fresh_key = tl.where(second, key_h, key_g)
                fresh_partner = tl.where(second, h, g)
                better = fresh > bound
                lost = (~better) & ((partner == g) | (partner == h))
                earlier = better | ((~lost) & (fresh == bound) & (key != -1) & (fresh_key < key))
                new_key = tl.where(earlier, fresh_key, tl.where(lost, -1, key))
                key = tl.where(bystander, new_key, key)
                partner = tl.where(bystander & earlier, fresh_partner, partner)
                bound = tl.where(bystander & better, fresh, bound)
                # rows g and h are empty now, but for their own pair in row g
                for side in tl.static_range(2):
                    emptied = g if side == 0 else h
                    if emptied // GROUPS == program:
                        pair = tl.where(columns == h, most_g + most_h, -1e30) if side == 0 else columns * 0.0 - 1e30
                        tl.store(gain_ptr + emptied * R + columns, pair.to(gain_ptr.dtype.element_ty), mask=columns < R)
                bound = tl.where(own == g, most_g + most_h, tl.where(own == h, -1e30, bound))
                key = tl.where(
                    own == g,
                    _pair_key(g * EDGE + first_g, h * EDGE + first_h),
                    tl.where(own == h, 4611686018427387904, key),
                )
                partner = tl.where(own == g, h, tl.where(own == h, -1, partner))
    if program == 0:
        tl.store(swaps_ptr, swaps)
        tl.store(swaps_ptr + 1, rounds)


def swap_search(
    values: torch.Tensor,
    order: torch.Tensor,
    edge: int,
    epsilon: torch.Tensor,
    *,
    config: SwapSearchConfig,
    trace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Greedy swaps of the largest gain until no gain exceeds ``epsilon``: eqs. 8 to 11 on groups of ``edge`` positions.

    Nothing waits for the GPU. Ties go to the smallest position i, then the smallest j.

    Args:
        values: float32 or float64 [n, R], contiguous; the importance that each slice keeps in each group.
        order: int64 [n]; the slice at every position. Changed in place.
        edge: positions a group; the last group may be smaller.
        epsilon: one number of values' dtype on the device; smallest gain worth a swap, in units of importance.
        trace: int64 [any, 2] on the device; receives the positions (i, j) of the first swaps.
    Returns:
        int64 [2] on the device: the number of swaps and of barriers.
    Cost:
        one read of values, then 2 * edge * R scattered reads and one barrier a swap; 3 R^2 words of state.
    """
    n, R = values.shape
    device = values.device
    programs = ceil_div(R, config.groups_per_program)
    leave = values.new_empty(R, R)
    who = torch.empty(R, R, dtype=torch.int32, device=device)
    tile = next_power_of_two(edge)
    tile_r = min(next_power_of_two(R), max(1, 4096 // tile))
    orders = torch.empty(programs, n, dtype=torch.int32, device=device)
    orders.copy_(order)
    best_leavers_kernel[(R, ceil_div(R, tile_r))](
        values, orders, leave, who, n, R, EDGE=edge, TILE=tile, TILE_R=tile_r, num_warps=4
    )
    gain, bound = torch.empty_like(leave), values.new_empty(R)
    pair_gains_kernel[(R,)](leave, gain, bound, R, TILE_R=next_power_of_two(R), num_warps=4)
    state = torch.zeros(3, dtype=torch.int64, device=device)  # swaps, barriers, and the barriers' counter
    swap_search_kernel[(programs,)](
        values,
        orders,
        leave,
        who,
        gain,
        bound,
        values.new_empty(2, programs),
        torch.empty(2, programs, dtype=torch.int64, device=device),
        state[2:].view(torch.int32),
        state,
        state if trace is None else trace,
        epsilon,
        0 if trace is None else len(trace),
        n,
        R,
        PROGRAMS=programs,
        TILE_PROGRAMS=next_power_of_two(programs),
        EDGE=edge,
        TILE=tile,
        GROUPS=config.groups_per_program,
        TILE_R=next_power_of_two(R),
        num_warps=config.num_warps,
        launch_cooperative_grid=programs > 1,
    )
    order.copy_(orders[0])
    return state[:2]
