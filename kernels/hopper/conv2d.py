"""Launcher of the Hopper convolution: descriptors, tile counts, one launch; allocates only the output."""

from __future__ import annotations

import torch

from tetris.kernels.hopper.geometry import WGMMA_ROWS, ConvTile


def descriptors(
    x: torch.Tensor, values: torch.Tensor, y: torch.Tensor, residual: torch.Tensor | None, tile: ConvTile, pool: bool
) -> list:
    """Tensor descriptors (input, its halo, weights, output, residual) of one launch, in the kernel's order.

    Activations appear as [H, W, N, C], so that boxes come out in the order of the shared-memory tile.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    bits = 8 * tile.item_size

    def activation(tensor: torch.Tensor, rows: int, columns: int, channels: int, swizzle: int):
        n, c, h, w = tensor.shape
        box = [rows, columns, tile.tile_n, channels]
        return TensorDescriptor(
            tensor, [h, w, n, c], [w * c, c, h * w * c, 1], box, NVMMASharedLayout(swizzle, bits, rank=4)
        )

    k_bytes = tile.tile_k * tile.item_size
    weights = values.view(-1, tile.block_in)
    rows, columns = tile.rows_per_accumulator, tile.tile_w // (2 if pool else 1)
    y_desc = activation(y, rows, columns, WGMMA_ROWS, 128)
    return [
        activation(x, 1, tile.tile_w, tile.tile_k, k_bytes),
        activation(x, 1, tile.halo_box, tile.tile_k, k_bytes),
        TensorDescriptor(
            weights,
            list(weights.shape),
            [tile.block_in, 1],
            [WGMMA_ROWS, tile.tile_k],
            NVMMASharedLayout(k_bytes, bits, rank=2),
        ),
        y_desc,
        y_desc if residual is None else activation(residual, rows, tile.tile_w, WGMMA_ROWS, 128),
    ]
