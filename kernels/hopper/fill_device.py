"""Strips of output channels that keep no block: a warp of its own stores their bias beside the products (Gluon).

A consumer would spend an epilogue on every tile of such a strip while the tensor cores wait; after reordering, the last
block row of most layers keeps nothing. The filler stores a few pixels at every step of the others: all at once, they
would hold up the first loads.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tetris.kernels.hopper.epilogue_device import activate
from tetris.kernels.hopper.geometry import FILL_PIXELS
from tetris.kernels.hopper.load_device import RECORD

PIXELS: gl.constexpr = gl.constexpr(FILL_PIXELS)


@gluon.jit
def fill_chunk(
    chunk, channels, bias, permutation, y, y_desc, c_out,
    ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, PERMUTES: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Store one chunk of pixels of a strip of WIDTH channels, 16 bytes a thread.

    Args:
        chunk: its number; those of one strip follow those of the one before.
        channels: int32, the first channel of every strip.
        bias, permutation, y, y_desc, c_out: as the kernel has them; y is contiguous, its channels innermost.
    """
    GROUP: gl.constexpr = 128 // y_desc.dtype.primitive_bitwidth
    LANES: gl.constexpr = WIDTH // GROUP
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, GROUP], [32 // LANES, LANES], [1, 1], [1, 0])
    pixels = y_desc.shape[0] * y_desc.shape[1] * y_desc.shape[2]
    chunks = (pixels + PIXELS - 1) // PIXELS
    groups = c_out // GROUP
    channel = gl.load(channels + chunk // chunks)
    first = chunk % chunks * PIXELS
    lanes = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    rows = gl.arange(0, PIXELS, gl.SliceLayout(1, LAYOUT))
    exist = lanes // GROUP < groups - channel // GROUP
    value = gl.zeros((WIDTH,), gl.float32, gl.SliceLayout(0, LAYOUT))
    if HAS_BIAS:
        value = gl.load(bias + channel + lanes, mask=exist, other=0.0).to(gl.float32)
    value = activate(value, ACTIVATION).to(y_desc.dtype)
    targets = channel // GROUP * GROUP + lanes
    if PERMUTES:
        targets = gl.load(permutation + channel + lanes // GROUP * GROUP, mask=exist, other=0).to(gl.int32)
        targets = gl.max_contiguous(gl.multiple_of(targets + lanes % GROUP, GROUP), GROUP)
    places = gl.expand_dims(rows * groups * GROUP, 1) + gl.expand_dims(targets, 0)
    inside = gl.expand_dims(rows < pixels - first, 1) & gl.expand_dims(exist, 0)
    gl.store(y + first.to(gl.int64) * groups * GROUP + places, gl.expand_dims(value, 0), mask=inside)


@gluon.jit
def filler(
    fill, strips, program_ptr, end_ptr, work, x_full, x_empty, bias, permutation, y, y_desc, c_out,
    ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, PERMUTES: gl.constexpr, FILLS: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """The storing warp: keeps step with the consumers as one more reader of every input stage's first band.

    ``fill``: see ``fill.fill_tensor``. Programs take turns with the chunks; what is left after the last step follows.
    """
    if FILLS:
        WIDTH: gl.constexpr = 64 // T.parts
        BANDS: gl.constexpr = len(T.bands)
        pixels = y_desc.shape[0] * y_desc.shape[1] * y_desc.shape[2]
        chunks = strips * ((pixels + PIXELS - 1) // PIXELS)
        chunk = gl.program_id(0)
        burst = gl.load(fill) * gl.num_programs(0)
        xi = 0
        for position in range(gl.load(program_ptr + chunk), gl.load(end_ptr + chunk)):
            steps = (gl.load(work + position * RECORD + 2) - gl.load(work + position * RECORD + 1)) * T.k_steps
            for _step in range(steps):
                stage = xi % T.x_stages * BANDS
                mbarrier.wait(x_full.index(stage), (xi // T.x_stages) & 1)
                until = gl.minimum(chunk + burst, chunks)
                for c in range(chunk, until, gl.num_programs(0)):
                    fill_chunk(c, fill + 1, bias, permutation, y, y_desc, c_out, ACTIVATION, HAS_BIAS, PERMUTES, WIDTH)
                chunk += burst
                mbarrier.arrive(x_empty.index(stage))
                xi += 1
        for c in range(chunk, chunks, gl.num_programs(0)):
            fill_chunk(c, fill + 1, bias, permutation, y, y_desc, c_out, ACTIVATION, HAS_BIAS, PERMUTES, WIDTH)
