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
    """[rows, columns] -> [n_groups, columns]: rows of the same label added up, by chunks of columns."""
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
def _scan_leavers(values, order, offsets, g, h):
    """The largest value[x, h] - value[x, g] among the members of g, and the lowest position that has it."""
    x = order[offsets[g]]
    best, where = values[x, h] - values[x, g], offsets[g]
    for position in range(offsets[g] + 1, offsets[g + 1]):
        x = order[position]
        difference = values[x, h] - values[x, g]
        if difference > best:
            best, where = difference, position
    return best, where


@njit(cache=True)
def _scan_row(gain, who, g):
    """The best partner h > g of group g: largest gain, then smallest positions (i, j)."""
    best, largest = g + 1, gain[g, g + 1]
    for h in range(g + 2, gain.shape[0]):
        candidate = gain[g, h]
        if candidate < largest:
            continue
        if candidate > largest or _precedes(who[g, h], who[h, g], who[g, best], who[best, g]):
            best, largest = h, candidate
    return best, largest


@njit(cache=True)
def _precedes(i, j, other_i, other_j):
    """The tie rule among equal gains: smaller i, then smaller j."""
    return i < other_i or (i == other_i and j < other_j)


@njit(cache=True)
def _best_row(gain, who, bound, partner, exact):
    """The row of the best swap. ``bound`` holds upper bounds; rows in the lead are rescanned until exact."""
    while True:
        lead = 0
        for row in range(1, len(bound)):
            if bound[row] > bound[lead]:
                lead = row
        ahead = bound[lead]
        settled = True
        for row in range(len(bound)):
            if bound[row] == ahead and not exact[row]:
                partner[row], bound[row] = _scan_row(gain, who, row)
                exact[row] = True
                settled = False
        if not settled:
            continue
        for row in range(lead + 1, len(bound)):
            if bound[row] == ahead and _precedes(
                who[row, partner[row]], who[partner[row], row], who[lead, partner[lead]], who[partner[lead], lead]
            ):
                lead = row
        return lead


@njit(cache=True)
def greedy_swaps(values, order, offsets, epsilon, trace, max_swaps):
    """Algorithm 1's inner loop on groups: always the swap of the largest gain. ``order`` changes in place.

    ``leave[g, h]`` is the best that a member of g gains by moving to h, ``who[g, h]`` its position; the best swap of
    two groups gains ``gain[g, h] = leave[g, h] + leave[h, g]``, kept for g < h. A swap touches two groups, so O(R)
    entries change. A row whose best entry fell keeps its old gain as an upper bound until it leads again.
    Returns the number of swaps; positions (i, j) of the first ``len(trace)`` are stored in ``trace``.
    """
    n_groups = len(offsets) - 1
    if n_groups < 2:
        return 0
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
    gain = leave + leave.T
    partner = np.empty(n_groups - 1, dtype=np.int64)
    bound = np.empty(n_groups - 1, dtype=values.dtype)
    exact = np.ones(n_groups - 1, dtype=np.bool_)
    for g in range(n_groups - 1):
        partner[g], bound[g] = _scan_row(gain, who, g)
    swaps = 0
    while swaps < max_swaps:
        g = _best_row(gain, who, bound, partner, exact)
        if not bound[g] > epsilon:
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
            own = values[newcomer, group]
            for other in range(n_groups):
                if other == group:
                    continue
                difference = values[newcomer, other] - own
                if difference > leave[group, other]:
                    leave[group, other], who[group, other] = difference, position
                elif who[group, other] == position:
                    leave[group, other], who[group, other] = _scan_leavers(values, order, offsets, group, other)
                elif difference == leave[group, other] and position < who[group, other]:
                    who[group, other] = position
        for other in range(n_groups):
            for group in (g, h):
                if other != group:
                    gain[min(group, other), max(group, other)] = leave[group, other] + leave[other, group]
        for row in (g, h):
            if row < n_groups - 1:
                partner[row], bound[row] = _scan_row(gain, who, row)
                exact[row] = True
        for row in range(h):
            if row == g:
                continue
            for column in (g, h):
                if column <= row:
                    continue
                candidate, p = gain[row, column], partner[row]
                if candidate > bound[row]:
                    partner[row], bound[row], exact[row] = column, candidate, True
                elif p == column or candidate == bound[row]:
                    exact[row] = False
    return swaps


