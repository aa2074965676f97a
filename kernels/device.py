"""The GPU that a launch will run on: the facts that choose a config, asked of the driver once."""

from __future__ import annotations

import functools

import torch

from tetris.errors import UnsupportedError
from tetris.kernels.configs import DeviceInfo


@functools.cache
def device_info(device: torch.device) -> DeviceInfo:
    """The facts about a GPU that choose a config.

    Raises:
        UnsupportedError: Triton is not installed (it exists for Linux only).
    """
    try:
        import triton
    except ImportError as error:
        raise UnsupportedError(
            f"GPU kernels: wanted Triton for {device}; it is not installed on this platform; install `triton` "
            "(Linux only) or move the model and its inputs to the CPU"
        ) from error
    properties = torch.cuda.get_device_properties(device)
    return DeviceInfo(
        name=properties.name,
        capability=(properties.major, properties.minor),
        sm_count=properties.multi_processor_count,
        triton_version=triton.__version__,
        backend="hip" if torch.version.hip else "cuda",
    )
