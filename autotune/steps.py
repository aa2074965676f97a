"""What a search's seconds went into, by name, and what the compiler did meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Steps:
    """Seconds by name, added up.

    Attributes:
        seconds: of every step on the clock; "compiler" is Triton's own part of the steps around it.
        kernels: names of the kernels that were compiled; those found in the compiler's cache are not among them.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds under a name."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count what runs within, also where it raises."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started)

    @contextmanager
    def watching_the_compiler(self) -> Iterator[None]:
        """Count what Triton compiles within; nothing where there is no Triton or it cannot tell."""
        try:
            from triton import knobs

            before = knobs.compilation.listener
        except (ImportError, AttributeError):
            yield
            return

        def listener(*, metadata: Any, times: Any, cache_hit: bool, **rest: Any) -> None:
            if not cache_hit:
                self.add("compiler", times.total / 1e6)
                self.kernels.append(str(metadata.get("name", "")))

        knobs.compilation.listener = listener
        try:
            yield
        finally:
            knobs.compilation.listener = before
