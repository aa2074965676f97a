"""Group sums: the only operations of a search that read the whole matrix. On the CPU compiled loops, on a GPU kernels.

A *label* is the group of a slice. Nothing here moves the matrix: a permutation changes only who belongs to which group.
"""

from __future__ import annotations

import torch

from tetris.errors import UnsupportedError

_CACHED_COLUMNS = 512


def group_sums(matrix: torch.Tensor, labels: torch.Tensor, n_groups: int, dim: int) -> torch.Tensor:
    """Slices along ``dim`` with the same label added up.

    Args:
        matrix: float32 or float64 [rows, columns], contiguous.
        labels: int64 [matrix.shape[dim]], entries in 0..n_groups-1, on the matrix's device.
    Returns:
        ``dim=1``: [rows, n_groups]; ``dim=0``: [n_groups, columns]; the matrix's dtype.
    Cost:
        one read of the matrix.
    """
    if matrix.is_cuda:
        return _cuda_sums(matrix, labels, n_groups, dim)
    from numba import config, set_num_threads

    from tetris.search import numba_kernels

    source, groups = matrix.numpy(), labels.numpy()
    threads = torch.get_num_threads()
    set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
    try:
        if dim == 1:
            return torch.from_numpy(numba_kernels.sum_column_groups(source, groups, n_groups))
        return torch.from_numpy(numba_kernels.sum_row_groups(source, groups, n_groups, _CACHED_COLUMNS))
    finally:
        torch.set_num_threads(threads)  # numba may share its OpenMP pool, whose size is the whole process's


def _cuda_sums(matrix: torch.Tensor, labels: torch.Tensor, n_groups: int, dim: int) -> torch.Tensor:
    shape = (n_groups, matrix.shape[1]) if dim == 0 else (matrix.shape[0], n_groups)
    return matrix.new_zeros(shape).index_add_(dim, labels, matrix)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right at the full precision of their dtype, whatever the global TF32 switches say.

    On a GPU the product runs in float64, a few thousand rows at a time to bound the memory.
    """
    if not left.is_cuda or left.dtype == torch.float64:
        return left @ right
    result, right = left.new_empty(left.shape[0], right.shape[1]), right.double()
    for start in range(0, left.shape[0], 4096):
        result[start : start + 4096] = left[start : start + 4096].double() @ right
    return result


def require_triton(what: str) -> None:
    """Raise UnsupportedError where Triton is missing: the searches on a GPU are Triton kernels."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            f"{what}: wanted Triton for a weight on a GPU; pip install triton, or pass weight.cpu()"
        ) from None
