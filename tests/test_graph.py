"""Channel groups of traced models, and the storage orders chosen from them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tetris
from tetris.channels import Channels, Member
from tetris.errors import TetrisError, UnsupportedError
from tetris.graph import channel_groups
from tetris.models import MLP, VGG16, LanguageModel, LeNet, TransformerBlock, resnet18
from tetris.orders import input_gather, output_scatter, unit_order
from tetris.permutation import expand
from tetris.stem import StemConv2d
from tetris.tracing import trace


def group_of(graph, module: str, role: str):
    return next(g for g in graph.groups if any(m.module == module and m.role == role for m in g.members))


def test_lenet_pairs_every_output_with_the_next_input():
    graph = channel_groups(LeNet(), torch.randn(1, 1, 28, 28))
    assert [g.fixed for g in graph.groups] == ["network input", None, None, None, "network output"]
    assert graph.groups[2].members == [Member("conv2", "output"), Member("fc1", "input", 16)]
    assert graph.inputs["fc1"] == Channels((2,), 16)
    assert "conv2 (out), fc1 (in)" in str(graph)


def test_batch_norms_follow_their_convolution():
    graph = channel_groups(VGG16(width=0.125, pooled=1, batch_norm=True), torch.randn(2, 3, 32, 32))
    members = group_of(graph, "features.0", "output").members
    assert members == [
        Member("features.0", "output"),
        Member("features.1", "per_channel"),
        Member("features.3", "input"),
    ]


def test_a_residual_stream_is_one_group():
    graph = channel_groups(resnet18(width=8), torch.randn(2, 3, 64, 64))
    stream = {m.module for m in group_of(graph, "layer1.0.conv2", "output").members}
    assert {"conv1", "bn1", "layer1.0.conv1", "layer1.1.conv2", "layer2.0.downsample.0"} <= stream
    assert len(group_of(graph, "layer1.0.conv1", "output").members) == 3


def test_a_transformer_frees_only_the_hidden_features_of_its_mlp():
    graph = channel_groups(TransformerBlock(32), torch.randn(2, 5, 32))
    free = [g for g in graph.groups if g.fixed is None]
    assert [[m.module for m in g.members] for g in free] == [["up_proj", "down_proj"]]


def test_a_language_model_frees_its_residual_stream():
    graph = channel_groups(LanguageModel(), torch.randint(256, (2, 5)))
    stream = {m.module for m in group_of(graph, "blocks.0.q_proj", "input").members}
    assert {"tokens", "positions", "blocks.0.out_proj", "blocks.1.ln_2", "blocks.1.down_proj", "norm", "head"} <= stream
    assert group_of(graph, "head", "input").fixed is None and graph.per_channel["tokens"] == graph.inputs["head"]


class Oddities(nn.Module):
    """Reshapes, means, broadcasts, shared and grouped modules, and an operation that mixes channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise, self.grouped = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(8, 8, 1, groups=2),
        )
        self.again, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.depthwise(self.first(x))
        x = self.again(self.again(x) * 2 + 1)
        x = self.grouped(x)
        return self.head(torch.softmax(x, 1).mean((2, 3)))


def test_unusual_operations_fix_what_they_must():
    graph = channel_groups(Oddities(), torch.randn(2, 3, 8, 8))
    stream = group_of(graph, "first", "output")
    assert Member("depthwise", "per_channel") in stream.members
    assert group_of(graph, "again", "input") is group_of(graph, "again", "output") is stream
    assert stream.fixed is not None and "grouped" in stream.fixed


def test_data_dependent_control_flow_is_refused_with_advice():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedError, match=r"torch\.fx can trace; Branching failed"):
        channel_groups(Branching(), torch.randn(2, 3))


def test_tracing_leaves_the_model_as_it_was():
    model = VGG16(width=0.125, pooled=1, batch_norm=True).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    channel_groups(model, torch.randn(2, 3, 32, 32))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_inputs_may_be_tuples_or_keywords():
    model, x = MLP(8, 16, 4), torch.randn(2, 8)
    assert len(channel_groups(model, (x,)).groups) == len(channel_groups(model, {"input": x}).groups) == 3
    with pytest.raises(TetrisError, match="example_inputs: wanted a tensor"):
        channel_groups(model, 3)
    with pytest.raises(TetrisError, match="wanted keywords of input; got image"):
        channel_groups(model, {"image": x})


