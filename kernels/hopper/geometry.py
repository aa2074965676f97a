"""Tile geometry of the Hopper convolution: which pixels, rows of shared memory and ring depths one program works on.

A tile is TILE_H x TILE_W output pixels of TILE_N images, times 64 output channels. Its input, with the halo, lies in
shared memory as groups of eight pixel rows of TILE_K channels, ordered so that every kernel tap is the same tile at
another *whole-group* offset: a wgmma operand then needs nothing but another base address. Two orders give that:

- ``images``: (y, x, image) with a multiple of 8 images innermost. One halo tile serves every tap: a step in x is
  TILE_N / 8 groups. With stride 2 a row holds its even columns first, then the odd ones.
- ``copies``: (kernel column, y, x, image): one copy of the tile for every kernel column, each loaded with its own
  shift. It reads the input KW times, but only TILE_W * TILE_N must be a multiple of 8: it serves batches under 8.

Pure data; nothing here needs Triton. Sizes are in elements unless a name says bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import NamedTuple

from tetris.errors import ShapeError
from tetris.layout import ceil_div

WGMMA_ROWS = 64
"""Output channels of one tile: the rows of a wgmma instruction."""
GROUP = 8
"""Pixels of a group: the rows of one shared-memory swizzle atom."""
ACCUMULATOR_COLUMNS = 256
"""Most pixels a consumer warpgroup accumulates: 64 x 256 fp32 are 128 registers a thread; 320 spill."""
BARRIER_BYTES = 1024
"""Room left for the mbarriers and for what warp specialization itself keeps in shared memory."""
NOTICES = 4
"""Tiles that the producer may be ahead of the consumers where it takes them from a list for all programs."""
WORK_FIELDS = 12
"""Numbers that the kernel reads of a tile, see ``schedule.Schedule.records``."""
FILL_PIXELS = 32
"""Pixels stored at a time of strips of channels without blocks."""
WEIGHT_ROW_BYTES = 128
"""Weights travel in rows of so many bytes, the longest that a swizzle reaches: a row costs the copy engine the same
2 clocks whether it has 32 bytes or 128."""
REVISION = 6
"""Raise it whenever a property below changes its meaning: compiled kernels are cached by a tile's fields alone."""


class ColumnLoad(NamedTuple):
    """One box of a tile row: ``column`` (in steps of the stride, from the tile's first) of the columns of a parity,
    to ``group`` after the row's first; ``halo`` boxes are halo_box columns wide, the others TILE_W."""

    parity: int
    column: int
    group: int
    halo: bool


class Band(NamedTuple):
    """``rows`` stored rows from ``row`` on; per consumer the first and last kernel row that reads them, -1 = none."""

    row: int
    rows: int
    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def readers(self) -> int:
        """Consumers that read the band."""
        return sum(dy >= 0 for dy in self.first)


