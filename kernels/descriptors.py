"""When a tensor may be read and written by hardware tensor descriptors (TMA), and how one is made."""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16
"""Bytes: of a descriptor's base address and of every stride but the last, which must be one element."""


def describable(tensor: torch.Tensor) -> bool:
    """Whether the hardware takes a descriptor of this tensor, its last dimension the contiguous one."""
    strides = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % ALIGNMENT == 0
        and all(0 < stride < 2**40 and stride % ALIGNMENT == 0 for stride in strides)
        and all(0 < size < 2**31 for size in tensor.shape)
    )


def describable_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., K] as a matrix [tokens, K] that the hardware takes a descriptor of; copied where it must be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if describable(rows) else rows.clone(memory_format=torch.contiguous_format)


def describe(tensor: torch.Tensor, box: list[int]) -> TensorDescriptor:
    """A descriptor of boxes of that shape; elements outside the tensor read 0 and are not written."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box)
