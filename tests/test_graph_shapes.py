"""How channels are followed through flattening, reshaping and means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tetris.graph import Member, channel_groups


class Between(nn.Module):
    """A convolution, some reshaping, a linear layer."""

    def __init__(self, step: Callable[[torch.Tensor], torch.Tensor], features: int) -> None:
        super().__init__()
        self.conv, self.fc, self.step = nn.Conv2d(4, 8, 1), nn.Linear(features, 5), step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.step(self.conv(x)))


def follows(step: Callable[[torch.Tensor], torch.Tensor], features: int) -> Member | None:
    """The linear layer's part in the convolution's group of outputs; None where it has none."""
    graph = channel_groups(Between(step, features), torch.randn(2, 4, 3, 3))
    group = next(g for g in graph.groups if Member("conv", "output") in g.members)
    return next((member for member in group.members if member.module == "fc"), None)


@pytest.mark.parametrize(
    ("step", "features", "repeats"),
    [
        (lambda x: torch.flatten(x, 1), 72, 9),
        (lambda x: x.flatten(2).flatten(1), 72, 9),
        (lambda x: x.view(2, 72), 72, 9),
        (lambda x: x.reshape(2, -1), 72, 9),
        (lambda x: x.mean((2, 3)), 8, 1),
        (lambda x: x.mean((2, 3)).reshape(1, 2, 8), 8, 1),
        (lambda x: x.mean((2, 3)).view(1, 2, 8).flatten(0, 1), 8, 1),
    ],
    ids=["flatten", "in two steps", "view", "reshape", "mean", "more dimensions", "fewer dimensions"],
)
def test_channels_are_followed(step, features: int, repeats: int) -> None:
    assert follows(step, features) == Member("fc", "input", repeats)


@pytest.mark.parametrize(
    ("step", "features"),
    [
        (lambda x: x.view(2, 4, 18).flatten(1), 72),
        (lambda x: torch.flatten(x, 0, 1).view(2, 72), 72),
        (lambda x: x.mean(1).flatten(1), 9),
        (lambda x: x, 3),
    ],
    ids=["channels split", "joined with the batch", "channels averaged", "another dimension read"],
)
def test_channels_that_mix_are_fixed(step, features: int) -> None:
    assert follows(step, features) is None
