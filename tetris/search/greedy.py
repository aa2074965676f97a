"""Algorithm 1's M-step on groups: the same swaps in the same order as on slices, a block edge times cheaper.

The best swap between groups g and h is the best leaver of g towards h plus the best leaver of h towards g, because the
gain of a swap (eq. 10) separates: G_ij = (S_ii - S_ij) + (S_jj - S_ji), and columns of S inside a group are equal.
Ties go to the smallest position i, then the smallest j, as in :mod:`tetris.algorithm1`. The sequences are identical
whenever sums are exact; with rounded sums two gains closer than the rounding may change places.
"""

from __future__ import annotations

import torch

from tetris.search.partition import Partition
from tetris.search.sums import processors, require_triton

UNLIMITED = 2**62


def smallest_gain(values: torch.Tensor) -> torch.Tensor:
    """The paper's epsilon, where values are and of their dtype: gains below the largest one's rounding are noise."""
    if values.numel() == 0:
        return values.new_zeros(())
    return values.max() * (8 * torch.finfo(values.dtype).eps)


def greedy(values: torch.Tensor, partition: Partition, trace: torch.Tensor | None = None) -> int | torch.Tensor:
    """Swap the pair of the largest gain until no gain exceeds epsilon; ``partition.order`` changes in place.

    Args:
        values: [n, R] importance that each slice keeps in each group.
        partition: the slices' current positions.
        trace: int64 [any, 2] on the CPU; receives the positions (i, j) of the first swaps.
    Returns:
        the number of swaps; on a GPU a tensor there, so that nothing waits for it.
    Cost:
        O(n R) once and O(R) a swap, apart from rescans.
    """
    if values.is_cuda:
        return _greedy_on_gpu(values, partition, trace)
    from tetris.search import numba_kernels

    record = torch.empty((0, 2), dtype=torch.int64) if trace is None else trace
    return int(
        numba_kernels.greedy_swaps(
            values.contiguous().numpy(),
            partition.order.numpy(),
            partition.offsets.numpy(),
            smallest_gain(values).item(),
            record.numpy(),
            UNLIMITED,
        )
    )


def _greedy_on_gpu(values: torch.Tensor, partition: Partition, trace: torch.Tensor | None) -> int | torch.Tensor:
    """The persistent kernel; groups of unequal sizes, as joint searches make, go through the compiled CPU loop."""
    if partition.n_groups < 2:
        return 0
    edge = partition.edge
    if edge is None:
        host = Partition(partition.order.cpu(), partition.offsets.cpu())
        swaps = greedy(values.cpu(), host, trace)
        partition.order.copy_(host.order)
        return swaps
    require_triton("reorder")
    from tetris.kernels.swap_search import default_swap_search_config, swap_search

    config = default_swap_search_config(partition.n_groups, processors(values.device))
    record = None if trace is None else trace.to(values.device)
    count = swap_search(values.contiguous(), partition.order, edge, smallest_gain(values), config=config, trace=record)
    if trace is not None and record is not None:
        trace.copy_(record)
    return count[0]
