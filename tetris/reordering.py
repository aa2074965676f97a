"""Reordering (Section 4): permutations under which pruning keeps more importance. The public ``reorder``.

    minimise over the mask and the permutations of Omega:  || M * W[permuted] ||          (eq. 5)

The pruning method decides the mask; the search methods differ only in how they find permutations, and every number in
the answer is recomputed from the resulting mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tetris.errors import ShapeError, TetrisError, UnsupportedError, describe
from tetris.importance import Importance, channel_importance, importance_of
from tetris.joint_reordering import JointProblem, JointReordering, reorder_jointly
from tetris.layout import BlockLayout, grid_shape
from tetris.permutation import apply, identity, inverse, validate
from tetris.pruning import Block, BlockPruning, PruningMethod, check_sparsity, fit_block, pruning_method, units_to_keep
from tetris.search.alternation import Progress
from tetris.search.general import alternate_slices, sorted_slices
from tetris.search.methods import METHODS, Options, Outcome, check_options
from tetris.search.system import BlockProblem, System, total_of
from tetris.search.threads import torch_threads_for_numba

__all__ = ["JointProblem", "JointReordering", "Reordering", "reorder", "reorder_jointly", "retained_importance"]

Start = Mapping[int, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Reordering:
    """Permutations, the mask that pruning chooses under them, and what it retains.

    Attributes:
        shape: the weight's.
        block: the (out, in) block used, after shrinking to the shape; see :func:`tetris.pruning.fit_block`.
        sparsity: fraction of units asked to be pruned.
        method: the search that found it.
        permutations: {dim: int64 on the CPU}; ``reordered = weight[permutations[0]][:, permutations[1]]``.
        block_mask: bool [block rows, block columns] on the CPU, True = kept, of the *reordered* weight; None for
            structures other than blocks.
        keep_mask: bool, weight's shape and device, True = kept, in the *original* order (the negated M).
        retained: kept importance / total importance, recomputed from ``keep_mask``.
        certificate: for ``method="exact"``, proof that no permutation of one dimension improves on ``block_mask``.
        n_swaps: swaps (or moves) that the search made.
        seconds: wall-clock time of the search.
    """

    shape: tuple[int, ...]
    block: tuple[int, int]
    sparsity: float
    method: str
    permutations: dict[int, torch.Tensor] = field(repr=False)
    block_mask: torch.Tensor | None = field(repr=False)
    keep_mask: torch.Tensor = field(repr=False)
    retained: float
    certificate: object | None = None
    n_swaps: int = 0
    seconds: float = 0.0

    @property
    def layout(self) -> BlockLayout:
        """The kept blocks of the reordered weight; UnsupportedError for structures other than blocks."""
        if self.block_mask is None:
            raise UnsupportedError("layout: only structure='block' has a block layout; use keep_mask for the others")
        return BlockLayout.from_mask(self.block_mask, (self.shape[0], self.shape[1]), self.block)

    @property
    def kept_fraction(self) -> float:
        """Kept elements / all elements."""
        return float(self.keep_mask.float().mean())

    def reordered(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` with this reordering's permutations applied."""
        return apply(weight, self.permutations)


def reorder(
    weight: torch.Tensor,
    block: Block = (64, 64),
    sparsity: float = 0.73,
    method: str = "paper",
    importance: Importance = "l1",
    dims: Sequence[int] = (0, 1),
    seed: int = 0,
    structure: str | PruningMethod = "block",
    steps: int = 60,
    seconds: float | None = None,
    progress: Progress | None = None,
    start: Start | Reordering | None = None,
) -> Reordering:
    """Search permutations of ``weight`` under which pruning to ``sparsity`` retains as much importance as possible.

    >>> r = reorder(conv.weight, block=(64, 32), sparsity=0.73, method="annealed")
    >>> r.retained, r.layout.n_blocks

    Args:
        weight: floating point, order >= 2, finite; dimension 0 is outputs, 1 inputs. A GPU weight is searched there.
        block: edge or (out, in) of the blocks; larger than a dimension, it shrinks to half of it.
        sparsity: fraction of units to prune, in [0, 1).
        method: "none"; "sort" (by importance); "paper" (Algorithm 1, identical swaps); "batched" (disjoint swaps
            together); "exact" (each M-step solved to optimality, with a certificate); "annealed" (the best).
        importance: "l1", "l2" or a tensor of the weight's shape, entries >= 0.
        dims: the reorderable dimensions (Omega), in the order of their M-steps.
        seed: of the annealed search's random numbers; equal seeds give equal results on one kind of device.
        structure: what pruning removes: "block", or any of :data:`tetris.pruning.METHODS`, or a PruningMethod.
        steps: annealing steps; 60 is quick, 500 thorough.
        seconds: wall-clock budget; the best found so far is returned.
        progress: called with (outer steps done, retained fraction so far).
        start: permutations {dim: indices} or a Reordering to start from, instead of the identity.
    Returns:
        the Reordering; all methods but "sort" retain at least what the start does.
    Raises:
        TetrisError, ShapeError, UnsupportedError: bad input, naming what was wanted.
    """
    sparsity = check_sparsity(sparsity)
    _check_weight(weight)
    omega = _check_dims(dims, weight.dim())
    options = check_options(method, seed, steps, seconds, progress, start is not None)
    fitted = fit_block(block, (weight.shape[0], weight.shape[1]))
    pruning = pruning_method(structure, fitted)
    scores = importance_of(weight, importance)
    permutations = _start_permutations(start, tuple(weight.shape), omega)
    if isinstance(pruning, BlockPruning):
        with torch_threads_for_numba():
            system = System([_block_problem(scores, pruning, sparsity)], permutations)
            outcome = METHODS[method](system, [dim for dim in omega if dim < 2], options)
            block_mask, keep_mask = _block_masks(system, tuple(scores.shape))
        permutations.update({dim: system.partitions[dim].order.cpu() for dim in omega if dim < 2})
    else:
        outcome = _search_slices(scores, pruning, sparsity, method, permutations, options)
        block_mask, mask = None, pruning.keep_mask(apply(scores, permutations), sparsity)
        keep_mask = apply(mask, {dim: inverse(p) for dim, p in permutations.items()}).contiguous()
    return Reordering(
        shape=tuple(weight.shape),
        block=fitted,
        sparsity=sparsity,
        method=method,
        permutations=permutations,
        block_mask=block_mask,
        keep_mask=keep_mask,
        retained=retained_importance(scores, keep_mask),
        certificate=outcome.certificate,
        n_swaps=outcome.n_swaps,
        seconds=options.budget.elapsed,
    )


