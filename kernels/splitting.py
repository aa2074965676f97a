"""How block rows are cut into parts along the inputs, so that all multiprocessors end together: decided offline.

With few tokens, or with a row that keeps far more than the others, whole rows are too coarse to deal out evenly. A row
is then cut into parts of even work, each summed by a program of its own. Every part leaves its sums in memory; the one
that finishes last (a counter tells) adds all of them in the order of the inputs, whoever it is: the result does not
depend on timing. Cutting has its price, a synchronisation and one more tile to write and read for every part.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

CANDIDATES = 16
"""Part sizes that are tried, from the longest row down to half the mean load of a program."""


@dataclass(frozen=True)
class PartCosts:
    """What a part costs beside its products, in the unit of the rows' costs.

    Attributes:
        fixed: of every part: first loads and epilogue.
        synchronise: of every part of a cut row.
        merge: of writing, or reading, the sums of one part.
    """

    fixed: float
    synchronise: float
    merge: float

    def of_part(self, row_cost: float, parts: int) -> float:
        """The cost of the part that finishes last, where a row is cut into that many."""
        if parts == 1:
            return row_cost + self.fixed
        return row_cost / parts + self.fixed + self.synchronise + (parts + 1) * self.merge


def makespan(costs: Sequence[float], programs: int) -> float:
    """The load of the busiest program when tasks go to the least loaded one, longest first."""
    loads = [0.0] * programs
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads)


def choose_parts(
    row_costs: Sequence[float], row_blocks: Sequence[int], copies: int, programs: int, costs: PartCosts
) -> list[int]:
    """Into how many parts every row is cut so that the busiest program ends first.

    Args:
        row_costs: cost of a row's products; row_blocks: the most parts that it can be cut into.
        copies: tiles of tokens: every row occurs that often.
        programs: that run at the same time.
        costs: what parts cost beside that.
    Returns:
        Parts of every row, at least 1; of equally fast choices the one with fewest parts.
    Cost: O(CANDIDATES * tasks * log programs).
    """
    longest, mean = max(row_costs), sum(row_costs) * copies / programs
    if mean == 0:
        return [1] * len(row_costs)
    ratio = min(1.0, 0.5 * mean / longest)
    best, parts = math.inf, [1] * len(row_costs)
    for limit in sorted({longest * ratio ** (step / (CANDIDATES - 1)) for step in range(CANDIDATES)}, reverse=True):
        found = [max(1, min(blocks, math.ceil(cost / limit))) for cost, blocks in zip(row_costs, row_blocks)]
        tasks = [costs.of_part(cost, n) for cost, n in zip(row_costs, found) for _ in range(n * copies)]
        end = makespan(tasks, programs)
        if end < 0.99 * best:
            best, parts = end, found
    return parts


def cut(length: int, parts: int) -> list[tuple[int, int]]:
    """(begin, end) of ``parts`` even parts of ``length`` steps, none empty."""
    edges = [length * part // parts for part in range(parts + 1)]
    return list(pairwise(edges))
