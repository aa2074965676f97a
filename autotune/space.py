"""Which configurations a problem can run with: every kernel's fields, kept to what the device holds.

Pure functions of the problem and the device; the first configuration is always the analytic default. Whether a choice
is any good is the business of :mod:`tetris.autotune.cost` and of measuring.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from tetris.autotune.problems import Problem
from tetris.kernels.configs import (
    ITEM_SIZE,
    Conv2dConfig,
    Conv2dProblem,
    DeviceInfo,
    LinearConfig,
    LinearProblem,
    padded_block,
)
from tetris.kernels.conv2d_paths import choose_conv2d_config, conv2d_refuses
from tetris.kernels.few_tokens import DECODE_TOKENS, decode_config, split_config, vector_config
from tetris.kernels.hopper.tile_choice import ranked_configs
from tetris.kernels.linear_paths import NARROW, choose_linear_config, linear_refuses
from tetris.layout import ceil_div

Config = Conv2dConfig | LinearConfig

ACCUMULATORS_PER_THREAD = 128
"""fp32 accumulators a thread holds before the compiler spills (255 registers, half of them for everything else)."""
SPLIT_TOKENS = 1024
"""With more tokens the split kernel is not tried: there are tiles enough."""
WASTE = 1.5
"""A tile whose padding computes more than this multiple of the best tile's pixels is not worth a measurement."""


def default_config(problem: Problem, device: DeviceInfo, max_pool: bool = False) -> Config:
    """What runs where nothing is tuned and the layout is even; see ``problems.fresh_config`` for a given layout."""
    if isinstance(problem, Conv2dProblem):
        return choose_conv2d_config(problem, device, max_pool=max_pool, allow_tf32=False)
    return choose_linear_config(problem, device)


def config_space(problem: Problem, device: DeviceInfo, max_pool: bool = False) -> list[Config]:
    """All configurations worth considering, without repetitions, the analytic default first.

    ``max_pool``: a 2x2 max-pool follows the convolution; Hopper tiles that cannot pool in registers are left out.
    """
    found: list[Config] = [default_config(problem, device, max_pool)]
    if isinstance(problem, Conv2dProblem):
        found += [*_portable_conv2d(problem, device), *ranked_configs(problem, device, max_pool=max_pool)]
        found += [] if max_pool else [*_pointwise(problem, device)]
    else:
        found += [
            *_portable_linear(problem, device),
            *_hopper_linear(problem, device),
            *_narrow_linear(problem, device),
            *_split_linear(problem, device),
            *_decode_linear(problem, device),
        ]
    return list(dict.fromkeys(found))


def is_valid(problem: Problem, device: DeviceInfo, config: Config, max_pool: bool = False) -> bool:
    """Whether a configuration (of a neighbouring problem, say) can run this problem on this device."""
    if isinstance(problem, Conv2dProblem) and isinstance(config, Conv2dConfig):
        refusal, pixels = conv2d_refuses(problem, device, config, max_pool=max_pool), config.tile_pixels
    elif isinstance(problem, LinearProblem) and isinstance(config, LinearConfig):
        refusal, pixels = linear_refuses(problem, device, config), config.tile_tokens
    else:
        return False
    if refusal is not None or config.kernel not in ("portable", "split"):
        return refusal is None
    return _fits(problem, device, pixels, config.tile_out, config.tile_k, config.num_warps, config.num_stages)


