"""The problems that are measured, as data: layers of known networks, the paper's pruning rates, layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tetris.layout import BlockLayout, grid_shape
from tetris.pruning import units_to_keep


@dataclass(frozen=True)
class ConvCase:
    """One convolution at one batch. ``height``, ``width``: the input's; ``count``: how often the network has it."""

    name: str
    c_in: int
    c_out: int
    height: int
    width: int
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    batch: int = 128
    kept: float = 0.27
    count: int = 1

    @property
    def out_size(self) -> tuple[int, int]:
        """(height, width) of the output."""
        height, width = (
            (size + 2 * self.padding - self.kernel_size) // self.stride + 1 for size in (self.height, self.width)
        )
        return height, width

    def flop(self, kept: float = 1.0) -> float:
        """Operations with ``kept`` of the weights left, a multiply-add counted twice."""
        pixels = self.batch * self.out_size[0] * self.out_size[1]
        return 2.0 * pixels * self.c_in * self.c_out * self.kernel_size**2 * kept

    def bytes(self, kept: float = 1.0, itemsize: int = 2) -> float:
        """Least traffic: input, kept weights and output once."""
        activations = self.batch * (
            self.height * self.width * self.c_in + self.out_size[0] * self.out_size[1] * self.c_out
        )
        return float(itemsize) * (activations + self.c_in * self.c_out * self.kernel_size**2 * kept)

    def at(self, batch: int) -> ConvCase:
        """The same layer at another batch."""
        return replace(self, batch=batch)


@dataclass(frozen=True)
class LinearCase:
    """One linear layer on ``tokens`` rows."""

    name: str
    in_features: int
    out_features: int
    tokens: int = 8192
    kept: float = 0.27
    count: int = 1

    def flop(self, kept: float = 1.0) -> float:
        """Operations with ``kept`` of the weights left, a multiply-add counted twice."""
        return 2.0 * self.tokens * self.in_features * self.out_features * kept

    def bytes(self, kept: float = 1.0, itemsize: int = 2) -> float:
        """Least traffic: input, kept weights and output once."""
        activations = self.tokens * (self.in_features + self.out_features)
        return float(itemsize) * (activations + self.in_features * self.out_features * kept)

    def at(self, tokens: int) -> LinearCase:
        """The same layer on another number of tokens."""
        return replace(self, tokens=tokens)


VGG16_KEPT: dict[str, float] = {
    "conv1_1": 0.58,
    "conv1_2": 0.22,
    "conv2_1": 0.34,
    "conv2_2": 0.36,
    "conv3_1": 0.53,
    "conv3_2": 0.24,
    "conv3_3": 0.42,
    "conv4_1": 0.32,
    "conv4_2": 0.27,
    "conv4_3": 0.34,
    "conv5_1": 0.35,
    "conv5_2": 0.29,
    "conv5_3": 0.36,
    "fc6": 0.04,
    "fc7": 0.04,
    "fc8": 0.23,
}
"""Fractions that Deep Compression keeps of VGG16's layers: the paper's configuration of pruning rates."""

VGG16_MODULES: dict[str, str] = dict(
    zip(
        VGG16_KEPT,
        [*(f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28))]
        + [f"classifier.{i}" for i in (0, 3, 6)],
    )
)
"""The layers' module names in the usual definition of VGG16 without batch-norm."""


def _vgg16_convs() -> tuple[ConvCase, ...]:
    sizes = {1: (224, (3, 64)), 2: (112, (64, 128)), 3: (56, (128, 256)), 4: (28, (256, 512)), 5: (14, (512, 512))}
    cases = []
    for name, kept in VGG16_KEPT.items():
        if name.startswith("conv"):
            stage, index = int(name[4]), int(name[6])
            size, (before, after) = sizes[stage]
            cases.append(ConvCase(name, before if index == 1 else after, after, size, size, kept=kept))
    return tuple(cases)


VGG16_CONVS: tuple[ConvCase, ...] = _vgg16_convs()
VGG16_LINEARS: tuple[LinearCase, ...] = (
    LinearCase("fc6", 25088, 4096, tokens=128, kept=VGG16_KEPT["fc6"]),
    LinearCase("fc7", 4096, 4096, tokens=128, kept=VGG16_KEPT["fc7"]),
    LinearCase("fc8", 4096, 1000, tokens=128, kept=VGG16_KEPT["fc8"]),
)

