"""Problems, devices and kernel configs: plain frozen data, and the analytic configs used where nothing is tuned.

A launcher never decides anything: it gets tensors and one of these configs. The defaults below are pure functions of
the problem and the device, so that they can be unit-tested; the tuner searches around them. Nothing here needs Triton.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

from tetris.errors import TetrisError
from tetris.layout import ceil_div

ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
Config = TypeVar("Config", bound="KernelConfig")


@dataclass(frozen=True)
class DeviceInfo:
    """The facts about a GPU that choose a config.

    Attributes:
        name: what the driver calls it.
        capability: CUDA compute capability, e.g. (9, 0); (0, 0) on AMD.
        sm_count: multiprocessors (compute units).
        triton_version: e.g. "3.7.1".
        backend: "cuda" or "hip".
    """

    name: str
    capability: tuple[int, int]
    sm_count: int
    triton_version: str
    backend: str = "cuda"

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one program may use."""
        if self.backend != "cuda":
            return 65536
        by_capability = {(7, 5): 65536, (8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448}
        return by_capability.get(self.capability, 101376)

    @property
    def fp32_precision(self) -> str:
        """How products of fp32 are computed that must not be rounded to tf32; see :class:`Conv2dConfig`."""
        return "tf32x3" if self.backend == "cuda" and self.capability >= (8, 0) else "ieee"

    @property
    def has_descriptors(self) -> bool:
        """Whether tensor descriptors are hardware (TMA); elsewhere Triton emulates them slowly."""
        return self.backend == "cuda" and self.capability[0] >= 9


@dataclass(frozen=True)
class Conv2dProblem:
    """Shape of one block-sparse convolution; ``height``, ``width`` are the input's, ``dtype`` e.g. "float16"."""

    batch: int
    c_in: int
    c_out: int
    height: int
    width: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    block: tuple[int, int]
    dtype: str
    n_blocks: int

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the output."""
        return conv2d_output_size((self.height, self.width), self.kernel_size, self.stride, self.padding, self.dilation)

    @property
    def block_rows(self) -> int:
        return ceil_div(self.c_out, self.block[0])

    @property
    def taps(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]


@dataclass(frozen=True)
class LinearProblem:
    """Shape of one block-sparse linear layer; ``tokens`` counts the rows of x.

    ``weight_dtype`` names the dtype of quantised weights, "int8" or "float8_e4m3fn"; "" = they have x's dtype.
    """

    tokens: int
    in_features: int
    out_features: int
    block: tuple[int, int]
    dtype: str
    n_blocks: int
    weight_dtype: str = ""

    @property
    def block_rows(self) -> int:
        return ceil_div(self.out_features, self.block[0])

    def step_bytes(self, tokens: int, outputs: int, inputs: int) -> int:
        """Shared memory of one step's tiles: ``tokens`` x ``inputs`` of x, ``outputs`` x ``inputs`` weights."""
        item = ITEM_SIZE[self.dtype]
        return (tokens * item + outputs * (1 if self.weight_dtype else item)) * inputs


@dataclass(frozen=True)
class KernelConfig:
    """What all configs share: a key in the store of tuned choices, and back."""

    def to_key(self) -> str:
        """The config as compact JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_key(cls: type[Config], key: str) -> Config:
        """The config of a key; TetrisError when it is not JSON or names fields that this version does not have."""
        try:
            values = json.loads(key)
        except json.JSONDecodeError as error:
            raise TetrisError(f"{cls.__name__}: wanted a config as JSON; got {key!r}") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not set(values) <= names:
            raise TetrisError(f"{cls.__name__}: wanted fields among {sorted(names)}; got {key!r}; tune again")
        return cls(**values)


@dataclass(frozen=True)
class Conv2dConfig(KernelConfig):
    """How a block-sparse convolution runs.

    Attributes:
        kernel: "portable" (Triton), "hopper" (Gluon, compute capability 9.0) or "hopper_linear" (the Hopper kernel of
            linear layers, for 1x1 convolutions of stride 1).
        tile_n, tile_h, tile_w: images x rows x columns of output pixels a program computes; powers of two. The
            pointer path flattens them: it computes tile_n * tile_h * tile_w consecutive pixels.
        tile_out: output channels a program computes; 0 = the whole block row.
        tile_k: input channels a step multiplies; 0 = the block's. A divisor splits blocks, a multiple (pointer path
            only) joins several kept (block, tap) pairs into one step.
        descriptors: load tiles by tensor descriptor (TMA) instead of pointers, where the operands allow it.
        group_rows: output tiles that run side by side on one pixel tile before the next tile; 0 = all.
        permute_first: with an input permutation, permute x once by a kernel of its own instead of gathering it on
            every load: more memory, far less address arithmetic.
        precision: of fp32 products where tf32 is not allowed: "ieee", or "tf32x3", three tf32 products that together
            are as exact as one in fp32 and run on tensor cores.
        num_warps, num_stages: Triton's. Index loads share the stages: ask for 5-7 to get 3-4 tile buffers.
        x_stages, w_stages: "hopper" only: depth of the input-tile and weight rings; 0 = chosen by the kernel.
        y_stages: "hopper" only: depth of the output ring; 0 = chosen by the kernel.
        w_taps: "hopper" only: kernel taps whose weights are loaded together; 0 = chosen by the kernel.
        input_order: "hopper" only: order of the input tile in shared memory, "images" or "copies".
        schedule: "hopper" only: "balanced" (offline, longest block rows first) or "static".
        fetch: "hopper" only: what L2 takes of the input from memory, whole "lines" of 128 bytes or the "sectors" that
            are asked for: faster where few channels of a line are kept, but some microseconds at the start.
        output_group: "hopper" only: an output permutation moves whole groups of so many channels, a multiple of 16
            bytes of them, as :func:`tetris.permutation.group_size` finds; 0 = it takes none.
    """

    kernel: str = "portable"
    tile_n: int = 1
    tile_h: int = 8
    tile_w: int = 16
    tile_out: int = 0
    tile_k: int = 0
    descriptors: bool = True
    group_rows: int = 0
    permute_first: bool = True
    precision: str = "ieee"
    num_warps: int = 4
    num_stages: int = 5
    x_stages: int = 0
    w_stages: int = 0
    y_stages: int = 0
    w_taps: int = 0
    input_order: str = "images"
    schedule: str = "balanced"
    fetch: str = "lines"
    output_group: int = 0

    @property
    def tile_pixels(self) -> int:
        return self.tile_n * self.tile_h * self.tile_w


@dataclass(frozen=True)
class LinearConfig(KernelConfig):
    """How a block-sparse linear layer runs; fields as in :class:`Conv2dConfig`, ``tile_tokens`` rows of x a program.

    ``kernel``: "portable", "hopper", "narrow" (Hopper, small scattered blocks), "split" (block rows cut along the
    inputs), "decode" (at most 16 tokens) or "vector" (one token).
    """

    kernel: str = "portable"
    tile_tokens: int = 128
    tile_out: int = 0
    tile_k: int = 0
    descriptors: bool = True
    group_rows: int = 0
    permute_first: bool = True
    precision: str = "ieee"
    num_warps: int = 4
    num_stages: int = 5
    x_stages: int = 0
    w_stages: int = 0
    schedule: str = "balanced"


@dataclass(frozen=True)
class StemConfig(KernelConfig):
    """How a dense convolution of few input channels runs: ``tile_pixels`` x ``tile_out`` outputs a program."""

    tile_pixels: int = 128
    tile_out: int = 64
    tile_k: int = 32
    num_warps: int = 4


def conv2d_output_size(
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """(height, width) of a convolution's output: floor((size + 2 p - d (k - 1) - 1) / s) + 1 along each."""
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation)
    )
    return height, width


