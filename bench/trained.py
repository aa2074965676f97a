"""Weights of small networks trained here on real data: what reordering meets in practice, at no download.

LeNet and a VGG-like network learn scikit-learn's handwritten digits in well under a minute on one core.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tetris.files import atomic_file
from tetris.models import LeNet

TRAINED = ("lenet fc1", "vgg conv3", "vgg conv4", "vgg fc1")
"""What :func:`trained_weights` returns."""
TRAIN_IMAGES = 1437
"""Of 1797; the rest tests."""


def _digits(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 1, size, size] in 0..1 and labels [1797]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    large = small if size == 8 else F.interpolate(small, size=size, mode="bilinear", align_corners=False)
    return large, torch.tensor(labels)


def _vgg_like() -> nn.Sequential:
    """Four 3x3 convolutions with batch norm and two linear layers, for 8x8 images."""
    layers: list[nn.Module] = []
    channels = 1
    for width, pool in ((64, False), (128, True), (256, False), (256, True)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 4, 512), nn.ReLU(), nn.Linear(512, 10))


def _train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> float:
    """Adam with weight decay; returns the accuracy on the held-out images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN_IMAGES, generator=generator).split(64):
            batch = batch.to(images.device)
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((model(images[TRAIN_IMAGES:]).argmax(1) == labels[TRAIN_IMAGES:]).float().mean())


def trained_networks(device: str = "cpu", seed: int = 0, quick: bool = False) -> dict[str, nn.Module]:
    """LeNet (28x28 images) and the VGG-like network (8x8) on ``device``; ``quick`` trains one epoch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lenet, vgg = LeNet().to(device), _vgg_like().to(device)
    for model, size, epochs in ((lenet, 28, 8), (vgg, 8, 8)):
        images, labels = (t.to(device) for t in _digits(size))
        _train(model, images, labels, 1 if quick else epochs, seed)
    return {"lenet": lenet, "vgg": vgg}


def trained_weights(device: str = "cpu", seed: int = 0, quick: bool = False) -> dict[str, torch.Tensor]:
    """Layer -> weight on ``device``: LeNet's first linear layer [500, 800] and three layers of the VGG-like network.

    The values depend on the device's arithmetic; ``quick`` trains one epoch.
    """
    lenet, vgg = trained_networks(device, seed, quick).values()
    linears: list[nn.Linear] = [m for m in lenet.modules() if isinstance(m, nn.Linear)]
    largest = max(linears, key=lambda layer: layer.weight.numel())
    convs = [m for m in vgg.modules() if isinstance(m, nn.Conv2d)]
    weights = (
        largest.weight,
        convs[2].weight,
        convs[3].weight,
        next(m for m in vgg.modules() if isinstance(m, nn.Linear)).weight,
    )
    return {name: weight.detach() for name, weight in zip(TRAINED, weights)}


def kept_weights(path: Path, device: str = "cpu", quick: bool = False) -> dict[str, torch.Tensor]:
    """:func:`trained_weights` from a safetensors file, which is written by the first call: training takes seconds."""
    from safetensors.torch import load_file, save_file

    if not path.is_file():
        weights = {name: weight.cpu().contiguous() for name, weight in trained_weights(device, quick=quick).items()}
        with atomic_file(path) as temporary:
            save_file(weights, temporary)
    return {name: weight.to(device) for name, weight in load_file(path).items()}
