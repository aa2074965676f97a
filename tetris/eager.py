"""Eager calls of a layer on a GPU: the first of a kind is recorded, the others repeat it.

A call through the registered operation costs some hundred microseconds of Python: torch's dispatch, the choice of the
kernel's configuration, its descriptors, Triton's binder. What compiles, traces, differentiates or watches operations
needs that; a plain call needs the kernels. See :mod:`tetris.kernels.recording`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tetris.kernels.recording import Recorder, Recording, layout_of

MOST_KINDS = 64
"""Kinds of calls that a layer remembers, so that inputs of ever new shapes do not fill the memory."""


class Call(NamedTuple):
    """A remembered kind of call: its recording, None where it cannot be repeated, and the layer's state back then."""

    recording: Recording | None
    state: tuple


class EagerCalls:
    """What a layer remembers of its calls. Copies of a layer start anew."""

    def __init__(self) -> None:
        self._found: dict[tuple, Call] = {}
        self.refused = ""
        """Why the last call that was recorded cannot be repeated."""

    def __len__(self) -> int:
        """Kinds of calls that are repeated."""
        return sum(call.recording is not None for call in self._found.values())

    def clear(self) -> None:
        """Forget all calls, and let go of the tensors that they read."""
        self._found.clear()

    def __call__(
        self, layer: nn.Module, run: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, residual: Tensor | None
    ) -> Tensor:
        """``run(x, residual)``, repeated from a recording where there is one, recorded where there may be one.

        Args:
            layer: whose parameters and buffers are constant between calls; when one of them changes or moves,
                everything is recorded anew. Its ``eager_key()`` is what else the result depends on.
            run: launches kernels on the layer's tensors and other tensors that the layer keeps.
            x, residual: plain tensors, see :func:`is_plain`. The call happens on x's GPU, current or not.
        """
        if torch.compiler.is_compiling():
            return run(x, residual)
        if type(x) is Tensor and x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return self(layer, run, x, residual)
        if not is_plain(layer, x, residual):
            return run(x, residual)
        state = _state(layer)
        key = (layout_of(x), None if residual is None else layout_of(residual), tf32_modes(x), layer.eager_key())  # type: ignore[operator]
        known = self._found.get(key)
        if known is not None and known.state == state:
            if known.recording is None:
                return run(x, residual)
            return known.recording(x) if residual is None else known.recording(x, residual)
        if torch.cuda.is_current_stream_capturing():  # to record may take two runs
            return run(x, residual)
        if known is not None or len(self._found) >= MOST_KINDS:
            self.clear()
        for _ in range(2):  # the first run may make what the layer keeps, its schedule for example; the second does not
            constants = [*layer.parameters(), *layer.buffers(), *layer.eager_constants()]  # type: ignore[operator]
            with Recorder([x] if residual is None else [x, residual], constants) as recorder:
                y = run(x, residual)
            recording = recorder.recording(y)
            if recording is not None:
                break
        self._found[key] = Call(recording, state)
        self.refused = recorder.refused
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> EagerCalls:
        return EagerCalls()

    def __reduce__(self) -> tuple:
        return EagerCalls, ()


def tf32_modes(x: Tensor) -> tuple[bool, bool] | None:
    """Whether convolutions and products of float32 may be rounded to tf32; None where x is not float32."""
    if x.dtype != torch.float32:
        return None
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def is_plain(layer: nn.Module, x: Tensor, residual: Tensor | None) -> bool:
    """Whether a call on a GPU is no more than that: no mode, transform, tracer or gradient wants to know of it.

    Replicas of ``nn.DataParallel`` live for one call, and their weights are not among their parameters.
    """
    if type(x) is not Tensor or not x.is_cuda or "_is_replica" in layer.__dict__:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return False
    tensors = [x, *layer._parameters.values()]
    if residual is not None:
        if type(residual) is not Tensor or residual.device != x.device:
            return False
        tensors.append(residual)
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None))


def _state(layer: nn.Module) -> tuple:
    """Changes when a tensor of the layer is replaced or moved, or when its parameters' values change."""
    parameters = [t for t in layer._parameters.values() if t is not None]
    addresses = [t.data_ptr() for t in parameters] + [t.data_ptr() for t in layer._buffers.values() if t is not None]
    return (*addresses, *(0 if t.is_inference() else t._version for t in parameters))
