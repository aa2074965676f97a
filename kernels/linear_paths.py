"""Which of the linear kernels runs a problem: pure functions of the problem and the device, and a table of launchers.

Few tokens are bound by reading the kept weights ("decode"), many by arithmetic and by fetching input tiles ("hopper"
where the GPU and the shapes allow it, "narrow" where small blocks lie scattered), everything else and everything in
between is "portable". The choice is data in the config; no path is tried and given up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from tetris.kernels.configs import (
    DeviceInfo,
    LinearConfig,
    LinearProblem,
    default_linear_config,
    next_power_of_two,
    padded_block,
)
from tetris.kernels.hopper.linear import supports as hopper_supports
from tetris.kernels.hopper.linear_schedule import (
    BYTES_PER_CLOCK,
    CLOCKS_PER_PRODUCT,
    STAGE_K,
    STRIP,
    LinearSchedule,
    make_linear_schedule,
)
from tetris.kernels.hopper.narrow_linear import supports as narrow_supports
from tetris.kernels.hopper.narrow_linear_schedule import TILE_TOKENS, NarrowSchedule, make_narrow_schedule
from tetris.kernels.split_schedule import SplitSchedule, make_split_schedule
from tetris.kernels.split_schedule import supports as split_supports
from tetris.layout import ceil_div

DECODE_TOKENS = 16
"""Up to one matrix instruction's columns of tokens."""


SCHEDULED = ("hopper", "narrow", "split")
"""The kernels that take an offline schedule."""


HARDLY_SHARED = 0.9
"""Input tiles fetched per product from which the Hopper kernel's pairs of strips no longer pay: the portable kernel
reads as much and takes shorter tasks (H200, random layouts, 64 x 64: 4 % kept, ratio .91: 95 against 105 us; but 10 %,
.88: 217 against 200, 27 %, .76: 166 against 138, and reordered 10 %, .53: 217 against 163)."""


NARROW = LinearConfig(kernel="narrow")


def refuses_weights(weight_dtype: str, device: DeviceInfo) -> str | None:
    """Why weights of that dtype ("" = the activations') cannot be multiplied on this device; None = they can."""
    if weight_dtype == "float8_e4m3fn" and (device.backend != "cuda" or device.capability < (8, 9)):
        return f"needs an NVIDIA GPU of compute capability 8.9 or newer; {device.name} has {device.capability}"
    return None


