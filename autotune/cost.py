"""A roofline estimate of every configuration: it only ranks them, so that few need measuring.

A program multiplies its kept blocks at the matrix unit's rate or at the rate at which L2 feeds it, whichever is
slower; programs run in whole waves over the multiprocessors; and nothing beats reading every operand once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tetris.autotune.ceilings import H200_FP16, Ceilings
from tetris.autotune.problems import Problem, size_bytes
from tetris.autotune.space import Config
from tetris.kernels.configs import (
    ITEM_SIZE,
    Conv2dConfig,
    Conv2dProblem,
    DeviceInfo,
    LinearConfig,
    LinearProblem,
    padded_block,
)
from tetris.kernels.hopper.heuristics import complete_tile
from tetris.kernels.hopper.pointwise_conv2d import as_linear, linear_config
from tetris.kernels.hopper.tile_choice import estimated_cycles
from tetris.kernels.linear_paths import SCHEDULED
from tetris.layout import ceil_div

L2_BYTES_PER_S = 8.7e12
"""Effective rate of all multiprocessors from L2: 447 TFLOP/s of 64 x 256 x 64 tiles on an H200, random layout."""
PROGRAM_US = 1.5
"""A program's prologue and epilogue that nothing overlaps."""
STEP_US = 0.03
"""Waiting for one step's buffers: what makes small steps slow."""
UNEVEN = 0.4
"""How much longer than the mean the longest block row takes, as long as there are few tasks to even it out with."""
OVERLAP = 0.1
"""Share of the lesser of arithmetic and traffic that does not hide behind the greater."""
CYCLES_PER_US = 1500.0
"""Of the Hopper kernel's own estimate, which leaves out what it does not rank by: 1.7 GHz on paper."""
LAUNCH_US = 2.0
MATRIX_ROWS = 64
"""Rows of a Hopper matrix instruction: blocks of fewer outputs waste the rest."""


@dataclass(frozen=True)
class Work:
    """What one program does and how many there are; ``stall`` multiplies its time for buffers that are too few."""

    programs: int
    flop: float
    l2_bytes: float
    steps: float
    stall: float
    per_sm: int
    persistent: bool


def estimate_us(problem: Problem, device: DeviceInfo, config: Config, ceilings: Ceilings = H200_FP16) -> float:
    """Estimated microseconds; good for ranking configurations of one problem, not for promises."""
    if isinstance(problem, Conv2dProblem) and isinstance(config, Conv2dConfig) and config.kernel == "hopper":
        return LAUNCH_US + estimated_cycles(problem, complete_tile(problem, config), device) / CYCLES_PER_US
    if isinstance(problem, Conv2dProblem) and isinstance(config, Conv2dConfig) and config.kernel == "hopper_linear":
        return estimate_us(as_linear(problem), device, linear_config(config), ceilings)
    work = _work(problem, device, config)
    rate = ceilings.flop_per_s * (1.0 if problem.dtype != "float32" else 0.5) / device.sm_count
    compute_us = work.flop / rate * 1e6
    feed_us = work.l2_bytes / (L2_BYTES_PER_S / device.sm_count) * 1e6
    one_us = max(compute_us, feed_us) * work.stall + work.steps * STEP_US
    sms = device.sm_count
    if work.persistent:
        rounds = work.programs / sms
        uneven = max(rounds + UNEVEN * min(rounds, 1.0), 1.0 + UNEVEN)  # block rows differ; a schedule evens them out
        busy = uneven * (one_us + 0.2) + PROGRAM_US
    else:
        waves = ceil_div(work.programs, sms * work.per_sm)
        busy = waves * work.per_sm * one_us + waves * PROGRAM_US
    memory_us = size_bytes(problem) / ceilings.bytes_per_s * 1e6
    return LAUNCH_US + max(busy, memory_us) + OVERLAP * min(busy, memory_us)


def _work(problem: Problem, device: DeviceInfo, config: Config) -> Work:
    if isinstance(problem, Conv2dProblem):
        assert isinstance(config, Conv2dConfig)
        return _portable_conv2d(problem, device, config)
    assert isinstance(config, LinearConfig)
    return _linear(problem, device, config)


def _portable_conv2d(problem: Conv2dProblem, device: DeviceInfo, config: Conv2dConfig) -> Work:
    """One program a tile and block row; every tap loads its own pixels."""
    height, width = problem.output_size
    tiles = ceil_div(problem.batch * height * width, config.tile_pixels)
    if config.descriptors:
        tiles = (
            ceil_div(problem.batch, config.tile_n) * ceil_div(height, config.tile_h) * ceil_div(width, config.tile_w)
        )
    return _portable(problem, device, config, tiles, config.tile_pixels, problem.taps)


def _linear(problem: LinearProblem, device: DeviceInfo, config: LinearConfig) -> Work:
    tiles = ceil_div(problem.tokens, config.tile_tokens)
    work = _portable(problem, device, config, tiles, config.tile_tokens, 1)
    scheduled = config.kernel in SCHEDULED and config.kernel != "vector"
    return replace(work, persistent=True, stall=1.0, per_sm=1) if scheduled else work


def _portable(problem: Problem, device: DeviceInfo, config: Config, tiles: int, pixels: int, taps: int) -> Work:
    item = ITEM_SIZE[problem.dtype]
    out, k = padded_block(problem.block)
    channels = problem.n_blocks / problem.block_rows * k
    tile_out = min(config.tile_out or out, out)
    rows = max(tile_out, MATRIX_ROWS) if config.kernel not in ("decode", "vector") else tile_out
    step = config.tile_k or k
    l2_bytes = item * ((pixels + tile_out) * channels * taps + pixels * tile_out)
    shared = max(1, (config.num_stages + 1) // 2) * (pixels + tile_out) * step * item
    return Work(
        programs=tiles * problem.block_rows * ceil_div(out, tile_out),
        flop=2.0 * rows * pixels * channels * taps,
        l2_bytes=l2_bytes,
        steps=channels * taps / step,
        stall=1.0 + 0.3 / max(config.num_stages - 2, 1),
        per_sm=max(1, min(device.shared_bytes // shared, 2048 // (32 * config.num_warps), 4)),
        persistent=False,
    )


def compile_seconds(config: Config) -> float:
    """About how long a processor compiles a configuration's kernel; it only orders them."""
    tile = _tile(config)
    if config.kernel == "hopper" and isinstance(config, Conv2dConfig):
        return 0.8 + tile / 180
    return tile / 65 if config.kernel in ("hopper", "hopper_linear", "narrow") else 0.3 + tile / 400


def _tile(config: Config) -> int:
    """Pixels or tokens."""
    return config.tile_tokens if isinstance(config, LinearConfig) else config.tile_n * config.tile_h * config.tile_w


def rank(problem: Problem, device: DeviceInfo, configs: list[Config]) -> list[Config]:
    """Configurations from the most promising on; equal estimates keep their order."""
    return sorted(configs, key=lambda config: estimate_us(problem, device, config))
