"""One permutation for several weights: channels that layers share are reordered once, for all of them.

The outputs of a producer are the inputs of its consumers, and residual branches tie many layers together. A shared
permutation costs nothing at run time; its M-step values are the sums of the layers' own (eq. 9 is a sum over slices).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tetris.errors import ShapeError, TetrisError, describe
from tetris.layout import BlockLayout, grid_shape
from tetris.permutation import identity, validate
from tetris.pruning import check_sparsity, fit_block, units_to_keep
from tetris.search.alternation import Progress
from tetris.search.methods import METHODS, check_options
from tetris.search.system import BlockProblem, Concatenation, Key, System, total_of
from tetris.search.threads import torch_threads_for_numba

Group = Key | Concatenation | None
"""Who orders a dimension."""


@dataclass(frozen=True, eq=False)
class JointProblem:
    """One weight of a joint search.

    Attributes:
        importance: float [rows, columns], entries >= 0, kernel taps summed. Scale it to weigh the layer.
        block: (out, in) edges; larger than a dimension, an edge shrinks to half of it.
        sparsity: fraction of blocks to prune.
        groups: names of the permutations of the rows and the columns, or a :class:`Concatenation` of several; None =
            not reorderable.
        repeats: consecutive features per channel along each dimension (conv -> flatten -> linear).
    """

    importance: torch.Tensor
    block: tuple[int, int]
    sparsity: float
    groups: tuple[Group, Group]
    repeats: tuple[int, int] = (1, 1)


@dataclass(frozen=True, eq=False)
class JointReordering:
    """The answer of :func:`reorder_jointly`.

    Attributes:
        permutations: {group: int64 on the CPU}, over channels: a dimension with repeats r moves in units of r features;
            :func:`tetris.permutation.expand` gives its feature permutation.
        layouts: the kept blocks of every reordered weight, on the CPU, in the order of the problems.
        retained: kept / total importance of every weight.
        n_swaps: swaps (or moves) that the search made.
        seconds: wall-clock time of the search.
    """

    permutations: dict[Key, torch.Tensor]
    layouts: list[BlockLayout]
    retained: list[float]
    n_swaps: int
    seconds: float

    def order(self, group: Group, size: int) -> torch.Tensor:
        """The order of the ``size`` channels of a dimension that has these groups."""
        if not isinstance(group, Concatenation):
            return identity(size) if group is None else self.permutations[group]
        parts, start = [], 0
        for key, channels in group.parts:
            parts.append((identity(channels) if key is None else self.permutations[key]) + start)
            start += channels
        return torch.cat(parts)

    @property
    def block_masks(self) -> list[torch.Tensor]:
        """bool [block rows, block columns] of every reordered weight, True = kept."""
        return [layout.to_mask() for layout in self.layouts]


def reorder_jointly(
    problems: list[JointProblem],
    method: str = "paper",
    seed: int = 0,
    steps: int = 60,
    seconds: float | None = None,
    progress: Progress | None = None,
    start: Mapping[Key, torch.Tensor] | None = None,
) -> JointReordering:
    """Search one permutation per group under which all weights together retain as much importance as possible.

    >>> first = JointProblem(conv1.weight.abs().sum((2, 3)), (64, 64), 0.7, (None, "a"))
    >>> second = ...

    Args:
        problems: the weights; dimensions with the same group name share a permutation.
        method, seed, steps, seconds, progress: as in :func:`tetris.reorder`.
        start: permutations by group name to start from.
    Raises:
        TetrisError, ShapeError: sizes of a group that disagree, bad importances, as in :func:`tetris.reorder`.
    """
    options = check_options(method, seed, steps, seconds, progress, bool(start))
    if not problems:
        raise TetrisError("reorder_jointly: wanted at least one problem; got none")
    sizes = _group_sizes(problems)
    orders = _start_orders(start, sizes)
    with torch_threads_for_numba():
        system = System([_block_problem(problem) for problem in problems], orders)
        outcome = METHODS[method](system, list(sizes), options)
        masks, _ = system.expectation()
        retained = [_retained(system, i, mask) for i, mask in enumerate(masks)]
    return JointReordering(
        permutations={key: system.partitions[key].order.cpu() for key in sizes},
        layouts=[
            BlockLayout.from_mask(mask.cpu(), (p.matrix.shape[0], p.matrix.shape[1]), p.block)
            for mask, p in zip(masks, system.problems)
        ],
        retained=retained,
        n_swaps=outcome.n_swaps,
        seconds=options.budget.elapsed,
    )


def _start_orders(start: Mapping[Key, torch.Tensor] | None, sizes: dict[Key, int]) -> dict[Key, torch.Tensor]:
    unknown = [key for key in start or {} if key not in sizes]
    if unknown:
        raise TetrisError(f"reorder_jointly: wanted start permutations of the groups {list(sizes)}; got {unknown}")
    return {
        key: validate(torch.as_tensor((start or {}).get(key, identity(size))).cpu(), size, f"start[{key!r}]")
        for key, size in sizes.items()
    }


def _retained(system: System, index: int, mask: torch.Tensor) -> float:
    total = total_of(system.problems[index].matrix)
    return float(system.block_sums(index)[mask].sum(dtype=torch.float64)) / total if total > 0 else 1.0


def _block_problem(problem: JointProblem) -> BlockProblem:
    matrix = problem.importance.detach()
    if matrix.dim() != 2 or matrix.numel() == 0 or not matrix.is_floating_point():
        raise ShapeError(f"reorder_jointly: wanted a float importance matrix [rows, columns]; got {describe(matrix)}")
    least, most = (float(extreme) for extreme in torch.aminmax(matrix))  # one pass; NaN where there is one
    if not 0 <= least <= most < math.inf:
        raise TetrisError(
            "reorder_jointly: wanted finite importances >= 0; got NaN, Inf or negative ones; pass weight.abs()"
        )
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    shape = (matrix.shape[0], matrix.shape[1])
    block = fit_block(problem.block, shape)
    rows, columns = grid_shape(shape, block)
    n_keep = units_to_keep(rows * columns, check_sparsity(problem.sparsity))
    return BlockProblem(matrix.contiguous(), block, n_keep, problem.groups, problem.repeats)


def _group_sizes(problems: list[JointProblem]) -> dict[Key, int]:
    """{group: channels}, in order of appearance; ShapeError where two uses disagree."""
    sizes: dict[Key, int] = {}
    for index, problem in enumerate(problems):
        for size, group, repeats in zip(problem.importance.shape, problem.groups, problem.repeats):
            if repeats < 1 or size % repeats:
                raise ShapeError(
                    f"reorder_jointly: problem {index} wanted whole channels of {repeats} features; got {size}"
                )
            parts = group.parts if isinstance(group, Concatenation) else ((group, size // repeats),)
            if sum(channels for _, channels in parts) != size // repeats:
                raise ShapeError(
                    f"reorder_jointly: problem {index} has {size // repeats} channels; its concatenation has "
                    f"{sum(channels for _, channels in parts)}; check groups and repeats"
                )
            for key, channels in parts:
                if key is not None and sizes.setdefault(key, channels) != channels:
                    raise ShapeError(
                        f"reorder_jointly: group {key!r} has {sizes[key]} channels elsewhere; "
                        f"problem {index} has {channels}; check groups and repeats"
                    )
    return sizes
