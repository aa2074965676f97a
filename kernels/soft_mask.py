"""The soft mask of an annealing step in one launch: a noisy sigmoid around the threshold that keeps K blocks' worth.

One program bisects the threshold over all block sums (at most a few 100,000, from cache): one launch instead of the
hundred that the same loop takes as tensor operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tetris.kernels.configs import next_power_of_two

HALVINGS = 26
MAX_TILE = 8192


@triton.jit
def soft_mask_kernel(
    sums_ptr, noise_ptr, mask_ptr, temperature_ptr, N, n_keep, noisiness, HALVINGS: tl.constexpr, TILE: tl.constexpr
):
    """Grid: one program."""
    temperature = tl.load(temperature_ptr)
    offs = tl.arange(0, TILE)
    total = tl.zeros((TILE,), dtype=tl.float32)
    low = tl.full((TILE,), float("inf"), dtype=tl.float32)
    high = tl.full((TILE,), float("-inf"), dtype=tl.float32)
    for start in range(0, N, TILE):
        inside = start + offs < N
        x = tl.load(sums_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        total += x
        low = tl.minimum(low, tl.where(inside, x, float("inf")))
        high = tl.maximum(high, tl.where(inside, x, float("-inf")))
    mean = tl.sum(total, axis=0) / N
    squares = tl.zeros((TILE,), dtype=tl.float32)
    for start in range(0, N, TILE):
        inside = start + offs < N
        x = tl.load(sums_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        squares += tl.where(inside, (x - mean) * (x - mean), 0.0)
    spread = tl.maximum(temperature * tl.sqrt(tl.sum(squares, axis=0) / N), 1e-30)
    bottom = tl.min(low, axis=0) - 20.0 * spread
    top = tl.max(high, axis=0) + 20.0 * spread
    for _ in range(HALVINGS):
        middle = 0.5 * (bottom + top)
        kept = tl.zeros((TILE,), dtype=tl.float32)
        for start in range(0, N, TILE):
            inside = start + offs < N
            x = tl.load(sums_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
            kept += tl.where(inside, tl.sigmoid((x - middle) / spread), 0.0)
        more = tl.sum(kept, axis=0) > n_keep
        bottom = tl.where(more, middle, bottom)
        top = tl.where(more, top, middle)
    for start in range(0, N, TILE):
        inside = start + offs < N
        x = tl.load(sums_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        noise = tl.load(noise_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        weight = tl.sigmoid((x - 0.5 * (bottom + top)) / spread) * (1.0 + noisiness * temperature * noise)
        tl.store(mask_ptr + start + offs, weight, mask=inside)


def soft_mask(
    block_sums: torch.Tensor, noise: torch.Tensor, n_keep: int, temperature: torch.Tensor, noisiness: float
) -> torch.Tensor:
    """sigmoid((B - tau) / (t std(B))) * (1 + noisiness t noise), t the temperature, tau so that the sigmoids sum to K.

    Args:
        block_sums: float [R, C]; noise: the same shape and device, contiguous.
        n_keep: K.
        temperature: float32 [1] on the device: a captured launch can then be replayed at another one.
    Returns:
        [R, C], the dtype of ``block_sums``.
    Cost:
        29 passes of one program over B, which stays in cache: about 0.1 ms for 100,000 blocks.
    """
    block_sums = block_sums.contiguous()
    mask = torch.empty_like(block_sums)
    N = block_sums.numel()
    tile = min(MAX_TILE, next_power_of_two(N))
    warps = max(1, min(16, tile // 256))
    soft_mask_kernel[(1,)](
        block_sums, noise, mask, temperature, N, n_keep, noisiness, HALVINGS=HALVINGS, TILE=tile, num_warps=warps
    )
    return mask
