"""Kernels' keys in Triton's cache, made the same in every process.

Triton (3.6, 3.7) hashes into a kernel's key the global constants of the functions that it calls, but only of those
functions that another kernel's key was made of before: the key depends on which kernel ran first, and a process then
compiles anew what another one left in the cache. Keys made from the innermost function outwards are all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any


def settle(kernel: Any, under_way: tuple[Any, ...] = ()) -> None:
    """Make the keys of all functions that a jitted one calls, then its own; nothing where they are made already.

    Cost: some milliseconds at a kernel's first launch, which Triton saves when it launches; later a look at a field.
    """
    if getattr(kernel, "hash", "") is not None or any(kernel is other for other in under_way):
        return
    for function in _called(kernel.fn):
        settle(function, (*under_way, kernel))
    kernel.cache_key  # noqa: B018 - making it is the point


def _called(function: Any) -> Iterator[Any]:
    """The jitted functions among the names in a function's code: its globals', its modules' and its classes'."""
    names = function.__code__.co_names
    for name in names:
        value = function.__globals__.get(name)
        inner = [getattr(value, other, None) for other in names] if isinstance(value, ModuleType) else []
        for found in (value, *inner):
            yield from (one for one in (found, *getattr(found, "hash_attrs", ())) if hasattr(type(one), "cache_key"))
