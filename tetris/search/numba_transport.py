"""Compiled loops of the exact M-step: a transportation problem solved by cancelling cycles on the graph of groups.

Imported on first use only. Arguments as in :mod:`tetris.search.numba_kernels`; gains and prices are float64.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def _scan_group(values, order, offsets, g, leave, who):
    """leave[g, h]: the most that any member of g gains by moving to h; who[g, h]: its position."""
    for position in range(offsets[g], offsets[g + 1]):
        x = order[position]
        own = np.float64(values[x, g])
        for h in range(len(offsets) - 1):
            difference = np.float64(values[x, h]) - own
            if position == offsets[g] or difference > leave[g, h]:
                leave[g, h] = difference
                who[g, h] = position


@njit(cache=True)
def _relax(leave, prices, parent, active, tolerance):
    """One Bellman-Ford pass: prices[h] >= prices[g] + leave[g, h] for the groups g that changed. True if any rose."""
    n_groups = len(prices)
    rose = False
    for g in range(n_groups):
        if not active[g]:
            continue
        active[g] = False
        base = prices[g]
        for h in range(n_groups):
            candidate = base + leave[g, h]
            if candidate > prices[h] + tolerance and h != g:
                prices[h] = candidate
                parent[h] = g
                active[h] = True
                rose = True
    return rose


@njit(cache=True)
def _apply_cycles(order, leave, who, parent, touched):
    """Move one member along every edge of every cycle of the parent graph; returns the number of moves.

    Cycles of a graph in which every node has one parent are disjoint, so their gains add exactly.
    """
    n_groups = len(parent)
    seen = np.full(n_groups, -1, dtype=np.int64)
    moves = 0
    for start in range(n_groups):
        node = start
        while node >= 0 and seen[node] < 0:
            seen[node] = start
            node = parent[node]
        if node < 0 or seen[node] != start:
            continue
        gain, length, at = 0.0, 0, node
        while True:
            gain += leave[parent[at], at]
            length += 1
            at = parent[at]
            if at == node:
                break
        if not gain > 0:
            continue
        first, at = parent[node], node
        incoming = order[who[first, node]]
        while True:  # who[parent[at], at] leaves parent[at] for at; its place goes to the one who enters parent[at]
            source = parent[at]
            position = who[source, at]
            touched[source] = True
            if source == node:
                order[position] = incoming
                break
            order[position] = order[who[parent[source], source]]
            at = source
        moves += length
    return moves


@njit(cache=True)
def cancel_cycles(values, order, offsets, prices, tolerance, max_passes):
    """Improve an assignment until no cycle of moves gains more than rounding; ``order`` and ``prices`` change in place.

    On return ``values[x, h] - prices[h] <= values[x, g] - prices[g]`` (up to the tolerance) for every member x of every
    group g: the prices are the dual solution that proves optimality.
    Returns (moves, whether it finished within max_passes).
    """
    n_groups = len(offsets) - 1
    leave = np.zeros((n_groups, n_groups))
    who = np.zeros((n_groups, n_groups), dtype=np.int64)
    for g in range(n_groups):
        _scan_group(values, order, offsets, g, leave, who)
    parent = np.full(n_groups, -1, dtype=np.int64)
    active = np.ones(n_groups, dtype=np.bool_)
    touched = np.zeros(n_groups, dtype=np.bool_)
    moves = 0
    for _ in range(max_passes):
        if not _relax(leave, prices, parent, active, tolerance):
            return moves, True
        cancelled = _apply_cycles(order, leave, who, parent, touched)
        if cancelled:
            moves += cancelled
            parent[:] = -1
            for g in range(n_groups):
                if touched[g]:
                    touched[g] = False
                    active[g] = True
                    _scan_group(values, order, offsets, g, leave, who)
    return moves, False
