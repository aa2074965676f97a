"""Random operands of the block-sparse operations: cases are data, operands are made from them and a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.support.moats import moated, moated_image
from tetris.kernels.configs import Conv2dProblem, LinearProblem, conv2d_output_size
from tetris.layout import BlockLayout, grid_shape
from tetris.packing import pack
from tetris.quantization import quantize


@dataclass(frozen=True)
class ConvCase:
    """One convolution; ``extras`` names optional operands: "bias", "residual", "input", "output" (permutations)."""

    c_out: int = 64
    c_in: int = 32
    block: tuple[int, int] = (32, 16)
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    batch: int = 2
    height: int = 5
    width: int = 6
    kept: float = 0.4
    activation: str = "none"
    extras: tuple[str, ...] = ("bias",)
    pitch: int = 0

    def __str__(self) -> str:
        parts = [
            f"{self.c_in}-{self.c_out}@{self.height}x{self.width}b{self.batch}",
            "x".join(map(str, self.block)),
            f"k{self.kernel_size[0]}{self.kernel_size[1]}s{self.stride[0]}{self.stride[1]}"
            f"p{self.padding[0]}{self.padding[1]}d{self.dilation[0]}{self.dilation[1]}",
            self.activation,
            *self.extras,
        ]
        return "-".join(parts) + (f"-pitch{self.pitch}" if self.pitch else "")


@dataclass(frozen=True)
class LinearCase:
    """One linear layer; fields as in :class:`ConvCase`."""

    out_features: int = 64
    in_features: int = 64
    block: tuple[int, int] = (32, 16)
    tokens: tuple[int, ...] = (19,)
    kept: float = 0.4
    activation: str = "none"
    extras: tuple[str, ...] = ("bias",)
    pitch: int = 0
    weight_dtype: str = ""

    def __str__(self) -> str:
        tokens = "x".join(map(str, self.tokens))
        parts = [f"{tokens}x{self.in_features}-{self.out_features}", "x".join(map(str, self.block)), self.activation]
        parts += [self.weight_dtype] if self.weight_dtype else []
        return "-".join([*parts, *self.extras]) + (f"-pitch{self.pitch}" if self.pitch else "")


def random_layout(shape: tuple[int, int], block: tuple[int, int], kept: float, seed: int = 0) -> BlockLayout:
    """A layout that keeps a random ``kept`` fraction of the blocks and at least one in every row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(grid_shape(shape, block), generator=generator) < kept
    return BlockLayout.from_mask(mask, shape, block).without_empty_rows()


def _with_empty_rows(layout: BlockLayout, generator: torch.Generator) -> BlockLayout:
    """The same layout with about half of its block rows emptied, never all of them."""
    mask = layout.to_mask()
    emptied = torch.rand(len(mask), generator=generator) < 0.5
    emptied[int(torch.randint(len(mask), (), generator=generator))] = False
    return BlockLayout.from_mask(mask & ~emptied[:, None], layout.shape, layout.block)


def _optional(case: ConvCase | LinearCase, channels: tuple[int, int], y_shape: tuple[int, ...], randn, dtype) -> dict:
    generator = torch.Generator().manual_seed(1)
    made: dict[str, torch.Tensor] = {}
    if "bias" in case.extras:
        made["bias"] = randn(channels[0], dtype=torch.float32)
    if "residual" in case.extras:
        made["residual"] = randn(*y_shape, dtype=dtype)
    if "input" in case.extras:
        made["input_permutation"] = torch.randperm(channels[1], generator=generator)
    if "output" in case.extras:
        made["output_permutation"] = torch.randperm(channels[0], generator=generator)
    return made


def conv2d_operands(case: ConvCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict:
    """The launcher's arguments, without a config; floating-point operands in NaN moats."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    layout = random_layout((case.c_out, case.c_in), case.block, case.kept, seed)
    if "empty" in case.extras:
        layout = _with_empty_rows(layout, generator)
    weight = randn(case.c_out, case.c_in, *case.kernel_size, dtype=torch.float32)
    weight /= (case.c_in * weight[0, 0].numel()) ** 0.5
    out_size = conv2d_output_size((case.height, case.width), case.kernel_size, case.stride, case.padding, case.dilation)
    y_shape = (case.batch, case.c_out, *out_size)
    optional = _optional(case, layout.shape, y_shape, randn, dtype)
    if "residual" in optional:
        optional["residual"] = moated_image(optional["residual"].to(device))
    if "bias" in optional:
        optional["bias"] = moated(optional["bias"].to(device))
    shape = (case.batch, case.c_in, case.height, case.width)  # most of the work: made where it is used
    image = torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    return {
        "x": moated_image(image.to(dtype), case.pitch),
        "values": moated(pack(weight, layout).to(device, dtype)),
        "indptr": layout.indptr.to(device),
        "indices": layout.indices.to(device),
        "c_out": case.c_out,
        "kernel_size": case.kernel_size,
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "activation": case.activation,
        **{name: value.to(device) for name, value in optional.items()},
    }


def linear_operands(case: LinearCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict:
    """The launcher's arguments, without a config; floating-point operands in NaN moats."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    layout = random_layout((case.out_features, case.in_features), case.block, case.kept, seed)
    weight = randn(case.out_features, case.in_features, dtype=torch.float32) / case.in_features**0.5
    optional = _optional(case, layout.shape, (*case.tokens, case.out_features), randn, dtype)
    for name in ("residual", "bias"):
        if name in optional:
            optional[name] = moated(optional[name].to(device))
    values = pack(weight, layout).to(dtype)
    if case.weight_dtype:
        stored, scales = quantize(weight, getattr(torch, case.weight_dtype))
        values, optional["scales"] = pack(stored, layout), moated(scales.to(device))
    return {
        "x": moated(randn(*case.tokens, case.in_features, dtype=dtype).to(device), case.pitch),
        "values": moated(values.to(device)),
        "indptr": layout.indptr.to(device),
        "indices": layout.indices.to(device),
        "out_features": case.out_features,
        "activation": case.activation,
        **{name: value.to(device) for name, value in optional.items()},
    }


def conv2d_problem(case: ConvCase, operands: dict) -> Conv2dProblem:
    """What a config is chosen from."""
    dtype = str(operands["values"].dtype).removeprefix("torch.")
    geometry = (case.kernel_size, case.stride, case.padding, case.dilation)
    sizes = (case.batch, case.c_in, case.c_out, case.height, case.width)
    return Conv2dProblem(*sizes, *geometry, case.block, dtype, len(operands["values"]))


def linear_problem(case: LinearCase, operands: dict) -> LinearProblem:
    """What a config is chosen from."""
    dtype = str(operands["x"].dtype).removeprefix("torch.")
    tokens, n_blocks = torch.Size(case.tokens).numel(), len(operands["values"])
    return LinearProblem(tokens, case.in_features, case.out_features, case.block, dtype, n_blocks, case.weight_dtype)
