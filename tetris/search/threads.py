"""Numba and torch share OpenMP's thread count: whoever starts threads last changes it for both. Here they agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads_for_numba() -> Iterator[None]:
    """Compiled loops use at most torch's number of threads meanwhile; afterwards both counts are what they were."""
    import numba

    of_torch, of_numba = torch.get_num_threads(), numba.get_num_threads()
    numba.set_num_threads(max(1, min(of_torch, numba.config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        numba.set_num_threads(of_numba)
        torch.set_num_threads(of_torch)
