"""A barrier across all programs of a launch: what lets one kernel hold a whole search loop.

Every program adds one to a counter with release semantics and spins with acquire semantics until all have. All
programs must run at the same time: launch them cooperatively. 0.92 us with 132 programs on an H200.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grid_barrier(counter_ptr, arrivals):
    """Wait until the counter, which every program raises by one, reaches ``arrivals``."""
    tl.debug_barrier()
    seen = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1
    if seen < arrivals:
        while tl.load(counter_ptr, volatile=True) < arrivals:
            pass
        tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
