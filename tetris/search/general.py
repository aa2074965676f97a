"""Algorithm 1 for any pruning method: n x n contractions, with the speedups of the paper's Section 4.2.

The contraction leaves the inner loop, because a swap only exchanges two rows of S; every row remembers its best
partner, so that a swap costs O(n) apart from rescans. Serves N:M groups, vectors and user-made pruning methods.
"""

from __future__ import annotations

import torch

from tetris.algorithm1 import contract
from tetris.permutation import apply, compose
from tetris.pruning import PruningMethod
from tetris.search.alternation import Budget, Progress
from tetris.search.greedy import UNLIMITED, smallest_gain


def swap_slices(kept: torch.Tensor, trace: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
    """The M-step along one dimension: greedy swaps for a contraction with the *keep* mask.

    Args:
        kept: [n, n]; ``kept[i, p]`` is the importance that slice i keeps at position p.
    Returns:
        the permutation to apply (CPU, int64 [n]) and the number of swaps.
    """
    from tetris.search import numba_kernels

    record = torch.empty((0, 2), dtype=torch.int64) if trace is None else trace
    positions = torch.arange(len(kept))
    epsilon = smallest_gain(kept).item()
    contraction = kept.contiguous().cpu().numpy()
    swaps = numba_kernels.greedy_swaps_of_slices(contraction, positions.numpy(), epsilon, record.numpy(), UNLIMITED)
    return positions, int(swaps)


def alternate_slices(
    importance: torch.Tensor,
    pruning: PruningMethod,
    sparsity: float,
    permutations: dict[int, torch.Tensor],
    budget: Budget,
    progress: Progress | None = None,
) -> int:
    """Algorithm 1 on an importance tensor of any order; ``permutations`` (its keys are Omega) are updated in place.

    Returns:
        the number of swaps.
    Cost:
        2 n * importance.numel() FLOP a dimension and outer step, n x n floats of state.
    """
    total = float(importance.sum(dtype=torch.float64))
    reordered = apply(importance, permutations)
    swaps, step, best = 0, 0, -1.0
    while True:
        mask = pruning.keep_mask(reordered, sparsity)
        kept = float((reordered * mask).sum(dtype=torch.float64))
        if progress is not None:
            progress(step, kept / total if total else 1.0)
        if kept <= best or budget.spent:
            return swaps
        best, step, before = kept, step + 1, swaps
        for dim in permutations:
            exchanged, count = swap_slices(contract(reordered, mask, dim))
            if count:
                reordered = reordered.index_select(dim, exchanged.to(reordered.device))
                permutations[dim] = compose(permutations[dim], exchanged)
                swaps += count
            if budget.spent:
                return swaps
        if swaps == before:
            return swaps


def sorted_slices(importance: torch.Tensor, dims: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Permutations (CPU) that put the slices of each dimension in descending order of importance."""
    totals = {dim: importance.movedim(dim, 0).flatten(1).sum(1) for dim in dims}
    return {dim: total.sort(descending=True, stable=True).indices.cpu() for dim, total in totals.items()}
