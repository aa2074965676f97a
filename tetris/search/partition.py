"""A dimension cut into groups: which slice sits at which position. What a search changes, and all that it changes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch


@dataclass
class Partition:
    """Slices of one dimension in their current order, cut into groups of consecutive positions.

    Attributes:
        order: int64 [n]; the slice at every position, i.e. the permutation. Searches change it in place.
        offsets: int64 [R + 1] on the order's device; group g owns the positions ``offsets[g]:offsets[g + 1]``.
        sizes: positions of every group.
        groups: int64 [R] on the order's device: 0, 1, ...
        edge: positions a group where all groups are equal but for a smaller last one; None otherwise.

    What depends on the groups alone is made at once: a captured step may neither wait for it nor own it.
    """

    order: torch.Tensor
    offsets: torch.Tensor
    sizes: list[int] = field(init=False)
    groups: torch.Tensor = field(init=False)
    edge: int | None = field(init=False)

    def __post_init__(self) -> None:
        host = self.offsets.cpu()
        self.offsets = host.to(self.order.device)
        self.sizes = host.diff().tolist()
        self.groups = torch.arange(self.n_groups, device=self.order.device)
        first, last = self.sizes[0], self.sizes[-1]
        self.edge = first if all(size == first for size in self.sizes[:-1]) and last <= first else None

    def twin(self) -> Partition:
        """The same groups and, for now, the same order."""
        other = copy.copy(self)
        other.order = self.order.clone()
        return other

    @property
    def n_groups(self) -> int:
        return len(self.offsets) - 1

    @property
    def capacity(self) -> int:
        """The size of the largest group."""
        return max(self.sizes)

    def group_of_position(self) -> torch.Tensor:
        """int64 [n]: the group that owns every position."""
        return torch.repeat_interleave(self.groups, self.offsets.diff())

    def labels(self) -> torch.Tensor:
        """int64 [n]: the group of every slice."""
        labels = torch.empty_like(self.order)
        labels[self.order] = self.group_of_position()
        return labels
