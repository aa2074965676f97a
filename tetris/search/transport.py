"""The exact M-step. With the mask fixed, assigning slices to groups is a transportation problem (eq. 8, solved).

Pairs of groups are split optimally first, which gets nearly all of the gain. What is left are cycles: a slice moves
from g to h, another from h to k, a third from k to g. They are cancelled on the graph of groups, whose edge (g, h)
carries the best move from g to h, until Bellman-Ford finds none. Its potentials are prices of places in each group:
when every slice sits where ``value - price`` is largest, no assignment is better (linear programming duality).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tetris.search.batched import sweep
from tetris.search.partition import Partition
from tetris.search.sums import processors, require_triton

_MAX_SWEEPS = 4
"""On a CPU, at most."""
_SWEEPS = 3
"""On a GPU, without looking: the last of them changes little, but to wait for a count costs as much."""
_MAX_PASSES = 1_000_000


@dataclass(frozen=True, eq=False)
class Certificate:
    """Proof that an M-step is optimal: prices of a place in every group.

    Attributes:
        prices: float64 [R]; see :func:`optimality_gap`.
        gap: bound on how much importance any other assignment could gain for this mask; rounding only, if optimal.
        kept: importance that the assignment keeps under the mask.
    """

    prices: torch.Tensor
    gap: float
    kept: float

    @property
    def is_optimal(self) -> bool:
        """Whether nothing but rounding is left to gain."""
        return self.gap <= 1e-9 * max(self.kept, 1e-300)


def optimality_gap(values: torch.Tensor, labels: torch.Tensor, prices: torch.Tensor) -> float:
    """How much any other assignment could gain at most: sum of what each slice would gain at these prices.

    With v = values and p = prices, any assignment with the same group sizes keeps at most
    sum_x max_h (v[x, h] - p[h]) + sum of the prices of all places.

    Args:
        values: [n, R]; labels: int64 [n], the group of every slice; prices: float64 [R].
    """
    gap = 0.0
    for rows, groups in zip(values.split(4096), labels.split(4096)):
        reduced = rows.double() - prices.to(rows.device)
        own = reduced.gather(1, groups[:, None])
        gap += float((reduced.max(1, keepdim=True).values - own).sum())
    return gap


def exact(values: torch.Tensor, partition: Partition) -> int | torch.Tensor:
    """Assign slices to groups optimally; ``partition.order`` changes in place.

    Returns:
        the number of moves; on a GPU a tensor there, so that nothing waits for it (nor checks it: certify does).
    """
    if not _solves_on_gpu(values, partition):
        return solve(values, partition)[0]
    swaps, (cancelled, _, _), _ = _solve_on_gpu(values, partition, _rounding(values))
    return swaps + cancelled


def solve(values: torch.Tensor, partition: Partition) -> tuple[int, torch.Tensor]:
    """Like :func:`exact`; returns the number of moves and the prices (float64 [R]) that prove optimality.

    Raises:
        RuntimeError: the cycle search did not end (it always does, short of a defect).
    """
    if partition.n_groups < 2:
        return 0, torch.zeros(partition.n_groups, dtype=torch.float64)
    if _solves_on_gpu(values, partition):
        swaps, result, both = _solve_on_gpu(values, partition, _rounding(values))
        cancelled, passes, ended = result.tolist()
        moves, prices = int(swaps) + cancelled, both[passes % 2]
    else:
        moves, ended, prices = _solve_on_cpu(values, partition, _rounding(values))
    if not ended:
        raise RuntimeError("exact M-step: the cycle search did not end; please report this weight")
    return moves, prices


def _solves_on_gpu(values: torch.Tensor, partition: Partition) -> bool:
    """Whether kernels do it: groups of unequal sizes go through the compiled CPU loops."""
    return values.is_cuda and partition.n_groups > 1 and partition.edge is not None


def _rounding(values: torch.Tensor) -> torch.Tensor:
    """float64 []: gains up to it are rounding."""
    return values.max().clamp(min=0).double() * (64 * torch.finfo(torch.float64).eps)


def _solve_on_cpu(
    values: torch.Tensor, partition: Partition, tolerance: torch.Tensor
) -> tuple[int, bool, torch.Tensor]:
    """(moves, whether it ended, prices)."""
    from tetris.search import numba_transport

    values, moves = values.cpu().contiguous(), 0
    host = Partition(partition.order.cpu(), partition.offsets.cpu())
    for _ in range(_MAX_SWEEPS):
        swaps = int(sweep(values, host, host.groups, tolerance.cpu().to(values.dtype)))
        moves += swaps
        if not swaps:
            break
    prices = torch.zeros(partition.n_groups, dtype=torch.float64)
    cancelled, ended = numba_transport.cancel_cycles(
        values.numpy(), host.order.numpy(), host.offsets.numpy(), prices.numpy(), tolerance.item(), _MAX_PASSES
    )
    partition.order.copy_(host.order)
    return moves + int(cancelled), bool(ended), prices


def _solve_on_gpu(
    values: torch.Tensor, partition: Partition, tolerance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same with kernels: (moves by splitting pairs, [moves along cycles, passes, whether it ended], two prices).

    The prices of row passes % 2 are the last. Nothing waits for the GPU.
    """
    require_triton("reorder")
    from tetris.kernels.cycle_cancel import cancel_cycles

    assert partition.edge is not None
    epsilon = tolerance.to(values.dtype)
    swaps = torch.zeros((), dtype=torch.int64, device=values.device)
    for _ in range(_SWEEPS):
        swaps += sweep(values, partition, partition.groups, epsilon)
    cores = processors(values.device)
    return swaps, *cancel_cycles(values, partition.order, partition.edge, tolerance, processors=cores)


def certify(values: torch.Tensor, partition: Partition) -> Certificate:
    """The certificate of a partition that :func:`exact` left: one more solve, which finds nothing to move."""
    _, prices = solve(values, partition.twin())
    labels = partition.labels()
    kept = float(values.gather(1, labels[:, None]).sum(dtype=torch.float64))
    return Certificate(prices.cpu(), optimality_gap(values, labels, prices), kept)
