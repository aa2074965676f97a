"""A roofline estimate of every configuration: it only ranks them, so that few need measuring.

A program multiplies its kept blocks at the matrix unit's rate or at the rate at which L2 feeds it, whichever is
slower; programs run in whole waves over the multiprocessors; and nothing beats reading every operand once.
"""

from __future__ import annotations

from dataclasses import dataclass

from tetris.autotune.ceilings import H200_FP16, Ceilings
from tetris.autotune.problems import Problem, size_bytes
from tetris.autotune.space import Config
from tetris.kernels.configs import ITEM_SIZE, Conv2dConfig, Conv2dProblem, DeviceInfo, padded_block
from tetris.kernels.hopper.heuristics import complete_tile
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
COPIES = 1.25
"""The ``copies`` order of the input writes shared memory once for every kernel column."""
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
    item = ITEM_SIZE[problem.dtype]
    out, k = padded_block(problem.block)
    per_row = problem.n_blocks / problem.block_rows
    if isinstance(problem, Conv2dProblem) and isinstance(config, Conv2dConfig):
        pixels, taps = config.tile_pixels, problem.taps
        height, width = problem.output_size
        if config.kernel == "hopper" or config.descriptors:
            tiles = ceil_div(problem.batch, config.tile_n) * ceil_div(height, config.tile_h)
            tiles *= ceil_div(width, config.tile_w)
        else:
            tiles = ceil_div(problem.batch * height * width, pixels)
        loaded = float(pixels * taps)
        if config.kernel == "hopper":
            loaded = _halo_pixels(problem, config)
    else:
        assert not isinstance(config, Conv2dConfig) and not isinstance(problem, Conv2dProblem)
        pixels, taps, loaded = config.tile_tokens, 1, float(config.tile_tokens)
        tiles = ceil_div(problem.tokens, pixels)
    tile_out = min(config.tile_out or out, out)
    programs = tiles * problem.block_rows * ceil_div(out, tile_out)
    rows = max(tile_out, MATRIX_ROWS) if config.kernel != "decode" else tile_out
    flop = 2.0 * rows * pixels * k * taps * per_row
    weights = tile_out * k * taps * per_row * item
    if config.kernel == "hopper":
        weights = 0.5 * weights  # both consumer warpgroups share a weight tile
    l2_bytes = loaded * k * per_row * item + weights + pixels * tile_out * item
    step = config.tile_k or k
    shared = max(1, (config.num_stages + 1) // 2) * (pixels + tile_out) * step * item
    per_sm = max(1, min(device.shared_bytes // max(shared, 1), 2048 // (32 * config.num_warps), 4))
    steps = per_row * k / step * (1 if config.kernel == "hopper" else taps)
    return Work(programs, flop, l2_bytes, steps, _stall(problem, config), per_sm, config.kernel == "hopper")


def _stall(problem: Problem, config: Config) -> float:
    """Waiting for loads: a pipeline of few stages, a ring of one buffer."""
    if config.kernel != "hopper":
        return 1.0 + 0.3 / max(config.num_stages - 2, 1)
    if not isinstance(problem, Conv2dProblem) or not isinstance(config, Conv2dConfig):
        return 1.0
    tile = complete_tile(problem, config)
    ring = 1.4 if tile.x_stages == 1 else 1.0
    return ring * (COPIES if tile.copies else 1.0)


def _halo_pixels(problem: Conv2dProblem, config: Conv2dConfig) -> float:
    """Pixels that one tile loads a channel: the tile and its halo, in ``copies`` order once a kernel column."""
    rows = config.tile_h + (problem.kernel_size[0] - 1) * problem.dilation[0]
    if config.input_order == "copies":
        return float(config.tile_n * rows * config.tile_w * problem.kernel_size[1])
    return float(config.tile_n * rows * (config.tile_w + (problem.kernel_size[1] - 1) * problem.dilation[1]))


def rank(problem: Problem, device: DeviceInfo, configs: list[Config]) -> list[Config]:
    """Configurations from the most promising on; equal estimates keep their order."""
    return sorted(configs, key=lambda config: estimate_us(problem, device, config))
