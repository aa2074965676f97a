"""The order in which the Hopper convolution reads weights: all taps of a step together, a tap's weights contiguous."""

from __future__ import annotations

import torch


def arranged_weights(values: torch.Tensor, tile_k: int) -> torch.Tensor:
    """Packed values cut into steps of TILE_K input channels, as if blocks were that narrow.

    Args:
        values: packed kept blocks [n_blocks, taps, BLOCK_OUT, BLOCK_IN].
        tile_k: input channels of a step; divides BLOCK_IN.
    Returns:
        [n_blocks * BLOCK_IN / TILE_K, taps, BLOCK_OUT, TILE_K], contiguous; ``values`` itself where a block is a step.
    Cost: one copy where they are not.
    """
    n_blocks, taps, block_out, block_in = values.shape
    if block_in == tile_k:
        return values
    steps = values.reshape(n_blocks, taps, block_out, block_in // tile_k, tile_k).permute(0, 3, 1, 2, 4)
    return steps.reshape(-1, taps, block_out, tile_k).contiguous()  # one block or tap: reshaping copies nothing
