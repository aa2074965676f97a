"""What a layer must compute and move at least, for the roofline of a whole network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tetris.autotune.problems import LayerInput


def dense_work(layer: nn.Conv2d | nn.Linear, x: LayerInput, kept: float = 1.0) -> tuple[float, float]:
    """(FLOP, least bytes) of a layer of which ``kept`` of the weights remain."""
    item = x.dtype.itemsize
    weights = layer.weight.numel() * kept
    if isinstance(layer, nn.Linear):
        positions_in = positions_out = math.prod(x.shape[:-1])
    else:
        with torch.device("meta"):
            out = F.conv2d(
                torch.empty(x.shape), torch.empty(layer.weight.shape), None, layer.stride, layer.padding, layer.dilation
            )
        positions_in, positions_out = x.shape[0] * x.shape[2] * x.shape[3], out.shape[0] * out.shape[2] * out.shape[3]
    c_out, c_in = layer.weight.shape[:2]
    return 2.0 * positions_out * weights, item * (positions_in * c_in + positions_out * c_out + weights)
