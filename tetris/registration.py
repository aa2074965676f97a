"""Operations registered with torch so that a call of a compiled graph costs the CPU little more than its launches.

Every operation has two names. ``tetris::NAME`` is what layers call and exported programs keep: arguments one by one,
differentiable. It is a composite: where torch compiles, traces below autograd or runs it, it becomes
``tetris::repeated_NAME(x, residual, constants, call)``, with everything else about the call in one string. That costs
torch 5 us to dispatch where 18 arguments and a gradient in Python cost 25, and a string is quickly looked up: on a GPU
the kernels' launches are recorded at the second call of a kind and repeated from then on, see
:mod:`tetris.kernels.recording`.

Recordings live in this process only. A compiler keeps graphs on disk, found by the arguments of ``tetris::NAME`` and
holding calls as they were packed: whoever changes the format of :func:`packed` gives the repeated operation a new name.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tetris.errors import ShapeError, describe
from tetris.kernels.recording import Recorder, Recording, layout_of

MOST_KINDS = 4096
"""Kinds of calls that are remembered; the one that was not called for longest is forgotten first."""

LIBRARY = torch.library.Library("tetris", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
INPUTS = ("x", "residual")
"""Arguments that differ from call to call; a layer's other tensors are constants."""
CALL = "(Tensor x, Tensor? residual, Tensor[] constants, str call) -> Tensor"

Arguments = dict[str, Any]


class Kind:
    """What is remembered of calls that differ in their inputs' addresses and contents only.

    Attributes:
        recording: to repeat; None so far, or for ever.
        refused: why there can be none; "" so far.
        seen: whether there was such a call. Tensors that are used once are not worth a recording.
    """

    __slots__ = ("recording", "refused", "seen")

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.refused, self.seen = "", False


@functools.lru_cache(maxsize=MOST_KINDS)
def remembered(call: str, *kind: Any) -> Kind:
    """The kind of a call: its string, its inputs' layouts and its constants' addresses.

    Launches depend on nothing else (the string has the constants' shapes), so that remembering them is safe: whoever
    calls with the same addresses and shapes has to launch the same, and passes the tensors that lie there. No tensor is
    kept alive.
    """
    return Kind()


class Operation:
    """An operation by its functions, which take the same arguments."""

    def __init__(
        self,
        name: str,
        run: Callable[..., Tensor],
        *,
        cpu: Callable[..., Tensor],
        shape: Callable[..., Tensor],
        dense: Callable[..., Tensor],
        memory_format: torch.memory_format | None = None,
    ) -> None:
        """Register it.

        Args:
            name: in ``torch.ops.tetris``.
            run: launches kernels; its annotations are the schema. Tensors but ``x`` and ``residual`` are constants.
            cpu: computes it on a CPU.
            shape: an empty tensor like the result.
            dense: the same function of plain torch operations, differentiable: gradients are taken of it. Training
                therefore costs what the dense layer costs. Lists of tensors are for kernels: it gets empty ones.
            memory_format: that ``run`` wants its inputs in; None = any.
        """
        self.name, self.run, self.dense, self.memory_format = name, run, dense, memory_format
        self.parameters = tuple(inspect.signature(run).parameters)
        repeated = f"repeated_{name}"
        LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()), tags=TAGS)
        LIBRARY.impl(name, self.composite, "CompositeImplicitAutograd")
        LIBRARY.define(repeated + CALL, tags=TAGS)
        LIBRARY.impl(repeated, self.repeat, "CUDA")
        LIBRARY.impl(repeated, _unpacking(cpu), "CPU")
        torch.library.register_fake(f"tetris::{repeated}", _unpacking(shape), lib=LIBRARY)
        self.op = getattr(torch.ops.tetris, name).default
        self.repeated = getattr(torch.ops.tetris, repeated).default

    def composite(self, *arguments: Any) -> Tensor:
        """``tetris::NAME``: the operation that is repeated, within a node of the autograd graph where one is wanted."""
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return _Differentiable.apply(self, *arguments)
        return self.call(arguments)

    def call(self, arguments: Sequence[Any]) -> Tensor:
        """The operation that is repeated, on the arguments of ``run``; copies of inputs are operations of their own."""
        x, residual, constants, call = packed(self.name, dict(zip(self.parameters, arguments)))
        if self.memory_format is not None:
            x = x.contiguous(memory_format=self.memory_format)
            residual = None if residual is None else residual.contiguous(memory_format=self.memory_format)
        return self.repeated(x, residual, constants, call)

    def repeat(self, x: Tensor, residual: Tensor | None, constants: list[Tensor], call: str) -> Tensor:
        """``tetris::repeated_NAME`` on a GPU."""
        if x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return self.repeat(x, residual, constants, call)
        addresses = [tensor.data_ptr() for tensor in constants]
        if residual is None:
            kind = remembered(call, *layout_of(x), *addresses)
            return self._first(kind, x, None, constants, call) if kind.recording is None else kind.recording(x)
        kind = remembered(call, *layout_of(x), *layout_of(residual), *addresses)
        if kind.recording is None:
            return self._first(kind, x, residual, constants, call)
        return kind.recording(x, residual)

    def _first(self, kind: Kind, x: Tensor, residual: Tensor | None, constants: list[Tensor], call: str) -> Tensor:
        """A call that is not repeated, perhaps recorded."""
        arguments = unpacked(x, residual, constants, call)
        if kind.refused or not kind.seen or torch.cuda.is_current_stream_capturing():
            kind.seen = True
            return self.run(**arguments)
        with Recorder([x] if residual is None else [x, residual], constants) as recorder:
            y = self.run(**arguments)
        recording = recorder.recording(y)
        kind.recording = None if recording is None else replace(recording, kept=())
        kind.refused = recorder.refused
        return y


