"""Device code that every kernel shares: the order of programs, and what happens between the sums and memory.

Tiles are computed transposed, ``acc[out, pixel]``, because a weight tile makes the better left operand of a matrix
instruction on Hopper: pixels, a view of a shared-memory tile, may only stand on the right without being serialised.
"""

import triton
import triton.language as tl

from tetris.kernels.gelu import END as GELU_END
from tetris.kernels.gelu import gelu


@triton.jit
def program_tile(pid, n_out_tiles, n_tiles, GROUP: tl.constexpr):
    """(output tile, pixel tile) of a program: GROUP output tiles side by side on one pixel tile, then the next one."""
    group_size = n_out_tiles if GROUP == 0 else GROUP
    group = pid // (group_size * n_tiles)
    first = group * group_size
    size = tl.minimum(n_out_tiles - first, group_size)
    within = pid - first * n_tiles
    return first + within % size, within // size


@triton.jit
def activate(acc, ACTIVATION: tl.constexpr):
    """The activation of that name; NaN stays NaN, as in torch."""
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0, 0.0, acc)
    elif ACTIVATION == "relu6":
        acc = tl.where(acc < 0, 0.0, tl.where(acc > 6, 6.0, acc))
    elif ACTIVATION == "silu":
        acc = acc / (1.0 + tl.exp(-acc))
    elif ACTIVATION == "gelu":
        acc = gelu(acc, tl.maximum(tl.minimum(acc, GELU_END), -GELU_END))
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return acc


@triton.jit
def scale_rows(acc, scales_ptr, offs_o, mask_o):
    """acc[out, pixel] * scales[out], for quantised weights; no scales is ``None``."""
    if scales_ptr is not None:
        acc *= tl.load(scales_ptr + offs_o, mask=mask_o, other=0.0)[:, None]
    return acc


@triton.jit
def add_bias(acc, bias_ptr, offs_o, mask_o):
    """acc[out, pixel] + bias[out]; no bias is ``None``."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def column_halves(tile):
    """The left and the right half of a [rows, columns] tile, without leaving the registers."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def halves(vector):
    """The first and the second half of a vector."""
    return vector.reshape(2, vector.shape[0] // 2).permute(1, 0).split()


@triton.jit
def store_rows(
    acc, y_ptr, residual_ptr, output_permutation_ptr, offs_m, mask_m, offs_o, mask_o, C_OUT, ACTIVATION: tl.constexpr
):
    """y[m, out] = activation(acc[out, m] + residual[m, out]) for rows of C_OUT channels, through the permutation.

    Masked element by element: nothing past a row's channels or the last row is touched. Wide tiles go in parts of at
    most 32 rows, because addresses and residuals of a whole tile would not fit into the registers beside the sums.
    """
    if acc.shape[1] > 32:
        acc_0, acc_1 = column_halves(acc)
        offs_0, offs_1 = halves(offs_m)
        mask_0, mask_1 = halves(mask_m.to(tl.int32))
        store_rows(
            acc_0, y_ptr, residual_ptr, output_permutation_ptr, offs_0, mask_0 != 0, offs_o, mask_o, C_OUT, ACTIVATION
        )
        store_rows(
            acc_1, y_ptr, residual_ptr, output_permutation_ptr, offs_1, mask_1 != 0, offs_o, mask_o, C_OUT, ACTIVATION
        )
    else:
        stored_o = offs_o
        if output_permutation_ptr is not None:
            stored_o = tl.load(output_permutation_ptr + offs_o, mask=mask_o, other=0)
        offsets = offs_m.to(tl.int64)[:, None] * C_OUT + stored_o[None, :]  # [rows, TILE_OUT]
        mask = mask_m[:, None] & mask_o[None, :]
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32).T
        tl.store(y_ptr + offsets, activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty).T, mask=mask)
