"""Eager calls of a layer on a GPU: the first of a kind is recorded, the others repeat it.

A call through the registered operation costs some hundred microseconds of Python: torch's dispatch, the choice of the
kernel's configuration, its descriptors, Triton's binder. What compiles, traces, differentiates or watches operations
needs that; a plain call needs the kernels. See :mod:`tetris.kernels.recording`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tetris.kernels.recording import Recorder, Recording

ALIGNMENT = 16
"""Bytes: kernels are compiled for addresses that are multiples of it, or for others."""
MOST_KINDS = 64
"""Kinds of calls that a layer remembers, so that inputs of ever new shapes do not fill the memory."""


UNKNOWN = "unknown"
"""In the place of a recording: no such call has been made. None: such calls cannot be repeated."""


class EagerCalls:
    """What a layer remembers of its calls. Copies of a layer start anew."""

    def __init__(self) -> None:
        self._recordings: dict[tuple, Recording | str | None] = {}
        self._state: tuple | None = None
        self.refused = ""
        """Why the last call that was recorded cannot be repeated."""

    def clear(self) -> None:
        """Forget all calls, and let go of the tensors that they read."""
        self._recordings.clear()

    def __call__(
        self, layer: nn.Module, run: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, residual: Tensor | None
    ) -> Tensor:
        """``run(x, residual)``, repeated from a recording where there is one, recorded where there may be one.

        Args:
            layer: whose parameters and buffers are constant between calls; when one of them changes or moves,
                everything is recorded anew. Its ``eager_key()`` is what else the result depends on.
            run: launches kernels on the layer's tensors and other tensors that the layer keeps.
            x, residual: plain tensors, see :func:`is_plain`.
        """
        if torch.compiler.is_compiling() or not is_plain(layer, x, residual):
            return run(x, residual)
        state = _state(layer)
        if state != self._state:
            self.clear()
            self._state = state
        tf32 = x.dtype == torch.float32 and (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
        key = (_kind(x), None if residual is None else _kind(residual), tf32, layer.eager_key())  # type: ignore[operator]
        recording = self._recordings.get(key, UNKNOWN)
        if isinstance(recording, Recording):
            return recording(x) if residual is None else recording(x, residual)
        if recording is None or torch.cuda.is_current_stream_capturing():  # recording would capture everything twice
            return run(x, residual)
        return self._record(layer, run, x, residual, key)

    def _record(
        self, layer: nn.Module, run: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, residual: Tensor | None,
        key: tuple,
    ) -> Tensor:  # fmt: skip
        run(x, residual)  # makes what the layer keeps: its schedule, for example
        constants = [*layer.parameters(), *layer.buffers(), *layer.eager_constants()]  # type: ignore[operator]
        with Recorder([x] if residual is None else [x, residual], constants) as recorder:
            y = run(x, residual)
        if len(self._recordings) >= MOST_KINDS:
            self.clear()
        self._recordings[key] = recorder.recording(y)
        self.refused = recorder.refused
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> EagerCalls:
        return EagerCalls()

    def __reduce__(self) -> tuple:
        return EagerCalls, ()


def is_plain(layer: nn.Module, x: Tensor, residual: Tensor | None) -> bool:
    """Whether nothing wants to know of the operation: no mode, transform, tracer or gradient; on the current GPU."""
    if type(x) is not Tensor or not x.is_cuda or x.device.index != torch.cuda.current_device():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return False
    tensors = [x, *layer._parameters.values()]
    if residual is not None:
        if type(residual) is not Tensor or residual.device != x.device:
            return False
        tensors.append(residual)
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None))


def _kind(tensor: Tensor) -> tuple:
    """All of a tensor that a launch depends on but its address."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % ALIGNMENT, tensor.device


def _state(layer: nn.Module) -> tuple:
    """Changes when a tensor of the layer is replaced or moved, or when its parameters' values change."""
    parameters = [t for t in layer._parameters.values() if t is not None]
    addresses = [t.data_ptr() for t in parameters] + [t.data_ptr() for t in layer._buffers.values() if t is not None]
    return (*addresses, *(0 if t.is_inference() else t._version for t in parameters))
