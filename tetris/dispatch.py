"""From a layer and an input to a launch: the kernel's config and, for the Hopper kernels, its offline schedule.

Everything here depends on shapes and on the layout only, so a layer computes it once an input shape and keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tetris.kernels.configs import (
    Conv2dConfig,
    Conv2dProblem,
    DeviceInfo,
    LinearConfig,
    LinearProblem,
)
from tetris.kernels.conv2d_paths import choose_conv2d_config, conv2d_refuses
from tetris.kernels.device import device_info
from tetris.kernels.few_tokens import depends_on_layout
from tetris.kernels.hopper.heuristics import supports as hopper_conv2d_supports
from tetris.kernels.hopper.pointwise_conv2d import fastest_pointwise, pointwise_schedule
from tetris.kernels.linear_paths import linear_refuses, linear_schedule, untuned_linear
from tetris.tuned_choices import shipped_conv2d_choice, shipped_linear_choice

SECTOR_BYTES = 32
"""What memory writes at once."""


@dataclass(frozen=True)
class Launch:
    """What an operation needs beyond its tensors: a config key ("" = the portable default) and schedule tensors.

    ``permutes_output``: the kernel stores permuted channels itself, cheaper than a pass of its own; others do not.
    ``pools``: so it does with max-pooling.
    """

    config: str = ""
    schedule: list[Tensor] = field(default_factory=list)
    permutes_output: bool = False
    pools: bool = False


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
    values: Tensor | None = None,
    output_group: int = 0,
) -> Launch:
    """The launch of a convolution on indptr's device; it may keep a copy of the packed ``values``.

    ``output_group``: the outputs are permuted in groups of so many channels; 0 = they are not, or one by one. Groups
    that fill no sector of memory are left to the permute kernel, which is faster: on an H200 271 us against 309 for
    512 -> 512 channels at 28 x 28 in groups of 8, but 184 in groups of 16.

    The config is that of ``key``, or the package's tuned choice for this or a similar problem. Where there is none, or
    its kernel does not take the problem, for example another batch size than it was tuned for, it is the analytic one.
    """
    device = device_info(indptr.device)
    output_group = output_group if output_group * getattr(torch, problem.dtype).itemsize >= SECTOR_BYTES else 0
    config = Conv2dConfig.from_key(key) if key else shipped_conv2d_choice(problem, device, max_pool)
    options = dict(max_pool=max_pool, allow_tf32=allow_tf32)
    if config is None or conv2d_refuses(problem, device, config, **options) is not None:
        config, key = choose_conv2d_config(problem, device, **options, permuted=output_group > 0), ""
    if config.kernel == "hopper_linear":
        arguments = (problem, config, indptr, indices, device.sm_count)
        config, pixels = (config, pointwise_schedule(*arguments)) if key else fastest_pointwise(*arguments)
        return Launch(config.to_key(), pixels.tensors)
    if config.kernel != "hopper":
        return Launch(config.to_key())
    from tetris.kernels.hopper.conv2d import conv2d_schedule

    grouped = replace(config, output_group=output_group)
    permutes = (
        output_group > 0
        and hopper_conv2d_supports(problem, device, grouped, max_pool=max_pool, allow_tf32=allow_tf32) is None
    )
    config = grouped if permutes else config
    schedule = conv2d_schedule(indptr, indices, problem, config, device.sm_count, indptr.device, values)
    return Launch(config.to_key(), schedule.tensors, permutes, max_pool)


def linear_launch(
    problem: LinearProblem,
    indptr: Tensor,
    indices: Tensor,
    *,
    key: str = "",
    device: DeviceInfo | None = None,
    shipped: bool = True,
) -> Launch:
    """The launch of a linear layer; the config of ``key`` as in :func:`conv2d_launch`.

    ``device``: instead of indptr's. ``shipped``: whether the package's tuned choices count.
    """
    device = device or device_info(indptr.device)
    longest_row = int(indptr.diff().max())
    config = LinearConfig.from_key(key) if key else shipped_linear_choice(problem, device) if shipped else None
    if config is not None and not key and depends_on_layout(problem, config, longest_row):
        config = None  # tuned on another layout
    if config is None or linear_refuses(problem, device, config) is not None:
        config, schedule = untuned_linear(problem, device, indptr, indices)
    else:
        schedule = linear_schedule(problem, config, indptr, indices, device.sm_count)
    return Launch(config.to_key(), [] if schedule is None else schedule.tensors)
