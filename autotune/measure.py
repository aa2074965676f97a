"""One layer in all its forms, timed side by side: dense, and in every candidate block at the wanted sparsities."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tetris.autotune.compile_job import Job
from tetris.autotune.device import device_info
from tetris.autotune.problems import LayerInput, Problem, SparseLayer, problem_of
from tetris.autotune.space import is_valid
from tetris.autotune.store import TuningStore
from tetris.autotune.timer import Timing, time_us
from tetris.importance import channel_importance, importance_of
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.permutation import apply
from tetris.plans import Candidate, block_label
from tetris.pruning import Block, block_sums, fit_block, keep_largest, units_to_keep
from tetris.reordering import Reordering, reorder

GPU_BLOCKS: tuple[Block, ...] = (32, (64, 16), (64, 32), 64, (128, 32), 128)
CPU_BLOCKS: tuple[Block, ...] = (16, 32, (64, 32), 64)
CHANNELS_LAST = torch.channels_last

DenseLayer = nn.Conv2d | nn.Linear
Point = tuple[tuple[int, int], float]
"""A block and a sparsity."""


@dataclass(frozen=True)
class Epilogue:
    """What conversion fuses behind a layer: bias (its own or a batch norm's), residual, activation, 2x2 max-pool."""

    activation: str = "none"
    max_pool: bool = False
    bias: bool = True
    residual: bool = False

    def job(self, problem: Problem) -> Job:
        """What a layer with this epilogue has to have compiled."""
        return Job(problem, "", self.activation, self.max_pool, self.bias, self.residual)


class Measured(NamedTuple):
    """The measurements of one layer, the dense one first, and the candidates that did not run."""

    candidates: tuple[Candidate, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True)
class ReorderedBlocks:
    """A weight under one reordering: every sparsity's mask, and what it retains, from one sort of its blocks.

    Attributes:
        reordering: its permutations are used at every sparsity.
        sums: importance of every block of the reordered weight, [block rows, block columns], on the CPU.
    """

    reordering: Reordering
    sums: torch.Tensor

    @staticmethod
    def of(weight: torch.Tensor, importance: str, reordering: Reordering) -> ReorderedBlocks:
        """From a weight and its reordering."""
        return ReorderedBlocks.of_scores(channel_importance(importance_of(weight.detach(), importance)), reordering)

    @staticmethod
    def of_scores(scores: torch.Tensor, reordering: Reordering) -> ReorderedBlocks:
        """From the importance of every (output, input) channel pair."""
        return ReorderedBlocks(reordering, block_sums(apply(scores, reordering.permutations), reordering.block).cpu())

    def _cumulative(self) -> torch.Tensor:
        """Fraction of the importance in the k + 1 largest blocks; float64."""
        total = self.sums.flatten().double().sort(descending=True).values.cumsum(0)
        return total / total[-1]

    def retained(self, sparsity: float) -> float:
        """Kept importance / total importance at a sparsity."""
        return float(self._cumulative()[units_to_keep(self.sums.numel(), sparsity) - 1])

    def sparsity_retaining(self, retained: float) -> float:
        """The highest sparsity that retains that much."""
        n_keep = int((self._cumulative() < retained - 1e-9).sum()) + 1
        return max(0.0, 1 - n_keep / self.sums.numel())

    def at(self, sparsity: float) -> Reordering:
        """The reordering with the mask of a sparsity; enough to build a layer to time."""
        mask = keep_largest(self.sums, units_to_keep(self.sums.numel(), sparsity))
        everything = torch.ones((), dtype=torch.bool).expand(self.reordering.shape)  # packing drops the pruned blocks
        return replace(
            self.reordering, sparsity=sparsity, block_mask=mask, keep_mask=everything, retained=self.retained(sparsity)
        )


@dataclass(frozen=True)
class LayerTimer:
    """How layers are measured; see :func:`tetris.plan` for the fields."""

    blocks: Sequence[Block] | None = None
    method: str = "sort"
    importance: str = "l1"
    device: torch.device | None = None
    store: TuningStore | None = None
    repeats: int = 15
    seconds: float = 2.0
    seed: int = 0

    def measure(
        self, layer: DenseLayer, x: LayerInput, sparsities: Sequence[float], epilogue: Epilogue | None = None
    ) -> Measured:
        """Time the dense layer, and every block at every sparsity, interleaved.

        With a single sparsity each block is timed a second time, at the sparsity at which it retains what the best
        block retains: two points to compare blocks at equal importance. Block-sparse layers run with the epilogue that
        conversion will fuse. The dense layer runs with one pass behind it that adds the residual, or else the bias; a
        compiler would do the rest in that pass. A max-pool that follows is a second one.
        """
        device, epilogue = self.device or x.device, epilogue or Epilogue(bias=layer.bias is not None)
        dense = random_twin(layer, epilogue, self.seed).to(device)
        points = self._points(layer.weight.detach().to(device), sparsities)
        sparse = {point: self._sparse(dense, blocks.at(point[1]), x, epilogue) for point, blocks in points.items()}
        images = x.random(device, self.seed, channels_last=True)
        residual = _like_output(dense, images) if epilogue.residual else None
        runs, failures = {}, []
        for (block, sparsity), module in sparse.items():
            run = _call(module, images, residual)
            if problem := why_not(run):
                failures.append(f"{block_label(block)} at {sparsity:.3g}: {problem}")
            else:
                runs[block, sparsity] = run
        baseline = {}
        if epilogue.residual:
            dense.bias = None
        if isinstance(dense, nn.Conv2d):
            last = copy.deepcopy(dense)
            last.weight.data = last.weight.data.contiguous(memory_format=CHANNELS_LAST)
            baseline["dense channels_last"] = _dense_call(last, images, residual, epilogue.max_pool)
        if not (isinstance(dense, nn.Conv2d) and x.channels_last):
            given = x.random(device, self.seed)
            baseline["dense"] = _dense_call(dense, given, residual, epilogue.max_pool)
        times = self._time(baseline | {str(point): run for point, run in runs.items()}, device)
        decisive = attrgetter("median_us" if device.type == "cuda" else "p10_us")  # other processes only add time
        best = min((times[name] for name in baseline), key=decisive)
        found = [Candidate(None, 0.0, 1.0, 1.0, decisive(best), best.p10_us, best.p90_us)]
        for block, sparsity in runs:
            module = sparse[block, sparsity]
            time, blocks = times[str((block, sparsity))], points[block, sparsity]
            retained = blocks.retained(sparsity)
            spread = decisive(time), time.p10_us, time.p90_us
            found.append(Candidate(block, sparsity, module.kept_fraction, retained, *spread, config=module.config))
        return Measured(tuple(found), tuple(failures))

    def _points(self, weight: torch.Tensor, sparsities: Sequence[float]) -> dict[Point, ReorderedBlocks]:
        """What is timed: (block, sparsity) -> the weight reordered for that block."""
        candidates = self.blocks or (GPU_BLOCKS if weight.is_cuda else CPU_BLOCKS)
        fitted = dict.fromkeys(fit_block(block, (weight.shape[0], weight.shape[1])) for block in candidates)
        middle = sorted(sparsities)[len(sparsities) // 2]
        reordered = {}
        for block in fitted:
            found = reorder(weight, block, middle, self.method, importance=self.importance, seed=self.seed)
            reordered[block] = ReorderedBlocks.of(weight, self.importance, found)
        points = {(block, rate): blocks for block, blocks in reordered.items() for rate in sparsities}
        if len(sparsities) == 1:
            goal = max(blocks.retained(middle) for blocks in reordered.values())
            for block, blocks in reordered.items():
                if blocks.retained(middle) < goal:
                    points[block, blocks.sparsity_retaining(goal)] = blocks
        return points

    def _sparse(self, dense: DenseLayer, reordering: Reordering, x: LayerInput, epilogue: Epilogue) -> SparseLayer:
        """The block-sparse layer with folded permutations and, on a GPU, its tuned configuration if there is one."""
        layer: SparseLayer
        activation, alone = epilogue.activation, None
        if isinstance(dense, nn.Linear):
            layer = BlockSparseLinear.from_dense(
                dense, reordering, activation=activation, input_permutation=alone, output_permutation=alone
            )
        else:
            layer = BlockSparseConv2d.from_dense(
                dense, reordering, activation=activation, input_permutation=alone, output_permutation=alone
            )
            layer.max_pool = epilogue.max_pool
        if self.store is not None and layer.values.is_cuda:
            problem, gpu = problem_of(layer, x), device_info(layer.values.device)
            match = self.store.lookup(problem, gpu, max_pool=epilogue.max_pool)
            if match and is_valid(problem, gpu, match.config, epilogue.max_pool):
                layer.config = match.config.to_key()
        return layer

    def _time(self, runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, Timing]:
        with torch.no_grad(), cudnn_search():
            if device.type != "cuda":
                return time_us(runs, device=device, warmup=1, repeats=self.repeats, budget_s=self.seconds)
            return time_us(
                runs, device=device, repeats=self.repeats, budget_s=self.seconds, cold_l2=True, cuda_graph=True
            )


def _call(module: nn.Module, x: torch.Tensor, residual: torch.Tensor | None) -> Callable[[], object]:
    return (lambda: module(x)) if residual is None else (lambda: module(x, residual))


def _dense_call(
    module: nn.Module, x: torch.Tensor, residual: torch.Tensor | None, max_pool: bool
) -> Callable[[], object]:
    def run() -> torch.Tensor:
        y = module(x) if residual is None else module(x).add_(residual)
        return F.max_pool2d(y, 2) if max_pool else y

    return run


@torch.no_grad()
def _like_output(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A standard normal tensor of the shape and memory format of a layer's output."""
    return torch.randn_like(module(x))


@torch.no_grad()
def why_not(run: Callable[[], object]) -> str:
    """Run a candidate once: "" if it runs, otherwise what went wrong. A kernel that does not compile is a finding."""
    try:
        run()
    except Exception as error:  # whatever a compiler or a driver raises is recorded in the plan
        text = str(error).strip()
        return f"{type(error).__name__}: {text.splitlines()[-1] if text else ''}"
    return ""


def random_twin(layer: DenseLayer, epilogue: Epilogue, seed: int = 0) -> DenseLayer:
    """A copy with dense random weights: zeros draw less power and would flatter or hurt the baseline.

    It gets a bias of zeros where a batch norm will be folded into it.
    """
    twin = copy.deepcopy(layer).eval().requires_grad_(False)
    generator = torch.Generator(layer.weight.device).manual_seed(seed)
    twin.weight.normal_(0, max(float(layer.weight.detach().float().std()), 1e-6), generator=generator)
    if epilogue.bias and twin.bias is None:
        twin.bias = nn.Parameter(twin.weight.new_zeros(twin.weight.shape[0]), requires_grad=False)
    return twin


@contextmanager
def cudnn_search() -> Iterator[None]:
    """Let cuDNN pick its fastest algorithm while timing; the user's setting comes back."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