def test_inputs_that_do_not_fit_are_named_and_nothing_is_printed(capfd):
    model = MLP(8, 16, 4).train()
    with pytest.raises(TetrisError, match=r"that MLP runs on; got tensor of shape \(2, 7\).*cannot be multiplied"):
        channel_groups(model, torch.randn(2, 7))
    with pytest.raises(TetrisError, match=r"MLP runs on; got nothing: .*Expected positional argument"):
        channel_groups(model, {})
    assert model.training and capfd.readouterr() == ("", "")


def test_keywords_that_are_left_out_take_their_defaults():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x, scale=2.0, shift=None):
            return self.fc(x * scale) + (0.0 if shift is None else shift)

    graph = channel_groups(Scaled(), {"x": torch.randn(2, 8), "shift": torch.randn(2, 4)})
    assert [(g.size, len(g.members)) for g in graph.groups] == [(8, 1), (4, 1)]


def test_gather_and_scatter_cross_between_orders():
    order, own = torch.randperm(12), torch.randperm(12)
    x = torch.randn(12)
    assert torch.equal(x[order][input_gather(order, own)], x[own])
    stored = torch.empty(12)
    stored[output_scatter(order, own)] = x[own]
    assert torch.equal(stored, x[order])
    assert input_gather(own, own) is None and output_scatter(own, own) is None


def test_unit_order_recognises_whole_channels():
    channels = torch.randperm(5)
    assert torch.equal(unit_order(expand(channels, 4), 4), channels)
    assert unit_order(torch.randperm(20, generator=torch.Generator().manual_seed(1)), 4) is None


def test_converted_layers_are_leaves_of_a_trace():
    conv = nn.Conv2d(16, 16, 3)
    block_sparse = tetris.BlockSparseConv2d.from_dense(conv, tetris.reorder(conv.weight, 8, 0.5, method="none"))
    model = nn.Sequential(StemConv2d(3, 16, (3, 3)), block_sparse, nn.ReLU())
    nodes = trace(model, torch.randn(1, 3, 9, 9)).graph.nodes
    assert [n.target for n in nodes if n.op == "call_module"] == ["0", "1", "2"] and len(nodes) == 5


class Between(nn.Module):
    """Two layers and a function between them."""

    def __init__(self, first: nn.Module, between, second: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.second = first, between, second
        self.bound = nn.Parameter(torch.linspace(-1, 1, 32))

    def forward(self, x):
        return self.second(self.between(self.first(x), self.bound))


def halves(y, bound):
    one, other = y.chunk(2, dim=-1)
    return one * F.silu(other)


def conv(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


MIXING = {
    "chunks": (nn.Linear(32, 64), halves, nn.Linear(32, 32)),
    "a part of a split": (nn.Linear(32, 64), lambda y, bound: y.split(32, dim=-1)[0], nn.Linear(32, 32)),
    "bounds a channel": (nn.Linear(32, 32), lambda y, bound: torch.clamp(y, max=bound), nn.Linear(32, 32)),
    "added by keyword": (nn.Linear(32, 32), lambda y, bound: torch.add(y, other=bound), nn.Linear(32, 32)),
    "both by keyword": (nn.Linear(32, 32), lambda y, bound: torch.add(input=y, other=bound), nn.Linear(32, 32)),
    "input by keyword": (nn.Linear(32, 32), lambda y, bound: F.relu(input=y).cumsum(-1), nn.Linear(32, 32)),
    "transposed": (nn.Linear(32, 32), lambda y, bound: y.T.cumsum(0).T, nn.Linear(32, 32)),
    "mean of the channels": (conv(8, 32), lambda y, bound: y.mean(dim=1)[:, None], conv(1, 32)),
    "viewed": (conv(8, 32), lambda y, bound: F.max_pool2d(y, 16).view(y.size(0), -1), nn.Linear(128, 32)),
}


@pytest.mark.parametrize("kind", MIXING)
def test_what_lies_between_layers_computes_the_same_when_converted(kind):
    torch.manual_seed(0)
    model = Between(*MIXING[kind]).eval()
    x = torch.randn(2, 8, 32, 32) if isinstance(model.first, nn.Conv2d) else torch.randn(4, 32)
    pruned = tetris.prune(model, {"first": 0.5}, block=8, method="sort", permutations="shared", example_inputs=x)
    assert tetris.verify(pruned, tetris.convert(pruned, example_inputs=x), example_inputs=x)
