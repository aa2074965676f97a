"""The search kernels compiled for GPUs that are not here: no spilled registers, little shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HAS_TRITON

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("target", ["80", "90"])
def test_search_kernels_hold_their_state_in_registers(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.search_report", target]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    kernels = json.loads(child.stdout)
    expected = {"swap_search_kernel", "cancel_cycles_kernel", "tournament_kernel", "soft_mask_kernel"}
    assert expected | {"hard_mask_kernel"} <= {kernel["name"] for kernel in kernels}
    assert [(k["name"], k["spill_bytes"]) for k in kernels if k["spill_bytes"] > 64] == []
    assert all(k["shared_bytes"] <= 49152 for k in kernels)
