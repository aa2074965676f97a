"""Evening out lists of tiles by swaps: what greedy list scheduling leaves is up to half of its smallest tile.

Tiles of one row cost the same, so what a program can give away is a choice of rows. The busiest program gives one or
two tiles to one of the idlest and takes at most two cheaper ones, until that shortens the busiest no more.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations_with_replacement

import numpy as np

IDLEST = 4
"""Programs that the busiest one tries to trade with."""
GOOD_ENOUGH = 1.002
"""Busiest over mean at which it ends."""

Bundle = tuple[int, ...]
"""Rows of up to two tiles."""


def even_out(lists: list[list[int]], costs: list[float]) -> None:
    """Swap tiles between programs, in place; the others keep their order, and every program some tile.

    Args:
        lists: tiles of every program, at least one; tile t belongs to row t mod ``len(costs)``.
        costs: of a tile of every row, all positive.
    Cost: about a tenth of a millisecond a swap on the CPU, two swaps a program at most.
    """
    rows = len(costs)
    loads = np.array([sum(costs[tile % rows] for tile in tiles) for tiles in lists])
    for _ in range(2 * len(lists)):
        busy = int(loads.argmax())
        if loads[busy] <= GOOD_ENOUGH * loads.mean():
            return
        given = [bundle for bundle in _bundles(lists[busy], rows) if len(bundle) < len(lists[busy])] or [()]
        gives = _sums(given, costs)[:, None]
        best: tuple[float, int, Bundle, Bundle] = (float(loads[busy]) - 1e-9, 0, (), ())
        for idle in loads.argsort(kind="stable")[:IDLEST].tolist():
            taken = [(), *_bundles(lists[idle], rows)]
            moved = gives - _sums(taken, costs)
            longest = np.maximum(loads[busy] - moved, loads[idle] + moved)
            i, j = divmod(int(longest.argmin()), len(taken))
            best = min(best, (float(longest[i, j]), idle, given[i], taken[j]))
        _, idle, gift, price = best
        if not gift:
            return
        _swap(lists[busy], lists[idle], gift, price, rows)
        for program in (busy, idle):
            loads[program] = sum(costs[tile % rows] for tile in lists[program])


def _bundles(tiles: list[int], rows: int) -> list[Bundle]:
    """What a program can give away: one or two of its tiles, by their rows."""
    held = Counter(tile % rows for tile in tiles)
    pairs = combinations_with_replacement(sorted(held), 2)
    return [*((row,) for row in sorted(held)), *(p for p in pairs if p[0] != p[1] or held[p[0]] > 1)]


def _sums(bundles: list[Bundle], costs: list[float]) -> np.ndarray:
    return np.array([sum(costs[row] for row in bundle) for bundle in bundles])


def _swap(busy: list[int], idle: list[int], given: Bundle, taken: Bundle, rows: int) -> None:
    """Exchange the last tiles of these rows; what comes takes the places of what goes, then the end."""
    gone, come = _positions(busy, given, rows), _positions(idle, taken, rows)
    gifts, prices = [busy[i] for i in gone], [idle[i] for i in come]
    _replace(busy, gone, prices)
    _replace(idle, come, gifts)


def _positions(tiles: list[int], bundle: Bundle, rows: int) -> list[int]:
    found: list[int] = []
    for row in bundle:
        found.append(max(i for i, tile in enumerate(tiles) if tile % rows == row and i not in found))
    return found


def _replace(tiles: list[int], places: list[int], new: list[int]) -> None:
    for place, tile in zip(places, new):
        tiles[place] = tile
    for place in sorted(places[len(new) :], reverse=True):
        del tiles[place]
    tiles.extend(new[len(places) :])
