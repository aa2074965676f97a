"""The JSON form of a traced model's graph and of its torch modules; calls nothing but arithmetic that is named here.

Nodes name functions of torch and ``operator``, methods of tensors and attributes to read, all from the lists below;
modules are a class of ``torch.nn`` and its arguments.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tetris.errors import FileFormatError, TetrisError, UnsupportedError


def _named(prefix: str, module: Any, names: str) -> dict[str, Any]:
    return {f"{prefix}.{name}": getattr(module, name) for name in names.split()}


FUNCTIONS: dict[str, Any] = {
    **_named(
        "operator", operator, "add iadd sub isub mul imul truediv floordiv neg pow matmul getitem eq ne lt le gt ge"
    ),
    **_named(
        "torch",
        torch,
        "abs add arange bmm cat chunk clamp concat conv2d div exp flatten matmul max_pool2d maximum mean minimum mul "
        "permute relu reshape sigmoid softmax split sqrt square squeeze stack sub sum tanh transpose unsqueeze",
    ),
    **_named(
        "functional",
        F,
        "adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d dropout elu gelu hardsigmoid hardswish hardtanh "
        "interpolate layer_norm leaky_relu log_softmax max_pool2d mish normalize pad relu relu6 "
        "scaled_dot_product_attention sigmoid silu softmax softplus tanh",
    ),
    "getattr": getattr,
}
"""Every function that a saved graph may call, by the name it has in the file."""
_METHOD_NAMES = (
    "abs add add_ chunk clamp contiguous detach div dim exp expand flatten float half mean mul mul_ permute relu relu_ "
    "repeat reshape sigmoid size softmax split sqrt square squeeze sub sub_ sum tanh to transpose unflatten unsqueeze "
    "view"
)
METHODS = frozenset(_METHOD_NAMES.split())
"""Every tensor method that a saved graph may call."""
ATTRIBUTES = frozenset({"shape", "dtype", "device", "T", "mT", "ndim"})
"""Every tensor attribute that a saved graph may read."""


# -- nodes -------------------------------------------------------------------------------------------------------------
def _target_to_json(node: fx.Node) -> str:
    if node.op != "call_function":
        _check_method(node.op, str(node.target), "save", UnsupportedError)
        return str(node.target)
    name = next((name for name, function in FUNCTIONS.items() if function is node.target), None)
    if name is None:
        raise UnsupportedError(
            f"save: the graph calls {node.target}, which the file format does not name; it names {', '.join(FUNCTIONS)}"
        )
    return name


def _target_from_json(op: str, target: str, args: Any) -> Any:
    if op != "call_function":
        _check_method(op, target, "load", FileFormatError)
        return target
    if target not in FUNCTIONS or (target == "getattr" and args[1] not in ATTRIBUTES):
        raise FileFormatError(f"load: the graph names {target!r} of {args!r}, which is not an allowed function")
    return FUNCTIONS[target]


def _check_method(op: str, target: str, who: str, kind: type[TetrisError]) -> None:
    if op == "call_method" and target not in METHODS:
        raise kind(f"{who}: the graph calls the tensor method {target!r}, which is not an allowed function")


def _argument_to_json(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_argument_to_json(v) for v in value]}
    if isinstance(value, slice):
        return {"slice": [_argument_to_json(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, dict):
        return {"dict": {k: _argument_to_json(v) for k, v in value.items()}}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is Ellipsis:
        return {"ellipsis": True}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UnsupportedError(f"save: the graph holds an argument of type {type(value).__name__}, which JSON cannot say")


def _argument_from_json(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return nodes[inner]
    if kind == "dict":
        return {k: _argument_from_json(v, nodes) for k, v in inner.items()}
    if kind == "dtype":
        return getattr(torch, inner)
    if kind == "ellipsis":
        return Ellipsis
    builders: dict[str, Callable[[list[Any]], Any]] = {
        "tuple": tuple,
        "list": list,
        "slice": lambda parts: slice(*parts),
    }
    return builders[kind]([_argument_from_json(v, nodes) for v in inner])


def node_to_json(node: fx.Node) -> dict[str, Any]:
    """One node of a graph; UnsupportedError if it needs what the lists above do not name."""
    if node.op == "get_attr":
        raise UnsupportedError(
            f"save: the graph reads the tensor {node.target} outside of a module; wrap it in a module"
        )
    return {
        "op": node.op,
        "name": node.name,
        "target": _target_to_json(node),
        "args": _argument_to_json(node.args),
        "kwargs": _argument_to_json(dict(node.kwargs)),
    }


def rebuild_graph(header: dict[str, Any]) -> fx.GraphModule:
    """The graph of a file's header over its torch modules; empty modules stand where Tetris' own layers belong."""
    root = nn.Module()
    for name, entry in header["modules"].items():
        parent, _, leaf = name.rpartition(".")
        ensure_module(root, parent).add_module(leaf, module_from_json(name, entry))
    for name in (*header["block_sparse"], *header["stems"]):
        ensure_module(root, name)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in header["graph"]:
        args, kwargs = (_argument_from_json(entry[k], nodes) for k in ("args", "kwargs"))
        target = _target_from_json(entry["op"], entry["target"], args)
        nodes[entry["name"]] = graph.create_node(entry["op"], target, args, kwargs, entry["name"])
    return fx.GraphModule(root, graph, header["name"])


# -- modules -----------------------------------------------------------------------------------------------------------
def module_to_json(name: str, module: nn.Module) -> dict[str, Any]:
    """Class and constructor arguments of a torch.nn module, read from its attributes of the same names."""
    kind = type(module)
    if getattr(nn, kind.__name__, None) is not kind:
        raise UnsupportedError(f"save: wanted modules of torch.nn; {name} is a {kind.__module__}.{kind.__name__}")
    arguments = {}
    for parameter in inspect.signature(kind.__init__).parameters:
        if parameter in ("self", "device", "dtype", "args", "kwargs") or not hasattr(module, parameter):
            continue
        value = getattr(module, parameter)
        arguments[parameter] = value is not None if parameter == "bias" else value
    if isinstance(module, nn.LayerNorm):
        arguments["normalized_shape"] = list(module.normalized_shape)
    return {"class": kind.__name__, "arguments": arguments}


def module_from_json(name: str, entry: dict[str, Any]) -> nn.Module:
    """The inverse of :func:`module_to_json`, with fresh parameters."""
    kind = getattr(nn, entry["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise FileFormatError(f"load: {name}: wanted a module of torch.nn; got {entry['class']!r}")
    return kind(**with_tuples(entry["arguments"]))


def with_tuples(arguments: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists back to the tuples that constructors take."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}


def ensure_module(root: nn.Module, path: str) -> nn.Module:
    """The submodule at ``path``, made of empty modules where missing."""
    for part in filter(None, path.split(".")):
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root
