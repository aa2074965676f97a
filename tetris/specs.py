"""What a user may write for ``sparsity`` and ``block``, resolved to one value a layer.

A value for all layers, a dict by layer name with glob patterns (later entries win), a list in the order of the layers,
or "auto" for blocks. Layers that block pruning cannot speed up (a handful of input channels) are left out of
model-wide values and pruned only when they are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from tetris.errors import TetrisError, UnsupportedError, describe
from tetris.layers import supported_padding
from tetris.pruning import Block, check_sparsity, fit_block

SparsitySpec = float | Mapping[str, float] | Sequence[float]
Prunable = nn.Conv2d | nn.Linear
BlockSpec = str | Block | Mapping[str, Block]
T = TypeVar("T")

MIN_CHANNELS = 16
"""Fewer input or output channels than this do not hold two blocks that a tensor core or a CPU's GEMM can fill."""


def prunable_layers(model: nn.Module) -> dict[str, Prunable]:
    """All convolutions without groups and linear layers of a model, by name, in the order of registration.

    Subclasses with a forward of their own and convolutions whose padding no kernel knows are left out, and so is the
    inside of ``nn.MultiheadAttention``, which reads its projections' weights without calling them.
    """
    attentions = _inside_attentions(model)
    return {
        name: module
        for name, module in model.named_modules()
        if (
            (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)
            or (isinstance(module, nn.Conv2d) and _refused(module) is None)
        )
        and not name.startswith(attentions)
    }


def _refused(conv: nn.Conv2d) -> str | None:
    """Why a convolution has no block-sparse form; None where it has one."""
    if conv.groups > 1:
        return f"{conv.groups} groups"
    if type(conv).forward is not nn.Conv2d.forward:
        return f"no block-sparse form of {type(conv).__name__}"
    try:
        supported_padding(conv)
    except UnsupportedError:
        return f"padding {conv.padding!r}, {conv.padding_mode}"
    return None


def unprunable_layers(model: nn.Module) -> dict[str, str]:
    """Why the other convolutions, linear layers and embeddings of a model cannot be pruned, by name."""
    prunable, attentions = prunable_layers(model), _inside_attentions(model)
    reasons = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd) or name in prunable:
            continue
        if name.startswith(attentions):
            reasons[name] = "the attention reads its weight without calling it"
        else:
            refused = _refused(module) if isinstance(module, nn.Conv2d) else None
            reasons[name] = refused or f"no block-sparse form of {type(module).__name__}"
    return reasons


def _inside_attentions(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names inside ``nn.MultiheadAttention``."""
    return tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))


def worth_pruning(shape: Sequence[int]) -> bool:
    """Whether model-wide settings include a weight of this shape."""
    return shape[0] >= MIN_CHANNELS and shape[1] >= MIN_CHANNELS


def match(patterns: Mapping[str, T], names: Sequence[str], what: str) -> dict[str, T]:
    """Values by layer name of a dict of glob patterns; a pattern that names no layer is an error."""
    result: dict[str, T] = {}
    for pattern, value in patterns.items():
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise TetrisError(f"{what}: {pattern!r} matches no prunable layer; the model has {', '.join(names)}")
        result.update(dict.fromkeys(hits, value))
    return result


def resolve_sparsity(spec: Any, layers: Mapping[str, Prunable], structure: Any = "block") -> dict[str, float]:
    """Sparsity by layer name, in the order of the layers; layers that are absent stay dense.

    Args:
        spec: a float for every layer worth pruning, a dict of glob patterns, or a list with one rate a layer.
        layers: the prunable layers by name.
        structure: block structures leave layers with few channels out of a model-wide float.
    Raises:
        TetrisError: a rate outside [0, 1), a pattern without a layer, a list of the wrong length.
    """
    names = list(layers)
    if not names:
        raise TetrisError("prune: wanted a model with Conv2d (groups=1) or Linear layers; it has none")
    if isinstance(spec, Mapping):
        rates = match(spec, names, "sparsity")
    elif isinstance(spec, Sequence) and not isinstance(spec, str):
        if len(spec) != len(names):
            raise TetrisError(
                f"sparsity: wanted one rate for each of the {len(names)} prunable layers ({', '.join(names)}); "
                f"got {len(spec)}"
            )
        rates = dict(zip(names, spec))
    else:
        chosen = [n for n, m in layers.items() if structure != "block" or worth_pruning(m.weight.shape)]
        rates = dict.fromkeys(chosen, spec)
        if not chosen:
            raise TetrisError(
                f"sparsity: no layer has {MIN_CHANNELS} input and output channels or more; "
                "name the layers to prune in a dict"
            )
    checked = {name: check_sparsity(rates[name], f"sparsity of {name}") for name in names if name in rates}
    return {name: rate for name, rate in checked.items() if rate > 0}


def resolve_blocks(spec: Any, layers: Mapping[str, Prunable]) -> dict[str, tuple[int, int]]:
    """The (out, in) block of every layer, shrunk to its shape; see :func:`tetris.pruning.fit_block`.

    Args:
        spec: an int, a pair (out, in), a dict of glob patterns (unnamed layers get "auto") or "auto".
    """
    blocks: dict[str, Any] = {name: default_block(m.weight) for name, m in layers.items()}
    if isinstance(spec, Mapping):
        blocks.update(match(spec, list(layers), "block"))
    elif isinstance(spec, str):
        if spec != "auto":
            raise TetrisError(
                f"block: wanted an int, a pair (out, in), a dict by layer or 'auto'; got {describe(spec)}"
            )
    else:
        blocks = dict.fromkeys(layers, spec)
    return {name: fit_block(blocks[name], (m.weight.shape[0], m.weight.shape[1])) for name, m in layers.items()}


def default_block(weight: torch.Tensor) -> tuple[int, int]:
    """The block where nobody measured: 64 outputs fill a tensor core's tile, fewer inputs retain more importance.

    64x32 ran as fast as 64x64 on an H200 (notes of the convolution bench); layers under 128 channels take smaller
    blocks so that a row still holds several. ``tetris.plan`` measures instead of guessing.
    """
    c_out, c_in = weight.shape[:2]
    if weight.device.type == "cpu":
        return min(32, max(8, c_out // 4)), min(32, max(8, c_in // 8))
    return (64 if c_out >= 128 else 32), (32 if c_in >= 128 else 16)
