"""Where a network's time goes: its kernels by time, sorted into what they are for, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

KINDS: dict[str, tuple[str, ...]] = {
    "permutation": ("permute_rows_kernel", "gather_rows_kernel", "permute_channels", "index_select", "indexSelect"),
    "pointwise": ("triton_", "elementwise", "max_pool", "avg_pool", "reduce_kernel", "copy"),
    "stem": ("stem_conv2d",),
    "block-sparse": (
        "conv2d_kernel", "conv2d_descriptor", "conv2d_pointer", "block_sparse_linear", "linear_descriptor",
        "linear_pointer", "linear_decode", "linear_split", "linear_vector",
    ),
    "library": ("mm", "nvjet", "cutlass", "cudnn", "xmma", "conv", "splitK", "linear"),
}  # fmt: skip
"""Kinds of kernels by parts of their names, the first that fits; everything else is "other"."""

SHOWN = 16
"""Kernels that a printed profile lists."""


def kind_of(kernel: str) -> str:
    """What a kernel is for."""
    lower = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part.lower() in lower for part in parts)), "other")


@dataclass(frozen=True)
class KernelProfile:
    """Kernels of one run: name -> (calls, microseconds). ``print`` it."""

    kernels: dict[str, tuple[int, float]]

    @property
    def total_us(self) -> float:
        """Microseconds of all kernels."""
        return sum(us for _, us in self.kernels.values())

    def share(self, kind: str) -> float:
        """Fraction of the time in kernels of a kind; 0 where nothing ran."""
        found = sum(us for name, (_, us) in self.kernels.items() if kind_of(name) == kind)
        return found / self.total_us if self.total_us else 0.0

    def __str__(self) -> str:
        from tabulate import tabulate

        ordered = sorted(self.kernels.items(), key=lambda item: -item[1][1])
        lines = [
            (name[:90], kind_of(name), calls, f"{us:.1f}", f"{us / self.total_us:.1%}") for name, (calls, us) in ordered
        ]
        kinds = dict.fromkeys(kind_of(name) for name, _ in ordered)
        summary = ", ".join(f"{kind} {self.share(kind):.1%}" for kind in kinds)
        head = ("kernel", "kind", "calls", "us", "share")
        return f"{tabulate(lines, headers=head, disable_numparse=True)}\n{self.total_us:.1f} us: {summary}"


def profile_kernels(run: Callable[[], object], device: str, repeats: int = 3) -> KernelProfile:
    """The kernels of one call of ``run``, averaged over ``repeats``; on a CPU torch's operators, without their callers.

    Times of graphed kernels are real, but the profiler slows what lies between them: compare shares, not sums.
    """
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    run()
    with profile(activities=activities) as recorded:
        for _ in range(repeats):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    kernels = {}
    for event in recorded.key_averages():
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if us > 0:
            kernels[event.key] = (event.count // repeats, us / repeats)
    return KernelProfile(kernels)