@dataclass(frozen=True)
class ConvTile:
    """Geometry of one launch. Hashable: it is a compile-time constant of the kernel.

    Attributes:
        block: sparsity block (BLOCK_OUT, BLOCK_IN); BLOCK_OUT is 32 (rows run in pairs) or a multiple of 64.
        kernel_size, stride, padding, dilation: of the convolution, (height, width); strides are 1 or 2.
        tile_n, tile_h, tile_w: images x rows x columns of output pixels; TILE_H may be any number, the others are
            powers of two.
        tile_k: input channels of a step; divides BLOCK_IN.
        copies: the ``copies`` order instead of ``images``.
        x_stages, w_stages, y_stages: ring depths of input tiles, weight groups and output rows (per consumer).
        w_taps: kernel taps whose weights arrive together; divides KH * KW.
        item_size: bytes of an element.
        revision: of this file, see :data:`REVISION`.
    """

    block: tuple[int, int]
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    tile_n: int = 16
    tile_h: int = 4
    tile_w: int = 4
    tile_k: int = 32
    copies: bool = False
    x_stages: int = 2
    w_stages: int = 3
    w_taps: int = 3
    y_stages: int = 2
    item_size: int = 2
    revision: int = REVISION

    @property
    def block_in(self) -> int:
        return self.block[1]

    @property
    def block_out(self) -> int:
        return self.block[0]

    @property
    def halves(self) -> int:
        """Tiles of 64 output channels in a block row."""
        return max(1, self.block[0] // WGMMA_ROWS)

    @property
    def parts(self) -> int:
        """Block rows in a tile of 64 output channels."""
        return max(1, WGMMA_ROWS // self.block[0])

    @property
    def k_steps(self) -> int:
        """Steps of TILE_K channels in a block."""
        return self.block[1] // self.tile_k

    @property
    def kernel_width(self) -> int:
        return self.kernel_size[1]

    @property
    def taps(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def stride_h(self) -> int:
        return self.stride[0]

    @property
    def padding_h(self) -> int:
        return self.padding[0]

    @property
    def dilation_h(self) -> int:
        return self.dilation[0]

    @property
    def row_step(self) -> int:
        """Image rows from one stored row to the next: a kernel one row high skips those between its strides."""
        return self.stride[0] if self.kernel_size[0] == 1 else 1

    @property
    def row_stride(self) -> int:
        """Stored rows from one output row to the next."""
        return self.stride[0] // self.row_step

    @property
    def input_rows(self) -> int:
        """Stored rows of a tile, halo included."""
        return (self.tile_h - 1) * self.row_stride + (self.kernel_size[0] - 1) * self.dilation[0] + 1

    @property
    def row_pixels(self) -> int:
        """Output pixels of one tile row: contiguous in shared memory in both orders."""
        return self.tile_w * self.tile_n

    def _column(self, tap: int) -> tuple[int, int]:
        """(parity, column in steps of the stride) at which kernel column ``tap`` of output column 0 reads."""
        column, parity = divmod(tap * self.dilation[1] - self.padding[1], self.stride[1])
        return parity, column

    @cached_property
    def planes(self) -> dict[int, tuple[int, int]]:
        """Parity of the image's columns -> (first, last) column that kernel columns read of it, for output column 0."""
        columns = [self._column(tap) for tap in range(self.kernel_size[1])]
        return {
            parity: (min(c for p, c in columns if p == parity), max(c for p, c in columns if p == parity))
            for parity in sorted({p for p, _ in columns})
        }

    @cached_property
    def halo_box(self) -> int:
        """Columns of one halo copy: a power of two, as TMA boxes are, that divides every halo; 0 = there is none."""
        common = 0
        for first, last in self.planes.values():
            common = gcd(common, last - first)
        return 0 if self.copies else common & -common

    @cached_property
    def column_loads(self) -> tuple[ColumnLoad, ...]:
        """The boxes that fill one row of the tile."""
        if self.copies:
            columns = [self._column(tap) for tap in range(self.kernel_size[1])]
            step = self.input_rows * self.row_groups
            return tuple(ColumnLoad(p, column, tap * step, False) for tap, (p, column) in enumerate(columns))
        loads = []
        group = 0
        for parity, (first, last) in self.planes.items():
            loads.append(ColumnLoad(parity, first, group * self.tile_n // GROUP, False))
            for column in range(self.tile_w, self.tile_w + last - first, max(self.halo_box, 1)):
                loads.append(ColumnLoad(parity, first + column, (group + column) * self.tile_n // GROUP, True))
            group += self.tile_w + last - first
        return tuple(loads)

    @cached_property
    def column_groups(self) -> tuple[int, ...]:
        """Groups from a row's first to the pixels that each kernel column multiplies."""
        if self.copies:
            return tuple(tap * self.input_rows * self.row_groups for tap in range(self.kernel_size[1]))
        bases, base = {}, 0
        for parity, (first, last) in self.planes.items():
            bases[parity] = base - first
            base += self.tile_w + last - first
        columns = [self._column(tap) for tap in range(self.kernel_size[1])]
        return tuple((bases[parity] + column) * self.tile_n // GROUP for parity, column in columns)

    @cached_property
    def row_groups(self) -> int:
        """Groups from one stored row to the next."""
        if self.copies:
            return self.row_pixels // GROUP
        return sum(self.tile_w + last - first for first, last in self.planes.values()) * self.tile_n // GROUP

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """The stored rows, those together that the consumers begin and finish to read at the same time.

        Each band has barriers of its own: the next step's first rows arrive while this step still reads its last ones.
        That is worth its barriers where the ring holds two steps (pairs of 32-row blocks 6 %, tf32 13 % faster on an
        H200); deeper rings look far enough ahead, and all rows make one band (64 -> 64 channels at 224 x 224: 4 %).
        """
        uses: dict[int, list[tuple[int, int]]] = {}
        for row in range(self.input_rows):
            reads = [self._kernel_rows(warpgroup, row) for warpgroup in (0, 1)]
            if any(reads):
                uses[row] = [(min(r), max(r)) if r else (-1, -1) for r in reads]
        if self.x_stages > 2 and max(uses) - min(uses) + 1 == len(uses):
            last_dy = self.kernel_size[0] - 1
            return (Band(min(uses), len(uses), (0, 0), (last_dy, last_dy)),)
        bands: list[Band] = []
        for row, spans in uses.items():
            first, last = tuple(a for a, _ in spans), tuple(b for _, b in spans)
            if bands and (bands[-1].first, bands[-1].last, bands[-1].row + bands[-1].rows) == (first, last, row):
                bands[-1] = bands[-1]._replace(rows=bands[-1].rows + 1)
            else:
                bands.append(Band(row, 1, first, last))
        return tuple(bands)

    def _kernel_rows(self, warpgroup: int, row: int) -> list[int]:
        """The kernel rows at which a warpgroup reads a stored row."""
        start = warpgroup * self.consumer_rows[0]
        mine = range(start, start + self.consumer_rows[warpgroup])
        return [
            dy for dy in range(self.kernel_size[0])
            if any(y * self.row_stride + dy * self.dilation[0] == row for y in mine)
        ]  # fmt: skip

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row, all copies of it."""
        copies = self.kernel_size[1] if self.copies else 1
        return copies * self.row_groups * GROUP * self.tile_k * self.item_size

    @property
    def stage_groups(self) -> int:
        """Groups of one input stage."""
        return self.input_rows * self.row_groups * (self.kernel_size[1] if self.copies else 1)

    @property
    def x_step_bytes(self) -> int:
        """Bytes of one input stage."""
        return self.stage_groups * GROUP * self.tile_k * self.item_size

    @property
    def w_step_bytes(self) -> int:
        """Bytes of one weight stage."""
        return self.w_taps * WGMMA_ROWS * self.tile_k * self.item_size

    @property
    def rows_per_accumulator(self) -> int:
        """Tile rows that one wgmma spans: in the ``copies`` order rows follow each other without a gap."""
        if not self.copies or self.row_stride > 1:
            return 1
        rows = ceil_div(self.tile_h, 2)
        return min(rows & -rows, max(1, ACCUMULATOR_COLUMNS // self.row_pixels))

    @property
    def accumulator_pixels(self) -> int:
        """N of a wgmma."""
        return self.rows_per_accumulator * self.row_pixels

    @property
    def consumer_rows(self) -> tuple[int, int]:
        """Tile rows of the two consumer warpgroups. They share the tensor cores, so uneven shares cost nothing."""
        if self.rows_per_accumulator > 1:
            return self.tile_h // 2, self.tile_h // 2
        return ceil_div(self.tile_h, 2), self.tile_h // 2

    @property
    def can_pool(self) -> bool:
        """Whether every thread holds whole 2 x 2 squares.

        Both rows lie in one accumulator or in two of a warpgroup, what is left fills whole groups, and neighbouring
        columns are one thread's: it has columns 2 i and 2 i + 1 of every group of eight accumulator columns, so with 2
        or 4 images innermost a neighbour is another thread's.
        """
        joined = self.rows_per_accumulator
        rows = self.consumer_rows if joined == 1 else (joined,)
        stored = self.accumulator_pixels // (2 if joined == 1 else 4)
        together = self.tile_n == 1 or self.tile_n % GROUP == 0
        return together and all(row % 2 == 0 for row in rows) and self.tile_w % 2 == 0 and stored >= GROUP

    @property
    def weight_rows(self) -> int:
        """Rows of 128 bytes that hold one tap's weights of a block row, 64 of its output channels at most."""
        return min(WGMMA_ROWS, self.block_out) * self.tile_k * self.item_size // WEIGHT_ROW_BYTES

    @property
    def weight_row_elements(self) -> int:
        """Elements of such a row."""
        return WEIGHT_ROW_BYTES // self.item_size

    @cached_property
    def weight_bases(self) -> tuple[tuple[int, int], ...]:
        """Where the bits of an offset in shared memory lead: (output channel, input channel) of one tap's weights.

        The copy engine stores chunk c (of 16 bytes) of the 128-byte row r at chunk c ^ (r % 8); a matrix row of TILE_K
        channels is a part of such a row. Eight matrix rows then lie in different banks.
        """
        chunk = 16 // self.item_size
        offsets = [1 << bit for bit in range((WGMMA_ROWS * self.tile_k).bit_length() - 1)]
        for i, offset in enumerate(offsets):
            row = offset // self.weight_row_elements
            offsets[i] = offset ^ (row % 8) * chunk
        return tuple((offset // self.tile_k, offset % self.tile_k) for offset in offsets)

    @property
    def y_step_bytes(self) -> int:
        """Bytes of one output stage."""
        return self.accumulator_pixels * WGMMA_ROWS * self.item_size

    @property
    def y_swizzle_bytes(self) -> int:
        """Channels of one part, in bytes, as far as a swizzle reaches."""
        return min(128, WGMMA_ROWS // self.parts * self.item_size)

    @property
    def turns(self) -> bool:
        """Whether the consumers multiply in turns, half a step apart, so that one's epilogue hides behind the other.

        The first then runs ahead by a whole step of weights. Alone, a warpgroup keeps the tensor cores busy with wide
        instructions only: 1 to 3 % faster on an H200 with 128 columns, 8 % slower with 64.
        """
        return self.w_stages * self.w_taps >= self.taps and self.accumulator_pixels >= 128 and self.x_stages == 2

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        rings = self.x_stages * self.x_step_bytes + self.w_stages * self.w_step_bytes
        return rings + 2 * self.y_stages * self.y_step_bytes + BARRIER_BYTES

    def problem(self) -> str | None:
        """Why no kernel can have this geometry; None = it can."""
        if self.block_out % WGMMA_ROWS and self.block_out != 32:
            return f"blocks of {self.block_out} output channels are neither 32 nor a multiple of {WGMMA_ROWS}"
        if not {*self.stride} <= {1, 2}:
            return f"stride {self.stride} is neither 1 nor 2"
        if self.tile_k not in (8, 16, 32, 64) or not 32 <= self.tile_k * self.item_size <= 128:
            return f"a step of {self.tile_k} channels is not 32, 64 or 128 bytes"
        if self.block_in % self.tile_k:
            return f"steps of {self.tile_k} channels do not divide the block's {self.block_in}"
        if self.taps % self.w_taps:
            return f"{self.w_taps} taps a weight stage do not divide {self.taps}"
        if self.tile_n & (self.tile_n - 1) or self.tile_w & (self.tile_w - 1):
            return f"{self.tile_n} images x {self.tile_w} columns: not powers of two"
        if (self.row_pixels if self.copies else self.tile_n) % GROUP:
            return f"{self.tile_n} images x {self.tile_w} columns do not fill groups of {GROUP} pixels"
        if self.rows_per_accumulator > 1 and self.tile_h % 2:
            return f"{self.tile_h} rows are not two equal shares"
        if self.accumulator_pixels not in (16, 32, 64, 128, 256):
            return f"wgmma takes no {self.accumulator_pixels} pixels"
        if self.tile_h < 2 or self.consumer_rows[0] * self.row_pixels > ACCUMULATOR_COLUMNS:
            return f"{self.tile_h} rows of {self.row_pixels} pixels do not fit two warpgroups' accumulators"
        if max(self.tile_n, self.tile_w) > 256:
            return "a TMA box holds at most 256 along a dimension"
        return None

    def checked(self) -> ConvTile:
        """Itself; ShapeError when no kernel can have this geometry."""
        if reason := self.problem():
            raise ShapeError(f"hopper convolution: {reason}; choose another tile ({self})")
        return self

    def tiles(self, batch: int, height: int, width: int) -> tuple[int, int, int]:
        """Tiles along (images, rows, columns) of an output of ``batch`` images of ``height`` x ``width``."""
        return ceil_div(batch, self.tile_n), ceil_div(height, self.tile_h), ceil_div(width, self.tile_w)
