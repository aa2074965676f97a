"""Storage orders: in which order of channels the tensor between layers lies in memory.

Every channel group gets one order. Layers whose own permutation equals it need no data movement, dense layers and norms
follow it by permuting their parameters once, and only the rest permute their inputs or outputs at run time. Fixed
groups keep the original order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from tetris.channels import ChannelGroup, Channels, ModelGraph
from tetris.permutation import expand, identity, inverse, is_identity
from tetris.reordering import Reordering


def unit_order(permutation: torch.Tensor, repeats: int) -> torch.Tensor | None:
    """The channel order q with ``expand(q, repeats) == permutation``; None if it splits the features of a channel."""
    heads = permutation.view(-1, repeats)[:, 0] // repeats
    return heads if torch.equal(expand(heads, repeats), permutation) else None


def part_of(permutation: torch.Tensor, start: int, size: int, repeats: int) -> torch.Tensor | None:
    """The permutation of the ``size`` channels from ``start`` on; None if it mixes them with others."""
    part = permutation[start * repeats : (start + size) * repeats] - start * repeats
    return part if bool(((part >= 0) & (part < size * repeats)).all()) else None


def feature_order(channels: Channels, orders: list[torch.Tensor]) -> torch.Tensor:
    """The order of all features along a dimension: its groups' orders one after the other."""
    parts, start = [], 0
    for group in channels.groups:
        parts.append(orders[group] + start)
        start += len(orders[group])
    return expand(torch.cat(parts), channels.repeats)


def storage_order(group: ChannelGroup, reorderings: Mapping[str, Reordering]) -> torch.Tensor:
    """The order that most of the group's pruned members already have; the first of equals, identity for none."""
    if group.fixed is not None:
        return identity(group.size)
    candidates = []
    for member in group.members:
        reordering = reorderings.get(member.module)
        if reordering is None or member.role == "per_channel":
            continue
        permutation = reordering.permutations.get(0 if member.role == "output" else 1)
        part = None if permutation is None else part_of(permutation, member.start, group.size, member.repeats)
        order = None if part is None else unit_order(part, member.repeats)
        if order is not None:
            candidates.append(order)
    if not candidates:
        return identity(group.size)
    counts = Counter(tuple(order.tolist()) for order in candidates)
    return torch.tensor(counts.most_common(1)[0][0], dtype=torch.int64)


def storage_orders(graph: ModelGraph, reorderings: Mapping[str, Reordering]) -> list[torch.Tensor]:
    """One storage order a channel group, by group index."""
    return [storage_order(group, reorderings) for group in graph.groups]


def input_gather(order: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor | None:
    """What a layer that wants ``x[permutation]`` must gather from ``x[order]``; None = nothing to move."""
    gather = inverse(order)[permutation]
    return None if is_identity(gather) else gather


def output_scatter(order: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor | None:
    """Where a layer that computes ``y[permutation]`` must store each channel so that ``y[order]`` results."""
    scatter = inverse(order)[permutation]
    return None if is_identity(scatter) else scatter