@njit(cache=True)
def greedy_swaps_of_slices(contraction, positions, epsilon, trace, max_swaps):
    """Algorithm 1's inner loop on an n x n contraction (Section 4.2): rows move, each row's maximum is remembered.

    ``contraction[x, p]`` is the importance that slice x keeps at position p; ``positions[p]`` the slice now at p,
    changed in place. A row whose best entry fell keeps its old gain as an upper bound until it leads.
    Returns the number of swaps; the first ``len(trace)`` are stored in ``trace``.
    """
    n = len(positions)
    if n < 2:
        return 0
    partner = np.empty(n - 1, dtype=np.int64)
    bound = np.empty(n - 1, dtype=contraction.dtype)
    exact = np.ones(n - 1, dtype=np.bool_)
    for row in range(n - 1):
        partner[row], bound[row] = _scan_slices(contraction, positions, row)
    swaps = 0
    while swaps < max_swaps:
        i = 0
        for row in range(1, n - 1):
            if bound[row] > bound[i]:
                i = row
        if not exact[i]:
            partner[i], bound[i] = _scan_slices(contraction, positions, i)
            exact[i] = True
            continue
        if not bound[i] > epsilon:
            break
        j = partner[i]
        positions[i], positions[j] = positions[j], positions[i]
        if swaps < len(trace):
            trace[swaps, 0], trace[swaps, 1] = i, j
        swaps += 1
        for row in (i, j):
            if row < n - 1:
                partner[row], bound[row] = _scan_slices(contraction, positions, row)
                exact[row] = True
        for row in range(j):
            if row == i:
                continue
            for column in (i, j):
                if column <= row:
                    continue
                candidate = _slice_gain(contraction, positions, row, column)
                if candidate > bound[row]:
                    partner[row], bound[row], exact[row] = column, candidate, True
                elif partner[row] == column or candidate == bound[row]:
                    exact[row] = False
    return swaps


@njit(cache=True)
def _slice_gain(contraction, positions, i, j):
    a, b = positions[i], positions[j]
    return (contraction[a, j] - contraction[a, i]) + (contraction[b, i] - contraction[b, j])


@njit(cache=True)
def _scan_slices(contraction, positions, i):
    """The lowest position j > i with the largest gain of swapping i and j."""
    best = i + 1
    largest = _slice_gain(contraction, positions, i, best)
    for j in range(i + 2, len(positions)):
        candidate = _slice_gain(contraction, positions, i, j)
        if candidate > largest:
            best, largest = j, candidate
    return best, largest


@njit(cache=True)
def _best_leaver(values, order, offsets, g, h):
    """The largest value[x, h] - value[x, g] among the members x of g, and the position of the lowest x that has it."""
    x = order[offsets[g]]
    best, where = values[x, h] - values[x, g], offsets[g]
    for position in range(offsets[g] + 1, offsets[g + 1]):
        x = order[position]
        difference = values[x, h] - values[x, g]
        if difference > best or (difference == best and x < order[where]):
            best, where = difference, position
    return best, where


@njit(cache=True)
def split_pair(values, order, offsets, g, h, epsilon):
    """Split the members of two groups anew, optimally: swap best leavers while a swap gains more than epsilon.

    Returns the number of swaps. Where slices stand inside the groups decides nothing: ties go to the lowest slice.
    """
    swaps = 0
    while True:
        first, i = _best_leaver(values, order, offsets, g, h)
        second, j = _best_leaver(values, order, offsets, h, g)
        if not first + second > epsilon:
            return swaps
        order[i], order[j] = order[j], order[i]
        swaps += 1


@njit(cache=True)
def tournament_pair(n_even, turn, k):
    """The k-th pair of a round-robin tournament's turn (circle method); turns 0..n_even-2, k in 0..n_even/2-1."""
    if k == 0:
        return n_even - 1, turn
    return (turn + k) % (n_even - 1), (turn - k) % (n_even - 1)


@njit(cache=True)
def sweep(values, order, offsets, players, first_turn, turns, epsilon):
    """Turns of a round-robin tournament in which every pair of groups is split anew; returns the number of swaps.

    Every group ends up in the order of its slices' numbers.
    """
    n_groups = len(offsets) - 1
    n_even = n_groups + n_groups % 2
    swaps = 0
    for turn in range(first_turn, first_turn + turns):
        for k in range(n_even // 2):
            a, b = tournament_pair(n_even, turn % (n_even - 1), k)
            if a < n_groups and b < n_groups:
                swaps += split_pair(values, order, offsets, players[a], players[b], epsilon)
    for g in range(n_groups):
        order[offsets[g] : offsets[g + 1]].sort()
    return swaps


@njit(cache=True, parallel=True)
def sweep_parallel(values, order, offsets, players, first_turn, turns, epsilon):
    """:func:`sweep` with the disjoint pairs of a turn on all cores; the same result."""
    n_groups = len(offsets) - 1
    n_even = n_groups + n_groups % 2
    swaps = 0
    for turn in range(first_turn, first_turn + turns):
        for k in prange(n_even // 2):
            a, b = tournament_pair(n_even, turn % (n_even - 1), k)
            if a < n_groups and b < n_groups:
                swaps += split_pair(values, order, offsets, players[a], players[b], epsilon)
    for g in range(n_groups):
        order[offsets[g] : offsets[g + 1]].sort()
    return swaps
