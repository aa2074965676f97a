"""A random sweep of compiled variants: every process takes one variant after the other, compiles it and runs its share.

Prints every configuration that is wrong and a summary; the exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import pytest
import torch

RunVariant = Callable[[int, int, int, float], list[tuple[str, float, bool]]]
"""(index of the variant, configurations, seed, when to stop) -> what ran, its relative error, whether it is allowed."""


def run_problems(
    variants: Sequence[Any],
    index: int,
    configurations: int,
    seed: int,
    end: float,
    allowed: float,
    error: Callable[[Any, Any, int, pytest.MonkeyPatch], float],
) -> list[tuple[str, float, bool]]:
    """What :data:`RunVariant` returns: a variant's random problems until ``end``."""
    torch.set_num_threads(1)
    variant, generator = variants[index], random.Random(f"{seed} {index}")
    results = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for number in range(configurations):
            if time.time() > end:
                break
            case = variant.problem(generator)
            e = error(variant, case, seed + number, monkeypatch)
            results.append((f"{variant};{case};{case.kept}", e, e <= allowed))
    return results


def run_sweep(
    description: str, variants: Sequence[object], run_variant: RunVariant, argv: Sequence[str] | None = None
) -> int:
    """The command line of a sweep; ``run_variant`` is a function of a module, so that other processes find it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--configurations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no configuration after this long")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--out", help="CSV of every configuration and its error")
    args = parser.parse_args(argv)
    start = time.time()
    each = -(-args.configurations // len(variants))
    lines, wrong, failed = ["variant;problem;kept;error"], 0, 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        end = start + args.seconds
        jobs = {pool.submit(run_variant, index, each, args.seed, end): index for index in range(len(variants))}
        for job in as_completed(jobs):
            if problem := job.exception():
                failed += 1
                print(f"FAILED {variants[jobs[job]]}: {str(problem)[:500]}", flush=True)
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
