"""From a layer and an input to a launch: the kernel's config and, for the Hopper kernels, its offline schedule.

Everything here depends on shapes and on the layout only, so a layer computes it once an input shape and keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tetris.kernels.configs import (
    Conv2dConfig,
    Conv2dProblem,
    LinearConfig,
    LinearProblem,
    default_linear_config,
)
from tetris.kernels.conv2d_paths import choose_conv2d_config
from tetris.kernels.device import device_info
from tetris.kernels.hopper.heuristics import supports as hopper_conv2d_supports
from tetris.kernels.hopper.linear import supports as hopper_linear_supports
from tetris.kernels.linear_paths import DECODE_TOKENS, choose_linear_config, hardly_shares
from tetris.tuned_choices import shipped_conv2d_choice, shipped_linear_choice


@dataclass(frozen=True)
class Launch:
    """What an operation needs beyond its tensors: a config key ("" = the portable default) and schedule tensors."""

    config: str = ""
    schedule: list[Tensor] = field(default_factory=list)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` -> "float16"."""
    return str(dtype).removeprefix("torch.")


def conv2d_launch(
    problem: Conv2dProblem,
    indptr: Tensor,
    indices: Tensor,
    *,
    key: str = "",
    max_pool: bool = False,
    allow_tf32: bool = False,
) -> Launch:
    """The launch of a convolution on indptr's device.

    The config is that of ``key``, or the package's tuned choice for this or a similar problem. Where there is none, or
    its kernel does not take the problem, for example another batch size than it was tuned for, it is the analytic one.
    """
    device = device_info(indptr.device)
    config = Conv2dConfig.from_key(key) if key else shipped_conv2d_choice(problem, device, max_pool)
    if config is None or (
        config.kernel == "hopper"
        and hopper_conv2d_supports(problem, device, config, max_pool=max_pool, allow_tf32=allow_tf32) is not None
    ):
        config = choose_conv2d_config(problem, device, max_pool=max_pool, allow_tf32=allow_tf32)
    if config.kernel != "hopper":
        return Launch(config.to_key())
    from tetris.kernels.hopper.conv2d import conv2d_schedule

    schedule = conv2d_schedule(indptr, indices, problem, config, device.sm_count, indptr.device)
    return Launch(config.to_key(), schedule.tensors)


def linear_launch(problem: LinearProblem, indptr: Tensor, indices: Tensor, *, key: str = "") -> Launch:
    """The launch of a linear layer on indptr's device; the config of ``key`` as in :func:`conv2d_launch`."""
    device = device_info(indptr.device)
    config = LinearConfig.from_key(key) if key else shipped_linear_choice(problem, device)
    if (
        config is None
        or (config.kernel == "hopper" and hopper_linear_supports(problem, device, config) is not None)
        or (config.kernel == "decode" and problem.tokens > DECODE_TOKENS)
    ):
        config = choose_linear_config(problem, device)
    if config.kernel != "hopper":
        return Launch(config.to_key())
    from tetris.kernels.hopper.linear_schedule import make_linear_schedule

    schedule = make_linear_schedule(
        indptr, indices, block=problem.block, tokens=problem.tokens, tile_tokens=config.tile_tokens,
        n_programs=device.sm_count,
    )  # fmt: skip
    if not key and hardly_shares(schedule):
        return Launch(default_linear_config(problem, device).to_key())
    return Launch(config.to_key(), schedule.tensors)
