"""Graphs as JSON: every kind of argument returns, and what a file must not name is refused."""

from __future__ import annotations

import json
import operator

import pytest
import torch
from torch import fx, nn

from tetris.errors import FileFormatError, UnsupportedError
from tetris.graph_json import module_from_json, module_to_json, node_to_json, rebuild_graph


def header_of(graph: fx.Graph) -> dict:
    """The part of a file's header that describes a graph without modules, through text."""
    nodes = [node_to_json(node) for node in graph.nodes]
    return json.loads(json.dumps({"modules": {}, "block_sparse": [], "stems": [], "graph": nodes, "name": "Net"}))


def test_arguments_of_every_kind_return() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    wide = graph.call_method("to", (x,), {"dtype": torch.float64})
    part = graph.call_function(operator.getitem, (wide, (Ellipsis, slice(1, None, 2))))
    joined = graph.call_function(torch.cat, ([part, part],), {"dim": 0})
    graph.output({"y": joined, "shape": (1, None, True)})
    again = rebuild_graph(header_of(graph))
    data = torch.arange(12.0).view(2, 6)
    found = again(data)
    assert torch.equal(found["y"], torch.cat([data[..., 1::2]] * 2).double()) and found["shape"] == (1, None, True)


def test_what_the_format_cannot_say_is_refused_when_saving() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    with pytest.raises(UnsupportedError, match="does not name"):
        node_to_json(graph.call_function(torch.linalg.inv, (x,)))
    with pytest.raises(UnsupportedError, match="tensor method 'backward'"):
        node_to_json(graph.call_method("backward", (x,)))
    with pytest.raises(UnsupportedError, match="outside of a module"):
        node_to_json(graph.create_node("get_attr", "scale"))
    with pytest.raises(UnsupportedError, match="argument of type device"):
        node_to_json(graph.call_method("to", (x, torch.device("cpu"))))


@pytest.mark.parametrize(
    ("op", "target", "args"),
    [
        ("call_function", "os.system", ["x"]),
        ("call_function", "getattr", [{"node": "x"}, "__class__"]),
        ("call_method", "backward", [{"node": "x"}]),
    ],
)
def test_a_file_cannot_call_what_it_likes(op: str, target: str, args: list) -> None:
    nodes = [
        {"op": "placeholder", "name": "x", "target": "x", "args": {"tuple": []}, "kwargs": {"dict": {}}},
        {"op": op, "name": "y", "target": target, "args": {"tuple": args}, "kwargs": {"dict": {}}},
    ]
    with pytest.raises(FileFormatError, match="not an allowed function"):
        rebuild_graph({"modules": {}, "block_sparse": [], "stems": [], "graph": nodes, "name": "Net"})


def test_modules_return_with_their_arguments() -> None:
    for module in (nn.LayerNorm((8,)), nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)):
        entry = json.loads(json.dumps(module_to_json("m", module)))
        assert repr(module_from_json("m", entry)) == repr(module)

    class Mine(nn.Module):
        pass

    with pytest.raises(UnsupportedError, match=r"wanted modules of torch\.nn"):
        module_to_json("m", Mine())
    with pytest.raises(FileFormatError, match=r"wanted a module of torch\.nn; got 'Module_that_is_not'"):
        module_from_json("m", {"class": "Module_that_is_not", "arguments": {}})
