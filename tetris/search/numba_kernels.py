"""Compiled CPU loops of the searches. Imported on first use only: loading numba takes half a second.

All arrays are C-contiguous numpy; ``values[x, g]`` is the importance that slice x keeps in group g, ``order[p]`` the
slice at position p and group g owns the positions ``offsets[g]:offsets[g + 1]``.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange


@njit(cache=True, parallel=True)
def sum_column_groups(matrix, labels, n_groups):
    """[rows, columns] -> [rows, n_groups]: columns with the same label added up."""
    rows, columns = matrix.shape
    sums = np.zeros((rows, n_groups), dtype=matrix.dtype)
    for row in prange(rows):
        target = sums[row]
        source = matrix[row]
        for column in range(columns):
            target[labels[column]] += source[column]
    return sums


@njit(cache=True, parallel=True)
def sum_row_groups(matrix, labels, n_groups, chunk):
    """[rows, columns] -> [n_groups, columns]: rows with the same label added up, in column chunks that stay in cache."""
    rows, columns = matrix.shape
    sums = np.zeros((n_groups, columns), dtype=matrix.dtype)
    for part in prange((columns + chunk - 1) // chunk):
        start, stop = part * chunk, min(columns, (part + 1) * chunk)
        for row in range(rows):
            target = sums[labels[row]]
            source = matrix[row]
            for column in range(start, stop):
                target[column] += source[column]
    return sums


@njit(cache=True)
def _scan_leavers(values, order, offsets, g, h, zero):
    """The largest value[x, h] - value[x, g] among the members of g, and the lowest position that has it."""
    best, where = zero, np.int64(-1)
    for position in range(offsets[g], offsets[g + 1]):
        x = order[position]
        difference = values[x, h] - values[x, g]
        if where < 0 or difference > best:
            best, where = difference, position
    return best, where


@njit(cache=True)
def _better(gain, i, j, other_gain, other_i, other_j):
    """The tie rule: larger gain, then smaller i, then smaller j."""
    if gain != other_gain:
        return gain > other_gain
    if i != other_i:
        return i < other_i
    return j < other_j


@njit(cache=True)
def _scan_row(leave, who, g):
    """The best partner h > g of group g under the tie rule; -1 when g is the last group."""
    n_groups = leave.shape[0]
    best = -1
    gain = leave[0, 0]
    for h in range(g + 1, n_groups):
        candidate = leave[g, h] + leave[h, g]
        if best < 0 or _better(candidate, who[g, h], who[h, g], gain, who[g, best], who[best, g]):
            best, gain = h, candidate
    return best, gain


@njit(cache=True)
def greedy_swaps(values, order, offsets, epsilon, trace, max_swaps):
    """Algorithm 1's inner loop on groups: always the swap of the largest gain. ``order`` changes in place.

    ``leave[g, h]`` is the best that a member of g gains by moving to h, ``who[g, h]`` its position; the best swap of
    two groups gains ``leave[g, h] + leave[h, g]``. A swap touches two groups, so O(R) entries change.
    Returns the number of swaps; positions (i, j) of the first ``len(trace)`` are stored in ``trace``.
    """
    n_groups = len(offsets) - 1
    zero = values[0, 0] - values[0, 0]
    leave = np.zeros((n_groups, n_groups), dtype=values.dtype)
    who = np.zeros((n_groups, n_groups), dtype=np.int64)
    for g in range(n_groups):
        for position in range(offsets[g], offsets[g + 1]):
            x = order[position]
            for h in range(n_groups):
                difference = values[x, h] - values[x, g]
                if position == offsets[g] or difference > leave[g, h]:
                    leave[g, h] = difference
                    who[g, h] = position
    partner = np.empty(n_groups, dtype=np.int64)
    gains = np.empty(n_groups, dtype=values.dtype)
    for g in range(n_groups):
        partner[g], gains[g] = _scan_row(leave, who, g)
    swaps = 0
    while swaps < max_swaps:
        g = -1
        for row in range(n_groups - 1):
            if g < 0 or _better(
                gains[row],
                who[row, partner[row]],
                who[partner[row], row],
                gains[g],
                who[g, partner[g]],
                who[partner[g], g],
            ):
                g = row
        if g < 0 or not gains[g] > epsilon:
            break
        h = partner[g]
        i, j = who[g, h], who[h, g]
        order[i], order[j] = order[j], order[i]
        if swaps < len(trace):
            trace[swaps, 0], trace[swaps, 1] = i, j
        swaps += 1
        for side in range(2):
            group, position = (g, i) if side == 0 else (h, j)
            newcomer = order[position]
            for other in range(n_groups):
                if other == group:
                    continue
                difference = values[newcomer, other] - values[newcomer, group]
                if difference > leave[group, other]:
                    leave[group, other], who[group, other] = difference, position
                elif who[group, other] == position:
                    leave[group, other], who[group, other] = _scan_leavers(values, order, offsets, group, other, zero)
                elif difference == leave[group, other] and position < who[group, other]:
                    who[group, other] = position
        for row in range(n_groups - 1):
            rescan = row in (g, h)
            for column in (g, h):
                if column <= row or rescan:
                    continue
                candidate, p = leave[row, column] + leave[column, row], partner[row]
                if p == column:
                    rescan = not candidate > gains[row]
                    gains[row] = candidate
                elif _better(candidate, who[row, column], who[column, row], gains[row], who[row, p], who[p, row]):
                    partner[row], gains[row] = column, candidate
            if rescan:
                partner[row], gains[row] = _scan_row(leave, who, row)
    return swaps


@njit(cache=True)
def greedy_swaps_of_slices(contraction, positions, epsilon, trace, max_swaps):
    """Algorithm 1's inner loop on an n x n contraction (Section 4.2): rows move, each row's maximum is remembered.

    ``contraction[x, p]`` is the importance that slice x keeps at position p; ``positions[p]`` the slice now at p,
    changed in place. Returns the number of swaps; the first ``len(trace)`` are stored in ``trace``.
    """
    n = len(positions)
    partner = np.empty(n, dtype=np.int64)
    gains = np.empty(n, dtype=contraction.dtype)
    for row in range(n - 1):
        partner[row], gains[row] = _scan_slices(contraction, positions, row)
    swaps = 0
    while swaps < max_swaps:
        i = -1
        for row in range(n - 1):
            if i < 0 or gains[row] > gains[i]:
                i = row
        if i < 0 or not gains[i] > epsilon:
            break
        j = partner[i]
        positions[i], positions[j] = positions[j], positions[i]
        if swaps < len(trace):
            trace[swaps, 0], trace[swaps, 1] = i, j
        swaps += 1
        for row in range(n - 1):
            rescan = row in (i, j)
            for column in (i, j):
                if column <= row or rescan:
                    continue
                candidate = _slice_gain(contraction, positions, row, column)
                if partner[row] == column:
                    rescan = not candidate > gains[row]
                    gains[row] = candidate
                elif candidate > gains[row] or (candidate == gains[row] and column < partner[row]):
                    partner[row], gains[row] = column, candidate
            if rescan:
                partner[row], gains[row] = _scan_slices(contraction, positions, row)
    return swaps


@njit(cache=True)
def _slice_gain(contraction, positions, i, j):
    a, b = positions[i], positions[j]
    return (contraction[a, j] - contraction[a, i]) + (contraction[b, i] - contraction[b, j])


@njit(cache=True)
def _scan_slices(contraction, positions, i):
    """The lowest position j > i with the largest gain of swapping i and j."""
    best = i + 1
    gain = _slice_gain(contraction, positions, i, best)
    for j in range(i + 2, len(positions)):
        candidate = _slice_gain(contraction, positions, i, j)
        if candidate > gain:
            best, gain = j, candidate
    return best, gain
