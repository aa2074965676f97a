"""The paper's two pictures, drawn from results: a layer before, reordered and pruned (Figure 3); accuracy against
sparsity for every block size (Figure 4).

Functions from data to a matplotlib figure; nothing is shown, saved or kept globally.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from tetris.errors import ShapeError
from tetris.importance import channel_importance
from tetris.layout import block_row_of
from tetris.permutation import apply
from tetris.pruning import expand_block_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tetris.demo.experiment import Result
    from tetris.reordering import Reordering

METHOD_NAMES = {
    "element": "element-wise (1x1)",
    "none": "blocks, no reordering",
    "sort": "blocks, sorted by L1",
    "paper": "blocks, TETRIS",
    "batched": "blocks, TETRIS batched",
    "exact": "blocks, TETRIS exact",
    "annealed": "blocks, TETRIS annealed",
}
METHOD_STYLES = {
    "element": ("#6b7280", "s", ":"),
    "none": ("#d97706", "v", "--"),
    "sort": ("#93b5d8", "o", "-."),
    "paper": ("#1d4ed8", "D", "-"),
    "batched": ("#7c3aed", "<", "-"),
    "exact": ("#be185d", ">", "-"),
    "annealed": ("#0f766e", "^", "-"),
}
"""Colour, marker and line of every method: the same in all pictures, and told apart without colour too."""


def layer_picture(weight: torch.Tensor, reordering: Reordering, name: str, max_pixels: int = 800) -> Figure:
    """Figure 3 for one layer: |W| summed over the kernel taps, as it is, reordered, and pruned in blocks.

    Block rows and block columns are drawn fullest first: their order is free, since no block changes.

    Args:
        weight: [C_OUT, C_IN, ...] in the original order.
        reordering: of that weight, with a block mask.
        name: the layer's, for the title.
        max_pixels: larger matrices are averaged down to this many rows or columns.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    if reordering.block_mask is None:
        raise ShapeError(f"picture: wanted a reordering with a block mask; {name} was pruned without blocks")
    before = channel_importance(weight.detach().float().abs().cpu())
    fullest_first = _fullest_first(reordering)
    reordered = apply(apply(before, reordering.permutations), fullest_first)
    keep = expand_block_mask(reordering.block_mask.cpu(), tuple(reordered.shape), reordering.block)
    keep = apply(keep, fullest_first)
    high = float(torch.quantile(before.flatten()[:: max(1, before.numel() // 1_000_000)], 0.995))
    figure = Figure(figsize=(11, 0.9 + 3.5 * min(1.2, before.shape[0] / before.shape[1])), layout="constrained")
    panels = (
        ("original", before),
        ("channels reordered", reordered),
        (f"{reordering.block[0]}x{reordering.block[1]} blocks, {reordering.sparsity:.0%} pruned", reordered * keep),
    )
    for axes, (title, matrix) in zip(figure.subplots(1, len(panels)), panels):
        axes.imshow(
            shrink(matrix, max_pixels),
            cmap="magma",
            norm=PowerNorm(1.5, 0, high),
            interpolation="nearest",
            aspect="auto",
        )
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("input channel", fontsize=9)
        axes.tick_params(labelsize=8)
    figure.axes[0].set_ylabel(f"{name}: output channel", fontsize=9)
    figure.suptitle(
        f"{name}, |weight|: the blocks that are left hold {reordering.retained:.1%} of the importance", fontsize=11
    )
    return figure


def _fullest_first(reordering: Reordering) -> dict[int, torch.Tensor]:
    """Permutations that move whole blocks so that the rows and columns that keep most come first."""
    assert reordering.block_mask is not None
    result = {}
    for dim in (0, 1):
        kept = reordering.block_mask.sum(1 - dim).cpu()
        rank = kept.argsort(descending=True, stable=True).argsort()
        block_of = block_row_of(reordering.shape[dim], reordering.block[dim])
        result[dim] = rank[block_of].argsort(stable=True)
    return result


def accuracy_picture(results: Sequence[Result], dense_accuracy: float, data_name: str) -> Figure:
    """Figure 4: accuracy against sparsity, a column for every block size, before and after fine-tuning in two rows.

    Element-wise pruning and the dense network are drawn in every column, to compare with.
    """
    from matplotlib.figure import Figure

    blocks = sorted({result.variant.block for result in results if result.variant.method != "element"})
    figure = Figure(figsize=(max(7.5, 1.2 + 3.4 * len(blocks)), 6.2), layout="constrained")
    grid = figure.subplots(2, len(blocks), sharex=True, sharey="row", squeeze=False)
    for row, (stage, title) in enumerate((("before", "pruned, not fine-tuned"), ("after", "fine-tuned"))):
        for column, block in enumerate(blocks):
            axes: Axes = grid[row, column]
            axes.axhline(100 * dense_accuracy, color="black", linewidth=0.8, label="dense")
            _draw_methods(
                axes, [r for r in results if r.variant.block == block or r.variant.method == "element"], stage
            )
            axes.grid(alpha=0.25)
            if row == 0:
                axes.set_title(f"{block}x{block} blocks", fontsize=11)
            else:
                axes.set_xlabel("weights pruned, %")
            if column == 0:
                axes.set_ylabel(f"accuracy, %\n{title}")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False, fontsize=9)
    figure.suptitle(f"LeNet on {data_name}", fontsize=12)
    return figure


def _draw_methods(axes: Axes, results: Sequence[Result], stage: str) -> None:
    """One line a method; ``stage`` is "before" or "after" fine-tuning."""
    for method, (colour, marker, line) in METHOD_STYLES.items():
        points = sorted(
            (100 * r.pruned, 100 * (r.accuracy_before if stage == "before" else r.accuracy_after))
            for r in results
            if r.variant.method == method
        )
        if points:
            axes.plot(
                *zip(*points), color=colour, marker=marker, linestyle=line, markersize=4.5, label=METHOD_NAMES[method]
            )


def shrink(matrix: torch.Tensor, max_pixels: int) -> np.ndarray:
    """A [rows, columns] matrix averaged down so that neither side is longer than ``max_pixels``."""
    rows, columns = (min(size, max_pixels) for size in matrix.shape)
    if (rows, columns) != tuple(matrix.shape):
        matrix = torch.nn.functional.adaptive_avg_pool2d(matrix[None, None], (rows, columns))[0, 0]
    return matrix.numpy()


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as the bytes of a PNG file in 128 colours: a third of the size, the same for the same data."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    Image.open(drawn).convert("RGB").quantize(128).save(small, format="PNG", optimize=True)
    return small.getvalue()
