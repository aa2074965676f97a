"""The channel groups of a network as a picture: layers from left to right, a line a group, what hangs on it marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tetris.channels import ModelGraph

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = {"output": (">", "writes"), "per_channel": ("|", "follows"), "input": ("<", "reads")}
"""Marker and legend of every role."""
FREE, FIXED = "#1d4ed8", "#9ca3af"


def groups_picture(graph: ModelGraph, title: str = "") -> Figure:
    """One order of channels a line: blue ones may be permuted at no cost, grey ones keep the original order.

    Columns are modules in the order of execution. Of a concatenation a module reads several lines.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    called = [str(node.target) for node in graph.module.graph.nodes if node.op == "call_module"]
    members = {member.module for group in graph.groups for member in group.members}
    modules = [name for name in dict.fromkeys(called) if name in members]
    place = {name: index for index, name in enumerate(modules)}
    size = (max(4.0, 0.34 * len(modules) + 1.5), max(2.2, 0.24 * len(graph.groups) + 1.6))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    shown: set[str] = set()
    for line, group in enumerate(graph.groups):
        color = FREE if group.fixed is None else FIXED
        at = [place[member.module] for member in group.members if member.module in place]
        axes.plot([min(at), max(at)], [line, line], color=color, linewidth=1.2)
        for member in group.members:
            marker, label = MARKERS[member.role]
            known: dict[str, Any] = {"label": label} if label not in shown else {}
            shown.add(label)
            axes.plot(place[member.module], line, marker=marker, color=color, markersize=7, linestyle="none", **known)
    axes.set_xticks(range(len(modules)), modules, rotation=60, ha="right", fontsize="x-small")
    axes.set_yticks(range(len(graph.groups)), [f"{group.size} channels" for group in graph.groups], fontsize="x-small")
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize="small")
    axes.legend(fontsize="x-small", loc="upper right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
