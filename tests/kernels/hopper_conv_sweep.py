"""The random sweep of the Hopper convolution: thousands of configurations against float64, with NaN moats.

python -m tests.kernels.hopper_conv_sweep --configurations 2000 --out sweep.csv
"""

from __future__ import annotations

import sys

import torch

from tests.kernels.hopper_conv_variants import VARIANTS
from tests.kernels.test_hopper_conv2d import error
from tests.support.sweep import run_problems, run_sweep
from tetris.tolerances import tolerance


def run_variant(index: int, configurations: int, seed: int, end: float) -> list[tuple[str, float, bool]]:
    """(description, relative error, whether it is small enough) of a variant's random problems until ``end``."""
    allowed = tolerance(getattr(torch, VARIANTS[index].dtype), True)
    return run_problems(VARIANTS, index, configurations, seed, end, allowed, error)


if __name__ == "__main__":
    sys.exit(run_sweep(__doc__.splitlines()[0], VARIANTS, run_variant))
