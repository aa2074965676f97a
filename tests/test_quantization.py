"""Weights in one byte: rounding, scales, and the way back."""

from __future__ import annotations

import pytest
import torch

from tests.support.operands import random_layout
from tetris.errors import UnsupportedError
from tetris.packing import pack, unpack
from tetris.quantization import LARGEST, dequantize, quantize, quantized, stored_dtype
from tetris.tolerances import relative_error

DTYPES = list(LARGEST)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_channel_uses_the_whole_range(dtype):
    weight = torch.randn(20, 30) * torch.logspace(-6, 3, 20)[:, None]
    stored, scales = quantize(weight, dtype)
    assert stored.dtype == dtype and stored.shape == weight.shape and scales.dtype == torch.float32
    assert torch.equal(stored.float().abs().amax(1), torch.full((20,), LARGEST[dtype]))
    torch.testing.assert_close(scales * LARGEST[dtype], weight.abs().amax(1))


def test_int8_is_within_half_a_step():
    weight = torch.randn(64, 200)
    stored, scales = quantize(weight, torch.int8)
    assert ((stored * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all()


def test_float8_is_within_half_a_unit_of_three_bits():
    weight = torch.randn(64, 200)
    stored, scales = quantize(weight, torch.float8_e4m3fn)
    error = (stored.float() * scales[:, None] - weight).abs()
    assert (error <= torch.maximum(weight.abs() / 16, scales[:, None] * 2.0**-10) * 1.0001).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_stay_zeros_and_representable_weights_stay_what_they_are(dtype):
    weight = torch.randn(8, 16)
    weight[3] = 0
    weight[:, ::2] = 0
    stored, scales = quantize(weight, dtype)
    assert (stored.float()[weight == 0] == 0).all() and scales[3] == 1
    again, same = quantize(quantized(weight, dtype), dtype)
    assert torch.equal(again.float(), stored.float())
    torch.testing.assert_close(same, scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 48), (50, 33)], ids=str)
def test_packed_blocks_dequantise_to_the_same_weight(shape, dtype):
    layout = random_layout(shape, (16, 8), 0.4)
    weight = unpack(pack(torch.randn(shape), layout), layout)
    stored, scales = quantize(weight, dtype)
    exact = dequantize(pack(stored, layout), scales, layout.indptr, torch.float64)
    assert torch.equal(unpack(exact, layout), quantized(weight, dtype))
    rounded = dequantize(pack(stored, layout), scales, layout.indptr, torch.float32)
    assert rounded.dtype == torch.float32 and relative_error(rounded, exact) < 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_channels_does_not_matter(dtype):
    weight, p, q = torch.randn(12, 20), torch.randperm(12), torch.randperm(20)
    assert torch.equal(quantized(weight[p][:, q], dtype), quantized(weight, dtype)[p][:, q])


def test_dtypes_go_by_torch_or_by_name():
    assert stored_dtype("int8") is stored_dtype(torch.int8) is torch.int8
    assert stored_dtype("float8_e4m3fn") is torch.float8_e4m3fn
    for wanted in ("int4", torch.float16, "torch.int8"):
        with pytest.raises(UnsupportedError, match="wanted 'int8', 'float8_e4m3fn' or None"):
            stored_dtype(wanted)
