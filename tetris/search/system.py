"""What a search works on: blocked matrices whose dimensions are ordered by shared partitions.

One weight is a system of one problem with two keys. Several weights that share channels (a producer's outputs and its
consumers' inputs) name the same key: their M-step values add (eq. 9 is a sum), and one permutation serves them all.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tetris.layout import ceil_div
from tetris.permutation import expand, identity
from tetris.search.partition import Partition
from tetris.search.sums import group_sums, hard_mask, product

Key = Hashable


@dataclass(frozen=True)
class Concatenation:
    """Channels of several partitions one after the other along one dimension, as ``torch.cat`` stores them.

    Attributes:
        parts: (key or None, channels) of every part; None keeps its order. A block may reach over a boundary.
    """

    parts: tuple[tuple[Key | None, int], ...]


class Part(NamedTuple):
    """Problems that share permutations with no others, as a system, and those of its keys that are to be searched."""

    system: System
    keys: list[Key]


class Use(NamedTuple):
    """Where a partition orders channels: a problem, one of its dimensions, and the channels along it."""

    problem: int
    dim: int
    units: slice


@dataclass(frozen=True, eq=False)
class BlockProblem:
    """A matrix of importances to be covered by the best ``n_keep`` blocks.

    Attributes:
        matrix: [rows, columns], kernel taps summed, float32 or float64, contiguous, on any device. Only read.
        block: (out, in) edges.
        n_keep: blocks that stay.
        keys: the partition, or a concatenation of several, that orders the rows and the columns; None = that dimension
            keeps its order.
        repeats: consecutive features that move together along each dimension (a flattened convolution's pixels).
    """

    matrix: torch.Tensor
    block: tuple[int, int]
    n_keep: int
    keys: tuple[Key | None, Key | None] = (0, 1)
    repeats: tuple[int, int] = (1, 1)

    @property
    def grid(self) -> tuple[int, int]:
        return ceil_div(self.matrix.shape[0], self.block[0]), ceil_div(self.matrix.shape[1], self.block[1])

    def blocks_of_unit(self, dim: int, device: torch.device | str) -> torch.Tensor:
        """int64 [units, repeats]: the block of every feature of the unit at every position."""
        features = torch.arange(self.matrix.shape[dim], device=device)
        return (features // self.block[dim]).view(-1, self.repeats[dim])

    def parts(self, dim: int) -> list[tuple[Key | None, slice]]:
        """(key, channels) of the partitions along a dimension, in order; a single one takes it all."""
        key, start, found = self.keys[dim], 0, []
        whole = ((key, self.matrix.shape[dim] // self.repeats[dim]),)
        for part, units in key.parts if isinstance(key, Concatenation) else whole:
            found.append((part, slice(start, start + units)))
            start += units
        return found


def total_of(matrix: torch.Tensor) -> float:
    """The sum of all entries: rows in their own precision, then float64 (ten times faster than all float64)."""
    return float(matrix.flatten(1).sum(1).sum(dtype=torch.float64))


class System:
    """Problems and the partitions that order them. Group sums are cached until a partition they depend on changes."""

    def __init__(self, problems: list[BlockProblem], orders: Mapping[Any, torch.Tensor] | None = None) -> None:
        """``orders``: starting permutations by key, the identity for the others."""
        self.problems = problems
        self.partitions: dict[Key, Partition] = {}
        self._versions: dict[Key | None, int] = {None: 0}
        self._sums: dict[tuple[int, int], tuple[list[int], torch.Tensor]] = {}
        parts = (part for problem in problems for dim in (0, 1) for part in problem.parts(dim))
        for key in dict.fromkeys(key for key, _ in parts if key is not None):
            self.partitions[key] = self._partition(key, (orders or {}).get(key))
            self._versions[key] = 0
        self._totals = [total_of(problem.matrix) for problem in problems]

    @property
    def size(self) -> int:
        """Entries of all matrices."""
        return sum(problem.matrix.numel() for problem in self.problems)

    @property
    def total(self) -> float:
        """The importance of all entries of all matrices."""
        return sum(self._totals)

    def twin(self) -> System:
        """A system of the same problems that starts from the same permutations and goes its own way."""
        other = copy.copy(self)
        other.partitions = {key: partition.twin() for key, partition in self.partitions.items()}
        other._versions, other._sums = dict(self._versions), dict(self._sums)
        return other

    def parts(self, keys: Sequence[Key]) -> list[Part]:
        """The systems of problems that ``keys`` or other shared keys tie together, in the order of their problems.

        They order the same partitions: what a search of one changes, this system sees.
        """
        tied: list[tuple[set[Key], list[int]]] = []
        for index, problem in enumerate(self.problems):
            own = {key for dim in (0, 1) for key, _ in problem.parts(dim) if key is not None}
            members, apart = [index], []
            for others, indices in tied:
                if own & others:
                    own, members = own | others, indices + members
                else:
                    apart.append((others, indices))
            tied = [*apart, (own, sorted(members))]
        if len(tied) == 1:
            return [Part(self, list(keys))]
        tied.sort(key=lambda one: one[1])
        return [Part(self._part(own, members), [key for key in keys if key in own]) for own, members in tied]

    def _part(self, keys: set[Key], members: list[int]) -> System:
        other = copy.copy(self)  # versions included: a change is one to both
        other.problems = [self.problems[index] for index in members]
        other.partitions = {key: partition for key, partition in self.partitions.items() if key in keys}
        other._totals, other._sums = [self._totals[index] for index in members], {}
        return other

    def forget(self) -> None:
        """Drop all cached sums: partitions changed, or will change, behind the system's back."""
        self._sums.clear()

    def uses(self, key: Key) -> list[Use]:
        """Everywhere that ``key`` orders channels."""
        return [
            Use(index, dim, units)
            for index, problem in enumerate(self.problems)
            for dim in (0, 1)
            for part, units in problem.parts(dim)
            if part == key
        ]

    def _partition(self, key: Key, order: torch.Tensor | None) -> Partition:
        """Groups = runs of positions that no problem can tell apart: the common refinement of all block grids."""
        uses = self.uses(key)
        blocks = torch.cat(
            [self.problems[use.problem].blocks_of_unit(use.dim, "cpu")[use.units] for use in uses], dim=1
        )
        starts = torch.ones(len(blocks), dtype=torch.bool)
        starts[1:] = (blocks[1:] != blocks[:-1]).any(1)
        offsets = torch.cat([starts.nonzero()[:, 0], starts.new_tensor([len(blocks)], dtype=torch.int64)])
        order = identity(len(blocks)) if order is None else order
        return Partition(order.to(self.problems[0].matrix.device, copy=True), offsets)

    def changed(self, key: Key) -> None:
        """Tell the system that the partition of ``key`` changed."""
        self._versions[key] += 1

    def feature_order(self, index: int, dim: int) -> torch.Tensor:
        """int64 [features]: the feature of a problem at every position along ``dim``."""
        problem = self.problems[index]
        orders = []
        for key, units in problem.parts(dim):
            order = self.partitions[key].order if key is not None else None
            orders.append(identity(units.stop - units.start, problem.matrix.device) if order is None else order)
            if units.start:
                orders[-1] = orders[-1] + units.start
        order = orders[0] if len(orders) == 1 else torch.cat(orders)
        return order if problem.repeats[dim] == 1 else expand(order, problem.repeats[dim])

    def labels(self, index: int, dim: int) -> torch.Tensor:
        """int64 [features]: the block row (``dim=0``) or column of every feature, in the original order."""
        positions = self.problems[index].blocks_of_unit(dim, self.problems[index].matrix.device).flatten()
        labels = torch.empty_like(positions)
        labels[self.feature_order(index, dim)] = positions
        return labels

    def _versions_along(self, index: int, dim: int) -> list[int]:
        return [self._versions[key] for key, _ in self.problems[index].parts(dim)]

    def _is_fresh(self, index: int, dim: int) -> bool:
        cached = self._sums.get((index, dim))
        return cached is not None and cached[0] == self._versions_along(index, 1 - dim)

    def sums(self, index: int, dim: int) -> torch.Tensor:
        """[features of ``dim``, blocks of the other dimension]: the other dimension's blocks summed."""
        problem = self.problems[index]
        if not self._is_fresh(index, dim):
            sums = group_sums(problem.matrix, self.feature_order(index, 1 - dim), problem.block[1 - dim], 1 - dim)
            self._sums[index, dim] = (self._versions_along(index, 1 - dim), sums if dim == 0 else sums.T)
        return self._sums[index, dim][1]

    def block_sums(self, index: int) -> torch.Tensor:
        """[block rows, block columns] of a problem under the current partitions."""
        problem = self.problems[index]
        dim = 1 if self._is_fresh(index, 1) and not self._is_fresh(index, 0) else 0
        sums = self.sums(index, dim) if dim == 0 else self.sums(index, dim).T
        return group_sums(sums, self.feature_order(index, dim), problem.block[dim], dim)

    def expectation(self) -> tuple[list[torch.Tensor], float]:
        """E-step (eq. 6): the heaviest blocks of every problem, ties to the lowest index, and what they keep in all."""
        masks, kept = self.heaviest_blocks()
        return masks, float(kept)

    def heaviest_blocks(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The E-step without waiting for a GPU: what they keep is a float64 [] there."""
        found = [hard_mask(self.block_sums(index), problem.n_keep) for index, problem in enumerate(self.problems)]
        return [mask for mask, _ in found], torch.stack([kept for _, kept in found]).sum()

    def retained(self, kept: float) -> float:
        """Kept importance as a fraction of the total; 1.0 when everything is zero."""
        return kept / self.total if self.total > 0 else 1.0

    def values(self, key: Key, masks: list[torch.Tensor], exact: bool = True) -> torch.Tensor:
        """[units, groups]: importance that every slice of ``key`` keeps in every group, under soft or hard masks.

        The compressed form of eq. 9; the values of all problems that share the key add. ``exact=False`` lets a GPU
        multiply in float32 or TF32, as torch is set.
        """
        starts = self.partitions[key].offsets[:-1]
        total: torch.Tensor | None = None
        for index, dim, units in self.uses(key):
            problem, repeats = self.problems[index], self.problems[index].repeats[dim]
            sums = self.sums(index, dim)[units.start * repeats : units.stop * repeats]
            mask = masks[index].T if dim == 0 else masks[index]
            kept = product(sums, mask) if exact else sums @ mask.to(sums.dtype)
            if repeats == 1 and problem.keys[dim] == key and len(starts) == kept.shape[1]:
                value = kept
            else:
                blocks = problem.blocks_of_unit(dim, starts.device)[units][starts]
                features = kept.view(-1, repeats, kept.shape[1])
                value = features[:, 0, blocks[:, 0]]
                for k in range(1, repeats):
                    value = value + features[:, k, blocks[:, k]]
            total = value if total is None else total + value
        assert total is not None
        return total.contiguous()

    def shares_itself(self, key: Key) -> bool:
        """Whether a problem has ``key`` on both dimensions: its M-step is then only a linearisation."""
        uses = {(use.problem, use.dim) for use in self.uses(key)}
        return any((problem, 1 - dim) in uses for problem, dim in uses)

    def snapshot(self) -> dict[Key, torch.Tensor]:
        """A copy of every order."""
        return {key: partition.order.clone() for key, partition in self.partitions.items()}

    def restore(self, orders: dict[Key, torch.Tensor]) -> None:
        """Go back to a snapshot."""
        for key, order in orders.items():
            self.partitions[key].order.copy_(order)
            self.changed(key)