def _fits(
    problem: Problem, device: DeviceInfo, pixels: int, tile_out: int, tile_k: int, num_warps: int, num_stages: int
) -> bool:
    """Registers and shared memory of the portable kernels; index loads take every other stage."""
    out, k = padded_block(problem.block)
    out, k = min(tile_out or out, out), tile_k or k
    buffers = max(1, (num_stages + 1) // 2)
    shared = buffers * (pixels + out) * k * ITEM_SIZE[problem.dtype]
    threads = 32 * num_warps
    return shared <= device.shared_bytes - 2048 and out * pixels <= ACCUMULATORS_PER_THREAD * threads


def _powers(low: int, high: int) -> list[int]:
    return [1 << e for e in range(low.bit_length() - 1, high.bit_length()) if low <= 1 << e <= high]


def _steps(problem: Problem, joined: bool = False) -> list[int]:
    """Channels of a step: the block, or parts of it down to 32 bytes, at most 128 bytes.

    With ``joined`` also multiples of the block: several kept (block, tap) pairs in one step.
    """
    item = ITEM_SIZE[problem.dtype]
    k = padded_block(problem.block)[1]
    most = 128 // item
    return [step for step in _powers(16, most if joined else min(k, most)) if k % step == 0 or step % k == 0] or [k]


def boxes(problem: Conv2dProblem, pixels: int, waste: float = WASTE) -> list[tuple[int, int, int]]:
    """(images, rows, columns) of ``pixels`` that cover the output, computing little more than the best box does."""
    height, width = problem.output_size
    sizes = range(pixels.bit_length())
    made = [(1 << a, 1 << b, pixels >> (a + b)) for a in sizes for b in sizes if pixels >> (a + b)]

    def computed(box: tuple[int, int, int]) -> int:
        return pixels * ceil_div(problem.batch, box[0]) * ceil_div(height, box[1]) * ceil_div(width, box[2])

    least = min(map(computed, made))
    return [box for box in made if computed(box) <= waste * least]


def _portable_conv2d(problem: Conv2dProblem, device: DeviceInfo) -> Iterator[Conv2dConfig]:
    by_descriptor = device.has_descriptors and problem.stride == (1, 1) and problem.block[1] >= 16
    steps = [(k, path) for path in (True, False) for k in _steps(problem, joined=not path) if by_descriptor or not path]
    for pixels, (k, path), warps, stages in itertools.product((32, 64, 128, 256), steps, (4, 8), (3, 5, 7)):
        if not _fits(problem, device, pixels, 0, k, warps, stages):
            continue
        shapes = boxes(problem, pixels, 1.15)[:4] if path else [(1, 1, pixels)]
        for (n, h, w), group in itertools.product(shapes, (0, 1) if problem.block_rows > 1 else (0,)):
            yield Conv2dConfig(
                tile_n=n, tile_h=h, tile_w=w, tile_k=k, descriptors=path, group_rows=group, num_warps=warps,
                num_stages=stages, precision=device.fp32_precision,
            )  # fmt: skip


def _portable_linear(problem: LinearProblem, device: DeviceInfo) -> Iterator[LinearConfig]:
    most = max(16, 1 << (problem.tokens - 1).bit_length())
    tiles = [tile for tile in (16, 32, 64, 128, 256) if tile <= most]
    paths = [True, False] if device.has_descriptors else [False]
    for tile, k, warps, stages, path in itertools.product(tiles, _steps(problem), (4, 8), (3, 5, 7, 10), paths):
        if _fits(problem, device, tile, 0, k, warps, stages):
            for group in (0, 1, 8):
                if group < problem.block_rows:
                    yield LinearConfig(
                        tile_tokens=tile, tile_k=k, descriptors=path, group_rows=group, num_warps=warps,
                        num_stages=stages, precision=device.fp32_precision,
                    )  # fmt: skip


def _hopper_linear(problem: LinearProblem, device: DeviceInfo) -> Iterator[LinearConfig]:
    for tile in (64, 128, 256):
        config = LinearConfig(kernel="hopper", tile_tokens=tile)
        if linear_refuses(problem, device, config) is None:
            yield config


def _narrow_linear(problem: LinearProblem, device: DeviceInfo) -> Iterator[LinearConfig]:
    yield from (config for config in NARROW if linear_refuses(problem, device, config) is None)


def _split_linear(problem: LinearProblem, device: DeviceInfo) -> Iterator[LinearConfig]:
    base = split_config(problem, device)
    tiles = (16, 32, 64, 128) if problem.tokens > DECODE_TOKENS else (16,)
    for tile, stages in itertools.product(tiles, (5, 7, 10)):
        config = replace(base, tile_tokens=tile, num_stages=stages)
        if problem.tokens <= SPLIT_TOKENS and is_valid(problem, device, config):
            yield config


def _pointwise(problem: Conv2dProblem, device: DeviceInfo) -> Iterator[Conv2dConfig]:
    for tile in (128, 256):
        config = Conv2dConfig(kernel="hopper_linear", tile_n=1, tile_h=1, tile_w=tile)
        if conv2d_refuses(problem, device, config) is None:
            yield config


def _decode_linear(problem: LinearProblem, device: DeviceInfo) -> Iterator[LinearConfig]:
    if problem.tokens > DECODE_TOKENS:
        return
    out, k = padded_block(problem.block)
    if problem.tokens > 1:
        base = decode_config(problem, device)
        choices = [*itertools.product({16, min(32, out), out}, (64, 128, 256), (2, 4), (1, 2, 4))]
    else:  # long steps of many warps, short ones of few, and those with a pipeline
        base = vector_config(problem, device)
        choices = [*itertools.product((8, min(16, out)), (256, 512, 1024), (4, 8), (1,))]
        choices += itertools.product((min(16, out), min(32, out)), (128, 256), (2, 4), (4,))
    for tile_out, tile_k, warps, stages in choices:
        if tile_k >= k:
            yield replace(base, tile_out=tile_out, tile_k=tile_k, num_warps=warps, num_stages=stages)
