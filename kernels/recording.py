"""Launches recorded once and repeated on other tensors, so that a call costs the CPU little more than its launches.

A launcher works out tiles, grids, descriptors and constants from its operands' shapes. In Python that takes longer
than many a kernel takes the GPU, and at the next call with such operands only addresses differ. A :class:`Recorder`
watches one call and makes a :class:`Recording` of it, or says why there can be none: it sees every kernel that goes
through :func:`launch` and every torch operation, and refuses whatever is neither a launch, an allocation nor a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tetris.kernels.cache_keys import settle

ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
)
"""Operations whose result holds nothing yet."""
ALIGNMENT = 16
"""Bytes: kernels are compiled for addresses that are multiples of it, or for others."""

_WATCHING: ContextVar[Recorder | Unwatching | None] = ContextVar("tetris_recorder", default=None)


def layout_of(tensor: Tensor) -> tuple:
    """All of an input that a launch depends on but its address."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % ALIGNMENT, tensor.device


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``, taken down by the recorder that is watching, if any."""
    settle(kernel)
    compiled = kernel[grid](*arguments, **constants)
    recorder = _WATCHING.get()
    if recorder is not None:
        recorder.take_down(kernel, grid, compiled, arguments, constants)


def watched() -> bool:
    """Whether a recorder is watching this thread of execution."""
    return _WATCHING.get() is not None


class Unwatching:
    """A recorder that takes nothing down."""

    def take_down(self, *launch: Any) -> None: ...


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within it, operations call their kernels themselves, as under a recorder, but nobody takes them down."""
    token = _WATCHING.set(Unwatching())
    try:
        yield
    finally:
        _WATCHING.reset(token)


