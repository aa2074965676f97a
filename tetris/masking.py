"""``tetris.prune``: a masked copy of a model, in the original channel order, ready to fine-tune.

The mask is a parametrization of each pruned weight, so any optimizer trains the copy as it is: pruned elements stay
zero, no reordering happens while training (the paper's un-permuted mask), and state dicts carry mask and permutations.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from tetris.channels import ModelGraph
from tetris.errors import TetrisError, UnsupportedError, describe
from tetris.graph import channel_groups
from tetris.importance import Importance, importance_of
from tetris.layer_searches import LayerProgress, Request, search_separately, search_shared
from tetris.permutation import apply, identity
from tetris.plans import ModelPlan
from tetris.pruning import PruningMethod, block_sums
from tetris.reordering import Reordering
from tetris.specs import BlockSpec, Prunable, SparsitySpec, match, prunable_layers, resolve_blocks, resolve_sparsity
from tetris.tracing import ExampleInputs

PERMUTATIONS = ("auto", "shared", "separate")


class MaskedWeight(nn.Module):
    """The parametrization ``weight = mask * original``, with the reordering under which the mask is made of blocks."""

    mask: torch.Tensor
    row_permutation: torch.Tensor
    column_permutation: torch.Tensor

    def __init__(self, reordering: Reordering, structure: str) -> None:
        super().__init__()
        mask = reordering.keep_mask
        if reordering.block_mask is not None:  # taps of one (out, in) pair share their fate: keep one
            mask = mask[(slice(None), slice(None)) + (slice(0, 1),) * (mask.dim() - 2)].clone()
        device, (rows, columns) = mask.device, reordering.shape[:2]
        self.register_buffer("mask", mask)
        permutations = reordering.permutations
        self.register_buffer("row_permutation", permutations.get(0, identity(rows)).to(device))
        self.register_buffer("column_permutation", permutations.get(1, identity(columns)).to(device))
        self.block = reordering.block if reordering.block_mask is not None else None
        self.sparsity, self.method, self.structure = reordering.sparsity, reordering.method, structure
        self.retained = reordering.retained

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.where(self.mask, weight, 0)

    def get_extra_state(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("block", "sparsity", "method", "structure", "retained")}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "block": state["block"] and tuple(state["block"])})

    def reordering(self, shape: tuple[int, ...]) -> Reordering:
        """The reordering, its masks read back from the buffers (they may have been loaded from a state dict)."""
        permutations = {0: self.row_permutation.cpu(), 1: self.column_permutation.cpu()}
        block_mask = None
        if self.block is not None:
            pairs = self.mask.flatten(2)[:, :, 0] if self.mask.dim() > 2 else self.mask
            block_mask = block_sums(apply(pairs, permutations).float(), self.block).cpu() > 0
        return Reordering(
            shape=shape, block=self.block or (1, 1), sparsity=self.sparsity, method=self.method,
            permutations=permutations, block_mask=block_mask, keep_mask=self.mask.expand(shape),
            retained=self.retained,
        )  # fmt: skip

    def extra_repr(self) -> str:
        block = f"{self.block[0]}x{self.block[1]}" if self.block else self.structure
        return f"{block}, sparsity={self.sparsity:.3f}, retained={self.retained:.3f}, method={self.method}"


def mask_of(module: nn.Module) -> MaskedWeight | None:
    """The mask of a pruned layer; None for any other module."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    return next((p for p in _parametrizations(module)["weight"] if isinstance(p, MaskedWeight)), None)


def _parametrizations(module: nn.Module) -> Mapping[str, parametrize.ParametrizationList]:
    """Of a parametrized module, by parameter."""
    return cast(Mapping[str, parametrize.ParametrizationList], module.parametrizations)


def masked_layers(model: nn.Module) -> dict[str, MaskedWeight]:
    """The masks of a pruned model by layer name."""
    return {name: mask for name, m in model.named_modules() if (mask := mask_of(m)) is not None}


