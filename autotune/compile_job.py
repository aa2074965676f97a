"""One kernel to compile, described by plain data, and how a process compiles it: build the layer and run it once.

A worker (:func:`work`) reads a job a line from standard input and answers each with a line on standard output: the
reason why it failed or "", the seconds it took, and what they went into (:data:`PARTS`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from tetris.autotune.problems import Problem, SparseLayer
from tetris.autotune.space import default_config
from tetris.autotune.steps import Steps
from tetris.kernels.configs import Conv2dProblem, DeviceInfo, LinearProblem
from tetris.kernels.recording import unrecorded
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.layout import BlockLayout, grid_shape
from tetris.tuned_choices import shipped_choice

ANSWER = "compile_ahead:"
"""How a worker's answers begin; compilers print to standard output too."""
READY = "compile_ahead is ready"
"""What a worker says when it takes jobs."""
PARTS = {
    "ready": "when the worker had imported what it needs and opened the GPU",
    "began": "when it took the job",
    "layer": "making the layer and its input",
    "launch": "schedule, compiling, loading and running",
    "compiler": "Triton's part of the launch",
    "kernels": "how many were compiled, not found in the cache",
    "cpu": "processor seconds of the worker",
    "children": "and of the assembler and C compiler that it started",
}
"""What an answer tells beside its seconds; times are those of ``time.monotonic``, which all processes share."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile: a problem, a config key ("" = the default choice) and the epilogue.

    ``indptr`` and ``indices`` are the layer's layout, where it is known: some kernels depend on how uneven it is, and
    those of convolutions on which of its blocks, ``zeros``, hold nothing but zeros.
    """

    problem: Problem
    config: str = ""
    activation: str = "none"
    max_pool: bool = False
    bias: bool = True
    residual: bool = False
    indptr: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()
    zeros: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "problem": asdict(self.problem), "kind": type(self.problem).__name__}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Job:
        """From what :meth:`to_json` gave."""
        kinds: dict[str, Any] = {kind.__name__: kind for kind in (Conv2dProblem, LinearProblem)}
        problem = kinds[data["kind"]](**_with_tuples(data["problem"]))
        rest = {name: value for name, value in data.items() if name not in ("kind", "problem")}
        return Job(problem, **_with_tuples(rest))


