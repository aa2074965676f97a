"""NaN moats: operands lie inside buffers full of NaN, outputs are allocated full of NaN.

A load past a tensor's end or past its last channel then poisons the result instead of reading a harmless zero, a
missing store stays visible, and a store past the end is found in the moat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

MOAT = 256
"""Elements before and after; keeps 16-byte alignment."""


def moated(tensor: torch.Tensor, pitch: int = 0) -> torch.Tensor:
    """An equal tensor inside a NaN-filled buffer; int8 has no NaN and gets its largest value.

    Args:
        tensor: of a floating-point dtype or int8.
        pitch: NaN elements between the rows of the last dimension; 0 keeps the tensor dense.
    """
    width = tensor.shape[-1] + pitch
    rows = tensor.numel() // max(tensor.shape[-1], 1)
    fill = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    buffer = torch.full((MOAT + rows * width + MOAT,), fill, dtype=tensor.dtype, device=tensor.device)
    inside = buffer[MOAT : MOAT + rows * width].view(*tensor.shape[:-1], width)[..., : tensor.shape[-1]]
    return inside.copy_(tensor)


def moated_image(image: torch.Tensor, pitch: int = 0) -> torch.Tensor:
    """The same for an image [N, C, H, W], in channels_last memory; the pitch lies between pixels."""
    return moated(image.permute(0, 2, 3, 1), pitch).permute(0, 3, 1, 2)


@contextmanager
def nan_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it ``torch.empty`` returns NaN-filled tensors inside moats; on leaving, the moats must be intact."""
    buffers: list[torch.Tensor] = []
    empty = torch.empty

    def nan_empty(*shape: object, **options: object) -> torch.Tensor:
        model = empty(*shape, **{**options, "device": "meta"})
        if not model.dtype.is_floating_point:
            return empty(*shape, **options)
        size = model.numel()
        buffer = torch.full((size + 2 * MOAT,), float("nan"), dtype=model.dtype, device=options.get("device"))
        buffers.append(buffer)
        return buffer[MOAT : MOAT + size].view(model.shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", nan_empty)
        yield
    for buffer in buffers:
        assert buffer[:MOAT].isnan().all() and buffer[-MOAT:].isnan().all(), "stored outside the output"
