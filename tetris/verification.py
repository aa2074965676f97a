"""``tetris.verify``: does the converted model compute what the masked model computes?

Every converted layer is run on the input it really gets and compared with its masked original in float64; then the
whole network's outputs are compared. Errors are relative Frobenius norms against the table in ``tetris.tolerances``.

A layer with quantised weights is compared with the masked original whose weights are quantised likewise, within the
same tolerances; what quantisation itself costs is reported beside them, without a verdict.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tetris.block_sparse_layer import BlockSparseLayer, FusedLayer
from tetris.conversion import Conversion, ConvertedLayer
from tetris.errors import ShapeError, TetrisError, describe
from tetris.masking import bake_masks
from tetris.permutation import apply, inverse
from tetris.quantization import quantized, stored_dtype
from tetris.reference import activate
from tetris.tolerances import relative_error, tolerance
from tetris.tracing import ExampleInputs, as_arguments


@dataclass(frozen=True)
class Check:
    """One comparison: ``error`` = ||y - ref|| / ||ref||, passed when finite and at most ``limit``."""

    name: str
    error: float
    limit: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.limit


@dataclass(frozen=True)
class Verification:
    """The outcome of :func:`verify`: a check for each replaced layer and one or more end to end.

    ``quantization``: relative error that one-byte weights bring, in float64: of each quantised layer's weights by its
    name, and of the network's outputs; empty without such layers.
    """

    layers: list[Check]
    outputs: list[Check]
    quantization: dict[str, float] = field(default_factory=dict)

    @property
    def checks(self) -> list[Check]:
        return [*self.layers, *self.outputs]

    @property
    def passed(self) -> bool:
        """Whether every check passed; never true when nothing was compared."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        rows = [
            (c.name, c.detail, f"{c.error:.2e}", f"{c.limit:.1e}", "ok" if c.passed else "FAILED") for c in self.checks
        ]
        verdict = "all within tolerance" if self.passed else f"{sum(not c.passed for c in self.checks)} checks FAILED"
        table = tabulate(rows, headers=("layer", "", "error", "limit", ""), disable_numparse=True)
        lost = "".join(f"\nweight quantisation, relative error: {n} {e:.2e}" for n, e in self.quantization.items())
        return f"{table}\n{verdict}{lost}"


