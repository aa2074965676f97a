"""Which of the linear kernels runs a problem: pure functions of the problem and the device, and a table of launchers.

Few tokens are bound by reading the kept weights (``few_tokens``), many by arithmetic and by fetching input tiles
("hopper" where the GPU and the shapes allow it, "narrow" where small blocks lie scattered), everything else and
everything in between is "portable". The choice is data in the config; no path is tried and given up.
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
)
from tetris.kernels.few_tokens import (
    DECODE_TOKENS,
    cutting_pays,
    decode_config,
    fastest_split,
    fastest_vector,
    few_enough_to_split,
    split_config,
    split_schedule,
    vector_config,
)
from tetris.kernels.hopper.linear import TILE_TOKENS
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
from tetris.kernels.hopper.narrow_linear_schedule import TILE_OUT, NarrowSchedule, make_narrow_schedule
from tetris.kernels.split_schedule import SplitSchedule
from tetris.kernels.split_schedule import supports as split_supports
from tetris.kernels.vector_schedule import VectorSchedule, make_vector_schedule
from tetris.kernels.vector_schedule import supports as vector_supports
from tetris.layout import ceil_div

SCHEDULED = ("hopper", "narrow", "split", "vector")
"""The kernels that take an offline schedule."""


HARDLY_SHARED = 0.9
"""Input tiles fetched per product from which the Hopper kernel's pairs of strips no longer pay: the portable kernel
reads as much and takes shorter tasks (H200, random layouts, 64 x 64: 4 % kept, ratio .91: 95 against 105 us; but 10 %,
.88: 217 against 200, 27 %, .76: 166 against 138, and reordered 10 %, .53: 217 against 163)."""

SPARSE = 0.06
"""Kept fraction under which the Hopper kernel's tasks have 128 tokens."""
NARROW = tuple(LinearConfig(kernel="narrow", tile_out=tile_out) for tile_out in TILE_OUT)


def refuses_weights(weight_dtype: str, device: DeviceInfo) -> str | None:
    """Why weights of that dtype ("" = the activations') cannot be multiplied on this device; None = they can."""
    if weight_dtype == "float8_e4m3fn" and (device.backend != "cuda" or device.capability < (8, 9)):
        return f"needs an NVIDIA GPU of compute capability 8.9 or newer; {device.name} has {device.capability}"
    return None


def hopper_config(problem: LinearProblem, device: DeviceInfo) -> LinearConfig:
    """256 tokens a task where that makes nearly two tasks for every multiprocessor, else 128; see :func:`fastest_wide`.

    Between one and two, the second round would leave most idle.
    """
    tasks = ceil_div(problem.out_features, 128) * ceil_div(problem.tokens, 256)
    large = tasks >= 1.7 * device.sm_count and max(wide_tiles(problem)) == 256
    return LinearConfig(kernel="hopper", tile_tokens=256 if large else 128)


def wide_tiles(problem: LinearProblem) -> list[int]:
    """Tokens of a task that are worth a try: no more than there are, and 128 where few blocks are kept.

    Their inputs lie far apart, and large tiles of them leave the L2 cache before all strips have read them (H200, 4096
    tokens, 25088 -> 4096 at 4 %, tiles of 128 / 256: reordered 82 / 88 us, random 100 / 114).
    """
    kept = problem.n_blocks * problem.block[0] * problem.block[1] / (problem.in_features * problem.out_features)
    most = next_power_of_two(problem.tokens, min(TILE_TOKENS)) if kept >= SPARSE else min(TILE_TOKENS)
    return [tile for tile in sorted(TILE_TOKENS) if tile <= most]


def fastest_wide(
    problem: LinearProblem, device: DeviceInfo, indptr: torch.Tensor, indices: torch.Tensor
) -> tuple[LinearConfig, LinearSchedule]:
    """The Hopper kernel's config and schedule that promise to end first on a layout.

    Large tiles read less, small ones balance better where block rows differ and are cheaper to cut (H200, 4096 -> 16384
    at 27 %, 512 tokens, tiles of 128 / 256: random 42.4 / 38.2 us, reordered 34.3 / 41.4).

    Cost: two schedules, 20 to 300 ms of host time.
    """
    configs = [LinearConfig(kernel="hopper", tile_tokens=tile) for tile in wide_tiles(problem)]
    made = [(config, wide_schedule(problem, config, indptr, indices, device.sm_count)) for config in configs]
    return min(made, key=lambda choice: choice[1].clocks)


def wide_schedule(
    problem: LinearProblem, config: LinearConfig, indptr: torch.Tensor, indices: torch.Tensor, sm_count: int
) -> LinearSchedule:
    """The Hopper kernel's schedule for a layout."""
    return make_linear_schedule(
        indptr, indices, block=problem.block, tokens=problem.tokens, tile_tokens=config.tile_tokens,
        n_programs=sm_count,
    )  # fmt: skip


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
    if problem.tokens <= 1:
        return vector_config(problem, device)
    if problem.tokens <= DECODE_TOKENS:
        return split if splits and cutting_pays(problem, longest_row) else decode_config(problem, device)
    if splits and few_enough_to_split(problem, device):
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