def next_power_of_two(n: int, at_least: int = 1) -> int:
    """The smallest power of two >= n and >= at_least."""
    return max(at_least, 1 << max(0, n - 1).bit_length())


def is_power_of_two_tile(size: int) -> bool:
    """Whether a tile of this size needs no padding: a power of two that a matrix instruction takes."""
    return size >= 16 and size & (size - 1) == 0


def padded_block(block: tuple[int, int]) -> tuple[int, int]:
    """The tile that holds one block: powers of two, at least 16, the smallest that a matrix instruction takes."""
    return next_power_of_two(block[0], 16), next_power_of_two(block[1], 16)


def pixel_tile(batch: int, height: int, width: int, pixels: int) -> tuple[int, int, int]:
    """The (images, rows, columns) box of ``pixels`` output pixels that wastes fewest; of equals the squarest.

    Args:
        batch, height, width: the output's.
        pixels: size of the box; a power of two.
    Returns:
        Powers of two whose product is ``pixels``.
    """

    def waste(box: tuple[int, int, int]) -> tuple[int, int, int]:
        n, h, w = box
        return ceil_div(batch, n) * ceil_div(height, h) * ceil_div(width, w), n, abs(h - w)

    exponents = range(pixels.bit_length())
    boxes = [(1 << a, 1 << b, pixels >> (a + b)) for a in exponents for b in exponents if pixels >> (a + b)]
    return min(boxes, key=waste)


