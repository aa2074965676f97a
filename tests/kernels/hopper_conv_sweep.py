"""The random sweep of the Hopper convolution: thousands of configurations against float64, with NaN moats.

    python -m tests.kernels.hopper_conv_sweep --configurations 2000 --out sweep.csv

Every process takes one variant after the other: compiles it and runs its share of the problems. Prints every
configuration that is wrong and a summary; the exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import pytest
import torch

from tests.kernels.hopper_conv_variants import VARIANTS
from tests.kernels.test_hopper_conv2d import error
from tetris.tolerances import tolerance


def run_variant(index: int, configurations: int, seed: int, end: float) -> list[tuple[str, float, bool]]:
    """(description, relative error, whether it is small enough) of a variant's random problems until ``end``."""
    torch.set_num_threads(1)
    variant, generator = VARIANTS[index], random.Random(f"{seed} {index}")
    allowed = tolerance(getattr(torch, variant.dtype), True)
    results = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for number in range(configurations):
            if time.time() > end:
                break
            case = variant.problem(generator)
            e = error(variant, case, seed + number, monkeypatch)
            results.append((f"{variant};{case};{case.kept}", e, e <= allowed))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configurations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no configuration after this long")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--out", help="CSV of every configuration and its error")
    args = parser.parse_args(argv)
    start = time.time()
    each = -(-args.configurations // len(VARIANTS))
    lines, wrong, failed = ["variant;problem;kept;error"], 0, 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        end = start + args.seconds
        jobs = {pool.submit(run_variant, index, each, args.seed, end): index for index in range(len(VARIANTS))}
        for job in as_completed(jobs):
            if problem := job.exception():
                failed += 1
                print(f"FAILED {VARIANTS[jobs[job]]}: {str(problem)[:500]}", flush=True)
                continue
            for name, e, right in job.result():
                lines.append(f"{name};{e:.3e}")
                if not right:
                    wrong += 1
                    print(f"WRONG {e:.2e} {name}", flush=True)
    if args.out:
        with open(args.out, "w") as file:
            file.write("\n".join(lines) + "\n")
    seconds = time.time() - start
    print(
        f"{len(lines) - 1} configurations, seed {args.seed}: {wrong} wrong; {failed} variants failed; {seconds:.0f} s"
    )
    return int(wrong > 0 or failed > 0)


if __name__ == "__main__":
    sys.exit(main())
