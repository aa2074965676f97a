"""Swaps that even out a schedule: nothing is lost, nobody is worse off, and the ends come together."""

from __future__ import annotations

import random
from itertools import chain

import pytest

from tetris.kernels.hopper.balance import even_out
from tetris.kernels.hopper.schedule import make_schedule


def loads(lists: list[list[int]], costs: list[float]) -> list[float]:
    return [sum(costs[tile % len(costs)] for tile in tiles) for tiles in lists]


@pytest.mark.parametrize("seed", range(8))
def test_tiles_stay_and_the_busiest_program_gets_no_busier(seed):
    generator = random.Random(seed)
    costs = [generator.uniform(0.3, 6.0) for _ in range(generator.randint(1, 9))]
    tiles = range(generator.randint(20, 200))
    lists: list[list[int]] = [[] for _ in range(generator.randint(3, 12))]
    for tile in tiles:
        lists[min(tile, generator.randrange(len(lists)))].append(tile)
    lists = [chosen for chosen in lists if chosen]
    longest = max(loads(lists, costs))
    even_out(lists, costs)
    assert sorted(chain.from_iterable(lists)) == list(tiles) and all(lists)
    assert max(loads(lists, costs)) <= longest + 1e-9


def test_a_swap_ends_two_programs_together():
    lists = [[0, 3, 6], [1, 4, 2]]  # rows of 3.0, 2.0 and 1.0
    even_out(lists, [3.0, 2.0, 1.0])
    assert loads(lists, [3.0, 2.0, 1.0]) == [7.0, 7.0]


def test_a_single_long_tile_stays_where_it_is():
    lists = [[0], [1, 3], [5, 7]]
    even_out(lists, [9.0, 1.0])
    assert lists == [[0], [1, 3], [5, 7]]


def test_schedules_end_together():
    """Rows of the 512-channel layer, 16-channel blocks: greedy alone ends 4.6 % late."""
    costs = [0.25 * blocks for blocks in (6, 9, 8, 6, 12, 6, 9, 8)]
    assert make_schedule(costs, 196, 132).makespan < 1.01