class Address:
    """Stands for the tensor behind a descriptor: an address is all that a launch asks of it."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value

    def data_ptr(self) -> int:
        return self.value


@dataclass(frozen=True)
class Moving:
    """An argument that differs from call to call.

    Attributes:
        index: among the kernel's arguments.
        tensor: among the recording's tensors, inputs before allocations.
        offset: bytes from that tensor's first element.
        descriptor: that is to be made for the address; None = the address itself is the argument.
    """

    index: int
    tensor: int
    offset: int
    descriptor: Any = None


@dataclass(frozen=True)
class RecordedLaunch:
    """One launch: ``run(*arguments)`` with the moving ones replaced."""

    run: Callable[..., None]
    arguments: tuple[Any, ...]
    moving: tuple[Moving, ...]

    def __call__(self, addresses: list[int]) -> None:
        arguments = list(self.arguments)
        for argument in self.moving:
            address = addresses[argument.tensor] + argument.offset
            arguments[argument.index] = address if argument.descriptor is None else _at(argument.descriptor, address)
        self.run(*arguments)


@dataclass(frozen=True)
class Allocation:
    """A tensor that a call allocates: its result, or memory that its kernels work in."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def like(tensor: Tensor) -> Allocation:
        return Allocation(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def __call__(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Recording:
    """A call to repeat: allocate, launch, return one of the allocations.

    Attributes:
        allocations: in the order in which they were made.
        launches: in their order.
        result: index among the allocations.
        kept: tensors whose addresses stand among the launches' arguments.
    """

    allocations: tuple[Allocation, ...]
    launches: tuple[RecordedLaunch, ...]
    result: int
    kept: tuple[Tensor, ...]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The call on other inputs.

        They must have the shapes, strides, dtypes, device and alignment (to 16 bytes) of those that were recorded, and
        that device must be the current one. Nothing of this is checked here.
        """
        made = [allocate() for allocate in self.allocations]
        addresses = [tensor.data_ptr() for tensor in (*inputs, *made)]
        for launched in self.launches:
            launched(addresses)
        return made[self.result]


class Recorder(TorchDispatchMode):
    """Watches the calls within its ``with`` block.

    Attributes:
        refused: why they cannot be repeated; "" so far.
    """

    def __init__(self, inputs: Sequence[Tensor], constants: Iterable[Tensor]) -> None:
        """
        Args:
            inputs: tensors that differ from call to call.
            constants: tensors that do not.
        """
        super().__init__()
        self.refused = ""
        self._inputs, self._kept = list(inputs), list(constants)
        self._made: list[Tensor] = []
        self._launches: list[tuple[Any, tuple[int, ...], list[Any]]] = []
        self._token: Token[Recorder | Unwatching | None] | None = None
        storages = [_storage(tensor) for tensor in self._inputs]
        if len(set(storages)) < len(storages) or set(storages) & {_storage(tensor) for tensor in self._kept}:
            self.refused = "its inputs share memory"

    def __enter__(self) -> Recorder:
        self._token = _WATCHING.set(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        assert self._token is not None
        _WATCHING.reset(self._token)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self._made.append(result)  # kept, so that no two of them ever have one address
        elif not func.is_view:
            self.refused = self.refused or f"it runs {func}"
        return result

    def take_down(
        self, kernel: Any, grid: tuple[int, ...], compiled: Any, arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        """A launch that has just happened; ``compiled`` is what ran."""
        if compiled is None:
            self.refused = self.refused or "its kernel is interpreted"
            return
        if getattr(compiled.metadata, "global_scratch_size", 0):
            self.refused = self.refused or "its kernel asks for scratch memory"
            return
        parameters = kernel.signature.parameters
        given = dict(zip(parameters, arguments)) | constants
        ordered = [given[name] if name in given else parameters[name].default for name in parameters]
        self._launches.append((compiled, (*grid, 1, 1)[:3], ordered))

    def recording(self, result: Tensor) -> Recording | None:
        """What was watched, whose result this is; None where ``refused`` says why not."""
        made = {_storage(tensor): index for index, tensor in enumerate(self._made)}
        index = made.get(_storage(result))
        if index is None or result.storage_offset() or result.numel() != self._made[index].numel():
            self.refused = self.refused or "its result is not what it allocated"
        launches = [] if self.refused else [self._recorded(*launched) for launched in self._launches]
        if self.refused or index is None or not launches:
            self.refused = self.refused or "it launches nothing"
            return None
        allocations = [Allocation.like(tensor) for tensor in self._made]
        allocations[index] = Allocation.like(result)
        return Recording(tuple(allocations), tuple(launches), index, tuple(self._kept))

    def _recorded(self, compiled: Any, grid: tuple[int, ...], arguments: list[Any]) -> RecordedLaunch:
        moving = []
        roots = {_storage(tensor): (place, tensor) for place, tensor in enumerate([*self._inputs, *self._made])}
        constants = {_storage(tensor) for tensor in self._kept}
        for index, argument in enumerate(arguments):
            descriptor = argument if hasattr(argument, "base") and hasattr(argument, "block_shape") else None
            tensor = argument.base if descriptor is not None else argument
            if not isinstance(tensor, Tensor):
                continue
            if _storage(tensor) in roots:
                place, root = roots[_storage(tensor)]
                template = None if descriptor is None else _at(descriptor, 0)
                moving.append(Moving(index, place, tensor.data_ptr() - root.data_ptr(), template))
                arguments[index] = None
            elif _storage(tensor) not in constants:
                self.refused = self.refused or f"it computes argument {index} of {compiled.name}"
            else:
                arguments[index] = tensor.data_ptr() if descriptor is None else _at(descriptor, tensor.data_ptr())
        return RecordedLaunch(compiled[grid], tuple(arguments), tuple(moving))


def _at(descriptor: Any, address: int) -> Any:
    """The descriptor of the same boxes at another address; what its constructor checks was checked before."""
    moved = object.__new__(type(descriptor))
    moved.__dict__.update(descriptor.__dict__)
    moved.base = Address(address)
    return moved


def _storage(tensor: Tensor) -> int:
    """The address of the memory that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()
