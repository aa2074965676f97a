"""Independent searches side by side: on a GPU every one of them on a stream, between a fork and a join.

A small layer's kernels fill a few of a GPU's multiprocessors. Inside a captured step the streams become branches of its
graph, so that the layers of a network take little longer than the largest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

MOST = 8
"""Streams: kernels that wait for their own programs must find room on the GPU at the same time."""


class Lanes:
    """A fixed deal of tasks to streams, longest first; the current stream is one of them."""

    def __init__(self, costs: Sequence[float], device: torch.device, most: int = MOST) -> None:
        """``costs``: of every task, in any unit."""
        lanes = min(most, len(costs)) if device.type == "cuda" else 1
        self._streams = [torch.cuda.Stream(device) for _ in range(lanes - 1)]
        self._lane_of, loads = [0] * len(costs), [0.0] * lanes
        self._by_cost = sorted(range(len(costs)), key=lambda i: -costs[i])
        for task in self._by_cost:
            lane = loads.index(min(loads))
            self._lane_of[task] = lane
            loads[lane] += costs[task]

    def __call__(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run all tasks, those of one lane one after the other; what follows on the current stream waits for all."""
        if not self._streams:
            for task in tasks:
                task()
            return
        here = torch.cuda.current_stream(self._streams[0].device)
        for stream in self._streams:
            stream.wait_stream(here)
        for i in self._by_cost:  # the longest begins first
            lane = self._lane_of[i]
            with torch.cuda.stream(self._streams[lane - 1] if lane else here):
                tasks[i]()
        for stream in self._streams:
            here.wait_stream(stream)
