"""The Hopper linear layer for narrow blocks: what the compilers make of it, and on a GPU its results."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import HAS_TRITON
from tests.support.moats import nan_outputs
from tests.support.operands import LinearCase, linear_operands
from tetris import reference
from tetris.kernels.configs import LinearConfig
from tetris.kernels.hopper.narrow_linear_schedule import TILE_OUT
from tetris.tolerances import relative_error, tolerance

ROOT = Path(__file__).parents[2]
CONFIG = LinearConfig(kernel="narrow")
BLOCKS = [(32, 32), (32, 64), (64, 16), (64, 32), (128, 16), (128, 32), (192, 32)]


@functools.cache
def compiled() -> dict[str, dict]:
    """Case -> facts about the kernel, compiled for sm_90 in a child: here the interpreter may be active."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.hopper_narrow_linear_report"]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_compiles_to_parallel_wgmma_without_spills():
    facts = compiled()
    assert len(facts) == 12
    assert {case: f["spill_bytes"] for case, f in facts.items() if f["spill_bytes"]} == {}
    assert {case: f["shared_bytes"] for case, f in facts.items() if f["shared_bytes"] > 232448} == {}
    assert [case for case, f in facts.items() if f["serialized"]] == []
    assert all(f["wgmma"] >= 16 for f in facts.values()), "two warp groups, two strips or halves, four steps"


FEATURES = [(512, 256), (200, 136), (328, 1032), (1088, 512)]
EXTRAS = [(), ("bias",), ("bias", "residual"), ("residual",)]


@pytest.mark.hopper
@pytest.mark.parametrize("tokens", [(1,), (4, 33), (1000,)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_matches_the_reference(block, tokens, device, monkeypatch):
    """Every block with every number of tokens; the rest rotates through the grid. Inputs and outputs lie in NaN."""
    from tetris.kernels.hopper.narrow_linear import block_sparse_linear

    first = BLOCKS.index(block) + 3 * len(tokens) + (tokens[0] > 1)
    for turn, tile_out in ((first, 256), (first + 1, 384)):
        out_features, in_features = FEATURES[turn % 4]
        dtype = (torch.float16, torch.bfloat16)[turn % 2]
        activation = ("none", "relu", "relu6", "silu", "gelu")[turn % 5]
        kept = (0.2, 0.5, 1.0)[turn % 3]
        extras = EXTRAS[turn % 4]
        config = replace(CONFIG, tile_out=tile_out)
        case = LinearCase(out_features, in_features, block, tokens, kept, activation=activation, extras=extras)
        operands = linear_operands(case, dtype, device)
        with nan_outputs(monkeypatch):
            y = block_sparse_linear(**operands, config=config)
        assert y.dtype == dtype
        assert relative_error(y, reference.block_sparse_linear(**operands)) <= tolerance(dtype)


@pytest.mark.hopper
@pytest.mark.parametrize("tile_out", TILE_OUT)
def test_is_the_same_every_time(tile_out, device):
    """No race: bit-identical results over many runs of one large problem."""
    from tetris.kernels.hopper.narrow_linear import block_sparse_linear

    operands = linear_operands(LinearCase(2048, 2048, (32, 32), (4096,), kept=0.3), torch.float16, device)
    config = replace(CONFIG, tile_out=tile_out)
    first = block_sparse_linear(**operands, config=config)
    for _ in range(50):
        assert torch.equal(first, block_sparse_linear(**operands, config=config))
