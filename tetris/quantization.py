"""Weights in one byte: int8 or float8 with one scale an output channel, symmetric around zero.

``scale[o] = max abs(w[o]) / the dtype's largest value`` in fp32, stored ``q[o] = round(w[o] / scale[o])``, and what is
computed with is ``scale[o] q[o]``. A channel's scale does not depend on the order of channels, so a permuted weight
has the same values, permuted. Pruned weights are zero and stay zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tetris.errors import UnsupportedError

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The stored dtypes and the value that a channel's largest weight becomes."""


def stored_dtype(wanted: torch.dtype | str) -> torch.dtype:
    """``"int8"`` or ``torch.int8`` -> ``torch.int8``; UnsupportedError for what weights cannot be stored in."""
    for dtype in LARGEST:
        if wanted in (dtype, str(dtype).removeprefix("torch.")):
            return dtype
    raise UnsupportedError(
        f"weight_dtype: wanted 'int8', 'float8_e4m3fn' or None for the activations' dtype; got {wanted!r}"
    )


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(stored weight in ``dtype``, fp32 scales [C_OUT]) of a weight [C_OUT, ...]; a channel of zeros has scale 1."""
    rows = weight.detach().float().flatten(1)
    scales = rows.abs().amax(1) / LARGEST[dtype]
    scales = torch.where(scales > 0, scales, 1.0)
    stored = (rows / scales[:, None]).clamp(-LARGEST[dtype], LARGEST[dtype])
    stored = stored if dtype.is_floating_point else stored.round()
    return stored.to(dtype).view(weight.shape), scales


def quantized(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What quantising leaves of a weight [C_OUT, ...], exact in float64."""
    stored, scales = quantize(weight, dtype)
    return (stored.double().flatten(1) * scales.double()[:, None]).view(weight.shape)


def dequantize(values: Tensor, scales: Tensor, indptr: Tensor, dtype: torch.dtype) -> Tensor:
    """Packed blocks [n_blocks, BLOCK_OUT, BLOCK_IN] times their channels' scales, rounded once to ``dtype``.

    Args:
        values: stored blocks; ``indptr``: of their layout.
        scales: fp32 [C_OUT] in the order of the block rows.
    """
    rows, block_out = len(indptr) - 1, values.shape[-2]
    by_row = F.pad(scales, (0, rows * block_out - len(scales))).view(rows, block_out, 1)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    blocks = by_row.to(exact).repeat_interleave(indptr.diff().long(), 0, output_size=len(values))
    return (values.to(exact) * blocks).to(dtype)