def reorderings(model: nn.Module) -> dict[str, Reordering]:
    """The reordering of every pruned layer by name: permutations, masks, retained importance."""
    return {
        name: mask.reordering(tuple(cast(torch.Tensor, model.get_submodule(name).weight).shape))
        for name, mask in masked_layers(model).items()
    }


def bake_masks(model: nn.Module) -> nn.Module:
    """Make the masked weights permanent, in place: plain layers whose pruned weights are zero. Returns the model."""
    for name in masked_layers(model):
        module = model.get_submodule(name)
        given = _parametrizations(module)
        if set(given) != {"weight"} or len(given["weight"]) != 1:
            raise UnsupportedError(
                f"bake_masks: wanted {name} to have its mask as the only parametrization; it has others; "
                "remove them first"
            )
        # remove_parametrizations would edit the class, which copies of the model share.
        weight, trainable = cast(torch.Tensor, module.weight).detach(), given["weight"].original.requires_grad
        del module.parametrizations
        module.__class__ = type(module).__mro__[1]
        module.weight = nn.Parameter(weight, requires_grad=bool(trainable))
    return model


def prune(
    model: nn.Module,
    sparsity: SparsitySpec | None = None,
    block: BlockSpec = "auto",
    method: str | None = None,
    *,
    importance: Importance | Mapping[str, Importance] = "l1",
    structure: str | PruningMethod = "block",
    permutations: str = "auto",
    example_inputs: ExampleInputs | None = None,
    plan: ModelPlan | None = None,
    skip: Sequence[str] = (),
    steps: int = 60,
    seed: int = 0,
    progress: LayerProgress | None = None,
) -> nn.Module:
    """A masked copy of ``model``: channels reordered in thought, blocks of small weights set to zero (eqs. 4 to 8).

    >>> pruned = tetris.prune(model, sparsity=0.73, example_inputs=x)
    >>> train(pruned)                                   # fine-tune as usual, the mask holds
    >>> fast = tetris.convert(pruned, example_inputs=x)

    Args:
        model: trained; not changed. Its Conv2d (groups=1) and Linear layers can be pruned.
        sparsity: fraction of blocks to prune: a float in [0, 1) for every layer with 16 channels or more, a dict by
            layer name (globs; only named layers are pruned) or a list with one rate a prunable layer (0 = dense).
        block: int, (out, in), dict by layer (globs) or "auto"; ignored by structures without blocks.
        method: "none", "sort", "paper", "batched", "exact" or "annealed", see :func:`tetris.reorder`; by default
            "annealed" for blocks and "none" for other structures.
        importance: "l1", "l2", a tensor for a single-layer model, or a dict by layer name of these.
        structure: "block" or another pruning method; see :mod:`tetris.pruning`.
        permutations: "shared" searches one permutation for all layers that meet in a channel group (free at run time;
            the model must be traceable), "separate" one for each weight (retains more, costs a data movement a
            layer), "auto" shares where ``example_inputs`` are given and the model can be traced (warns where not).
        example_inputs: a tensor, tuple or dict to call the model with; needed to share permutations.
        plan: decisions of :func:`tetris.plan` by layer; replaces ``sparsity`` and ``block``.
        skip: glob patterns of layers to leave dense.
        steps: annealing steps, 60 quick, 500 thorough.
        seed: results are equal for equal seeds.
        progress: called as ``progress(what is searched, layers done, layers in all)``, before every layer (the first
            name of several at once) and after every step of a search: "fc1, step 12".
    Returns:
        a copy with masks as parametrizations; ``print`` a layer to see its mask.
    Raises:
        TetrisError, UnsupportedError: bad input, naming what was wanted.
    Cost: one search a layer, see :func:`tetris.reorder`; on a GPU layers are annealed side by side.
    """
    if permutations not in PERMUTATIONS:
        raise TetrisError(f"prune: wanted permutations of {', '.join(PERMUTATIONS)}; got {describe(permutations)}")
    if not isinstance(model, nn.Module):
        raise TetrisError(f"prune: wanted an nn.Module; got {describe(model)}")
    if isinstance(model, (nn.Linear, nn.Conv2d)):
        raise TetrisError(
            f"prune: wanted a model with layers inside; got a bare {type(model).__name__}; wrap it in nn.Sequential, "
            "or use tetris.reorder and tetris.BlockSparseLinear.from_dense (BlockSparseConv2d.from_dense)"
        )
    if masked_layers(model):
        raise TetrisError(
            "prune: wanted a dense model; this one is pruned already; prune the original, or bake_masks it"
        )
    method = method or ("annealed" if structure == "block" else "none")
    layers = prunable_layers(model)
    skipped = match(dict.fromkeys(skip, True), list(layers), "skip") if skip else {}
    if plan is not None:
        if sparsity is not None or block != "auto":
            raise TetrisError("prune: wanted either a plan or sparsity and block; got both; edit the plan instead")
        _check_fits(plan, layers)
        sparsity, block = plan.sparsities, plan.blocks
    if sparsity is None:
        raise TetrisError("prune: wanted a sparsity, for example sparsity=0.73, or a plan; got neither")
    rates = resolve_sparsity(sparsity, layers, structure)
    blocks = resolve_blocks(block, layers)
    requests = [
        Request(name, layers[name].weight.detach(), _importance(importance, name), blocks[name], rate)
        for name, rate in rates.items()
        if name not in skipped
    ]
    for request in requests:
        if parametrize.is_parametrized(layers[request.name]):
            raise TetrisError(
                f"prune: {request.name} has a parametrization of its own, which conversion could not fold; "
                "make it permanent with torch.nn.utils.parametrize.remove_parametrizations, or name it in skip"
            )
        try:
            importance_of(request.weight, request.importance)
        except TetrisError as error:
            raise type(error)(f"{request.name}: {error}") from error
    if not requests:
        return copy.deepcopy(model)
    graph = _sharing_graph(model, permutations, structure, method, example_inputs)
    pruned = copy.deepcopy(model)
    options = {"method": method, "seed": seed, "steps": steps}
    if graph is None:
        found = search_separately(requests, structure, options, progress)
    else:
        found = search_shared(requests, graph, plan, options, progress)
    label = structure if isinstance(structure, str) else type(structure).__name__
    for name, reordering in found.items():
        parametrize.register_parametrization(
            pruned.get_submodule(name), "weight", MaskedWeight(reordering, label), unsafe=True
        )
    return pruned


