"""Compile kernels in many processes at once, so that a planner, a tuner or a bench finds them in the compiler's cache.

A Gluon kernel takes a processor some seconds to compile; a network needs dozens. Every worker builds layers of random
blocks for its share of the problems and runs them once. ``python -m tetris.autotune.compile_ahead`` is such a worker;
it reads its jobs from standard input.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tetris.autotune.problems import Problem
from tetris.autotune.space import default_config
from tetris.kernels.configs import Conv2dProblem, DeviceInfo, LinearProblem
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.layout import BlockLayout, grid_shape

MOST_WORKERS = 14
"""Each holds a GPU context and the operands of one layer."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile: a problem, a config key ("" = the default choice) and the epilogue."""

    problem: Problem
    config: str = ""
    activation: str = "none"
    max_pool: bool = False
    bias: bool = True

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "kind": type(self.problem).__name__}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Job:
        """From what :meth:`to_json` gave."""
        kinds: dict[str, Any] = {kind.__name__: kind for kind in (Conv2dProblem, LinearProblem)}
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in data["problem"].items()}
        rest = {name: data[name] for name in ("config", "activation", "max_pool", "bias")}
        return Job(kinds[data["kind"]](**values), **rest)


def distinct_kernels(jobs: Iterable[Job], device: DeviceInfo) -> list[Job]:
    """One job a kernel: jobs whose problems differ only in sizes that are not compiled in want the same one."""
    found: dict[object, Job] = {}
    for job in jobs:
        problem = job.problem
        config = job.config or default_config(problem, device, job.max_pool).to_key()
        geometry: tuple[object, ...] = ()
        if isinstance(problem, Conv2dProblem):
            geometry = problem.kernel_size, problem.stride, problem.padding, problem.dilation
        found.setdefault((problem.block, problem.dtype, geometry, config, job.activation, job.max_pool, job.bias), job)
    return list(found.values())


@torch.no_grad()
def run_once(job: Job, device: str) -> torch.Tensor:
    """Build a layer with random values for the job and run it: the launch compiles what is missing."""
    problem = job.problem
    dtype = getattr(torch, problem.dtype)
    options: dict[str, Any] = {"bias": job.bias, "activation": job.activation, "config": job.config}
    if isinstance(problem, Conv2dProblem):
        layout = even_layout((problem.c_out, problem.c_in), problem.block, problem.n_blocks, device)
        values = torch.randn(layout.n_blocks, problem.taps, *problem.block, device=device).to(dtype)
        layer: torch.nn.Module = BlockSparseConv2d(
            problem.c_in, problem.c_out, problem.kernel_size, problem.block, layout.n_blocks, problem.stride,
            problem.padding, problem.dilation, max_pool=job.max_pool, values=values, layout=layout, **options,
        )  # fmt: skip
        x = torch.empty(problem.batch, problem.c_in, problem.height, problem.width, dtype=dtype, device=device)
        return layer(x.contiguous(memory_format=torch.channels_last).zero_())
    layout = even_layout((problem.out_features, problem.in_features), problem.block, problem.n_blocks, device)
    values = torch.randn(layout.n_blocks, *problem.block, device=device).to(dtype)
    layer = BlockSparseLinear(
        problem.in_features,
        problem.out_features,
        problem.block,
        layout.n_blocks,
        values=values,
        layout=layout,
        **options,
    )
    return layer(torch.zeros(problem.tokens, problem.in_features, dtype=dtype, device=device))


def even_layout(shape: tuple[int, int], block: tuple[int, int], n_blocks: int, device: str) -> BlockLayout:
    """A layout of ``n_blocks`` blocks, dealt out evenly to the block rows; no row is empty if there are enough."""
    rows, columns = grid_shape(shape, block)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for index in range(min(n_blocks, rows * columns)):
        mask[index % rows, (index // rows + index % rows) % columns] = True
    layout = BlockLayout.from_mask(mask, shape, block).without_empty_rows()
    return BlockLayout(shape, block, layout.indptr.to(device), layout.indices.to(device))


@dataclass
class Workers:
    """Running workers; :meth:`wait` for them before timing anything."""

    processes: list[subprocess.Popen[str]]

    def wait(self, seconds: float | None = None) -> list[str]:
        """Wait for all; what failed, in the workers' words. Workers still busy after ``seconds`` are ended."""
        failures = []
        end = math.inf if seconds is None else time.monotonic() + seconds
        for process in self.processes:
            try:
                _, complaints = process.communicate(
                    timeout=None if seconds is None else max(end - time.monotonic(), 0.01)
                )
            except subprocess.TimeoutExpired:
                process.kill()
                _, complaints = process.communicate()
                complaints += f"ended after {seconds} s"
            failures += [line for line in complaints.splitlines() if line.startswith("compile_ahead:")]
            if process.returncode:
                failures.append(f"compile_ahead: a worker ended with {process.returncode}: {complaints[-300:]}")
        return failures


def start_workers(jobs: Sequence[Job], device: str = "cuda", workers: int | None = None) -> Workers:
    """Start compiling ``jobs`` in processes of their own and return at once.

    Args:
        jobs: duplicates are compiled once.
        device: where the layers run.
        workers: how many processes; None = all processors but one, at most 14.
    """
    distinct = list(dict.fromkeys(jobs))
    count = workers or max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 1))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])
    processes = []
    for share in (distinct[i::count] for i in range(min(count, len(distinct)))):
        process = subprocess.Popen(
            [sys.executable, "-m", "tetris.autotune.compile_ahead", device],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write("\n".join(json.dumps(job.to_json()) for job in share))
        process.stdin.close()
        process.stdin = None
        processes.append(process)
    return Workers(processes)


def main() -> None:
    """A worker: one job a line on standard input; a job that fails is named on standard error and left to its user."""
    torch.set_num_threads(1)
    device = sys.argv[1]
    for line in sys.stdin.read().splitlines():
        job = Job.from_json(json.loads(line))
        try:
            run_once(job, device)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            print(f"compile_ahead: {job.problem}: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
