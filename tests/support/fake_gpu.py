"""Stand-ins for a GPU: its facts, its clock, and tensors that say they lie on one. Arithmetic stays real."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from tetris import reference
from tetris.autotune.timer import Timing
from tetris.kernels.configs import DeviceInfo

H200 = DeviceInfo("NVIDIA H200", (9, 0), 132, "3.6.0")
A100 = DeviceInfo("NVIDIA A100", (8, 0), 108, "3.6.0")


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU: sends searches along their GPU paths, in Triton's interpreter."""

    is_cuda = True


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, sharing its memory, as an :class:`OnGpu`."""
    return tensor.as_subclass(OnGpu)


def clock(times_us: Mapping[str, float], otherwise: float = 50.0) -> Callable[..., dict[str, Timing]]:
    """A ``time_us`` that runs everything once and answers with these times."""

    def time_us(callables: Mapping[str, Callable[[], object]], **options: Any) -> dict[str, Timing]:
        for function in callables.values():
            function()
        taken = {name: times_us.get(name, otherwise) for name in callables}
        return {name: Timing(us, us - 1, us + 1, 1) for name, us in taken.items()}

    return time_us


def conv2d_twin(x: torch.Tensor, *operands: Any, config: Any = None, schedule: Any = None, **options: Any) -> Any:
    """The Hopper convolution's launcher in float64 on any device, pooling included."""
    pool = options.pop("max_pool", False)
    y = reference.block_sparse_conv2d(x, *operands, **options)
    return (F.max_pool2d(y, 2) if pool else y).to(x.dtype)


def linear_twin(x: torch.Tensor, *operands: Any, config: Any = None, schedule: Any = None, **options: Any) -> Any:
    """A linear launcher in float64 on any device."""
    return reference.block_sparse_linear(x, *operands, **options).to(x.dtype)


class KernelRecorder:
    """Stands where a compiled kernel would: remembers grid, arguments and constants of its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self.launches.append((grid, arguments, constants))

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **constants: Any) -> None:
        self.launches.append((grid, arguments, constants))


def module_with(name: str, **attributes: Any) -> types.ModuleType:
    """A module of that name with these attributes, to stand in ``sys.modules``."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    return module
