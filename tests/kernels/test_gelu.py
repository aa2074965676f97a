"""The polynomial GELU of the kernels against the error function in float64."""

from __future__ import annotations

import pytest
import torch

from tetris.reference import activate as reference_activate
from tetris.tolerances import relative_error, tolerance

pytestmark = pytest.mark.usefixtures("triton_kernels")


def gelu_of(x: torch.Tensor) -> torch.Tensor:
    """What the kernels' epilogue makes of fp32 ``x``; its length is a power of two."""
    import triton
    import triton.language as tl

    from tetris.kernels.epilogue import activate

    @triton.jit
    def kernel(x_ptr, y_ptr, N: tl.constexpr, ACTIVATE: tl.constexpr):
        offsets = tl.arange(0, N)
        tl.store(y_ptr + offsets, ACTIVATE(tl.load(x_ptr + offsets), "gelu"))

    y = torch.empty_like(x)
    kernel[(1,)](x, y, x.numel(), activate)
    return y


def test_its_largest_error(device: torch.device) -> None:
    x = torch.linspace(-20, 20, 16384, device=device)
    error = (gelu_of(x).double() - reference_activate(x.double(), "gelu")).abs()
    assert error.max() < 1e-5  # at x = 20: 0.5 + 0.5 is off by one rounding, times 20
    assert error[x.abs() < 6].max() < 2.5e-6


def test_float32_tolerance_on_normal_values(device: torch.device) -> None:
    x = torch.randn(16384, generator=torch.Generator().manual_seed(0)).to(device)
    assert relative_error(gelu_of(x), reference_activate(x.double(), "gelu")) < tolerance(torch.float32)


def test_special_values(device: torch.device) -> None:
    x = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, 1e-30, -1e4, 1e4, -60.0], device=device)
    y = gelu_of(x).cpu()
    assert y[0].isnan() and y[1] == float("inf")
    assert y[2] == 0 and y[3] == 0 and y[4] == pytest.approx(0.5e-30)
    assert y[5].abs() < 1e-2 and y[6] == pytest.approx(1e4) and y[7].abs() < 1e-4
