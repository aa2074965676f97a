"""A mask that hardens slowly: the alternation of E- and M-steps without its local optima.

Algorithm 1 stops where no permutation improves on the mask that the permutation itself chose, and that happens early.
Here the E-step answers with a soft mask at temperature t,

    w = sigmoid((B - tau) / (t std(B))) * (1 + a t N(0, 1)),      B the block sums, tau such that the sigmoids sum to K,

so that blocks near the threshold still count, and the M-step re-splits every pair of groups once. t falls
geometrically; at the end w is the hard mask, and plain alternation finishes. The start is random: at a high temperature
the beginning is forgotten anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tetris.search.alternation import Budget, Progress
from tetris.search.batched import sweep, turns_of_sweep
from tetris.search.sums import require_triton
from tetris.search.system import Key, System

HOTTEST, COLDEST, NOISE = 0.5, 0.04, 2.0
_SHARE_OF_BUDGET = 0.8
WARM = 0.2
"""Where a search starts that was given permutations: hot enough to escape, too cold to forget."""


def soft_mask(block_sums: torch.Tensor, n_keep: int, temperature: float, noise: torch.Tensor) -> torch.Tensor:
    """The kept weight of every block, [R, C] float, for standard normal ``noise`` [R, C]; see the module."""
    if block_sums.is_cuda:
        require_triton("reorder")
        from tetris.kernels import soft_mask as kernels

        return kernels.soft_mask(block_sums, noise, n_keep, temperature, NOISE * temperature)
    spread = max(temperature * float(block_sums.std(correction=0)), 1e-30)
    low, high = (float(extreme) for extreme in torch.aminmax(block_sums))
    low, high = low - 20 * spread, high + 20 * spread
    for _ in range(26):
        middle = (low + high) / 2
        if float(torch.sigmoid((block_sums - middle) / spread).sum()) > n_keep:
            low = middle
        else:
            high = middle
    return torch.sigmoid((block_sums - (low + high) / 2) / spread) * (1 + NOISE * temperature * noise)


def anneal(
    system: System,
    keys: Sequence[Key],
    steps: int,
    seed: int,
    hottest: float = HOTTEST,
    shuffle: bool = True,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> int:
    """Anneal all partitions of ``keys`` in place, for ``steps`` temperatures; follow with a hard alternation.

    Args:
        hottest: the first temperature, in standard deviations of the block sums.
        shuffle: start from random permutations.
    Returns:
        the number of steps made; fewer than ``steps`` where the budget is short, for which it cools faster.
    Cost:
        a step reads every matrix twice and every value about twice.
    """
    budget = budget or Budget()
    device = system.problems[0].matrix.device
    generator, draws = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)
    if shuffle:
        for key in keys:
            partition = system.partitions[key]
            partition.order.copy_(torch.randperm(len(partition.order), generator=draws))
            system.changed(key)
    step, done = 0, 0.0
    while done <= 1:
        temperature = hottest * (COLDEST / hottest) ** done
        for key in keys:
            masks = []
            for index, problem in enumerate(system.problems):
                sums = system.block_sums(index)
                noise = torch.randn(sums.shape, generator=generator, device=device, dtype=sums.dtype)
                masks.append(soft_mask(sums, problem.n_keep, temperature, noise))
            partition = system.partitions[key]
            players = torch.randperm(partition.n_groups, generator=draws).to(device)
            values = system.values(key, masks, exact=False)
            sweep(values, partition, players, 0, turns_of_sweep(partition.n_groups), 0.0)
            system.changed(key)
        step += 1
        if progress is not None:
            progress(step, system.retained(system.expectation()[1]))
        done = step / (steps - 1) if steps > 1 else 2.0
        if budget.seconds is not None:
            done = max(done, budget.elapsed / (_SHARE_OF_BUDGET * budget.seconds))
    return step
