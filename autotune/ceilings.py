"""What the device can do at best: the copy bandwidth and the rate of a large matrix product, measured, not quoted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tetris.autotune.timer import time_us


@dataclass(frozen=True)
class Ceilings:
    """A device's measured limits for one dtype.

    Attributes:
        bytes_per_s: device-to-device copy, bytes read plus written.
        flop_per_s: a large square matrix product.
    """

    bytes_per_s: float
    flop_per_s: float

    def least_us(self, flop: float, size_bytes: float) -> float:
        """The roofline: microseconds that work of ``flop`` and ``size_bytes`` takes at least."""
        return max(flop / self.flop_per_s, size_bytes / self.bytes_per_s) * 1e6


H200_FP16 = Ceilings(bytes_per_s=4.27e12, flop_per_s=714e12)
"""Measured on an H200: 1 GiB copy, 8192^3 fp16 product (torch 2.11.0)."""


def measure_ceilings(device: str | torch.device, dtype: torch.dtype = torch.float16, seconds: float = 0.5) -> Ceilings:
    """Measure both limits; takes about ``seconds``.

    A GPU copies 1 GiB and multiplies 8192^3 matrices; a CPU copies 128 MiB and multiplies 1024^3.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    n_bytes, n = (1 << 29, 8192) if on_gpu else (1 << 26, 1024)
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    times = time_us(
        {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b)},
        device=device,
        warmup=2,
        repeats=20,
        budget_s=seconds,
    )
    return Ceilings(2e6 * n_bytes / times["copy"].median_us, 2e6 * n**3 / times["matmul"].median_us)
