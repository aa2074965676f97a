"""Sums over groups and blocks and what a mask keeps of them. On the CPU compiled loops, on a GPU kernels.

Group sums are the only operations of a search that read the whole matrix.

Nothing here moves the matrix: a permutation changes only who belongs to which group.
"""

from __future__ import annotations

import torch

from tetris.errors import UnsupportedError
from tetris.layout import ceil_div
from tetris.pruning import keep_largest

_CACHED_COLUMNS = 512


def group_sums(matrix: torch.Tensor, order: torch.Tensor, group: int, dim: int) -> torch.Tensor:
    """Slices along ``dim`` added up by groups of ``group`` consecutive positions.

    Args:
        matrix: float32 or float64 [rows, columns], contiguous.
        order: int64 [matrix.shape[dim]]; the slice at every position, on the matrix's device.
    Returns:
        ``dim=1``: [rows, groups]; ``dim=0``: [groups, columns]; the matrix's dtype.
    Cost:
        one read of the matrix.
    """
    if matrix.is_cuda:
        require_triton("reorder")
        from tetris.kernels import group_sums as kernels

        return kernels.group_sums(matrix, order, group, dim=dim, processors=processors(matrix.device))
    from tetris.search import numba_kernels

    labels = torch.empty_like(order)
    labels[order] = torch.arange(len(order)) // group
    n_groups = ceil_div(len(order), group)
    if dim == 1:
        return torch.from_numpy(numba_kernels.sum_column_groups(matrix.numpy(), labels.numpy(), n_groups))
    return torch.from_numpy(numba_kernels.sum_row_groups(matrix.numpy(), labels.numpy(), n_groups, _CACHED_COLUMNS))


def hard_mask(sums: torch.Tensor, n_keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask (bool) of the ``n_keep`` largest block sums, ties to the lowest index, and their sum (float64 []).

    On a GPU nothing waits for them.
    """
    if sums.is_cuda:
        require_triton("reorder")
        from tetris.kernels import hard_mask as kernels

        return kernels.hard_mask(sums, n_keep)
    mask = keep_largest(sums, n_keep)
    return mask, sums[mask].sum(dtype=torch.float64)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right at the full precision of left's dtype, whatever the global TF32 switches say.

    On a GPU the product runs in float64, a few thousand rows at a time to bound the memory.
    """
    if not left.is_cuda or left.dtype == torch.float64:
        return left @ right.to(left.dtype)
    result, right = left.new_empty(left.shape[0], right.shape[1]), right.double()
    for start in range(0, left.shape[0], 4096):
        result[start : start + 4096] = left[start : start + 4096].double() @ right
    return result


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU: as many programs run at the same time for certain."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def require_triton(what: str) -> None:
    """Raise UnsupportedError where Triton is missing: the searches on a GPU are Triton kernels."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            f"{what}: wanted Triton for a weight on a GPU; pip install triton, or pass weight.cpu()"
        ) from None
