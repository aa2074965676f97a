"""Swaps on disjoint pairs of groups, together: the M-step for many cores and for GPUs.

Swaps in different groups do not touch each other's gains, so the gains of disjoint pairs add exactly. A *tournament*
pairs all R groups in R - 1 turns of R / 2 disjoint pairs; each pair is split anew, optimally: its best swaps, until
none gains. Sweeps of the tournament repeat until one changes nothing: then no swap is left, as with Algorithm 1.
"""

from __future__ import annotations

import torch

from tetris.search.greedy import smallest_gain
from tetris.search.partition import Partition
from tetris.search.sums import processors, require_triton

_PARALLEL_GROUPS = 128


def turns_of_sweep(n_groups: int) -> int:
    """Turns after which every two groups have met once."""
    return n_groups - 1 + n_groups % 2


def sweep(
    values: torch.Tensor,
    partition: Partition,
    players: torch.Tensor,
    first_turn: int,
    turns: int,
    epsilon: float,
) -> int | torch.Tensor:
    """Turns ``first_turn .. first_turn + turns - 1`` of a tournament; ``partition.order`` changes in place.

    Args:
        values: [n, R] importance that each slice keeps in each group, contiguous.
        players: int64 [R]; the group that plays as each contestant, a permutation.
        epsilon: smallest gain worth a swap.
    Returns:
        the number of swaps; on a GPU a tensor there, so that nothing waits for it.
    Cost:
        about 4 n reads a turn.
    """
    if values.is_cuda:
        return _sweep_on_gpu(values, partition, players, first_turn, turns, epsilon)
    from tetris.search import numba_kernels

    play = numba_kernels.sweep_parallel if partition.n_groups >= _PARALLEL_GROUPS else numba_kernels.sweep
    host = values.numpy()
    order, offsets = partition.order.numpy(), partition.offsets.numpy()
    return int(play(host, order, offsets, players.numpy(), first_turn, turns, host.dtype.type(epsilon)))


def _sweep_on_gpu(
    values: torch.Tensor, partition: Partition, players: torch.Tensor, first_turn: int, turns: int, epsilon: float
) -> torch.Tensor:
    require_triton("reorder")
    from tetris.kernels.pair_split import play_tournament

    order = partition.order.to(torch.int32)
    swaps = play_tournament(
        values,
        order,
        partition.offsets.to(torch.int32),
        players.to(torch.int32),
        first_turn,
        turns,
        epsilon,
        capacity=partition.capacity,
        uniform=partition.edge is not None,
        programs=processors(values.device),
    )
    partition.order.copy_(order)
    return swaps


def batched(values: torch.Tensor, partition: Partition) -> int:
    """Sweep until no swap gains more than rounding, in place; returns the number of swaps."""
    if partition.n_groups < 2:
        return 0
    players = torch.arange(partition.n_groups, device=values.device)
    epsilon, swaps = smallest_gain(values), 0
    while True:
        made = int(sweep(values, partition, players, 0, turns_of_sweep(partition.n_groups), epsilon))
        if not made:
            return swaps
        swaps += made
