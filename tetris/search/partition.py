"""A dimension cut into groups: which slice sits at which position. What a search changes, and all that it changes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass
class Partition:
    """Slices of one dimension in their current order, cut into groups of consecutive positions.

    Attributes:
        order: int64 [n]; the slice at every position, i.e. the permutation. Searches replace or change it in place.
        offsets: int64 [R + 1]; group g owns the positions ``offsets[g]:offsets[g + 1]``.
    """

    order: torch.Tensor
    offsets: torch.Tensor

    def twin(self) -> Partition:
        """The same groups and, for now, the same order."""
        other = copy.copy(self)  # with what is cached of the groups
        other.order = self.order.clone()
        return other

    @cached_property
    def sizes(self) -> list[int]:
        """Positions of every group."""
        return self.offsets.diff().tolist()

    @cached_property
    def edge(self) -> int | None:
        """Positions a group where all groups are equal but for a smaller last one; None otherwise."""
        first, last = self.sizes[0], self.sizes[-1]
        return first if all(size == first for size in self.sizes[:-1]) and last <= first else None

    @property
    def n_groups(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def capacity(self) -> int:
        """The size of the largest group."""
        return max(self.sizes)

    @cached_property
    def groups(self) -> torch.Tensor:
        """int64 [R]: 0, 1, ..."""
        return torch.arange(self.n_groups, device=self.order.device)

    def group_of_position(self) -> torch.Tensor:
        """int64 [n]: the group that owns every position."""
        return torch.repeat_interleave(self.groups, self.offsets.diff())

    def labels(self) -> torch.Tensor:
        """int64 [n]: the group of every slice."""
        labels = torch.empty_like(self.order)
        labels[self.order] = self.group_of_position()
        return labels
