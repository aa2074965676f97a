"""Channel groups as data: which weight dimensions share one order of channels, and how dimensions are made of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from tabulate import tabulate
from torch import fx


@dataclass(frozen=True)
class Member:
    """One weight dimension (or per-channel parameter set) of a channel group.

    Attributes:
        module: qualified name.
        role: "output" (weight dim 0), "input" (weight dim 1) or "per_channel" (norms, depthwise, embeddings).
        repeats: consecutive features per channel; > 1 after flattening images.
        start: channels of other groups before this one's, in a concatenation.
    """

    module: str
    role: str
    repeats: int = 1
    start: int = 0


@dataclass(frozen=True)
class Channels:
    """What lies along one dimension: the channels of one group, or of several one after the other.

    Attributes:
        groups: indices of channel groups.
        repeats: consecutive features per channel.
    """

    groups: tuple[int, ...]
    repeats: int = 1


@dataclass
class ChannelGroup:
    """Weight dimensions that share one order of channels; ``fixed`` says why it must stay the original order."""

    index: int
    size: int
    members: list[Member] = field(default_factory=list)
    fixed: str | None = None


@dataclass
class ModelGraph:
    """A traced model and its channel groups.

    Attributes:
        module: the traced module; nodes of tensors carry their ``shape``, as ``node.meta["shape"]``.
        groups: all channel groups.
        inputs, outputs: every layer's input and output channels, by module name.
        per_channel: the channels of every norm, depthwise convolution and embedding, by module name.
    """

    module: fx.GraphModule
    groups: list[ChannelGroup]
    inputs: dict[str, Channels]
    outputs: dict[str, Channels]
    per_channel: dict[str, Channels]

    def __str__(self) -> str:
        rows = []
        for group in self.groups:
            roles = {"output": "out", "input": "in", "per_channel": "per channel"}
            members = ", ".join(
                f"{m.module} ({roles[m.role]}{f' from {m.start}' if m.start else ''})" for m in group.members
            )
            rows.append((group.index, group.size, "fixed: " + group.fixed if group.fixed else "free", members))
        return tabulate(rows, headers=("group", "channels", "order", "members"), maxcolwidths=[None, None, 40, 70])