def wide_clocks(schedule: LinearSchedule, problem: LinearProblem, sm_count: int) -> float:
    """Estimate of what the Hopper kernel takes, evenly spread; its schedule says what bounds it."""
    tokens = schedule.tile_tokens
    size = 2 * STAGE_K * (schedule.fetched_stages * tokens + schedule.products * STRIP)
    clocks = max(size / BYTES_PER_CLOCK, CLOCKS_PER_PRODUCT * tokens * schedule.products)
    return clocks * ceil_div(problem.tokens, tokens) / sm_count


def narrow_choice(
    problem: LinearProblem, device: DeviceInfo, wide: LinearSchedule, indptr: torch.Tensor, indices: torch.Tensor
) -> tuple[LinearConfig, NarrowSchedule] | None:
    """The narrow-block kernel's config and schedule where it beats the Hopper kernel's on this layout, else None.

    It does where the latter's pairs of strips pad (32 outputs) or fetch as many input tiles as they keep weight tiles:
    small blocks, scattered (H200, random layouts: 32 x 32 at 27 % 212 against 261 us, at 50 % 277 against 369).
    """
    kept = problem.n_blocks * problem.block[0] * problem.block[1] / (STRIP * STAGE_K)
    if wide.fetched_stages <= HARDLY_SHARED * kept or narrow_supports(problem, device, NARROW[0]) is not None:
        return None
    found = []
    for config in NARROW:
        schedule = make_narrow_schedule(
            indptr, indices, block=problem.block, tokens=problem.tokens, n_programs=device.sm_count,
            tile_out=config.tile_out,
        )  # fmt: skip
        found.append((config, schedule))
    best = min(found, key=lambda choice: choice[1].clocks)
    return best if best[1].clocks < wide_clocks(wide, problem, device.sm_count) else None


Schedule = LinearSchedule | NarrowSchedule | SplitSchedule | VectorSchedule


def untuned_linear(
    problem: LinearProblem, device: DeviceInfo, indptr: torch.Tensor, indices: torch.Tensor
) -> tuple[LinearConfig, Schedule | None]:
    """The config for a layout that nobody tuned, and its schedule, if its kernel takes one.

    :func:`choose_linear_config` names the kernel; tiles and cuts are those whose schedules promise to end first.
    """
    config = choose_linear_config(problem, device, longest_row=int(indptr.diff().max()))
    if config.kernel == "split":
        return fastest_split(problem, device, indptr, indices)
    if config.kernel == "vector":
        return fastest_vector(problem, device, indptr)
    if config.kernel != "hopper":
        return config, linear_schedule(problem, config, indptr, indices, device.sm_count)
    config, wide = fastest_wide(problem, device, indptr, indices)
    if narrow := narrow_choice(problem, device, wide, indptr, indices):
        return narrow
    return (default_linear_config(problem, device), None) if hardly_shares(wide) else (config, wide)


def linear_refuses(problem: LinearProblem, device: DeviceInfo, config: LinearConfig) -> str | None:
    """Why the config's kernel does not take the problem; None = it does."""
    if config.kernel == "hopper":
        return hopper_supports(problem, device, config)
    if config.kernel == "narrow":
        return narrow_supports(problem, device, config)
    if config.kernel == "split":
        return split_supports(problem, device, config)
    if config.kernel == "vector":
        return vector_supports(problem)
    if config.kernel == "decode" and problem.tokens > DECODE_TOKENS:
        return f"takes {DECODE_TOKENS} tokens at most; got {problem.tokens}"
    return None


def linear_schedule(
    problem: LinearProblem, config: LinearConfig, indptr: torch.Tensor, indices: torch.Tensor, sm_count: int
) -> Schedule | None:
    """The offline schedule of a config's kernel for one layout; None where it takes none."""
    if config.kernel == "hopper":
        return wide_schedule(problem, config, indptr, indices, sm_count)
    if config.kernel == "narrow":
        return make_narrow_schedule(
            indptr, indices, block=problem.block, tokens=problem.tokens, n_programs=sm_count,
            tile_out=config.tile_out or TILE_OUT[0],
        )  # fmt: skip
    if config.kernel == "split":
        return split_schedule(problem, config, indptr, indices, sm_count)
    if config.kernel == "vector":
        return make_vector_schedule(indptr, problem.block, config, sm_count)
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
    if kernel == "vector":
        from tetris.kernels import linear_vector

        return linear_vector.block_sparse_linear
    if kernel == "decode":
        from tetris.kernels import linear_decode

        return linear_decode.block_sparse_linear
    from tetris.kernels import linear

    return linear.block_sparse_linear
