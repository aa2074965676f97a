"""Small launches of the search's kernels, ragged and with more groups than programs; each is compared with the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tetris.layout import ceil_div
from tetris.search import annealing, greedy, sums, transport
from tetris.search.batched import sweep
from tetris.search.partition import Partition

SIZES = ((260, 2, 4), (137, 8, 1), (96, 32, 4), (100, 33, 2))
"""(slices, slices a group, groups a program)."""


def _values(n: int, groups: int) -> torch.Tensor:
    """Whole numbers: sums and differences are exact in any order."""
    return torch.randint(0, 9, (n, groups), generator=torch.Generator().manual_seed(n)).float()


def _both(n: int, edge: int) -> tuple[torch.Tensor, Partition, Partition]:
    """Values on the CPU, and the same partition on the CPU and on the GPU."""
    offsets = torch.arange(0, n + edge, edge).clamp(max=n)
    here = Partition(torch.arange(n), offsets)
    return _values(n, ceil_div(n, edge)), here, Partition(here.order.cuda(), offsets.cuda())


def _differing(here: Partition, there: Partition) -> float:
    return float((here.order != there.order.cpu()).sum())


def swap_search_error(n: int, edge: int, groups_per_program: int) -> float:
    """Positions that hold another slice than on the CPU, and swaps made at another time."""
    from tetris.kernels.swap_search import SwapSearchConfig, swap_search

    values, here, there = _both(n, edge)
    expected, trace = torch.full((500, 2), -1), torch.full((500, 2), -1, device="cuda")
    greedy.greedy(values, here, expected)
    epsilon = greedy.smallest_gain(values).cuda()
    swap_search(values.cuda(), there.order, edge, epsilon, config=SwapSearchConfig(groups_per_program), trace=trace)
    return _differing(here, there) + float((trace.cpu() != expected).sum())


def tournament_error(n: int, edge: int) -> float:
    """Positions that hold another slice than on the CPU."""
    values, here, there = _both(n, edge)
    epsilon = torch.zeros(())
    sweep(values, here, here.groups, epsilon)
    sweep(values.cuda(), there, there.groups, epsilon.cuda())
    return _differing(here, there)


def exact_error(n: int, edge: int) -> float:
    """What the optimum on the GPU keeps less than the CPU's, in all."""
    values, here, there = _both(n, edge)
    transport.exact(values, here)
    transport.exact(values.cuda(), there)
    found = [values.gather(1, partition.labels().cpu()[:, None]).sum() for partition in (here, there)]
    return float((found[0] - found[1]).abs())


def sums_error(n: int, edge: int, dim: int) -> float:
    """The largest difference of group sums."""
    matrix = _values(n, 150) if dim == 0 else _values(150, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    got = sums.group_sums(matrix.cuda(), order.cuda(), edge, dim).cpu()
    return float((got - sums.group_sums(matrix, order, edge, dim)).abs().max())


def masks_error(rows: int, columns: int) -> float:
    """Blocks that the hard masks differ in, and the largest difference of the soft ones beyond rounding."""
    generator = torch.Generator().manual_seed(0)
    blocks, noise = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    blocks, n_keep = blocks.abs(), rows * columns // 3
    differing = (sums.hard_mask(blocks.cuda(), n_keep)[0].cpu() != sums.hard_mask(blocks, n_keep)[0]).sum()
    soft = annealing.soft_mask(blocks.cuda(), n_keep, torch.full((1,), 0.3, device="cuda"), noise.cuda()).cpu()
    off = (soft - annealing.soft_mask(blocks, n_keep, 0.3, noise)).abs().max()
    return float(differing) + max(0.0, float(off) - 1e-3)


def launches() -> list[tuple[str, Callable[[], float]]]:
    """(name, run); a run returns 0 where the GPU does what the CPU does."""
    found: list[tuple[str, Callable[[], float]]] = []
    for n, edge, groups in SIZES:
        found.append((f"swap_search {n} in {edge}, {groups} a program", partial(swap_search_error, n, edge, groups)))
        found.append((f"tournament {n} in {edge}", partial(tournament_error, n, edge)))
        found.append((f"exact {n} in {edge}", partial(exact_error, n, edge)))
        found += [(f"group_sums {n} in {edge}, dim {dim}", partial(sums_error, n, edge, dim)) for dim in (0, 1)]
    return found + [(f"masks {r}x{c}", partial(masks_error, r, c)) for r, c in ((5, 7), (67, 130))]
