"""Linear kernels with weights in int8 and float8 against their float64 reference, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.support.moats import nan_outputs
from tests.support.operands import LinearCase, linear_operands, linear_problem
from tetris import reference
from tetris.autotune.device import device_info
from tetris.kernels.configs import LinearConfig
from tetris.kernels.cpu import linear as cpu_linear
from tetris.kernels.linear_paths import choose_linear_config, linear_launcher
from tetris.tolerances import relative_error, tolerance

WEIGHTS = ("int8", "float8_e4m3fn")
EVERYTHING = ("bias", "residual", "input", "output")
DESCRIPTORS = LinearConfig(tile_tokens=16, tile_k=16)
POINTERS = LinearConfig(tile_tokens=16, tile_k=32, descriptors=False, permute_first=False)
DECODE = LinearConfig(kernel="decode", tile_out=16, tile_k=64, num_stages=1)
ONE = LinearConfig(kernel="vector", tile_tokens=1, tile_out=16, tile_k=64, num_stages=1)

CASES = [
    ({}, DESCRIPTORS),
    ({"out_features": 72, "in_features": 40, "extras": EVERYTHING, "activation": "gelu"}, POINTERS),
    ({"out_features": 69, "in_features": 39, "extras": ()}, DESCRIPTORS),
    ({"out_features": 50, "in_features": 20, "block": (25, 10)}, POINTERS),
    ({"tokens": (1,)}, DECODE),
    ({"tokens": (1,)}, ONE),
    ({"tokens": (5,), "out_features": 72, "in_features": 40, "extras": EVERYTHING, "activation": "silu"}, DECODE),
    ({"tokens": (1,), "out_features": 50, "in_features": 20, "block": (25, 10), "extras": ()}, ONE),
]


def check(case: LinearCase, config: LinearConfig, dtype: torch.dtype, device, monkeypatch) -> None:
    """Runs it and compares with the exactly dequantised weights; fails on NaN and on a store outside the output."""
    operands = linear_operands(case, dtype, device)
    with nan_outputs(monkeypatch):
        y = linear_launcher(config.kernel)(**operands, config=config)
    assert y.dtype == dtype and operands["values"].element_size() == 1
    assert relative_error(y, reference.block_sparse_linear(**operands)) <= tolerance(dtype)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("options", "config"), CASES, ids=lambda value: getattr(value, "kernel", None) or "")
def test_matches_the_reference(options, config, weights, device, monkeypatch):
    check(LinearCase(**options, weight_dtype=weights), config, torch.float32, device, monkeypatch)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("config", [DESCRIPTORS, POINTERS, DECODE], ids=["descriptors", "pointers", "decode"])
def test_half_precision(config, weights, dtype, device, monkeypatch):
    tokens = (16,) if config.kernel == "decode" else (19,)
    case = LinearCase(72, 40, tokens=tokens, extras=("bias", "residual"), activation="relu", weight_dtype=weights)
    check(case, config, dtype, device, monkeypatch)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("options", [options for options, _ in CASES], ids=str)
def test_the_cpu_path_matches_the_reference(options, weights):
    operands = linear_operands(LinearCase(**options, weight_dtype=weights), torch.float32, torch.device("cpu"))
    y = cpu_linear.block_sparse_linear(**operands)
    assert relative_error(y, reference.block_sparse_linear(**operands)) <= tolerance(torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 16, 130, 1000])
@pytest.mark.parametrize("block", [(64, 64), (32, 32), (64, 16), (128, 64), (100, 40)], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_sweep_on_the_gpu(weights, block, tokens, device, monkeypatch):
    """Default configs; dtypes and features rotate through the grid."""
    turn = tokens + block[0] + block[1]
    dtype = (torch.float16, torch.bfloat16, torch.float32)[turn % 3]
    out_features, in_features = ((512, 456), (1100, 260), (260, 1100))[turn % 3]
    options = {"activation": "silu", "extras": ("bias", "residual"), "weight_dtype": weights}
    case = LinearCase(out_features, in_features, block, (tokens,), **options)
    problem = linear_problem(case, linear_operands(case, dtype, device))
    check(case, choose_linear_config(problem, device_info()), dtype, device, monkeypatch)
