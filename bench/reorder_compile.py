"""Compile the searches' kernels ahead of a bench run, in processes side by side: it then finds them in the cache."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from tetris.bench.reorder_cases import ReorderCase
from tetris.reordering import reorder

METHODS = ("paper", "batched", "exact", "annealed")
"""That launch kernels of their own."""
MOST_PROCESSES = 12

Problem = tuple[tuple[int, ...], tuple[int, int], float]
"""(shape, block, sparsity) of a matrix."""


def problems_of(cases: Sequence[ReorderCase], layers: Sequence[tuple[str, tuple[int, ...], float]]) -> list[Problem]:
    """What kernels depend on, once each, the largest weights first; ``layers``: in 32x32 blocks."""
    found = {(tuple(case.weight.shape[:2]), case.block): case.sparsity for case in cases}
    found |= {(shape[:2], (32, 32)): sparsity for _, shape, sparsity in layers}
    problems = [(shape, block, sparsity) for (shape, block), sparsity in found.items()]
    return sorted(problems, key=lambda problem: -torch.Size(problem[0]).numel())


def search_briefly(problem: Problem) -> None:
    """Every search of a random weight on the GPU, two steps each."""
    shape, block, sparsity = problem
    weight = torch.rand(shape, device="cuda")
    for method in METHODS:
        reorder(weight, block, sparsity, method, steps=2)


def compile_ahead(problems: Sequence[Problem]) -> None:
    """Fill the cache; returns when all is there."""
    processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 1, len(problems)))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(search_briefly, problems):
            pass
