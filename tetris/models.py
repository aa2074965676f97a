"""The networks of the paper and of the benchmarks, with torchvision's parameter names so that its state dicts load.

Built here because a pruning toolkit should not need torchvision: LeNet (the paper's), VGG16 and VGG16-BN, ResNet-18 and
ResNet-50, a plain MLP, a pre-norm transformer block and a language model of such blocks, and a small network that
concatenates as DenseNet and Inception do.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn


class LeNet(nn.Module):
    """The paper's LeNet: [N, 1, 28, 28] -> 20 and 50 5x5 filters -> 800 -> 500 -> ``num_classes``."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc2(x)


class VGG16(nn.Module):
    """VGG16 as torchvision names it: ``features`` of 13 3x3 convolutions, ``classifier`` of 3 linear layers.

    Args:
        num_classes: outputs of the last layer.
        batch_norm: a BatchNorm2d after every convolution (VGG16-BN).
        width: multiplies every channel count; 1.0 is VGG16, small widths make test-sized twins.
        pooled: the classifier sees ``pooled`` x ``pooled`` positions a channel; torchvision's VGG16 has 7.
    """

    CHANNELS: ClassVar = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")

    def __init__(self, num_classes: int = 1000, batch_norm: bool = False, width: float = 1.0, pooled: int = 7) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for entry in self.CHANNELS:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2, 2))
                continue
            out = max(1, int(entry * width))
            layers.append(nn.Conv2d(channels, out, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out))
            layers.append(nn.ReLU(inplace=True))
            channels = out
        hidden = max(1, int(4096 * width))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((pooled, pooled))
        self.classifier = nn.Sequential(
            nn.Linear(channels * pooled * pooled, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


def _conv_bn(c_in: int, c_out: int, kernel_size: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(c_in, c_out, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return conv, nn.BatchNorm2d(c_out)


class _ResidualBlock(nn.Module):
    """conv-bn stages with a shortcut; ``BasicBlock`` and ``Bottleneck`` say which convolutions."""

    expansion: ClassVar[int]
    stages: ClassVar[int]

    def __init__(self, c_in: int, planes: int, stride: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        for i, (inner, out, size, step) in enumerate(self.shapes(c_in, planes, stride), 1):
            conv, bn = _conv_bn(inner, out, size, step)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", bn)
        out = planes * self.expansion
        self.downsample = nn.Sequential(*_conv_bn(c_in, out, 1, stride)) if stride != 1 or c_in != out else None

    @staticmethod
    def shapes(c_in: int, planes: int, stride: int) -> list[tuple[int, int, int, int]]:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = x
        for i in range(1, self.stages + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.stages:
                y = self.relu(y)
        return self.relu(y + shortcut)


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions (ResNet-18)."""

    expansion = 1
    stages = 2

    @staticmethod
    def shapes(c_in: int, planes: int, stride: int) -> list[tuple[int, int, int, int]]:
        return [(c_in, planes, 3, stride), (planes, planes, 3, 1)]


class Bottleneck(_ResidualBlock):
    """1x1, 3x3, 1x1 convolutions (ResNet-50); the stride sits in the 3x3, as in torchvision."""

    expansion = 4
    stages = 3

    @staticmethod
    def shapes(c_in: int, planes: int, stride: int) -> list[tuple[int, int, int, int]]:
        return [(c_in, planes, 1, 1), (planes, planes, 3, stride), (planes, 4 * planes, 1, 1)]


class ResNet(nn.Module):
    """A ResNet of four stages with torchvision's names; see :func:`resnet18` and :func:`resnet50`."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self, block: type[_ResidualBlock], depths: tuple[int, int, int, int], num_classes: int = 1000, width: int = 64
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                blocks.append(block(channels, width * 2**stage, 2 if stage and not i else 1))
                channels = width * 2**stage * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(num_classes: int = 1000, width: int = 64) -> ResNet:
    """ResNet-18; ``width`` is the channel count of the first stage."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, width)


def resnet50(num_classes: int = 1000, width: int = 64) -> ResNet:
    """ResNet-50; ``width`` is the channel count of the first stage."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, width)


class MLP(nn.Sequential):
    """Linear layers with an activation between them: ``MLP(784, 512, 512, 10)``."""

    def __init__(self, *features: int, activation: type[nn.Module] = nn.ReLU) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (inner, out) in enumerate(pairwise(features)):
            layers[f"fc{i + 1}"] = nn.Linear(inner, out)
            if i < len(features) - 2:
                layers[f"act{i + 1}"] = activation()
        super().__init__(layers)


class TransformerBlock(nn.Module):
    """A pre-norm transformer block in Hugging Face's shape: q/k/v/out projections, two-layer MLP; [B, T, width]."""

    def __init__(self, width: int = 256, heads: int = 4, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or 4 * width
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up_proj, self.down_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.ln_1(x)
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + self.out_proj(attended)
        return x + self.down_proj(self.act(self.up_proj(self.ln_2(x))))


class LanguageModel(nn.Module):
    """Token and position embeddings, transformer blocks, norm, and a head that shares the token embedding's weight."""

    def __init__(
        self, vocabulary: int = 256, width: int = 64, heads: int = 4, blocks: int = 2, length: int = 64
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class DenseBlock(nn.Module):
    """DenseNet's: every stage reads the input and all stages before it, concatenated, through norm, ReLU and a 3x3."""

    def __init__(self, c_in: int, growth: int, stages: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(c_in + i * growth) for i in range(stages))
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in + i * growth, growth, 3, padding=1, bias=False) for i in range(stages)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for norm, conv in zip(self.norms, self.convs):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features, 1)


class InceptionBlock(nn.Module):
    """Inception's: 1x1, 3x3 and pooled branches side by side, their channels concatenated."""

    def __init__(self, c_in: int, branch: int) -> None:
        super().__init__()
        self.single = nn.Conv2d(c_in, branch, 1)
        self.reduce, self.wide = nn.Conv2d(c_in, branch // 2, 1), nn.Conv2d(branch // 2, branch, 3, padding=1)
        self.pooled = nn.Conv2d(c_in, branch // 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = (
            self.single(x),
            self.wide(F.relu(self.reduce(x))),
            self.pooled(F.avg_pool2d(x, 3, stride=1, padding=1)),
        )
        return F.relu(torch.cat(branches, dim=1))


class Concatenating(nn.Module):
    """A small network of both ways to concatenate: stem, dense block, 1x1 transition, inception block, classifier."""

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.dense = DenseBlock(width, width // 2, 3)
        self.transition = nn.Conv2d(width + 3 * (width // 2), 2 * width, 1)
        self.inception = InceptionBlock(2 * width, 2 * width)
        self.head = nn.Linear(5 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(self.transition(self.dense(x)))
        return self.head(self.inception(x).mean((2, 3)))
