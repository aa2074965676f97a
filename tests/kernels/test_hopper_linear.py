"""The Hopper linear layer: what the compilers make of it, and on a GPU its results."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import HAS_TRITON
from tests.support.moats import nan_outputs
from tests.support.operands import LinearCase, linear_operands
from tetris import reference
from tetris.kernels.configs import LinearConfig
from tetris.kernels.hopper.linear import ring_stages
from tetris.kernels.hopper.linear_schedule import make_linear_schedule
from tetris.tolerances import relative_error, tolerance

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("tile_tokens", [128, 256])
def test_the_ring_is_deep_enough_for_both_strips(tile_tokens, residual):
    """Three stages at least: one strip may hold two stages while the other waits for the next."""
    assert ring_stages(tile_tokens, residual) >= 3


@functools.cache
def compiled() -> dict[str, dict]:
    """Case -> facts about the kernel, compiled for sm_90 in a child: here the interpreter may be active."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.hopper_linear_report"]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_compiles_to_parallel_wgmma_without_spills():
    facts = compiled()
    assert len(facts) >= 6
    assert {case: f["spill_bytes"] for case, f in facts.items() if f["spill_bytes"]} == {}
    assert {case: f["shared_bytes"] for case, f in facts.items() if f["shared_bytes"] > 232448} == {}
    assert [case for case, f in facts.items() if f["serialized"]] == []
    assert all(f["wgmma"] >= 8 for f in facts.values()), "four steps of 16 inputs in each of two warp groups"


BLOCKS = [(64, 64), (64, 32), (64, 16), (32, 32), (32, 64), (128, 64), (128, 32), (128, 16), (128, 128), (192, 64)]
FEATURES = [(512, 256), (200, 136), (320, 1032)]
EXTRAS = [(), ("bias",), ("bias", "residual"), ("residual",)]


@pytest.mark.hopper
@pytest.mark.parametrize("tokens", [(1,), (4, 33), (1000,)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_matches_the_reference(block, tokens, device, monkeypatch):
    """Every block with every number of tokens; the rest rotates through the grid. Inputs and outputs lie in NaN."""
    from tetris.kernels.hopper.linear import block_sparse_linear

    turn = BLOCKS.index(block) + 3 * len(tokens)
    out_features, in_features = FEATURES[turn % 3]
    dtype = (torch.float16, torch.bfloat16)[turn % 2]
    activation = ("none", "relu", "relu6", "silu", "gelu")[turn % 5]
    for tile_tokens in (128, 256):
        case = LinearCase(out_features, in_features, block, tokens, activation=activation, extras=EXTRAS[turn % 4])
        operands = linear_operands(case, dtype, device)
        with nan_outputs(monkeypatch):
            y = block_sparse_linear(**operands, config=LinearConfig(kernel="hopper", tile_tokens=tile_tokens))
        assert y.dtype == dtype
        assert relative_error(y, reference.block_sparse_linear(**operands)) <= tolerance(dtype)
        turn += 1


@pytest.mark.hopper
@pytest.mark.parametrize("tile_tokens", [128, 256])
@pytest.mark.parametrize("block", [(64, 64), (32, 32), (128, 16)], ids=str)
def test_cut_pairs_match_the_reference(block, tile_tokens, device, monkeypatch):
    """Few tokens and long rows: every pair is cut into several pieces."""
    from tetris.kernels.hopper.linear import block_sparse_linear

    case = LinearCase(200, 8192, block, (300,), activation="gelu", extras=("bias", "residual"))
    operands = linear_operands(case, torch.bfloat16, device)
    schedule = make_linear_schedule(
        operands["indptr"], operands["indices"], block=block, tokens=300, tile_tokens=tile_tokens, n_programs=132
    )
    assert len(schedule.counters) > 0
    config = LinearConfig(kernel="hopper", tile_tokens=tile_tokens)
    for _ in range(3):
        with nan_outputs(monkeypatch):
            y = block_sparse_linear(**operands, config=config, schedule=schedule.tensors)
        assert relative_error(y, reference.block_sparse_linear(**operands)) <= tolerance(torch.bfloat16)
        assert schedule.counters.count_nonzero() == 0


@pytest.mark.hopper
@pytest.mark.parametrize(("tokens", "inputs", "tile_tokens", "cut"), [(4096, 2048, 256, False), (300, 8192, 128, True)])
def test_is_the_same_every_time(tokens, inputs, tile_tokens, cut, device):
    """No race: bit-identical results over many runs, of whole pairs and of cut ones."""
    from tetris.kernels.hopper.linear import block_sparse_linear

    operands = linear_operands(LinearCase(2048, inputs, (64, 64), (tokens,), kept=0.3), torch.float16, device)
    schedule = make_linear_schedule(
        operands["indptr"], operands["indices"], block=(64, 64), tokens=tokens, tile_tokens=tile_tokens, n_programs=132
    )
    assert (len(schedule.counters) > 100) == cut
    options = dict(config=LinearConfig(kernel="hopper", tile_tokens=tile_tokens), schedule=schedule.tensors)
    first = block_sparse_linear(**operands, **options)
    for _ in range(50):
        assert torch.equal(first, block_sparse_linear(**operands, **options))
