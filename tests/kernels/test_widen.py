"""One-byte weights in registers: every value comes out exactly, whatever the dtype of the activations."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("triton_kernels")


def widened(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the kernels multiply with; the length of ``stored`` is a power of two."""
    import triton
    import triton.language as tl

    from tetris.kernels.widen import widen

    @triton.jit
    def kernel(w_ptr, y_ptr, N: tl.constexpr, WIDEN: tl.constexpr):
        offsets = tl.arange(0, N)
        tl.store(y_ptr + offsets, WIDEN(tl.load(w_ptr + offsets), y_ptr.dtype.element_ty))

    y = torch.empty(len(stored), dtype=dtype, device=stored.device)
    kernel[(1,)](stored, y, len(stored), widen)
    return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_every_value_is_exact(stored, dtype, device):
    values = torch.arange(256, dtype=torch.uint8, device=device).view(stored)
    values = values[torch.isfinite(values.float())]  # float8 has two NaNs, which quantising never stores
    values = torch.cat([values, values[: 256 - len(values)]])
    assert torch.equal(widened(values, dtype).double(), values.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_pass_through(dtype, device):
    x = torch.randn(64, device=device).to(dtype)
    assert torch.equal(widened(x, dtype), x)
