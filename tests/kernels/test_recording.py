"""Recorded launches on the CPU: a stand-in for a compiled kernel reads and writes at the addresses that it is given."""

from __future__ import annotations

import ctypes
import gc
import inspect
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tetris.kernels.recording import Recorder, Recording, launch, watched


class Kernel:
    """y = scale * x + shift, as a compiled kernel does it: by addresses. Counts what it launches."""

    signature = inspect.Signature([
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in (("x", None), ("y", None), ("shift", None), ("n", None), ("SCALE", 1.0))
    ])  # fmt: skip

    def __init__(self, scratch: int = 0) -> None:
        self.name, self.metadata = "affine", SimpleNamespace(global_scratch_size=scratch)
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(x: Any, y: Any, shift: Any, n: int, SCALE: float = 1.0, num_warps: int = 4) -> Kernel:
            self.grids.append(grid)
            source, target, added = (_floats(argument, n) for argument in (x, y, shift))
            for i in range(n):
                target[i] = SCALE * source[i] + (added[i] if added is not None else 0.0)
            return self

        return run


class Described:
    """A descriptor whose constructor must not run again."""

    def __init__(self, base: torch.Tensor) -> None:
        self.base, self.shape, self.block_shape = base, list(base.shape), [4]
        assert isinstance(base, torch.Tensor)


def _floats(argument: Any, n: int) -> Any:
    if argument is None:
        return None
    tensor = getattr(argument, "base", argument)
    address = tensor if isinstance(tensor, int) else tensor.data_ptr()
    return (ctypes.c_float * n).from_address(address)


def recorded(call: Any, *inputs: torch.Tensor, constants: tuple[torch.Tensor, ...] = ()) -> tuple[Any, Recorder]:
    with Recorder(inputs, constants) as recorder:
        y = call(*inputs)
    return recorder.recording(y), recorder


def test_a_launch_runs_whether_or_not_it_is_watched() -> None:
    kernel, x, y = Kernel(), torch.randn(8), torch.empty(8)
    launch(kernel, (2,), x, y, None, 8, SCALE=3.0, num_warps=1)
    assert torch.equal(y, 3 * x) and kernel.grids == [(2,)] and not watched()
    with Recorder([x], [y]):
        assert watched()
        launch(kernel, (2,), x, y, None, 8)
    assert torch.equal(y, x) and not watched()


def test_a_recording_computes_the_same_of_other_inputs() -> None:
    kernel, shift = Kernel(), torch.randn(8)

    def call(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """shift + 2 x, then the residual on top, through memory of its own and a view of the result."""
        between = torch.empty(8)
        launch(kernel, (1,), x.view(2, 4), between, shift, 8, SCALE=2.0)
        y = torch.empty(8)
        launch(kernel, (3, 2), Described(between), Described(y), residual[8:], 8)
        return y.view(2, 4).permute(1, 0)

    first = torch.randn(8), torch.randn(16)
    recording, recorder = recorded(call, *first, constants=(shift,))
    assert isinstance(recording, Recording) and recorder.refused == ""
    for _ in range(3):
        x, residual = torch.randn(8), torch.randn(16)
        got, expected = recording(x, residual), call(x, residual)
        assert torch.equal(got, expected) and got.stride() == expected.stride() == (1, 4)
    assert kernel.grids[-4:] == [(1, 1, 1), (3, 2, 1), (1,), (3, 2)]
    shift.add_(1)  # a constant is read, not remembered
    assert torch.equal(recording(x, residual), call(x, residual)) and not torch.equal(got, recording(x, residual))


def test_a_recording_keeps_constants_but_not_what_was_recorded() -> None:
    operands = [torch.randn(8), torch.randn(8)]

    def call(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(8)
        launch(Kernel(), (1,), Described(x), Described(y), operands[1], 8)
        return y

    alive = [weakref.ref(tensor) for tensor in operands]
    recording, _ = recorded(call, operands[0], constants=(operands[1],))
    shift = operands[1].clone()
    operands.clear()
    del _
    gc.collect()
    assert [ref() is None for ref in alive] == [True, False]
    assert torch.equal(recording(torch.zeros(8)), shift)


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("it runs aten.clone", lambda x, kernel: affine(kernel, x.t().contiguous())),
        ("it runs aten.zero_", lambda x, kernel: affine(kernel, x, torch.empty(8).zero_())),
        ("it runs aten.zeros", lambda x, kernel: affine(kernel, x, torch.zeros(8))),
        ("it runs aten._local_scalar", lambda x, kernel: affine(kernel, x) if x.sum().item() else x),
        ("it computes argument 2 of affine", lambda x, kernel: affine(kernel, x, ELSEWHERE)),
        ("its result is not what it allocated", lambda x, kernel: affine(kernel, x)[1:]),
        ("its result is not what it allocated", lambda x, kernel: x),
        ("it launches nothing", lambda x, kernel: torch.empty(8)),
    ],
)
def test_what_is_neither_launch_nor_allocation_is_refused(reason: str, call: Any) -> None:
    recording, recorder = recorded(lambda x: call(x, Kernel()), torch.randn(2, 4))
    assert recording is None and (recorder.refused.startswith(reason) or "aten.sum" in recorder.refused)


ELSEWHERE = torch.randn(8)
"""A tensor that no recorder is told of."""


def affine(kernel: Kernel, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
    y = torch.empty(8)
    launch(kernel, (1,), x, y, shift, 8)
    return y


def test_inputs_that_share_memory_and_kernels_with_scratch_are_refused() -> None:
    x = torch.randn(16)
    recording, recorder = recorded(lambda a, b: affine(Kernel(), a, b), x[:8], x[8:])
    assert recording is None and recorder.refused == "its inputs share memory"
    recording, recorder = recorded(lambda a: affine(Kernel(), a), x[:8], constants=(x[8:],))
    assert recording is None and recorder.refused == "its inputs share memory"
    recording, recorder = recorded(lambda a: affine(Kernel(scratch=128), a), x[:8])
    assert recording is None and recorder.refused == "its kernel asks for scratch memory"


def test_an_interpreted_kernel_is_refused() -> None:
    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **constants: None

    recording, recorder = recorded(lambda x: affine(Interpreted(), x), torch.randn(8))  # type: ignore[arg-type]
    assert recording is None and recorder.refused == "its kernel is interpreted"


def test_a_slice_of_a_larger_tensor_is_an_input_like_others() -> None:
    recording, _ = recorded(lambda x: affine(Kernel(), x), torch.randn(24)[8:16])
    x = torch.randn(8)
    assert torch.equal(recording(x), x)