class _Differentiable(torch.autograd.Function):
    """An operation whose backward pass differentiates its ``dense`` twin, recomputing the forward pass."""

    @staticmethod
    def forward(ctx: Any, operation: Operation, *arguments: Any) -> Tensor:  # type: ignore[override]
        ctx.operation = operation
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in arguments))
        ctx.others = [None if isinstance(a, Tensor) else [] if _are_tensors(a) else a for a in arguments]
        return operation.call(arguments)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        operation, wanted = ctx.operation, ctx.needs_input_grad[1:]
        arguments = [other if saved is None else saved for other, saved in zip(ctx.others, ctx.saved_tensors)]
        with torch.enable_grad():
            arguments = [a.detach().requires_grad_() if w else a for a, w in zip(arguments, wanted)]
            y = operation.dense(**dict(zip(operation.parameters, arguments)))
            found = iter(torch.autograd.grad(y, [a for a, w in zip(arguments, wanted) if w], gradient))
        return None, *(next(found) if w else None for w in wanted)


def packed(name: str, arguments: Arguments) -> tuple[Tensor, Tensor | None, list[Tensor], str]:
    """(x, residual, constants, call) of an operation's arguments; the call is JSON.

    It has the constants' names, shapes, strides and dtypes, and all other arguments.
    """
    constants: list[Tensor] = []
    layouts: dict[str, Any] = {}
    others: Arguments = {}
    for key, value in arguments.items():
        if key in INPUTS and value is not None:
            continue
        if isinstance(value, Tensor):
            constants.append(value)
            layouts[key] = _constant(value)
        elif _are_tensors(value):
            constants += value
            layouts[key] = [_constant(tensor) for tensor in value]
        else:
            others[key] = list(value) if isinstance(value, (list, tuple)) else value
    call = json.dumps({"operation": name, "constants": layouts, "others": others}, separators=(",", ":"))
    return arguments["x"], arguments.get("residual"), constants, call


def unpacked(x: Tensor, residual: Tensor | None, constants: Sequence[Tensor], call: str) -> Arguments:
    """The arguments that were :func:`packed`.

    Raises:
        ShapeError: the constants are not those that the call describes.
    """
    described = _described(call)
    rest = list(constants)
    arguments: Arguments = {"x": x, **described["others"]}
    if residual is not None:
        arguments["residual"] = residual
    for key, layout in described["constants"].items():
        several = isinstance(layout, list)
        wanted = layout if several else [layout]
        tensors, rest = rest[: len(wanted)], rest[len(wanted) :]
        if [_constant(tensor) for tensor in tensors] != wanted:
            raise ShapeError(f"{described['operation']}: wanted {key} like {layout}; got {[*map(describe, tensors)]}")
        arguments[key] = tensors if several else tensors[0]
    return arguments


@functools.lru_cache(maxsize=MOST_KINDS)
def _described(call: str) -> dict[str, Any]:
    """What a call says; to be read only."""
    return json.loads(call)


def _constant(tensor: Tensor) -> dict[str, Any]:
    """What a call says of a constant."""
    shape, stride = [int(n) for n in tensor.shape], [int(n) for n in tensor.stride()]
    return {"shape": shape, "stride": stride, "dtype": str(tensor.dtype).removeprefix("torch.")}


def _are_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(item, Tensor) for item in value)


def _unpacking(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of an operation's arguments as one of what they are packed into."""
    return lambda x, residual, constants, call: function(**unpacked(x, residual, constants, call))