def verify(pruned: nn.Module, fast: nn.Module, example_inputs: ExampleInputs) -> Verification:
    """Compare a converted model with the masked model that it came from.

    Args:
        pruned: the model that was converted, with its masks.
        fast: from :func:`tetris.convert` (or :func:`tetris.load`).
        example_inputs: a tensor, tuple or dict to call both with, on their device and in their dtype.
    Returns:
        a report; ``print`` it, or ask ``report.passed``. End to end the limit grows with the square root of the number
        of layers, as independent roundings do, or is twice the masked model's own rounding error if that is larger.
    Raises:
        TetrisError: ``fast`` is no converted model; outputs that differ in structure; a model that fails in float64.
    Cost: a copy of the masked model and of every converted layer's inputs and outputs, one forward pass of each model
    and one of the masked one in float64; two with quantised weights.
    """
    record = getattr(fast, "conversion", None)
    if not isinstance(record, Conversion):
        raise TetrisError(
            f"verify: wanted a model from tetris.convert; got {type(fast).__name__} without a conversion record"
        )
    args, kwargs = as_arguments(example_inputs)
    masked = bake_masks(copy.deepcopy(pruned)).eval()
    captured: dict[str, tuple[Tensor, Tensor | None, Tensor]] = {}
    handles = [
        module.register_forward_hook(_capture(name, captured), with_kwargs=True)
        for name, module in fast.named_modules()
        if isinstance(module, FusedLayer)
    ]
    try:
        with torch.no_grad():
            y = fast(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        own = masked(*args, **kwargs)
        reference_model = masked.double()
        exact = reference = _in_double(reference_model, args, kwargs)
        quantization = _quantize_weights(reference_model, record)
        if quantization:
            reference = _in_double(reference_model, args, kwargs)
        layers = [
            _check_layer(reference_model, fast.get_submodule(name), record.layers, name, *captured[name])  # type: ignore[arg-type]
            for name in captured
        ]
    outputs = _check_outputs(y, reference, own, exact, len(record.layers))
    if quantization:
        pairs = zip(_tensors(reference), _tensors(exact))
        quantization |= {check.name: relative_error(a, b) for check, (a, b) in zip(outputs, pairs)}
    return Verification(layers, outputs, quantization)


def _quantize_weights(model: nn.Module, record: Conversion) -> dict[str, float]:
    """Give the quantised layers' masked originals in float64 such weights too; relative errors of these by layer."""
    errors = {}
    for name, layer in record.layers.items():
        if layer.weight_dtype:
            original = model.get_submodule(name)
            assert isinstance(original, nn.Linear)
            rounded = quantized(original.weight, stored_dtype(layer.weight_dtype))
            errors[name] = relative_error(rounded, original.weight)
            original.weight.data = rounded
    return errors


class _CastsToDouble(TorchFunctionMode):
    """While it is entered, a model's own casts to a floating-point dtype, ``x.float()`` say, give float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        if func is Tensor.to:
            args = tuple(_double_dtype(value) for value in args)
            kwargs = {name: _double_dtype(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _double_dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _in_double(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """What ``model``, which is in float64, computes on inputs in float64."""
    try:
        with _CastsToDouble():
            return model(*_to_double(args), **_to_double(kwargs))
    except RuntimeError as error:
        raise TetrisError(
            f"verify: wanted a model that runs in float64, the reference; {type(model).__name__} failed "
            f"({str(error).strip().splitlines()[0]}); look for tensors that its forward makes in another dtype"
        ) from error


def _capture(name: str, captured: dict[str, tuple[Tensor, Tensor | None, Tensor]]) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        residual = kwargs.get("residual")  # copies: what follows may work in place
        copied = None if residual is None else residual.detach().clone()
        captured[name] = (args[0].detach().clone(), copied, output.detach().clone())

    return hook


def _check_layer(
    model: nn.Module,
    layer: FusedLayer,
    records: dict[str, ConvertedLayer],
    name: str,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
) -> Check:
    """The masked original (with its batch norm) in float64 on the same input, brought to the storage orders."""
    record, dim = records[name], 1 if y.dim() == 4 else -1
    original = x.double()
    if record.input_order is not None:
        original = apply(original, {dim: inverse(record.input_order)})
    expected = _original(model, record, original)
    if record.bias_of is not None:
        source = records[record.bias_of]
        weight = cast(Tensor, model.get_submodule(source.name).weight)
        bias = _original(model, source, torch.zeros_like(weight[:1]))  # what zeros become
        expected = expected + (bias[..., :1, :1] if dim == 1 else bias[0])
    if record.output_order is not None:
        expected = apply(expected, {dim: record.output_order})
    if residual is not None:
        expected = expected + residual.double()
    expected = activate(expected, layer.activation)
    if layer.max_pool:
        expected = F.max_pool2d(expected, 2)
    tf32 = torch.backends.cudnn.allow_tf32 if y.dim() == 4 else torch.backends.cuda.matmul.allow_tf32
    limit = tolerance(y.dtype, allow_tf32=y.is_cuda and tf32)
    detail = "dense"
    if isinstance(layer, BlockSparseLayer):
        detail = f"{layer.block[0]}x{layer.block[1]}, {layer.kept_fraction:.0%} kept"
    return Check(record.name, relative_error(y, expected), limit, detail)


def _original(model: nn.Module, record: ConvertedLayer, x: Tensor) -> Tensor:
    """The masked original of a layer, with the batch norm that was folded into it; of zeros its bias."""
    y = model.get_submodule(record.name)(x)
    return y if record.batch_norm is None else model.get_submodule(record.batch_norm)(y)


def _check_outputs(y: Any, reference: Any, own: Any, exact: Any, depth: int) -> list[Check]:
    """``own`` and ``exact``: outputs of the masked model in its dtype and in float64, before any quantisation."""
    tensors, references, owns, exacts = (_tensors(v) for v in (y, reference, own, exact))
    if len(tensors) != len(references) or any(a.shape != b.shape for a, b in zip(tensors, references)):
        raise ShapeError(
            f"verify: wanted outputs like the masked model's: {', '.join(map(describe, references))}; "
            f"got {', '.join(map(describe, tensors))}"
        )
    checks = []
    for i, (a, b, c, d) in enumerate(zip(tensors, references, owns, exacts)):
        tf32 = a.is_cuda and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        limit = max(tolerance(a.dtype, tf32) * math.sqrt(max(1, depth)), 2 * relative_error(c, d))
        checks.append(
            Check("network" if len(tensors) == 1 else f"network output {i}", relative_error(a, b), limit, "end to end")
        )
    return checks


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in a model's output, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_to_double(v) for v in value)
    return {k: _to_double(v) for k, v in value.items()} if isinstance(value, dict) else value
