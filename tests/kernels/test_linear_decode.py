"""The decode kernel (up to 16 tokens) against its float64 reference, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.support.moats import nan_outputs
from tests.support.operands import LinearCase, linear_operands
from tetris import reference
from tetris.kernels.configs import LinearConfig
from tetris.tolerances import relative_error, tolerance

pytestmark = pytest.mark.usefixtures("triton_kernels")

JOINED = LinearConfig(kernel="decode", tile_out=16, tile_k=64, num_stages=1)
WHOLE = LinearConfig(kernel="decode", tile_out=0, tile_k=0, num_stages=2)
EVERYTHING = ("bias", "residual", "input", "output")

CASES = [
    (LinearCase(tokens=(1,)), JOINED),
    (LinearCase(tokens=(1,)), WHOLE),
    (LinearCase(tokens=()), JOINED),
    (LinearCase(tokens=(0,)), JOINED),
    (LinearCase(tokens=(2, 8)), JOINED),
    (LinearCase(tokens=(5,), out_features=72, in_features=40, extras=EVERYTHING, activation="gelu"), JOINED),
    (LinearCase(tokens=(3,), out_features=69, in_features=39, extras=("residual",), activation="relu"), WHOLE),
    (LinearCase(tokens=(9,), in_features=55, pitch=3), JOINED),
    (LinearCase(tokens=(2,), out_features=50, in_features=20, block=(25, 10)), JOINED),
    (LinearCase(tokens=(4,), out_features=10, in_features=500, block=(5, 250)), JOINED),
]


def check(case, config, dtype, device, monkeypatch) -> None:
    """Runs it and compares; fails on NaN and on a store outside the output."""
    from tetris.kernels.linear_decode import block_sparse_linear

    operands = linear_operands(case, dtype, device)
    with nan_outputs(monkeypatch):
        y = block_sparse_linear(**operands, config=config)
    assert y.dtype == dtype and y.is_contiguous()
    assert relative_error(y, reference.block_sparse_linear(**operands)) <= tolerance(dtype)


@pytest.mark.parametrize(
    ("case", "config"), CASES, ids=lambda value: str(value) if isinstance(value, LinearCase) else ""
)
def test_matches_the_reference(case, config, device, monkeypatch):
    check(case, config, torch.float32, device, monkeypatch)


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tokens, device, monkeypatch):
    case = LinearCase(tokens=(tokens,), out_features=72, in_features=40, extras=EVERYTHING, activation="relu")
    check(case, JOINED, dtype, device, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("block", [(64, 64), (32, 32), (64, 16), (128, 128), (100, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sweep_on_the_gpu(block, tokens, dtype, device, monkeypatch):
    case = LinearCase(512, 456, block, (tokens,), activation="silu", extras=("bias", "residual"))
    for config in (JOINED, WHOLE, LinearConfig(kernel="decode", tile_out=32, tile_k=256, num_stages=3)):
        check(case, config, dtype, device, monkeypatch)
