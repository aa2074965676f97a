"""The channel permutation kernel: a permutation moves values, so results are equal, not close."""

from __future__ import annotations

import pytest
import torch

from tests.support.moats import moated, moated_image, nan_outputs

pytestmark = pytest.mark.usefixtures("triton_kernels")


def check(x: torch.Tensor, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tetris.kernels.permute import permute_channels

    permutation = torch.randperm(x.shape[dim], generator=torch.Generator().manual_seed(0)).to(x.device)
    with nan_outputs(monkeypatch):
        y = permute_channels(x, permutation, dim=dim)
    assert y.dtype == x.dtype and torch.equal(y, x.index_select(dim, permutation))
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 3, 16, 75])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_images_and_matrices(dtype, channels, device, monkeypatch):
    generator = torch.Generator().manual_seed(channels)
    check(moated_image(torch.randn(2, channels, 3, 5, generator=generator).to(device, dtype)), 1, monkeypatch)
    check(moated(torch.randn(2, 3, channels, generator=generator).to(device, dtype)), -1, monkeypatch)


def test_rows_too_long_to_hold(device, monkeypatch):
    check(moated(torch.randn(3, 20000).to(device)), -1, monkeypatch)


def test_dimensions_that_are_not_contiguous(device, monkeypatch):
    check(moated(torch.randn(2, 12, 4, 4).to(device)), 1, monkeypatch)
    check(moated(torch.randn(4, 12).to(device), pitch=5), -1, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 512, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_images_on_the_gpu(dtype, channels, device, monkeypatch):
    check(moated_image(torch.randn(8, channels, 28, 27).to(device, dtype)), 1, monkeypatch)
