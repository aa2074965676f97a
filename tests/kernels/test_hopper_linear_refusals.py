"""What the two Hopper linear kernels, for wide and for narrow blocks, take and refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.conftest import HAS_TRITON
from tests.support.operands import LinearCase, linear_operands
from tetris.errors import UnsupportedError
from tetris.kernels.configs import DeviceInfo, LinearConfig, LinearProblem
from tetris.kernels.linear_paths import linear_launcher, linear_refuses

H200 = DeviceInfo("NVIDIA H200", (9, 0), 132, "3.6.0")
PROBLEM = LinearProblem(8192, 4096, 4096, (64, 32), "float16", 2212)
WIDE = LinearConfig(kernel="hopper", tile_tokens=256)
NARROW = LinearConfig(kernel="narrow")


@pytest.mark.parametrize(
    ("config", "block"),
    [(WIDE, block) for block in ((32, 32), (64, 16), (64, 64), (128, 16), (128, 128), (256, 64), (32, 16))]
    + [(NARROW, block) for block in ((32, 32), (32, 64), (64, 16), (64, 32), (128, 16), (128, 32), (192, 32))],
    ids=str,
)
def test_takes_the_blocks_that_fill_its_tiles(config, block):
    assert linear_refuses(replace(PROBLEM, block=block), H200, config) is None


@pytest.mark.parametrize("config", [WIDE, NARROW], ids=lambda config: config.kernel)
@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (PROBLEM, replace(H200, capability=(8, 0)), "capability"),
        (PROBLEM, replace(H200, triton_version="3.5.1"), "Triton 3.6"),
        (replace(PROBLEM, dtype="float32"), H200, "float16"),
        (replace(PROBLEM, weight_dtype="int8"), H200, "x's dtype"),
        (replace(PROBLEM, block=(16, 16)), H200, "outputs"),
        (replace(PROBLEM, block=(96, 64)), H200, "outputs"),
        (replace(PROBLEM, block=(64, 24)), H200, "inputs"),
        (replace(PROBLEM, in_features=4100), H200, "multiples of 8"),
    ],
)
def test_says_why_it_does_not_support(config, problem, device, reason):
    assert reason in (linear_refuses(problem, device, config) or "")


@pytest.mark.parametrize(
    ("config", "block", "reason"),
    [
        (WIDE, (64, 96), "inputs"),
        (replace(WIDE, tile_tokens=64), (64, 64), "tile_tokens"),
        (NARROW, (32, 16), "weights"),
        (NARROW, (64, 64), "fewer than 64"),
        (NARROW, (64, 128), "inputs"),
        (replace(NARROW, tile_tokens=256), (32, 32), "tile_tokens"),
        (replace(NARROW, tile_out=512), (32, 32), "tile_out"),
    ],
)
def test_says_which_tiles_it_takes(config, block, reason):
    assert reason in (linear_refuses(replace(PROBLEM, block=block), H200, config) or "")


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("config", [WIDE, NARROW], ids=lambda config: config.kernel)
def test_refuses_permutations(config):
    operands = linear_operands(LinearCase(block=(64, 32), extras=("input",)), torch.float16, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="permutations"):
        linear_launcher(config.kernel)(**operands, config=config)