def decode_config(problem: LinearProblem, device: DeviceInfo) -> LinearConfig:
    """For a few tokens: enough loads in flight on every multiprocessor.

    One token: small programs, all resident at once, four blocks of 64 a step (H200, 4096 -> 14336 at 27 %: 14.3 us of
    cuBLAS' 33.2). More tokens: the whole block row, because every slice of it would read the tokens again, and a
    pipeline of asynchronous copies (15.0 us).
    """
    out, k = padded_block(problem.block)
    if problem.tokens <= 1:
        return LinearConfig(
            kernel="decode", tile_tokens=1, tile_out=min(out, 16), tile_k=max(k, 256), num_warps=4, num_stages=1
        )
    tile_out, tile_k = min(out, 64), max(k, 128)
    stages = max(1, min(5, (device.shared_bytes - 4096) // problem.step_bytes(DECODE_TOKENS, tile_out, tile_k)))
    return LinearConfig(
        kernel="decode", tile_tokens=DECODE_TOKENS, tile_out=tile_out, tile_k=tile_k, num_warps=4, num_stages=stages
    )


def hopper_config(problem: LinearProblem, device: DeviceInfo) -> LinearConfig:
    """256 tokens a task where that makes nearly two tasks for every multiprocessor, else 128.

    Between one and two, the second round would leave most idle. Below 6 % of the blocks kept, block rows differ so
    much that smaller tasks pay by their balance (H200, 4096 tokens, 25088 -> 4096 at 4 %: 82 against 88 us reordered).
    """
    tasks = ceil_div(problem.out_features, 128) * ceil_div(problem.tokens, 256)
    kept = problem.n_blocks * problem.block[0] * problem.block[1] / (problem.in_features * problem.out_features)
    return LinearConfig(kernel="hopper", tile_tokens=256 if tasks >= 1.7 * device.sm_count and kept >= 0.06 else 128)


def medium_config(problem: LinearProblem, device: DeviceInfo) -> LinearConfig:
    """The portable kernel with tiles of 64 tokens or fewer and a deep pipeline, for too few tokens to fill the GPU.

    H200, 128 tokens, 4096 -> 4096: 11.9 us with 10 stages, 15.2 with 7, 22.7 with 4. Tiles of 128 where they still are
    enough: 512 tokens, 18.7 us instead of 22.4 (int8 weights 23.5 instead of 28.6).
    """
    config = default_linear_config(problem, device)
    if not config.descriptors or device.capability != (9, 0):
        return config
    tile = max(config.tile_tokens, min(64, next_power_of_two(problem.tokens, 16)))
    if ceil_div(problem.out_features, config.tile_out) * ceil_div(problem.tokens, 128) >= device.sm_count:
        tile = max(tile, 128)
    stages = (device.shared_bytes - 4096) // problem.step_bytes(tile, config.tile_out, config.tile_k)
    return replace(config, tile_tokens=tile, num_stages=max(2, min(10, stages)))


def split_config(problem: LinearProblem, device: DeviceInfo) -> LinearConfig:
    """The split kernel: tiles of 64 outputs and about half of the tokens, as deep a pipeline as shared memory holds.

    H200, 4096 -> 4096, random and reordered at 27 %: 64 tokens in tiles of 32 / 64: 10.9 / 11.9 and 13.0 / 13.7 us;
    128 in tiles of 64 / 128: 12.0 / 12.7 and 14.8 / 14.4; 256 in tiles of 64 / 128: 14.4 / 13.8 and 17.7 / 15.8.
    One-byte weights are widened again for every tile: 64 tokens in tiles of 32 / 64, random: 15.5 / 13.2 us with int8,
    14.0 / 12.7 with float8.
    """
    tile_out, tile_k = min(problem.block[0], 64), min(problem.block[1], 64)
    tokens, least = next_power_of_two(problem.tokens, 16), 64 if problem.weight_dtype else 32
    tile = 16 if problem.tokens <= DECODE_TOKENS else max(min(tokens, least), min(128, tokens // 2))
    buffers = (device.shared_bytes - 8192) // problem.step_bytes(tile, tile_out, tile_k)
    return LinearConfig(
        kernel="split", tile_tokens=tile, tile_out=tile_out, tile_k=tile_k, num_stages=max(2, min(10, 2 * buffers - 1))
    )


def cutting_pays(problem: LinearProblem, longest_row: int) -> bool:
    """Whether at most 16 tokens are faster with block rows cut along the inputs than one program a row.

    One token: only where one row keeps far more than the others (H200, 25088 -> 4096 at 4 % reordered: 12.7 against
    42 us; random 10.4 against 11.1; 4096 -> 4096 at 4 % random, where rows are short, 7.5 against 6.9). More tokens,
    blocks of 64 inputs: always (8 tokens: 58 -> 12.5, 13.3 -> 10.5, 8.0 -> 7.9 us; 4096 -> 14336 16.2 -> 14.4).
    """
    mean = problem.n_blocks / problem.block_rows
    uneven = longest_row > 1.75 * mean and longest_row * problem.block[1] >= 1536
    return uneven or (problem.tokens > 1 and problem.block[1] >= 64 and not problem.weight_dtype)


def choose_linear_config(
    problem: LinearProblem, device: DeviceInfo, *, permuted: bool = False, longest_row: int = 0
) -> LinearConfig:
    """The config for a problem nobody tuned.

    Args:
        permuted: whether the call gathers its inputs or scatters its outputs; whole tiles then cannot move by TMA.
        longest_row: blocks of the longest block row; 0 = unknown, taken to be the mean.
    """
    split = split_config(problem, device)
    splits = not permuted and device.capability == (9, 0) and split_supports(problem, device, split) is None
    if problem.tokens <= DECODE_TOKENS:
        return split if splits and cutting_pays(problem, longest_row) else decode_config(problem, device)
    if splits and ceil_div(problem.out_features, 64) * ceil_div(problem.tokens, 128) <= device.sm_count:
        return split
    config = hopper_config(problem, device)
    if not permuted and hopper_supports(problem, device, config) is None:
        return config
    if ceil_div(problem.out_features, 128) * ceil_div(problem.tokens, 128) < device.sm_count:
        return medium_config(problem, device)
    return default_linear_config(problem, device)


def hardly_shares(schedule: LinearSchedule) -> bool:
    """Whether the strips of a layout have so few input tiles in common that the portable kernel is faster."""
    return schedule.fetched_stages > HARDLY_SHARED * schedule.products


def wide_clocks(schedule: LinearSchedule) -> float:
    """Estimate for the tasks of one token tile of the Hopper kernel together; its schedule says what bounds it."""
    tokens = schedule.tile_tokens
    size = 2 * STAGE_K * (schedule.fetched_stages * tokens + schedule.products * STRIP)
    return max(size / BYTES_PER_CLOCK, CLOCKS_PER_PRODUCT * tokens * schedule.products)


def narrow_schedule(
    problem: LinearProblem, device: DeviceInfo, wide: LinearSchedule, indptr: torch.Tensor, indices: torch.Tensor
) -> NarrowSchedule | None:
    """The narrow-block kernel's schedule where it beats the Hopper kernel's on this layout, else None.

    It does where the latter's pairs of strips pad (32 outputs) or fetch more input tiles than they keep weight tiles:
    small blocks, scattered (H200, random layouts, 27 % kept: 32 x 32 247 against 295 us, 128 x 16 209 against 217).
    """
    kept = problem.n_blocks * problem.block[0] * problem.block[1] / (STRIP * STAGE_K)
    if wide.fetched_stages <= kept or narrow_supports(problem, device, NARROW) is not None:
        return None
    narrow = make_narrow_schedule(
        indptr, indices, block=problem.block, tokens=problem.tokens, n_programs=device.sm_count
    )
    return narrow if narrow.clocks / TILE_TOKENS < wide_clocks(wide) / wide.tile_tokens else None


def linear_refuses(problem: LinearProblem, device: DeviceInfo, config: LinearConfig) -> str | None:
    """Why the config's kernel does not take the problem; None = it does."""
    if config.kernel == "hopper":
        return hopper_supports(problem, device, config)
    if config.kernel == "narrow":
        return narrow_supports(problem, device, config)
    if config.kernel == "split":
        return split_supports(problem, device, config)
    if config.kernel == "decode" and problem.tokens > DECODE_TOKENS:
        return f"takes {DECODE_TOKENS} tokens at most; got {problem.tokens}"
    return None


def linear_schedule(
    problem: LinearProblem, config: LinearConfig, indptr: torch.Tensor, indices: torch.Tensor, sm_count: int
) -> LinearSchedule | NarrowSchedule | SplitSchedule | None:
    """The offline schedule of a config's kernel for one layout; None where it takes none."""
    if config.kernel == "hopper":
        return make_linear_schedule(
            indptr, indices, block=problem.block, tokens=problem.tokens, tile_tokens=config.tile_tokens,
            n_programs=sm_count,
        )  # fmt: skip
    if config.kernel == "narrow":
        return make_narrow_schedule(indptr, indices, block=problem.block, tokens=problem.tokens, n_programs=sm_count)
    if config.kernel == "split":
        return make_split_schedule(
            indptr, indices, block=problem.block, tokens=problem.tokens, tile_tokens=config.tile_tokens,
            tile_out=config.tile_out, n_programs=sm_count * (2 if config.tile_tokens <= DECODE_TOKENS else 1),
        )  # fmt: skip
    return None


def linear_launcher(kernel: str) -> Callable[..., torch.Tensor]:
    """The launcher of a config's ``kernel``; imports Triton."""
    if kernel == "hopper":
        from tetris.kernels.hopper import linear as hopper

        return hopper.block_sparse_linear
    if kernel == "narrow":
        from tetris.kernels.hopper import narrow_linear

        return narrow_linear.block_sparse_linear
    if kernel == "split":
        from tetris.kernels import linear_split

        return linear_split.block_sparse_linear
    if kernel == "decode":
        from tetris.kernels import linear_decode

        return linear_decode.block_sparse_linear
    from tetris.kernels import linear

    return linear.block_sparse_linear
