"""The networks that are measured end to end, as data: model, input, and which layers lose how much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from tetris.bench.cases import VGG16_KEPT, VGG16_MODULES, scaled_weight
from tetris.models import MLP, VGG16, resnet50
from tetris.pruning import Block
from tetris.specs import prunable_layers


@dataclass(frozen=True)
class NetworkCase:
    """One network.

    Attributes:
        make: builds it.
        input_shape: of one sample; for an MLP stack the batch counts tokens.
        batches: what is measured by default.
        sparsity: rates by layer name (globs); layers not named stay dense.
        blocks: candidates of the planner by layer name (globs).
        floors: speedup over the compiled dense model that is asked for, by batch.
    """

    name: str
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    batches: tuple[int, ...]
    sparsity: dict[str, float]
    blocks: dict[str, tuple[Block, ...]]
    floors: dict[int, float] = field(default_factory=dict)

    def inputs(self, batch: int, device: str, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        """Standard normal inputs; images are channels_last."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, *self.input_shape, generator=generator).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


VGG16_SPARSITY = {VGG16_MODULES[name]: round(1 - kept, 2) for name, kept in VGG16_KEPT.items()}
"""The paper's rates by module name."""


def _vgg16() -> nn.Module:
    return VGG16()


def _small_vgg16() -> nn.Module:
    return VGG16(num_classes=10, width=0.25, pooled=1)


def _mlp_stack() -> nn.Module:
    return MLP(4096, 16384, 4096, 16384, 4096, activation=nn.GELU)


def _small_mlp() -> nn.Module:
    return MLP(256, 512, 256)


NETWORKS: dict[str, NetworkCase] = {
    case.name: case
    for case in (
        NetworkCase(
            "vgg16",
            _vgg16,
            (3, 224, 224),
            (128, 32, 8, 1),
            VGG16_SPARSITY,
            {"features.*": ((64, 32),), "classifier.*": ((64, 64),)},
            {128: 2.35, 32: 2.0, 8: 1.6, 1: 1.1},
        ),
        NetworkCase(
            "resnet50",
            resnet50,
            (3, 224, 224),
            (128,),
            {"layer*.*.conv2": 0.75},
            {"layer*.*.conv2": ((64, 32),)},
            {128: 1.1},
        ),
        NetworkCase("mlp", _mlp_stack, (4096,), (8192,), {"fc*": 0.75}, {"fc*": ((64, 64),)}, {8192: 2.2}),
        NetworkCase(
            "small-vgg16",
            _small_vgg16,
            (3, 32, 32),
            (4,),
            {"features.*": 0.73, "classifier.[03]": 0.73},
            {"*": (16, 32)},
        ),
        NetworkCase("small-mlp", _small_mlp, (256,), (64,), {"fc*": 0.75}, {"*": (32,)}),
    )
}
FULL = ("resnet50", "mlp", "vgg16")
QUICK = ("small-vgg16", "small-mlp")


def trained_like(case: NetworkCase, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The network with weights whose channels differ as in a trained one, and outputs of unit variance in every layer.

    Without the scaling, half-precision activations would vanish after sixteen pruned layers and no error would show.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model = case.make().eval().requires_grad_(False)
    handles = []
    for index, layer in enumerate(prunable_layers(model).values()):
        layer.weight.copy_(scaled_weight(tuple(layer.weight.shape), 0.5, seed + index, device))
        handles.append(layer.register_forward_hook(_unit_variance))
    model(case.inputs(2, device, torch.float32, seed))
    for handle in handles:
        handle.remove()
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model.to(dtype)


def _unit_variance(layer: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    scale = 1.0 / output.float().std().clamp_min(1e-6)
    layer.weight.data.mul_(scale)  # type: ignore[union-attr,operator]
    return output * scale
