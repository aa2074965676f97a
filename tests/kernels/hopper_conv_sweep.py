"""The random sweep of the Hopper convolution: thousands of configurations against float64, with NaN moats.

    python -m tests.kernels.hopper_conv_sweep --configurations 2000 --out sweep.csv

Prints every configuration that is wrong and a summary; the exit status is 1 if there is one. All variants compile in
parallel first; afterwards a configuration takes some milliseconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.kernels.hopper_conv_variants import VARIANTS
from tests.kernels.test_hopper_conv2d import error
from tetris.tolerances import tolerance


def compile_variant(index: int) -> str:
    """Run one problem of a variant in a process of its own: leaves the kernel in the compiler's cache on disk."""
    variant = VARIANTS[index]
    with pytest.MonkeyPatch.context() as monkeypatch:
        return f"{error(variant, variant.problem(random.Random(0)), 0, monkeypatch):.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configurations", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after this long")
    parser.add_argument("--out", help="CSV of every configuration and its error")
    args = parser.parse_args()
    start = time.time()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=context) as pool:
        compiled = [pool.submit(compile_variant, index) for index in range(len(VARIANTS))]
        broken = {i for i, future in enumerate(compiled) if future.exception() is not None}
    for i in sorted(broken):
        print(f"FAILED {VARIANTS[i]}: {str(compiled[i].exception())[:500]}")
    print(f"compiled {len(VARIANTS)} variants in {time.time() - start:.0f} s", flush=True)
    generator = random.Random(1)
    lines, wrong, done = ["variant;problem;error"], 0, 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        while done < args.configurations and time.time() - start < args.seconds:
            index = done % len(VARIANTS)
            variant = VARIANTS[index]
            case = variant.problem(generator)
            done += 1
            if index in broken:
                continue
            e = error(variant, case, done, monkeypatch)
            lines.append(f"{variant};{case};{e:.3e}")
            if not e <= tolerance(getattr(torch, variant.dtype), True):
                wrong += 1
                print(f"WRONG {e:.2e} {variant} {case} kept {case.kept}", flush=True)
    if args.out:
        with open(args.out, "w") as file:
            file.write("\n".join(lines) + "\n")
    print(f"{done} configurations, {wrong} wrong, {len(broken)} variants failed, {time.time() - start:.0f} s")
    return int(wrong > 0 or len(broken) > 0)


if __name__ == "__main__":
    sys.exit(main())