def _block_tile(block: tuple[int, int], row_inputs: float, item: int, descriptors: bool) -> tuple[int, int]:
    """(tile_out, tile_k): at most 128 output channels and 128 bytes of inputs, the width of a swizzled row.

    Without descriptors small blocks are joined until they fill a step, or until the ``row_inputs`` (taps x channels)
    that a block row keeps on average are in it.
    """
    out, k = padded_block(block)
    if not descriptors:
        k = max(k, next_power_of_two(round(row_inputs)))
    return min(out, 128), min(k, 128 // item)


def _largest_tile(pixels: int, rows: int, item: int, descriptors: bool, device: DeviceInfo) -> int:
    """The largest tile of pixels (or tokens) that leaves every multiprocessor two programs; at least 16.

    At most 256, so that 128 registers a thread hold the sums; half of that where the addresses of the pointer path or
    the split operands of tf32x3 need registers too. On an H200, 8192 x 4096 x 4096 in 128x64 blocks: .130 ms with 256,
    .144 ms with 128.
    """
    largest = (256 if descriptors else 128) // (1 if item == 2 else 2)
    tiles = [tile for tile in (256, 128, 64, 32, 16) if tile <= min(largest, next_power_of_two(pixels, 16))]
    return next((tile for tile in tiles if ceil_div(pixels, tile) * rows >= 2 * device.sm_count), tiles[-1])


def _warps(sums: int, descriptors: bool) -> int:
    """4, or 8 where the sums and the addresses would not fit into the registers of 4."""
    return 8 if sums > 64 * 256 or (sums > 64 * 128 and not descriptors) else 4


def _stages(step_bytes: int, descriptors: bool, device: DeviceInfo) -> int:
    """Pipeline stages: 7, or what shared memory holds (two stages make one buffer; the index is loaded ahead).

    AMD's pipeliner wants 2.
    """
    if device.backend != "cuda":
        return 2
    buffers = (device.shared_bytes - 4096) // step_bytes
    return max(2, min(7 if descriptors else 5, 2 * buffers - 1))


def default_conv2d_config(problem: Conv2dProblem, device: DeviceInfo) -> Conv2dConfig:
    """The config for a problem nobody tuned. Pure; cheap enough for every call."""
    item = ITEM_SIZE[problem.dtype]
    descriptors = (
        device.has_descriptors
        and all(is_power_of_two_tile(size) for size in problem.block)
        and problem.c_in * item % 16 == 0
        and (problem.stride == (1, 1) or problem.taps == 1)
    )
    row_inputs = problem.n_blocks / problem.block_rows * problem.taps * problem.block[1]
    tile_out, tile_k = _block_tile(problem.block, row_inputs, item, descriptors)
    height, width = problem.output_size
    pixels = problem.batch * height * width
    tile = _largest_tile(pixels, problem.block_rows, item, descriptors, device)
    n, h, w = pixel_tile(problem.batch, height, width, tile)
    return Conv2dConfig(
        tile_n=n,
        tile_h=h,
        tile_w=w,
        tile_out=tile_out,
        tile_k=tile_k,
        descriptors=descriptors,
        precision=device.fp32_precision,
        num_warps=_warps(tile_out * tile, descriptors),
        num_stages=_stages((tile + tile_out) * tile_k * item, descriptors, device),
    )


def default_linear_config(problem: LinearProblem, device: DeviceInfo) -> LinearConfig:
    """The config for a problem nobody tuned. Pure; cheap enough for every call.

    With one-byte weights two programs share a multiprocessor: one widens its weights while the other multiplies (H200,
    8192 tokens, 4096 -> 4096 at 27 %: int8 152 us instead of 176, float8 150 instead of 161).
    """
    item = ITEM_SIZE[problem.dtype]
    descriptors = (
        device.has_descriptors
        and all(is_power_of_two_tile(size) for size in problem.block)
        and problem.in_features * item % 16 == 0
    )
    row_inputs = problem.n_blocks / problem.block_rows * problem.block[1]
    tile_out, tile_k = _block_tile(problem.block, row_inputs, item, descriptors)
    tile = _largest_tile(problem.tokens, problem.block_rows, item, descriptors, device)
    programs = 2 if problem.weight_dtype else 1
    return LinearConfig(
        tile_tokens=tile,
        tile_out=tile_out,
        tile_k=tile_k,
        descriptors=descriptors,
        precision=device.fp32_precision,
        num_warps=_warps(tile_out * tile, descriptors),
        num_stages=_stages(programs * problem.step_bytes(tile, tile_out, tile_k), descriptors, device),
    )
