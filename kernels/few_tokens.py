"""How a linear layer runs for few tokens, one to some hundreds, where nobody tuned it: configs as pure functions.

One token is multiplied by ordinary arithmetic ("vector"), up to 16 by one matrix instruction's columns ("decode"), and
where TMA moves the tiles block rows are cut along the inputs ("split"), for up to some hundreds of tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tetris.kernels.configs import DeviceInfo, LinearConfig, LinearProblem, next_power_of_two, padded_block
from tetris.kernels.split_schedule import TURNS, SplitSchedule, make_split_schedule
from tetris.kernels.vector_schedule import EVEN, LEAST_INPUTS, VectorSchedule, make_vector_schedule, programs_at_once
from tetris.layout import ceil_div

DECODE_TOKENS = 16
"""Up to one matrix instruction's columns of tokens."""
LONG_WALK = 1920
"""Kept inputs of a row that one token walks whole in steps of 1024 by 4 warps instead of 512 by 8 (H200: 16384 -> 4096
at 27 % random 15.0 us instead of 16.0, 14336 -> 4096 13.9 / 14.7, 4096 -> 4096 at 4 % reordered 7.6 / 8.5; but 26
blocks of 64, 4096 -> 4096 at 27 %, 9.0 / 8.8). So are rows that such a step holds and one of 512 does not (1024 -> 4096
6.9 / 7.2)."""
LONG_INPUTS = 4096
"""Kept inputs of a row that one token's long steps may walk whole."""
SPLIT_TILES, MOST_TILES = (16, 32, 64, 128), 8
"""Tiles of tokens that are tried for a layout, and the most of them that are worth it."""


def vector_configs(problem: LinearProblem) -> tuple[LinearConfig, LinearConfig]:
    """For one token: many warps on 8 outputs, which take long steps, and few on 16, of which many run side by side."""
    out, k = padded_block(problem.block)
    wide = LinearConfig(
        kernel="vector", tile_tokens=1, tile_out=min(out, 8), tile_k=max(k, 512), num_warps=8, num_stages=1
    )
    return wide, replace(wide, tile_out=min(out, 16), tile_k=max(k, 256), num_warps=4)


def vector_config(problem: LinearProblem, device: DeviceInfo) -> LinearConfig:
    """For one token and an even layout: long steps, as long as all programs run at the same time.

    H200, long / short steps: 4096 -> 4096 at 27 %, random 8.8 / 10.4 us, 14336 -> 4096 14.4 / 19.5, 4096 -> 14336,
    where they do not, 17.3 / 14.4.
    """
    wide, narrow = vector_configs(problem)
    programs = problem.block_rows * ceil_div(problem.block[0], wide.tile_out)
    return wide if programs <= programs_at_once(wide, device.sm_count) else narrow


def fastest_vector(
    problem: LinearProblem, device: DeviceInfo, indptr: torch.Tensor
) -> tuple[LinearConfig, VectorSchedule]:
    """The config and schedule of one token for a layout, whose long rows are cut: more programs.

    H200, reordered, long / short steps: 4096 -> 1000 at 23 % 7.7 / 8.4 us, 4096 -> 4096 at 27 % 12.9 / 9.6. Where there
    are too many rows to cut the long ones, long steps of few warps (4096 -> 16384 at 27 % 16.6 / 18.7).
    """
    wide, narrow = vector_configs(problem)
    schedule = make_vector_schedule(indptr, problem.block, wide, device.sm_count)
    one_step = schedule.longest_part * problem.block[1] <= wide.tile_k
    if (schedule.most_parts == 1 or one_step) and len(schedule.parts) <= programs_at_once(wide, device.sm_count):
        longer = replace(wide, tile_k=2 * wide.tile_k, num_warps=narrow.num_warps)
        inputs = schedule.longest_part * problem.block[1]
        if inputs < LONG_WALK and not wide.tile_k < inputs <= longer.tile_k:
            return wide, schedule
        return longer, make_vector_schedule(indptr, problem.block, longer, device.sm_count)
    short = make_vector_schedule(indptr, problem.block, narrow, device.sm_count)
    longest = int(indptr.diff().max())
    too_many = short.longest_part * problem.block[1] > 2 * LEAST_INPUTS
    if (
        too_many
        and longest > EVEN * problem.n_blocks / problem.block_rows
        and longest * problem.block[1] <= LONG_INPUTS
    ):
        wide = replace(wide, num_warps=narrow.num_warps)
        return wide, make_vector_schedule(indptr, problem.block, wide, device.sm_count)
    return narrow, short


