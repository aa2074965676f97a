"""The random sweep of the linear kernels: thousands of configurations against float64, with NaN moats.

python -m tests.kernels.linear_sweep --configurations 2000 --out sweep.csv
"""

from __future__ import annotations

import sys

import pytest
import torch

from tests.kernels.linear_variants import VARIANTS, LinearVariant
from tests.support.operands import LinearCase
from tests.support.sweep import run_problems, run_sweep
from tetris.tolerances import tolerance


def error_on_gpu(variant: LinearVariant, case: LinearCase, seed: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """The relative error of one problem."""
    return variant.error(case, seed, torch.device("cuda"), monkeypatch)


def run_variant(index: int, configurations: int, seed: int, end: float) -> list[tuple[str, float, bool]]:
    """(description, relative error, whether it is small enough) of a variant's random problems until ``end``."""
    allowed = tolerance(getattr(torch, VARIANTS[index].dtype))
    return run_problems(VARIANTS, index, configurations, seed, end, allowed, error_on_gpu)


if __name__ == "__main__":
    sys.exit(run_sweep(__doc__.splitlines()[0], VARIANTS, run_variant))
