"""``tetris.save`` and ``tetris.load``: a converted model as one safetensors file, JSON in its header, no pickle.

A traced model is saved with its graph, so that it loads without the code that defined it: nodes name functions of torch
and ``operator`` and methods of tensors, modules are rebuilt from their class and arguments. Nothing but the
arithmetic named in :data:`FUNCTIONS` is ever called. A model that could not be traced needs its architecture passed to ``load``.
"""

from __future__ import annotations

import copy
import inspect
import json
import operator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tetris.conversion import Conversion, ConvertedLayer
from tetris.errors import FileFormatError, TetrisError, UnsupportedError
from tetris.files import atomic_file
from tetris.layers import BlockSparseConv2d, BlockSparseLayer, BlockSparseLinear
from tetris.stem import StemConv2d

FORMAT = "tetris-model"
VERSION = 1
LAYERS: dict[str, type[BlockSparseLayer]] = {c.__name__: c for c in (BlockSparseConv2d, BlockSparseLinear)}


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a converted model to ``path`` (conventionally ``*.safetensors``), atomically. Returns the path.

    Raises:
        TetrisError: not a model from :func:`tetris.convert`.
        UnsupportedError: its graph uses an operation or module that the file format cannot name.
    """
    record = getattr(model, "conversion", None)
    if not isinstance(record, Conversion):
        raise TetrisError(
            f"save: wanted a model from tetris.convert; got {type(model).__name__}; torch.save saves any other"
        )
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    for layer in record.layers.values():
        for side in ("input_order", "output_order"):
            if (order := getattr(layer, side)) is not None:
                tensors[f"{layer.name}.{side}"] = order
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "name": type(model).__name__,
        "traced": isinstance(model, fx.GraphModule),
        "layers": {name: _layer_to_json(layer) for name, layer in record.layers.items()},
        "block_sparse": {
            n: _block_sparse_to_json(m) for n, m in model.named_modules() if isinstance(m, BlockSparseLayer)
        },
        "stems": {n: m.arguments() for n, m in model.named_modules() if isinstance(m, StemConv2d)},
    }
    if isinstance(model, fx.GraphModule):
        leaves = {str(n.target) for n in model.graph.nodes if n.op == "call_module"}
        leaves -= header["block_sparse"].keys() | header["stems"].keys()
        header["modules"] = {name: _module_to_json(name, model.get_submodule(name)) for name in sorted(leaves)}
        header["graph"] = [_node_to_json(node) for node in model.graph.nodes]
    from safetensors.torch import save_file

    # Shared and overlapping tensors would be refused; a clone each is what a state dict means.
    with atomic_file(path) as temporary:
        save_file({n: t.clone() for n, t in tensors.items()}, temporary, metadata={"tetris": json.dumps(header)})
    return Path(path)


def load(path: str | Path, model: nn.Module | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """Read a converted model.

    Args:
        path: a file of :func:`save`.
        model: the dense architecture; needed only if the saved model could not be traced. It is not changed.
        device: where the tensors go.
    Raises:
        FileFormatError: missing, corrupt, another format or version, or tensors that do not match the description.
    """
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"load: wanted a model file at {path}; there is no such file")
    header, tensors = _read(path, device)
    try:
        if header["traced"]:
            result = _rebuild_graph(header)
        elif model is None:
            raise TetrisError(
                f"load: {path} holds a model that could not be traced; pass its architecture: tetris.load(path, model=...)"
            )
        else:
            result = copy.deepcopy(model)
        shapes = {name: t.shape for name, t in tensors.items()}
        for name, arguments in header["block_sparse"].items():
            parent, _, leaf = name.rpartition(".")
            setattr(_ensure(result, parent), leaf, _block_sparse_from_json(name, arguments, shapes))
        for name, arguments in header["stems"].items():
            parent, _, leaf = name.rpartition(".")
            setattr(_ensure(result, parent), leaf, StemConv2d(**_with_tuples(arguments)))
        layers = {name: ConvertedLayer(**values) for name, values in header["layers"].items()}
        for layer in layers.values():
            layer.block = tuple(layer.block) if layer.block else None  # type: ignore[assignment]
            for side in ("input_order", "output_order"):
                order = tensors.pop(f"{layer.name}.{side}", None)
                setattr(layer, side, None if order is None else order.cpu())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, TetrisError):
            raise
        raise FileFormatError(f"load: {path} has a damaged description ({type(error).__name__}: {error})") from error
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    result = result.to(device=device, dtype=dtypes.pop() if len(dtypes) == 1 else None)
    try:
        result.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise FileFormatError(f"load: the tensors of {path} do not match the model: {error}") from error
    if any(isinstance(m, nn.Conv2d | BlockSparseConv2d) for m in result.modules()):
        result = result.to(memory_format=torch.channels_last)
    result.conversion = Conversion(layers, header["traced"])  # type: ignore[assignment]
    return result.eval().requires_grad_(False)


def _read(path: Path, device: torch.device | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FileFormatError(
            f"load: wanted a safetensors file; {path} is corrupt or of another kind ({error})"
        ) from error
    try:
        header = json.loads(metadata["tetris"])
    except (KeyError, json.JSONDecodeError) as error:
        raise FileFormatError(
            f"load: wanted a file of tetris.save; {path} is a safetensors file without its header"
        ) from error
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise FileFormatError(
            f"load: wanted {FORMAT} version {VERSION}; {path} is {header.get('format')} version {header.get('version')}; "
            "convert the model again with this version"
        )
    return header, tensors


# -- layers and modules -----------------------------------------------------------------------------------------------
def _layer_to_json(layer: ConvertedLayer) -> dict[str, Any]:
    return {
        k: v for k, v in vars(layer).items() if not isinstance(v, Tensor) and k not in ("input_order", "output_order")
    }


def _block_sparse_to_json(layer: BlockSparseLayer) -> dict[str, Any]:
    common = ("block", "n_blocks", "activation", "kept_fraction", "config")
    own = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "max_pool")
    names = (*common, *(own if isinstance(layer, BlockSparseConv2d) else ("in_features", "out_features")))
    return {
        "class": type(layer).__name__,
        "bias": layer.bias is not None,
        "permutes": [layer.input_permutation is not None, layer.output_permutation is not None],
        **{name: getattr(layer, name) for name in names},
    }


def _block_sparse_from_json(name: str, arguments: dict[str, Any], shapes: dict[str, torch.Size]) -> BlockSparseLayer:
    values = _with_tuples(arguments)
    kind, (permutes_in, permutes_out) = LAYERS[values.pop("class")], values.pop("permutes")
    layer = kind(**values)
    for side, wanted, size in (("input", permutes_in, layer.shape[1]), ("output", permutes_out, layer.shape[0])):
        if wanted:
            layer.register_buffer(f"{side}_permutation", torch.arange(size))
    if shapes.get(f"{name}.values") != layer.values.shape:
        raise FileFormatError(
            f"load: {name}: wanted values of {tuple(layer.values.shape)}; the file holds {shapes.get(f'{name}.values')}"
        )
    return layer


def _module_to_json(name: str, module: nn.Module) -> dict[str, Any]:
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
    if kind is nn.LayerNorm:
        arguments["normalized_shape"] = list(module.normalized_shape)
    return {"class": kind.__name__, "arguments": arguments}


def _module_from_json(name: str, entry: dict[str, Any]) -> nn.Module:
    kind = getattr(nn, entry["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise FileFormatError(f"load: {name}: wanted a module of torch.nn; got {entry['class']!r}")
    return kind(**_with_tuples(entry["arguments"]))


def _with_tuples(arguments: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists back to the tuples that constructors take."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}


def _ensure(root: nn.Module, path: str) -> nn.Module:
    """The submodule at ``path``, made of empty modules where missing."""
    for part in filter(None, path.split(".")):
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root


# -- graph ------------------------------------------------------------------------------------------------------------
FUNCTIONS: dict[str, Any] = {
    f"{prefix}.{name}": getattr(module, name)
    for prefix, module, names in (
        ("operator", operator, "add iadd sub isub mul imul truediv floordiv neg pow matmul getitem eq ne lt le gt ge"),
        (
            "torch",
            torch,
            "abs add bmm cat chunk clamp concat conv2d div exp flatten matmul max_pool2d maximum mean minimum mul permute relu "
            "reshape sigmoid softmax split sqrt square squeeze stack sub sum tanh transpose unsqueeze",
        ),
        (
            "functional",
            F,
            "adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d dropout elu gelu hardsigmoid hardswish hardtanh interpolate "
            "layer_norm leaky_relu log_softmax max_pool2d mish normalize pad relu relu6 scaled_dot_product_attention sigmoid "
            "silu softmax softplus tanh",
        ),
    )
    for name in names.split()
} | {"getattr": getattr}
"""Every function that a saved graph may call, by the name it has in the file."""
METHODS = frozenset(
    [
        "abs",
        "add",
        "add_",
        "chunk",
        "clamp",
        "contiguous",
        "detach",
        "div",
        "dim",
        "exp",
        "expand",
        "flatten",
        "float",
        "half",
        "mean",
        "mul",
        "mul_",
        "permute",
        "relu",
        "relu_",
        "repeat",
        "reshape",
        "sigmoid",
        "size",
        "softmax",
        "split",
        "sqrt",
        "square",
        "squeeze",
        "sub",
        "sub_",
        "sum",
        "tanh",
        "to",
        "transpose",
        "unflatten",
        "unsqueeze",
        "view",
    ]
)
"""Every tensor method that a saved graph may call."""
ATTRIBUTES = frozenset({"shape", "dtype", "device", "T", "mT", "ndim"})
"""Every tensor attribute that a saved graph may read."""


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
    items = [_argument_from_json(v, nodes) for v in inner]
    return {"tuple": tuple, "list": list, "slice": lambda parts: slice(*parts)}[kind](items)


def _node_to_json(node: fx.Node) -> dict[str, Any]:
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


def _rebuild_graph(header: dict[str, Any]) -> fx.GraphModule:
    root = nn.Module()
    for name, entry in header["modules"].items():
        parent, _, leaf = name.rpartition(".")
        _ensure(root, parent).add_module(leaf, _module_from_json(name, entry))
    for name in (*header["block_sparse"], *header["stems"]):
        _ensure(root, name)
    graph, nodes = fx.Graph(), {}
    for entry in header["graph"]:
        args, kwargs = (_argument_from_json(entry[k], nodes) for k in ("args", "kwargs"))
        target = _target_from_json(entry["op"], entry["target"], args)
        nodes[entry["name"]] = graph.create_node(entry["op"], target, args, kwargs, entry["name"])
    return fx.GraphModule(root, graph, header["name"])
