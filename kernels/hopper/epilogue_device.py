"""What happens to an accumulator before it is stored: activations and the 2x2 max-pool's columns (Gluon)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def activate(value, ACTIVATION: gl.constexpr):
    """The activation of fp32 values; NaN stays NaN."""
    if ACTIVATION == "relu":
        value = gl.maximum(value, 0.0)
    elif ACTIVATION == "relu6":
        value = gl.minimum(gl.maximum(value, 0.0), 6.0)
    elif ACTIVATION == "silu":
        value = value / (1.0 + gl.exp(-value))
    elif ACTIVATION == "gelu":
        value = 0.5 * value * (1.0 + gl.erf(value * 0.7071067811865476))
    return value


@gluon.jit
def pool_columns(value, TILE_W: gl.constexpr, TILE_N: gl.constexpr):
    """[64, TILE_W * TILE_N] -> [64, TILE_W / 2 * TILE_N]: maximum of neighbouring columns, within a thread."""
    pairs = value.reshape([64, TILE_W // 2, 2, TILE_N]).permute([0, 1, 3, 2])
    left, right = gl.split(pairs)
    return gl.maximum(left, right).reshape([64, TILE_W // 2 * TILE_N])


@gluon.jit
def pixel_chunk(value, index: gl.constexpr, CHUNKS: gl.constexpr, LAYOUT: gl.constexpr):
    """Half ``index`` of the pixels of [64, N], or all of them if CHUNKS is 1; no data moves between threads."""
    if CHUNKS == 2:
        first, second = gl.split(value.reshape([64, 2, value.shape[1] // 2]).permute([0, 2, 1]))
        value = first if index == 0 else second
        value = gl.convert_layout(value, LAYOUT, assert_trivial=True)
    return value
