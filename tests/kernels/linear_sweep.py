"""The random sweep of the linear kernels: thousands of configurations against float64, with NaN moats.

python -m tests.kernels.linear_sweep --configurations 2000 --out sweep.csv
"""

from __future__ import annotations

import random
import sys
import time

import pytest
import torch

from tests.kernels.linear_variants import VARIANTS
from tests.support.sweep import run_sweep
from tetris.tolerances import tolerance


def run_variant(index: int, configurations: int, seed: int, end: float) -> list[tuple[str, float, bool]]:
    """(description, relative error, whether it is small enough) of a variant's random problems until ``end``."""
    torch.set_num_threads(1)
    variant, generator = VARIANTS[index], random.Random(f"{seed} {index}")
    allowed, device = tolerance(getattr(torch, variant.dtype)), torch.device("cuda")
    results = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for number in range(configurations):
            if time.time() > end:
                break
            case = variant.problem(generator)
            e = variant.error(case, seed + number, device, monkeypatch)
            results.append((f"{variant};{case};{case.kept}", e, e <= allowed))
    return results


if __name__ == "__main__":
    sys.exit(run_sweep(__doc__.splitlines()[0], VARIANTS, run_variant))