RESNET50_CONVS: tuple[ConvCase, ...] = (
    ConvCase("3x3 64@56", 64, 64, 56, 56, kept=0.25, count=3),
    ConvCase("3x3 128@56 /2", 128, 128, 56, 56, stride=2, kept=0.25),
    ConvCase("3x3 128@28", 128, 128, 28, 28, kept=0.25, count=3),
    ConvCase("3x3 256@28 /2", 256, 256, 28, 28, stride=2, kept=0.25),
    ConvCase("3x3 256@14", 256, 256, 14, 14, kept=0.25, count=5),
    ConvCase("3x3 512@14 /2", 512, 512, 14, 14, stride=2, kept=0.25),
    ConvCase("3x3 512@7", 512, 512, 7, 7, kept=0.25, count=2),
    ConvCase("1x1 64-256@56", 64, 256, 56, 56, 1, padding=0, kept=0.25, count=4),
    ConvCase("1x1 256-64@56", 256, 64, 56, 56, 1, padding=0, kept=0.25, count=2),
    ConvCase("1x1 128-512@28", 128, 512, 28, 28, 1, padding=0, kept=0.25, count=4),
    ConvCase("1x1 512-128@28", 512, 128, 28, 28, 1, padding=0, kept=0.25, count=3),
    ConvCase("1x1 256-1024@14", 256, 1024, 14, 14, 1, padding=0, kept=0.25, count=6),
    ConvCase("1x1 1024-256@14", 1024, 256, 14, 14, 1, padding=0, kept=0.25, count=5),
    ConvCase("1x1 512-2048@7", 512, 2048, 7, 7, 1, padding=0, kept=0.25, count=3),
    ConvCase("1x1 2048-512@7", 2048, 512, 7, 7, 1, padding=0, kept=0.25, count=2),
)

TRANSFORMER_LINEARS: tuple[LinearCase, ...] = (
    LinearCase("4096-4096", 4096, 4096),
    LinearCase("4096-16384", 4096, 16384),
    LinearCase("16384-4096", 16384, 4096),
    LinearCase("14336-4096", 14336, 4096),
    LinearCase("4096-14336", 4096, 14336),
    LinearCase("1024-4096", 1024, 4096),
    LinearCase("4096-1024", 4096, 1024),
    LinearCase("25088-4096", 25088, 4096, tokens=4096),
)


def random_layout(shape: tuple[int, int], block: tuple[int, int], kept: float, seed: int = 0) -> BlockLayout:
    """A layout whose kept blocks are drawn uniformly without replacement; CPU tensors, deterministic by seed."""
    rows, columns = grid_shape(shape, block)
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[order[: units_to_keep(rows * columns, 1 - kept)]] = True
    return BlockLayout.from_mask(mask.view(rows, columns), shape, block)


def scaled_weight(
    shape: tuple[int, ...], sigma: float = 0.6, seed: int = 0, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Gaussian weights times lognormal row and column factors, fp32: channels differ as in a trained network.

    ``sigma`` is the standard deviation of the factors' logarithm.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(shape, generator=generator, device=device)
    for dim in (0, 1):
        factor = torch.exp(sigma * torch.randn(shape[dim], generator=generator, device=device))
        weight *= factor.view([-1 if d == dim else 1 for d in range(len(shape))])
    return weight


def reordered_layout(
    shape: tuple[int, int], block: tuple[int, int], kept: float, seed: int = 0, method: str = "sort"
) -> BlockLayout:
    """The layout that reordering and pruning of :func:`scaled_weight` give: kept blocks crowd, block rows are uneven.

    ``method`` is one of ``tetris.reordering.reorder``'s; the default, sorting by L1 norm, takes milliseconds at any
    size and already makes the uneven rows that trouble kernels.
    """
    from tetris.reordering import reorder  # above: only the makers of layouts need the search

    return reorder(scaled_weight(shape, seed=seed), block=block, sparsity=1 - kept, method=method, seed=seed).layout


LAYOUTS: dict[str, Callable[..., BlockLayout]] = {"random": random_layout, "reordered": reordered_layout}
