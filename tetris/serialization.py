"""``tetris.save`` and ``tetris.load``: a converted model as one safetensors file, JSON in its header, no pickle.

A traced model is saved with its graph (``tetris.graph_json``), so that it loads without the code that defined it.
A model that could not be traced needs its architecture passed to ``load``.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from tetris.block_sparse_layer import BlockSparseLayer
from tetris.conversion import Conversion, ConvertedLayer, to_channels_last
from tetris.errors import FileFormatError, TetrisError, UnsupportedError, describe
from tetris.files import atomic_file
from tetris.graph_json import ensure_module, module_to_json, node_to_json, rebuild_graph, with_tuples
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.quantization import LARGEST
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
    # Shared and overlapping tensors would be refused; a copy each is what a state dict means.
    tensors = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in model.state_dict().items()}
    for layer in record.layers.values():
        for side in ("input_order", "output_order"):
            if (order := getattr(layer, side)) is not None:
                tensors[f"{layer.name}.{side}"] = order.clone()
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
        header["modules"] = {name: module_to_json(name, model.get_submodule(name)) for name in sorted(leaves)}
        header["graph"] = [node_to_json(node) for node in model.graph.nodes]
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"tetris": json.dumps(header)})
    return Path(path)


def load(path: str | Path, model: nn.Module | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """Read a converted model.

    Args:
        path: a file of :func:`save`.
        model: the dense architecture, for a saved model that could not be traced; any other is rebuilt from the file
            alone. It is not changed.
        device: where the tensors go.
    Raises:
        FileFormatError: missing, corrupt, another format or version, or tensors that do not match the description.
        UnsupportedError: a GPU is asked for and there is none.
    """
    path = Path(path)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"load: wanted to load to {device}; this machine (or torch build) has no usable GPU")
    if not path.is_file():
        raise FileFormatError(f"load: wanted a model file at {path}; there is no such file")
    header, tensors = _read(path, device)
    try:
        if header["traced"]:
            result: nn.Module = rebuild_graph(header)
        elif model is None:
            raise TetrisError(
                f"load: {path} holds a model that could not be traced; pass its architecture: "
                "tetris.load(path, model=...)"
            )
        else:
            result = copy.deepcopy(model)
        for name, arguments in header["block_sparse"].items():
            parent, _, leaf = name.rpartition(".")
            setattr(ensure_module(result, parent), leaf, _block_sparse_from_json(name, arguments, tensors))
        for name, arguments in header["stems"].items():
            parent, _, leaf = name.rpartition(".")
            setattr(ensure_module(result, parent), leaf, StemConv2d(**with_tuples(arguments)))
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
    quantised = [name for name, arguments in header["block_sparse"].items() if "weight_dtype" in arguments]
    kept = {f"{name}.{part}" for name in quantised for part in ("values", "scales")}
    dtypes = {t.dtype for name, t in tensors.items() if t.is_floating_point() and name not in kept}
    result = result.to(device=device, dtype=dtypes.pop() if len(dtypes) == 1 else None)
    try:
        result.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise FileFormatError(f"load: the tensors of {path} do not match the model: {error}") from error
    to_channels_last(result)
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
            f"load: wanted {FORMAT} version {VERSION}; {path} is {header.get('format')} version "
            f"{header.get('version')}; convert the model again with this version"
        )
    return header, tensors


# -- layers ------------------------------------------------------------------------------------------------------------
def _layer_to_json(layer: ConvertedLayer) -> dict[str, Any]:
    left_out = {"input_order", "output_order"} | (set() if layer.weight_dtype else {"weight_dtype"})
    return {k: v for k, v in vars(layer).items() if not isinstance(v, Tensor) and k not in left_out}


def _block_sparse_to_json(layer: BlockSparseLayer) -> dict[str, Any]:
    common = ("block", "n_blocks", "activation", "kept_fraction", "config")
    own = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "max_pool")
    names = (*common, *(own if isinstance(layer, BlockSparseConv2d) else ("in_features", "out_features")))
    return {
        "class": type(layer).__name__,
        "bias": layer.bias is not None,
        "permutes": [layer.input_permutation is not None, layer.output_permutation is not None],
        **{name: getattr(layer, name) for name in names},
        **({"weight_dtype": layer.weight_dtype} if isinstance(layer, BlockSparseLinear) and layer.weight_dtype else {}),
    }


def _block_sparse_from_json(name: str, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> BlockSparseLayer:
    values = with_tuples(arguments)
    kind, (permutes_in, permutes_out) = LAYERS[values.pop("class")], values.pop("permutes")
    layer = kind(**values)
    for side, wanted, size in (("input", permutes_in, layer.shape[1]), ("output", permutes_out, layer.shape[0])):
        if wanted:
            layer.register_buffer(f"{side}_permutation", torch.arange(size))
    stored, wanted = tensors.get(f"{name}.values"), layer.values
    if stored is None or stored.shape != wanted.shape or not _same_kind(stored.dtype, wanted.dtype):
        raise FileFormatError(f"load: {name}: wanted values as {describe(wanted)}; the file holds {describe(stored)}")
    return layer


def _same_kind(a: torch.dtype, b: torch.dtype) -> bool:
    """Whether values of dtype a may be read into a layer of dtype b: not if either is quantised and they differ."""
    return a == b or not {a, b} & LARGEST.keys()