def _block_problem(scores: torch.Tensor, pruning: BlockPruning, sparsity: float) -> BlockProblem:
    """Taps of one kernel share their fate, so the problem is a matrix over channels."""
    matrix = channel_importance(scores).contiguous()
    rows, columns = grid_shape((matrix.shape[0], matrix.shape[1]), pruning.block)
    return BlockProblem(matrix, pruning.block, units_to_keep(rows * columns, sparsity))


def _block_masks(system: System, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(block mask of the reordered weight on the CPU, keep mask in the original order), without moving the weight."""
    block_mask = system.expectation()[0][0]
    pairs = block_mask[system.labels(0, 0)][:, system.labels(0, 1)]
    keep_mask = pairs.reshape(*pairs.shape, *(1 for _ in shape[2:])).expand(shape).contiguous()
    return block_mask.cpu(), keep_mask


def _search_slices(
    scores: torch.Tensor,
    pruning: PruningMethod,
    sparsity: float,
    method: str,
    permutations: dict[int, torch.Tensor],
    options: Options,
) -> Outcome:
    """The methods that work for every pruning method; ``permutations`` change in place."""
    if method == "none":
        return Outcome()
    if method == "sort":
        permutations.update(sorted_slices(scores, tuple(permutations)))
        return Outcome()
    if method == "paper":
        swaps = alternate_slices(scores, pruning, sparsity, permutations, options.budget, options.progress)
        return Outcome(swaps)
    raise UnsupportedError(
        f"reorder: method {method!r} needs structure='block'; got {describe(pruning)}; "
        "the methods for other structures are none, sort and paper"
    )


def _check_weight(weight: torch.Tensor) -> None:
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise TetrisError(f"reorder: wanted a floating-point weight tensor; got {describe(weight)}")
    if weight.dim() < 2 or weight.numel() == 0:
        raise ShapeError(
            f"reorder: wanted a non-empty weight of order >= 2, [C_OUT, C_IN, ...]; got {describe(weight)}"
        )


def _check_dims(dims: Sequence[int], order: int) -> tuple[int, ...]:
    omega = tuple(dims)
    valid = all(isinstance(dim, int) and 0 <= dim < order for dim in omega)
    if not valid or len(set(omega)) != len(omega):
        raise ShapeError(f"reorder: wanted distinct dims of 0..{order - 1} for a weight of order {order}; got {omega}")
    return omega


def _start_permutations(
    start: Start | Reordering | None, shape: tuple[int, ...], dims: tuple[int, ...]
) -> dict[int, torch.Tensor]:
    given = start.permutations if isinstance(start, Reordering) else dict(start or {})
    if not set(given) <= set(dims):
        raise ShapeError(f"reorder: wanted start permutations of the reorderable dims {dims}; got dims {tuple(given)}")
    return {
        dim: validate(torch.as_tensor(given[dim]).cpu(), shape[dim], f"start[{dim}]")
        if dim in given
        else identity(shape[dim])
        for dim in dims
    }


def retained_importance(importance: torch.Tensor, keep_mask: torch.Tensor) -> float:
    """Kept importance / total importance; 1.0 when everything is zero."""
    kept = total = 0.0
    for scores, mask in zip(importance.split(1024), keep_mask.split(1024)):
        total += total_of(scores)
        kept += total_of(scores * mask)
    return kept / total if total > 0 else 1.0