def decode_config(problem: LinearProblem, device: DeviceInfo) -> LinearConfig:
    """For up to 16 tokens: the whole block row, because every slice of it would read the tokens again, and a pipeline
    of asynchronous copies, so that enough loads are in flight (H200, 16 tokens, 4096 -> 14336 at 27 %: 15.0 us).
    """
    out, k = padded_block(problem.block)
    tile_out, tile_k = min(out, 64), max(k, 128)
    stages = max(1, min(5, (device.shared_bytes - 4096) // problem.step_bytes(DECODE_TOKENS, tile_out, tile_k)))
    return LinearConfig(
        kernel="decode", tile_tokens=DECODE_TOKENS, tile_out=tile_out, tile_k=tile_k, num_warps=4, num_stages=stages
    )


def split_config(problem: LinearProblem, device: DeviceInfo, tile_tokens: int = 0) -> LinearConfig:
    """The split kernel: tiles of 64 outputs and about half of the tokens, as deep a pipeline as shared memory holds.

    H200, 4096 -> 4096, random and reordered at 27 %: 64 tokens in tiles of 32 / 64: 10.9 / 11.9 and 13.0 / 13.7 us;
    128 in tiles of 64 / 128: 12.0 / 12.7 and 14.8 / 14.4; 256 in tiles of 64 / 128: 14.4 / 13.8 and 17.7 / 15.8.
    One-byte weights are widened again for every tile: 64 tokens in tiles of 32 / 64, random: 15.5 / 13.2 us with int8,
    14.0 / 12.7 with float8.

    Args:
        tile_tokens: instead of about half; for a known layout see :func:`fastest_split`.
    """
    tile_out, tile_k = min(problem.block[0], 64), min(problem.block[1], 64)
    tokens, least = next_power_of_two(problem.tokens, 16), 64 if problem.weight_dtype else 32
    half = 16 if problem.tokens <= DECODE_TOKENS else max(min(tokens, least), min(128, tokens // 2))
    tile = tile_tokens or half
    buffers = (device.shared_bytes - 8192) // problem.step_bytes(tile, tile_out, tile_k)
    return LinearConfig(
        kernel="split", tile_tokens=tile, tile_out=tile_out, tile_k=tile_k, num_stages=max(2, min(10, 2 * buffers - 1))
    )


def few_enough_to_split(problem: LinearProblem, device: DeviceInfo) -> bool:
    """Whether more than 16 tokens are faster with the split kernel than with that for many.

    Where there are no more tiles of 64 x 128 than multiprocessors; up to 128 tokens even if there are (H200, reordered,
    14336 -> 4096 21.6 against 26.0 us, 4096 -> 14336 18.8 against 21.7), and where rows are short, so that the many
    warps of the other kernel are hardly started before it ends (512 tokens, 1024 -> 4096: 13.3 against 15.1).
    """
    if ceil_div(problem.out_features, 64) * ceil_div(problem.tokens, 128) <= device.sm_count:
        return True
    short = problem.n_blocks * problem.block[1] <= 512 * problem.block_rows and problem.tokens <= 512
    return problem.block[0] % 64 == 0 and (problem.tokens <= 128 or short)


def fastest_split(
    problem: LinearProblem, device: DeviceInfo, indptr: torch.Tensor, indices: torch.Tensor
) -> tuple[LinearConfig, SplitSchedule]:
    """The split kernel's config and schedule that promise to end first on a layout.

    Small tiles balance better and have small sums to add, large ones read less. One-byte weights keep the usual tile.

    Cost: up to four schedules, 5 to 70 ms of host time.
    """
    tokens = next_power_of_two(problem.tokens, 16)
    least = min(tokens // MOST_TILES, max(SPLIT_TILES))
    tiles = [0] if problem.weight_dtype else [tile for tile in SPLIT_TILES if least <= tile <= tokens]
    configs = [split_config(problem, device, tile) for tile in tiles]
    made = [(config, split_schedule(problem, config, indptr, indices, device.sm_count)) for config in configs]

    def promise(choice: tuple[LinearConfig, SplitSchedule]) -> tuple[float, int, int]:
        """Of equal estimates that with the fewest programs a multiprocessor, then with most programs."""
        programs = len(choice[1].parts) * ceil_div(problem.tokens, choice[0].tile_tokens)
        return choice[1].clocks, ceil_div(programs, device.sm_count), -programs

    config, schedule = min(made, key=promise)
    return replace(config, num_stages=min(config.num_stages, schedule.stages)), schedule


def split_schedule(
    problem: LinearProblem, config: LinearConfig, indptr: torch.Tensor, indices: torch.Tensor, sm_count: int
) -> SplitSchedule:
    """The split kernel's schedule for a layout."""
    return make_split_schedule(
        indptr, indices, block=problem.block, tokens=problem.tokens, tile_tokens=config.tile_tokens,
        tile_out=config.tile_out, n_programs=sm_count, turns=TURNS,
    )  # fmt: skip


def cutting_pays(problem: LinearProblem, longest_row: int) -> bool:
    """Whether 2 to 16 tokens are faster with block rows cut along the inputs than one program a row.

    Where one row keeps far more than the others, and with blocks of 64 inputs always (H200, 8 tokens, 25088 -> 4096 at
    4 %: reordered 58 -> 12.5 us, random 13.3 -> 10.5; 4096 -> 14336 16.2 -> 14.4).
    """
    uneven = longest_row > EVEN * problem.n_blocks / problem.block_rows and longest_row * problem.block[1] >= 1536
    return uneven or (problem.block[1] >= 64 and not problem.weight_dtype)


def depends_on_layout(problem: LinearProblem, config: LinearConfig, longest_row: int) -> bool:
    """Whether a config that was fastest for a problem may be slow on another layout of it.

    The best tile and cut of rows differ by 10 to 20 % between even and uneven rows (H200, 128 tokens, 4096 -> 4096 at
    27 %, tiles of 64 / 128: random 11.8 / 13.2 us, reordered 14.4 / 13.9), more than an estimate for the layout errs.
    """
    return config.kernel in ("split", "vector", "hopper") or (
        config.kernel == "decode" and cutting_pays(problem, longest_row)
    )
