"""Steps that are made again and again: on a GPU as CUDA graphs, which spare a dozen launches' time each.

A search of a small layer is a chain of short kernels: launching one takes the host ten times as long as the GPU needs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


class Replayed:
    """A step on a GPU that nothing waits for: captured once and replayed from then on.

    What differs from time to time must lie in tensors that live longer than the step.
    """

    def __init__(self, step: Callable[[], None], generators: Sequence[torch.Generator] = ()) -> None:
        """``generators``: on the GPU; the step's sources of random numbers."""
        self._step, self._generators = step, generators
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self) -> None:
        """Capture the step, which compiles its kernels and makes nothing happen on the GPU."""
        if self._graph is None:
            self._graph = self._capture()

    def __call__(self) -> None:
        self.prepare()
        assert self._graph is not None
        self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Like ``torch.cuda.graph`` but without its garbage collection, which takes 0.1 s: here none happens meanwhile.

        A graph that is freed during a capture, perhaps another's in a cycle of references, would break it. "Relaxed"
        lets kernels be loaded meanwhile.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        for generator in self._generators:
            graph.register_generator_state(generator)
        stream.wait_stream(torch.cuda.current_stream())
        with _no_garbage_collection(), torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="relaxed")
            try:
                self._step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
