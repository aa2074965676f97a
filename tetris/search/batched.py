"""Swaps on disjoint pairs of groups, together: the M-step for many cores and for GPUs.

Swaps in different groups do not touch each other's gains, so the gains of disjoint pairs add exactly. A *tournament*
pairs all R groups in R - 1 turns of R / 2 disjoint pairs; each pair is split anew, optimally: its best swaps, until
none gains. One tournament gets nearly all of an M-step's gain in R - 1 steps. Further ones would meet the same pairs
again for a handful of swaps: the search for the best swap finds those sooner, and leaves none, as Algorithm 1 does.
"""

from __future__ import annotations

import torch

from tetris.search.greedy import greedy, smallest_gain
from tetris.search.partition import Partition
from tetris.search.sums import processors, require_triton

_PARALLEL_GROUPS = 128


def sweep(
    values: torch.Tensor,
    partition: Partition,
    players: torch.Tensor,
    epsilon: torch.Tensor,
    first_turn: int = 0,
    turns: int | None = None,
) -> int | torch.Tensor:
    """A tournament, or some turns of one; ``partition.order`` changes in place.

    Ties go to the slice of the lowest number; every group ends up in the order of its slices' numbers.

    Args:
        values: [n, R] importance that each slice keeps in each group, contiguous.
        players: int64 [R]; the group that plays as each contestant, a permutation.
        epsilon: one number, values' dtype and device: smallest gain worth a swap.
        first_turn, turns: by default all, after which every two groups have met once.
    Returns:
        the number of swaps; on a GPU a tensor there, so that nothing waits for it.
    Cost:
        about 4 n reads a turn.
    """
    n_groups = partition.n_groups
    turns = n_groups - 1 + n_groups % 2 if turns is None else turns
    order, offsets = partition.order, partition.offsets
    if values.is_cuda:
        require_triton("reorder")
        from tetris.kernels.pair_split import play_tournament

        return play_tournament(
            values,
            order,
            offsets,
            players,
            first_turn,
            turns,
            epsilon,
            capacity=partition.capacity,
            uniform=partition.edge is not None,
            processors=processors(values.device),
        )
    from tetris.search import numba_kernels

    play = numba_kernels.sweep_parallel if n_groups >= _PARALLEL_GROUPS else numba_kernels.sweep
    least = epsilon.numpy()[()]
    return int(play(values.numpy(), order.numpy(), offsets.numpy(), players.numpy(), first_turn, turns, least))


def batched(values: torch.Tensor, partition: Partition) -> int | torch.Tensor:
    """A sweep, then the best swap until none gains more than rounding, in place; returns the number of swaps."""
    if partition.n_groups < 2:
        return 0
    swaps = sweep(values, partition, partition.groups, smallest_gain(values))
    return swaps + greedy(values, partition)
