"""The paper's Algorithm 1, word for word: the readable definition that every fast search is tested against.

Reordering and pruning alternate. The E-step (eq. 6) asks the pruning method for the mask of the reordered weight; the
M-step (eqs. 7, 8) improves one permutation at a time for that mask by greedy swaps: contract (eq. 9), evaluate the gain
of every swap (eqs. 10, 11), swap the best pair, until no gain exceeds epsilon. The whole ends when nothing changes.

Nothing is optimised here: every swap contracts anew, O(n^2) times the slice size. Use :func:`tetris.reorder`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tetris.permutation import identity
from tetris.pruning import PruningMethod


@dataclass(frozen=True)
class Trace:
    """What Algorithm 1 did: the permutations {dim: sources} and every swap (dim, i, j), i < j, in order."""

    permutations: dict[int, torch.Tensor]
    swaps: list[tuple[int, int, int]]


def contract(importance: torch.Tensor, pruned: torch.Tensor, dim: int) -> torch.Tensor:
    """S_ij = sum over the other dimensions of |W|_i * M_j (eq. 9): slice i of the weight under slice j of the mask."""
    slices = importance.movedim(dim, 0).flatten(1)
    return slices @ pruned.movedim(dim, 0).flatten(1).to(slices).T


def swap_gains(contraction: torch.Tensor) -> torch.Tensor:
    """G = L + L^T - S - S^T, L the diagonal of S repeated (eqs. 10, 11): what swapping i and j saves."""
    diagonal = contraction.diagonal()[:, None]
    return diagonal + diagonal.T - contraction - contraction.T


def algorithm1(
    importance: torch.Tensor,
    pruning: PruningMethod,
    sparsity: float,
    dims: tuple[int, ...] = (0, 1),
    epsilon: float = 0.0,
) -> Trace:
    """Run Algorithm 1 on a non-negative importance tensor of any order >= 2.

    Ties are broken by position: of all swaps with the largest gain the one with the smallest i, then the smallest j.

    Args:
        importance: |W| (or another importance), any shape; integers stored in float64 make every step exact.
        pruning: P of eq. 4; asked for the mask of the reordered importance in every E-step.
        sparsity: fraction of units to prune, in [0, 1).
        dims: the reorderable dimensions Omega, in the order of their M-steps.
        epsilon: smallest gain worth a swap, in units of importance.
    Cost:
        O(n^2 * importance.numel() / n) a swap; hours for large layers.
    """
    permutations = {dim: identity(importance.shape[dim]) for dim in dims}
    swaps: list[tuple[int, int, int]] = []
    reordered = importance.clone()
    changed = True
    while changed:
        changed = False
        pruned = ~pruning.keep_mask(reordered, sparsity)
        for dim in dims:
            while True:
                gains = swap_gains(contract(reordered, pruned, dim))
                i, j = divmod(int(gains.argmax()), gains.shape[1])
                if gains[i, j] <= epsilon:
                    break
                exchanged = identity(importance.shape[dim])
                exchanged[[i, j]] = exchanged[[j, i]]
                reordered = reordered.index_select(dim, exchanged.to(reordered.device))
                permutations[dim] = permutations[dim][exchanged]
                swaps.append((dim, i, j))
                changed = True
    return Trace(permutations, swaps)
