"""A dimension cut into groups: which slice sits at which position. What a search changes, and all that it changes."""

from __future__ import annotations

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

    @cached_property
    def edge(self) -> int | None:
        """Positions a group where all groups are equal but for a smaller last one; None otherwise."""
        sizes = self.offsets.diff().tolist()
        return sizes[0] if all(size == sizes[0] for size in sizes[:-1]) and sizes[-1] <= sizes[0] else None

    @property
    def n_groups(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def capacity(self) -> int:
        """The size of the largest group."""
        return int(self.offsets.diff().max())

    def group_of_position(self) -> torch.Tensor:
        """int64 [n]: the group that owns every position."""
        groups = torch.arange(self.n_groups, device=self.order.device)
        return torch.repeat_interleave(groups, self.offsets.diff())

    def labels(self) -> torch.Tensor:
        """int64 [n]: the group of every slice."""
        labels = torch.empty_like(self.order)
        labels[self.order] = self.group_of_position()
        return labels
