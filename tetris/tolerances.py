"""How far a result may be from its float64 reference: one table for the tests and for ``tetris.verify``.

Errors are relative Frobenius errors ||y - ref|| / ||ref||: a bound on the whole tensor that a single misplaced block
breaks, unlike element-wise bounds, which have to be loosened for long sums. NaN never passes.
"""

from __future__ import annotations

import torch

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
"""Per dtype, with inputs of that dtype and sums kept in float32: a few roundings of the stored result."""

TF32_TOLERANCE = 1e-3
"""float32 tensors whose products are rounded to tf32 (10 bits of mantissa, as float16)."""


def tolerance(dtype: torch.dtype, allow_tf32: bool = False) -> float:
    """The largest acceptable relative error of results in ``dtype``."""
    return TF32_TOLERANCE if allow_tf32 and dtype is torch.float32 else TOLERANCES[dtype]


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """||result - reference|| / ||reference|| in float64; inf where shapes differ or the result is not finite."""
    if result.shape != reference.shape:
        return float("inf")
    result, reference = result.detach().double().cpu(), reference.detach().double().cpu()
    if not bool(torch.isfinite(result).all()):
        return float("inf")
    scale = reference.norm().item()
    difference = (result - reference).norm().item()
    return difference / scale if scale else difference
