"""What the compilers make of the Hopper convolution on sm_90; needs no GPU. See ``test_compiled.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HAS_TRITON
from tests.kernels.hopper_conv_variants import VARIANTS
from tetris.kernels.hopper.heuristics import SHARED_BYTES

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

ROOT = Path(__file__).parents[2]
QUICK = (2, 8, 13, 15, 27, 41, 46)
"""Tall tiles; pairs of rows with pooling; tf32; stride 2; a batch of one; rows without blocks; rows cut into pieces."""


def facts(*which: int | str) -> dict[str, dict]:
    """Variant -> facts, compiled in a child: here the interpreter may be active. See the child for ``which``."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.hopper_conv_report", *map(str, which)]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def check(report: dict[str, dict]) -> None:
    assert [name for name, k in report.items() if k["spill_bytes"]] == []
    assert [name for name, k in report.items() if k["serialized"]] == []
    assert [name for name, k in report.items() if not 0 < k["shared_bytes"] <= SHARED_BYTES] == []
    assert [name for name, k in report.items() if k["wgmma"] == 0 or k["async_copies"] == 0] == []


def test_typical_variants_fit_and_multiply_asynchronously():
    report = facts(*QUICK)
    assert len(report) == len(QUICK)
    check(report)


def test_layers_that_pool_get_configs_that_compile():
    """VGG16's pooled layers in 64x32 blocks at batches from 1 to 128, where nothing is tuned."""
    report = facts("pooled-defaults")
    assert len(report) >= 10
    check(report)


@pytest.mark.slow
@pytest.mark.skipif("TETRIS_COMPILE_ALL" not in os.environ, reason="minutes of compiling: set TETRIS_COMPILE_ALL")
def test_the_other_variants_and_every_first_choice_compile():
    """All of the sweep's variants; every layer of VGG16 and of the conv bench at all batches and blocks."""
    check(facts(*(index for index in range(len(VARIANTS)) if index not in QUICK)))
    check(facts("defaults"))
