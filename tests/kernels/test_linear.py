"""The portable block-sparse linear layer against its float64 reference, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.support.moats import nan_outputs
from tests.support.operands import LinearCase, linear_operands, linear_problem
from tetris import reference
from tetris.autotune.device import device_info
from tetris.kernels.configs import LinearConfig, default_linear_config
from tetris.tolerances import relative_error, tolerance

pytestmark = pytest.mark.usefixtures("triton_kernels")

SMALL = LinearConfig(tile_tokens=16, tile_k=16)
POINTERS = LinearConfig(tile_tokens=16, tile_k=16, descriptors=False)
JOINED = LinearConfig(tile_tokens=32, tile_k=64, descriptors=False, permute_first=False)
EVERYTHING = ("bias", "residual", "input", "output")

CASES = [
    (LinearCase(), SMALL),
    (LinearCase(), POINTERS),
    (LinearCase(), JOINED),
    (LinearCase(tokens=(2, 3, 5)), SMALL),
    (LinearCase(tokens=(1,)), SMALL),
    (LinearCase(tokens=()), SMALL),
    (LinearCase(tokens=(0,)), SMALL),
    (LinearCase(out_features=72, in_features=40, extras=("bias", "residual"), activation="relu"), SMALL),
    (LinearCase(out_features=72, in_features=40, extras=EVERYTHING, activation="silu"), POINTERS),
    (LinearCase(out_features=72, in_features=40, extras=EVERYTHING, activation="gelu"), JOINED),
    (LinearCase(out_features=72, in_features=40, extras=("output", "residual"), activation="relu6"), SMALL),
    (LinearCase(out_features=69, in_features=39), SMALL),
    (LinearCase(in_features=56, pitch=8), SMALL),
    (LinearCase(in_features=55, pitch=3), JOINED),
    (LinearCase(out_features=50, in_features=20, block=(25, 10)), SMALL),
    (LinearCase(out_features=50, in_features=20, block=(25, 10)), JOINED),
    (LinearCase(out_features=10, in_features=500, block=(5, 250)), JOINED),
    (LinearCase(), LinearConfig(tile_tokens=16, tile_out=16, group_rows=3)),
]


def check(
    case: LinearCase,
    config: LinearConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    allow_tf32: bool = False,
) -> None:
    """Runs it, by the default config for None, and compares; fails on NaN and on a store outside the output."""
    from tetris.kernels.linear import block_sparse_linear

    operands = linear_operands(case, dtype, device)
    config = config or default_linear_config(linear_problem(case, operands), device_info())
    with nan_outputs(monkeypatch):
        y = block_sparse_linear(**operands, allow_tf32=allow_tf32, config=config)
    assert y.dtype == dtype and y.is_contiguous()
    assert relative_error(y, reference.block_sparse_linear(**operands)) <= tolerance(dtype, allow_tf32)


@pytest.mark.parametrize(
    ("case", "config"), CASES, ids=lambda value: str(value) if isinstance(value, LinearCase) else ""
)
def test_matches_the_reference(case, config, device, monkeypatch):
    check(case, config, torch.float32, device, monkeypatch)


@pytest.mark.parametrize("config", [SMALL, JOINED], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, config, device, monkeypatch):
    case = LinearCase(out_features=72, in_features=40, extras=("bias", "residual", "output"), activation="gelu")
    check(case, config, dtype, device, monkeypatch)


BLOCKS = [(64, 64), (64, 32), (64, 16), (32, 32), (128, 64), (128, 16), (128, 128), (16, 16), (100, 40)]
TOKENS = [(1,), (7,), (4, 33), (1000,)]
FEATURES = [(512, 256), (200, 136), (133, 75)]
MODES = [("float16", False), ("bfloat16", False), ("float32", True), ("float32", False)]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_sweep_on_the_gpu(block, tokens, device, monkeypatch):
    """Every block with every number of tokens; features, dtypes and optional operands rotate through the grid."""
    turn = BLOCKS.index(block) * len(TOKENS) + TOKENS.index(tokens)
    out_features, in_features = FEATURES[turn % 3]
    name, allow_tf32 = MODES[(turn + turn // 4) % 4]
    case = LinearCase(
        out_features=out_features,
        in_features=in_features,
        block=block,
        tokens=tokens,
        activation=("relu", "none", "silu", "gelu", "relu6")[turn % 5],
        extras=(("bias",), EVERYTHING, ("bias", "residual"), ())[turn // 2 % 4],
    )
    check(case, None, getattr(torch, name), device, monkeypatch, allow_tf32)