def _check_fits(plan: ModelPlan, layers: Mapping[str, Prunable]) -> None:
    """A plan for another model is refused before it decides anything."""
    for planned in plan:
        found = tuple(layers[planned.name].weight.shape) if planned.name in layers else "no such layer"
        if found != tuple(planned.shape):
            raise TetrisError(
                f"prune: the plan has a layer {planned.name} of {tuple(planned.shape)}; the model has {found}; "
                "make the plan again for this model"
            )


def _importance(importance: Importance | Mapping[str, Importance], name: str) -> Importance:
    if isinstance(importance, Mapping):
        return importance.get(name, "l1")
    return importance


def _sharing_graph(
    model: nn.Module, permutations: str, structure: Any, method: str, example_inputs: ExampleInputs | None
) -> ModelGraph | None:
    """The channel groups along which permutations are shared; None = every layer for itself."""
    if permutations == "separate" or structure != "block" or method == "none":
        return None
    if example_inputs is None:
        if permutations == "shared":
            raise TetrisError("prune: permutations='shared' wants example_inputs to trace the model with; got None")
        return None
    try:
        return channel_groups(model, example_inputs)
    except UnsupportedError as error:
        if permutations == "shared":
            raise UnsupportedError(f"{error}, or use permutations='separate', which needs no tracing") from error
        warnings.warn(f"prune: {error}; every layer gets permutations of its own", stacklevel=3)
        return None
