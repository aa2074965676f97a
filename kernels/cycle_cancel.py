"""The exact M-step's last part in one persistent kernel: cancel cycles of moves until prices prove that none is left.

Groups are the nodes of a graph; the edge from g to h weighs what the best member of g gains by moving to h. Programs
own the incoming edges of some groups and relax them (Bellman-Ford, all at once). Every few passes all programs look for
cycles among the parents by pointer jumping; the moves along all cycles found, which are disjoint, are made, and the
edges out of the groups that changed are computed anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tetris.kernels.configs import next_power_of_two
from tetris.kernels.grid_barrier import grid_barrier
from tetris.kernels.swap_search import best_leavers_kernel
from tetris.layout import ceil_div

PASSES_PER_CHECK = 3
MAX_PASSES = 1_000_000


@triton.jit
def _gather(scratch_ptr, lanes, x, index):
    """x[index] through memory: ``tl.gather`` of a thousand elements spills."""
    tl.debug_barrier()
    tl.store(scratch_ptr + lanes, x)
    tl.debug_barrier()
    return tl.load(scratch_ptr + index)


@triton.jit
def cancel_cycles_kernel(
    values_ptr,  # [n, R]
    orders_ptr,  # int32 [PROGRAMS, n]: a private copy each
    enter_ptr,  # float64 [R, R]; enter[h, g]: the most that a member of g gains by moving to h
    who_ptr,  # int32 [R, R]: its position
    prices_ptr,  # float64 [2, R]
    parent_ptr,  # int32 [R]
    rose_ptr,  # int32 [2, PROGRAMS]
    flags_ptr,  # int32 [PROGRAMS, TILE_R], scratch
    counter_ptr,  # int32 [1], zero
    result_ptr,  # int64 [3]: moves, passes, whether it ended
    tolerance_ptr,  # float64 [1]
    n,
    R,
    max_passes,
    PROGRAMS: tl.constexpr,
    TILE_PROGRAMS: tl.constexpr,
    EDGE: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE_R: tl.constexpr,
    JUMPS: tl.constexpr,
    CHECK: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Grid: PROGRAMS, all running at once; program p owns the groups p * GROUPS .. (p + 1) * GROUPS - 1."""
    program = tl.program_id(0)
    order_ptr = orders_ptr + program.to(tl.int64) * n
    flag_ptr = flags_ptr + program * TILE_R
    tolerance = tl.load(tolerance_ptr)
    own = program * GROUPS + tl.arange(0, GROUPS)
    mask_own = own < R
    everyone = tl.arange(0, TILE_PROGRAMS)
    node = tl.arange(0, TILE_R)
    real = node < R
    lane = tl.arange(0, TILE)
    item = tl.arange(0, BATCH * GROUPS)  # a group that changed x a group of ours
    target = program * GROUPS + item % GROUPS
    parent = tl.full((GROUPS,), -1, tl.int32)
    arrivals = 0
    passes = 0
    moves = 0
    running = True
    while running:
        before = (passes % 2) * R
        after = R - before
        price = tl.load(prices_ptr + before + node, mask=real, other=0.0, cache_modifier=".cg")
        mine = tl.load(prices_ptr + before + own, mask=mask_own, other=0.0, cache_modifier=".cg")
        edge = tl.load(enter_ptr + own[:, None] * R + node[None, :], mask=mask_own[:, None] & real[None, :], other=0.0)
        reach = tl.where(real[None, :] & (own[:, None] != node[None, :]), price[None, :] + edge, -1e300)
        best = tl.max(reach, axis=1)
        via = tl.min(tl.where(reach == best[:, None], node[None, :], 2147483647), axis=1)
        rises = mask_own & (best > mine + tolerance)
        parent = tl.where(rises, via, parent)
        tl.store(prices_ptr + after + own, tl.where(rises, best, mine), mask=mask_own)
        rose_at = (passes % 2) * PROGRAMS
        tl.store(rose_ptr + rose_at + program, tl.sum(rises.to(tl.int32), axis=0))
        passes += 1
        check = passes % CHECK == 0
        tl.store(parent_ptr + own, parent, mask=mask_own & check)
        arrivals += PROGRAMS
        if PROGRAMS > 1:
            grid_barrier(counter_ptr, arrivals)
        else:
            tl.debug_barrier()
        rose = tl.load(rose_ptr + rose_at + everyone, mask=everyone < PROGRAMS, other=0, cache_modifier=".cg")
        running = (tl.sum(rose, axis=0) > 0) & (passes < max_passes)
        if running & check:
            above = tl.load(parent_ptr + node, mask=real, other=-1, cache_modifier=".cg")
            arrivals += PROGRAMS
            if PROGRAMS > 1:
                grid_barrier(counter_ptr, arrivals)  # all have read the parents
            else:
                tl.debug_barrier()
            jump = tl.where(above >= 0, above, node)
            for _ in range(JUMPS):
                jump = _gather(flag_ptr, node, jump, jump)
            tl.debug_barrier()
            tl.store(flag_ptr + node, tl.zeros((TILE_R,), tl.int32))
            tl.debug_barrier()
            tl.store(flag_ptr + jump, tl.full((TILE_R,), 1, tl.int32))  # after so many steps all are on cycles or roots
            tl.debug_barrier()
            on_cycle = (tl.load(flag_ptr + node) == 1) & (above >= 0)
            count = tl.sum(on_cycle.to(tl.int32), axis=0)
            if count > 0:
                source = tl.where(on_cycle, above, 0)
                # the entrant of `node` leaves `vacated`, a position of its parent: the parent's own entrant goes there
                vacated = tl.load(who_ptr + node * R + source, mask=on_cycle, other=0, cache_modifier=".cg")
                entrant = tl.load(order_ptr + vacated, mask=on_cycle, other=0)
                successor = _gather(flag_ptr, node, entrant, source)
                tl.debug_barrier()
                tl.store(order_ptr + vacated, successor, mask=on_cycle)
                arrivals += PROGRAMS
                if PROGRAMS > 1:
                    grid_barrier(counter_ptr, arrivals)  # all have read the movers' positions
                else:
                    tl.debug_barrier()
                rank = tl.cumsum(on_cycle.to(tl.int32), axis=0) - 1
                tl.store(flag_ptr + rank, node, mask=on_cycle)  # the list of groups that changed
                tl.debug_barrier()
                for first in range(0, count, BATCH):
                    valid = (first + item // GROUPS < count) & (target < R)
                    group = tl.load(flag_ptr + first + item // GROUPS, mask=valid, other=0)  # [ITEMS]
                    position = group[None, :] * EDGE + lane[:, None]  # [TILE, ITEMS]
                    mask = valid[None, :] & (lane < EDGE)[:, None] & (position < n)
                    slice = tl.load(order_ptr + position, mask=mask, other=0).to(tl.int64)
                    here = tl.load(values_ptr + slice * R + group[None, :], mask=mask, other=0.0).to(tl.float64)
                    there = tl.load(values_ptr + slice * R + target[None, :], mask=mask, other=0.0).to(tl.float64)
                    most, at = tl.max(tl.where(mask, there - here, -1e300), axis=0, return_indices=True)
                    tl.store(enter_ptr + target * R + group, most, mask=valid)
                    tl.store(who_ptr + target * R + group, group * EDGE + at, mask=valid)
                tl.debug_barrier()
                parent = tl.full((GROUPS,), -1, tl.int32)
                moves += count
    if program == 0:
        tl.store(result_ptr, moves)
        tl.store(result_ptr + 1, passes)
        tl.store(result_ptr + 2, passes < max_passes)


def cancel_cycles(
    values: torch.Tensor, order: torch.Tensor, edge: int, tolerance: torch.Tensor, *, processors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Improve an assignment until no cycle of moves gains more than rounding.

    Args:
        values: float32 or float64 [n, R], contiguous; the importance that each slice keeps in each group.
        order: int64 [n]; the slice at every position. Changed in place.
        edge: positions a group; the last group may be smaller.
        tolerance: float64, one number on the device; gains up to it are rounding.
        processors: programs that may run at the same time; 1 in the interpreter.
    Returns:
        int64 [3] on the device (moves, passes, 1 = it ended) and prices, float64 [2, R], of which row passes % 2 proves
        optimality. Nothing waits for them.
    Cost:
        R^2 reads and a barrier a pass; edge * R scattered reads a move.
    """
    n, R = values.shape
    device = values.device
    groups = next_power_of_two(ceil_div(R, processors))
    programs = ceil_div(R, groups)
    tile, tile_r = next_power_of_two(edge), next_power_of_two(R)
    leave = torch.empty(R, R, dtype=torch.float64, device=device)
    who = torch.empty(R, R, dtype=torch.int32, device=device)
    orders = torch.empty(programs, n, dtype=torch.int32, device=device)
    orders.copy_(order)
    block = min(tile_r, max(1, 4096 // tile))
    best_leavers_kernel[(R, ceil_div(R, block))](
        values, orders, leave, who, n, R, EDGE=edge, TILE=tile, TILE_R=block, num_warps=4
    )
    prices = torch.zeros(2, R, dtype=torch.float64, device=device)
    result = torch.zeros(3, dtype=torch.int64, device=device)
    cancel_cycles_kernel[(programs,)](
        values,
        orders,
        leave.T.contiguous(),
        who.T.contiguous(),
        prices,
        torch.full((R,), -1, dtype=torch.int32, device=device),
        torch.zeros(2, programs, dtype=torch.int32, device=device),
        torch.zeros(programs, tile_r, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        result,
        tolerance,
        n,
        R,
        MAX_PASSES,
        PROGRAMS=programs,
        TILE_PROGRAMS=next_power_of_two(programs),
        EDGE=edge,
        TILE=tile,
        GROUPS=groups,
        TILE_R=tile_r,
        JUMPS=max(1, (tile_r - 1).bit_length()),
        CHECK=PASSES_PER_CHECK,
        BATCH=max(1, 1024 // (tile * groups)),
        num_warps=8,
        launch_cooperative_grid=programs > 1,
    )
    order.copy_(orders[0])
    return result, prices