def _with_tuples(data: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def distinct_kernels(jobs: Iterable[Job], device: DeviceInfo) -> list[Job]:
    """One job a kernel: jobs whose problems differ only in sizes that are not compiled in want the same one."""
    found: dict[object, Job] = {}
    for job in jobs:
        found.setdefault(kernel_of(job, device), job)
    return list(found.values())


def kernel_of(job: Job, device: DeviceInfo) -> tuple[object, ...]:
    """Equal for jobs that most likely want the same kernel."""
    problem, config = job.problem, job.config
    if not config:
        shipped = shipped_choice(problem, device, job.max_pool)
        config = (shipped.config if shipped else default_config(problem, device, job.max_pool)).to_key()
    geometry: tuple[object, ...] = ()
    if isinstance(problem, Conv2dProblem):
        geometry = problem.kernel_size, problem.stride, problem.padding, problem.dilation
    return problem.block, problem.dtype, geometry, config, job.activation, job.max_pool, job.bias, job.residual


@torch.no_grad()
def run_once(job: Job, device: str, steps: Steps | None = None) -> torch.Tensor:
    """Run a layer of ones on zeros for the job once: the launch compiles what is missing.

    Its kernels are called as they are: to register or to record the call would import seconds' worth of torch.
    """
    steps = steps or Steps()
    with steps.timed("layer"):
        layer, x = _layer_and_input(replace(job, config=""), device)
        residual = _residual(job.problem, x) if job.residual else None
    layer.use_config(job.config)
    with steps.timed("launch"), steps.watching_the_compiler(), unrecorded():
        y = layer._forward(x, residual)
        if y.is_cuda:
            torch.cuda.synchronize(y.device)
        return y


def _residual(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    """Zeros like the output."""
    if isinstance(problem, LinearProblem):
        return x.new_zeros(problem.tokens, problem.out_features)
    y = x.new_zeros(problem.batch, problem.c_out, *problem.output_size)
    return y.contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=1)
def _layer_and_input(job: Job, device: str) -> tuple[SparseLayer, torch.Tensor]:
    """Made once for jobs in a row that differ in the config only; weights are ones, but for the job's zeros."""
    problem, dtype = job.problem, getattr(torch, job.problem.dtype)
    layout = _layout(job, device)
    options: dict[str, Any] = {"bias": job.bias, "activation": job.activation, "layout": layout}
    options |= {"dtype": dtype, "device": device}
    if isinstance(problem, LinearProblem):
        linear = BlockSparseLinear(
            problem.in_features, problem.out_features, problem.block, layout.n_blocks, problem.weight_dtype, **options
        )
        return _with_ones(linear, job), torch.zeros(problem.tokens, problem.in_features, dtype=dtype, device=device)
    layer = BlockSparseConv2d(
        problem.c_in, problem.c_out, problem.kernel_size, problem.block, layout.n_blocks, problem.stride,
        problem.padding, problem.dilation, max_pool=job.max_pool, **options,
    )  # fmt: skip
    x = torch.empty(problem.batch, problem.c_in, problem.height, problem.width, dtype=dtype, device=device)
    return _with_ones(layer, job), x.contiguous(memory_format=torch.channels_last).zero_()


def _with_ones(layer: SparseLayer, job: Job) -> SparseLayer:
    layer.values.fill_(1)
    if job.zeros:
        layer.values[list(job.zeros)] = 0
    return layer


def _layout(job: Job, device: str) -> BlockLayout:
    """The job's own layout, or an even one."""
    problem = job.problem
    if isinstance(problem, LinearProblem):
        shape = problem.out_features, problem.in_features
    else:
        shape = problem.c_out, problem.c_in
    if not job.indptr:
        return even_layout(shape, problem.block, problem.n_blocks, device)
    indptr, indices = (torch.tensor(values, dtype=torch.int32, device=device) for values in (job.indptr, job.indices))
    return BlockLayout(shape, problem.block, indptr, indices)


def even_layout(shape: tuple[int, int], block: tuple[int, int], n_blocks: int, device: str) -> BlockLayout:
    """A layout of ``n_blocks`` blocks, dealt out evenly to the block rows; no row is empty if there are enough."""
    rows, columns = grid_shape(shape, block)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for index in range(min(n_blocks, rows * columns)):
        mask[index % rows, (index // rows + index % rows) % columns] = True
    layout = BlockLayout.from_mask(mask, shape, block).without_empty_rows()
    return BlockLayout(shape, block, layout.indptr.to(device), layout.indices.to(device))


def work(device: str) -> int:
    """A worker: says when it is ready, then answers jobs.

    Whatever a compiler or a driver raises is an answer; after an error on the GPU it gives up.

    Returns:
        the process's exit code.
    """
    if ":" in device:
        torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    ready = time.monotonic()
    print(READY, flush=True)
    for line in sys.stdin:
        reason, seconds, parts = answer(Job.from_json(json.loads(line)), device)
        print(ANSWER, json.dumps([reason, seconds, {"ready": ready, **parts}]), flush=True)
        if "CUDA error" in reason:
            return 1
    return 0


def answer(job: Job, device: str) -> tuple[str, float, dict[str, float]]:
    """Run the job: why it failed or "", its seconds, and its :data:`PARTS`."""
    began, before, steps, reason = time.monotonic(), os.times(), Steps(), ""
    try:
        run_once(job, device, steps)
        if device != "cpu":
            torch.cuda.empty_cache()
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
    after = os.times()
    parts = {"began": began, **steps.seconds, "kernels": len(steps.kernels)}
    parts["cpu"] = round(after.user + after.system - before.user - before.system, 2)
    parts["children"] = round(
        after.children_user + after.children_system - before.children_user - before.children_system, 2
    )
    return reason, time.monotonic() - began, parts


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "")
