"""The picture of channel groups shows every group and every module that hangs on one."""

from __future__ import annotations

import torch

import tetris
from tetris.groups_picture import FIXED, FREE, groups_picture
from tetris.models import Concatenating


def test_every_group_is_a_line_and_every_member_a_mark() -> None:
    graph = tetris.channel_groups(Concatenating(width=16), torch.randn(1, 3, 16, 16))
    axes = groups_picture(graph, "small").axes[0]
    marks = [line for line in axes.lines if line.get_marker() != "None"]
    assert len(marks) == sum(len(group.members) for group in graph.groups)
    assert len(axes.get_yticks()) == len(graph.groups) and axes.get_title(loc="left") == "small"
    colors = [line.get_color() for line in axes.lines if line.get_marker() == "None"]
    assert colors == [FREE if group.fixed is None else FIXED for group in graph.groups]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["reads", "writes", "follows"]
    assert axes.get_xticklabels()[0].get_text() == "stem"
