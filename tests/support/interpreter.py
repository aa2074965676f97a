"""Repairs of Triton's interpreter that the kernel tests need. Test-only: it replaces private methods of Triton.

- bfloat16 values are kept as their bit patterns in uint16; casts other than to and from float32, and dot products,
  take the patterns for integers and are silently wrong. Here they go through float32.
- float8 values are kept as bit patterns too; on their way to bfloat16 they go through float32.
- Triton 3.6 turns one-element arrays into a loop's bounds by a way that numpy 2.4 refuses.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _is_bfloat16(handle: interpreter.TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bit patterns, rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _as_float32(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    return interpreter.TensorHandle(widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def repair() -> None:
    """Replace the broken methods, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    dot, cast, convert, patch_tensor = (
        builder.create_dot,
        builder.cast_impl,
        builder.create_fp_to_fp,
        interpreter._patch_lang_tensor,
    )

    def create_dot(self, a, b, d, *rest):
        return dot(self, _as_float32(a), _as_float32(b), d, *rest)

    def cast_impl(self, source, target):
        if _is_bfloat16(source) == (target.scalar == tl.bfloat16):
            return cast(self, source, target)
        if _is_bfloat16(source):
            return cast(self, _as_float32(source), target)
        return interpreter.TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)

    def create_fp_to_fp(self, source, target, rounding):
        if target.scalar == tl.bfloat16 and source.dtype.scalar.primitive_bitwidth == 8:
            source = convert(self, source, tl.float32, rounding)
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.repaired = True
