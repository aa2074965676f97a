"""What happens to an accumulator before it is stored: activations and the 2x2 max-pool's columns (Gluon)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language import PropagateNan

from tetris.kernels.gelu import END as GELU_END
from tetris.kernels.gelu import gelu

NAN: gl.constexpr = gl.constexpr(PropagateNan.ALL)
"""As in torch, NaN is not cut off by a maximum: a diverged network shows."""


@gluon.jit
def activate(value, ACTIVATION: gl.constexpr):
    """The activation of fp32 values; NaN stays NaN."""
    if ACTIVATION == "relu":
        value = gl.maximum(value, 0.0, propagate_nan=NAN)
    elif ACTIVATION == "relu6":
        value = gl.minimum(gl.maximum(value, 0.0, propagate_nan=NAN), 6.0, propagate_nan=NAN)
    elif ACTIVATION == "silu":
        value = value / (1.0 + gl.exp(-value))
    elif ACTIVATION == "gelu":
        value = gelu(value, gl.maximum(gl.minimum(value, GELU_END), -GELU_END))
    return value


@gluon.jit
def pool_columns(value, TILE_W: gl.constexpr, TILE_N: gl.constexpr):
    """[64, TILE_W * TILE_N] -> [64, TILE_W / 2 * TILE_N]: maximum of neighbouring columns, within a thread."""
    pairs = value.reshape([64, TILE_W // 2, 2, TILE_N]).permute([0, 1, 3, 2])
    left, right = gl.split(pairs)
    return gl.maximum(left, right, propagate_nan=NAN).reshape([64, TILE_W // 2 * TILE_N])


@gluon.jit
def pool_rows(value, ROWS: gl.constexpr, ROW_PIXELS: gl.constexpr):
    """[64, ROWS * ROW_PIXELS] -> [64, ROWS / 2 * ROW_PIXELS]: maximum of neighbouring rows, within a thread."""
    pairs = value.reshape([64, ROWS // 2, 2, ROW_PIXELS]).permute([0, 1, 3, 2])
    upper, lower = gl.split(pairs)
    return gl.maximum(upper, lower, propagate_nan=NAN).reshape([64, ROWS // 2 * ROW_PIXELS])
