"""What the compilers make of the portable kernels, for GPUs that are not here; see ``support/compiler.py``.

The interpreter finds wrong results; this finds what it cannot: spilled registers, too much shared memory, matrix
instructions that are missing or run one after the other.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

TARGETS = ["80", "90", "100", "gfx942"]
SHARED_LIMITS = {"80": 166912, "90": 232448, "100": 232448, "gfx942": 65536}
ROOT = Path(__file__).parents[2]


@functools.cache
def report(target: str) -> dict[str, list[dict]]:
    """Case -> facts about the kernels it launches, compiled in a child: here the interpreter may be active."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.compile_report", target]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_registers_do_not_spill_and_shared_memory_suffices(target):
    kernels = [(case, kernel) for case, kernels in report(target).items() for kernel in kernels]
    assert len(kernels) >= 13
    assert [(case, k["spill_bytes"]) for case, k in kernels if k["spill_bytes"]] == []
    limit = SHARED_LIMITS[target]
    assert [(case, k["shared_bytes"]) for case, k in kernels if k["shared_bytes"] > limit] == []


@pytest.mark.parametrize("target", TARGETS)
def test_products_use_matrix_instructions(target):
    """All but those with one token, which are sums of products."""
    products = [(case, k) for case, kernels in report(target).items() for k in kernels if "permute" not in k["name"]]
    without = [case for case, k in products if k["mma"] == 0 and "gather" not in k["name"]]
    assert [case for case in without if not case.endswith(" 1 tokens")] == []


def test_hopper_multiplies_asynchronously_and_in_parallel():
    """Blocks of 64 outputs or more use wgmma, except for few tokens, and ptxas does not serialise it (C7515)."""
    products = [
        (case, k) for case, kernels in report("90").items() for k in kernels if k["name"].split("_")[0] != "permute"
    ]
    wide = [(case, k) for case, k in products if "32x32" not in case and "25x10" not in case and k["mma"]]
    assert [case for case, k in wide if k["wgmma"] == 0 and k["name"] != "linear_decode_kernel"] == []
    assert [case for case, k in products if k["serialized"]] == []


@pytest.mark.parametrize("target", ["80", "90"])
def test_loads_are_pipelined(target):
    """Tiles arrive by asynchronous copies, except the unaligned ones of blocks of 10 fp16 inputs."""
    products = [(case, k) for case, kernels in report(target).items() for k in kernels if k["mma"]]
    assert [case for case, k in products if k["async_copies"] == 0 and "25x10" not in case] == []
