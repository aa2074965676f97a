"""Device code: which of several programs is the last to arrive, so that it may read what all of them stored."""

import triton
import triton.language as tl


@triton.jit
def arrive(counter_ptr, arrivals):
    """Whether this program is the last of ``arrivals`` to come here; the last one sees what all of them stored.

    The counter is zero before the first and after the last arrival.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last
