"""Where the kernels run: on the GPU if there is one, otherwise in Triton's interpreter.

The interpreter must be chosen before Triton is imported, hence here, at import time. Compiling ahead of time needs a
process without it: those tests start a child. GPU-marked tests are skipped where there is no GPU; the others run
everywhere, on ``device``.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON and not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the interpreter's products are tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    capability = torch.cuda.get_device_capability() if HAS_GPU else (0, 0)
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("hopper") and capability[0] != 9:
            item.add_marker(pytest.mark.skip(reason="needs a Hopper GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernel tests put their operands."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session")
def triton_kernels() -> None:
    """Asked for by every test that runs a Triton kernel: prepares the interpreter, skips where Triton is missing."""
    if not HAS_TRITON:
        pytest.skip("needs Triton")
    if not HAS_GPU:
        from tests.support.interpreter import repair

        repair()
