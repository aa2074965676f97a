"""Which of the linear kernels runs a problem: pure functions of the problem and the device, and a table of launchers.

Few tokens are bound by reading the kept weights ("decode"), many by arithmetic and by fetching input tiles ("hopper"
where the GPU and the shapes allow it), everything else and everything in between is "portable". The choice is data in
the config; no path is tried and given up.
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
from tetris.kernels.hopper.linear_schedule import LinearSchedule, make_linear_schedule
from tetris.kernels.split_schedule import SplitSchedule, make_split_schedule
from tetris.kernels.split_schedule import supports as split_supports
from tetris.layout import ceil_div

DECODE_TOKENS = 16
"""Up to one matrix instruction's columns of tokens."""


SCHEDULED = ("hopper", "split")
"""The kernels that take an offline schedule."""


HARDLY_SHARED = 0.85
"""Input tiles fetched per product from which the Hopper kernel's pairs of strips no longer pay: the portable kernel
reads as much and takes shorter tasks (H200, random layouts, 64 x 64: 10 % kept, ratio .88: 216 against 240 us; 4 %,
.91: 93 against 105; but 27 %, .76: 166 against 145, and reordered 10 %, .53: 217 against 164)."""


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
    """256 tokens a task where that makes at least a task for every multiprocessor, else 128.

    Below 6 % of the blocks kept, block rows differ so much that smaller tasks pay by their balance (H200, 4096 tokens,
    25088 -> 4096 at 4 %: 100 against 136 us reordered, 105 against 115 us random).
    """
    tasks = ceil_div(problem.out_features, 128) * ceil_div(problem.tokens, 256)
    kept = problem.n_blocks * problem.block[0] * problem.block[1] / (problem.in_features * problem.out_features)
    return LinearConfig(kernel="hopper", tile_tokens=256 if tasks >= device.sm_count and kept >= 0.06 else 128)


def medium_config(problem: LinearProblem, device: DeviceInfo) -> LinearConfig:
    """The portable kernel with tiles of 64 tokens or fewer and a deep pipeline, for too few tokens to fill the GPU.

    H200, 128 tokens, 4096 -> 4096: 11.9 us with 10 stages, 15.2 with 7, 22.7 with 4.
    """
    config = default_linear_config(problem, device)
    if not config.descriptors or device.capability != (9, 0):
        return config
    tile = max(config.tile_tokens, min(64, next_power_of_two(problem.tokens, 16)))
    stages = (device.shared_bytes - 4096) // problem.step_bytes(tile, config.tile_out, config.tile_k)
    return replace(config, tile_tokens=tile, num_stages=max(2, min(10, stages)))


def split_config(problem: LinearProblem, device: DeviceInfo) -> LinearConfig:
    """The split kernel with tiles of 64 outputs and at most 128 tokens, as deep a pipeline as shared memory holds."""
    tile_out, tile_k = min(problem.block[0], 64), min(problem.block[1], 64)
    tile = min(128, next_power_of_two(problem.tokens, 16))
    buffers = (device.shared_bytes - 8192) // problem.step_bytes(tile, tile_out, tile_k)
    return LinearConfig(
        kernel="split", tile_tokens=tile, tile_out=tile_out, tile_k=tile_k, num_stages=max(2, min(10, 2 * buffers - 1))
    )


def choose_linear_config(problem: LinearProblem, device: DeviceInfo, *, permuted: bool = False) -> LinearConfig:
    """The config for a problem nobody tuned.

    Args:
        permuted: whether the call gathers its inputs or scatters its outputs; whole tiles then cannot move by TMA.
    """
    if problem.tokens <= DECODE_TOKENS:
        return decode_config(problem, device)
    config = hopper_config(problem, device)
    tasks = ceil_div(problem.out_features, 128) * ceil_div(problem.tokens, config.tile_tokens)
    if not permuted and tasks >= 0.9 * device.sm_count and hopper_supports(problem, device, config) is None:
        return config
    if tasks < device.sm_count:
        return medium_config(problem, device)
    return default_linear_config(problem, device)


def hardly_shares(schedule: LinearSchedule) -> bool:
    """Whether the strips of a layout have so few input tiles in common that the portable kernel is faster."""
    return schedule.fetched_stages > HARDLY_SHARED * schedule.products


def linear_refuses(problem: LinearProblem, device: DeviceInfo, config: LinearConfig) -> str | None:
    """Why the config's kernel does not take the problem; None = it does."""
    if config.kernel == "hopper":
        return hopper_supports(problem, device, config)
    if config.kernel == "split":
        return split_supports(problem, device, config)
    if config.kernel == "decode" and problem.tokens > DECODE_TOKENS:
        return f"takes {DECODE_TOKENS} tokens at most; got {problem.tokens}"
    return None


def linear_schedule(
    problem: LinearProblem, config: LinearConfig, indptr: torch.Tensor, indices: torch.Tensor, sm_count: int
) -> LinearSchedule | SplitSchedule | None:
    """The offline schedule of a config's kernel for one layout; None where it takes none."""
    if config.kernel == "hopper":
        return make_linear_schedule(
            indptr, indices, block=problem.block, tokens=problem.tokens, tile_tokens=config.tile_tokens,
            n_programs=sm_count,
        )  # fmt: skip
    if config.kernel == "split":
        return make_split_schedule(
            indptr, indices, block=problem.block, tokens=problem.tokens, tile_tokens=config.tile_tokens,
            tile_out=config.tile_out, n_programs=sm_count,
        )  # fmt: skip
    return None


def linear_launcher(kernel: str) -> Callable[..., torch.Tensor]:
    """The launcher of a config's ``kernel``; imports Triton."""
    if kernel == "hopper":
        from tetris.kernels.hopper import linear as hopper

        return hopper.block_sparse_linear
    if kernel == "split":
        from tetris.kernels import linear_split

        return linear_split.block_sparse_linear
    if kernel == "decode":
        from tetris.kernels import linear_decode

        return linear_decode.block_sparse_linear
    from tetris.kernels import linear

    return linear.block_sparse_linear
