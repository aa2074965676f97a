"""A plan as a picture: every layer's speedup for every block, the chosen ones marked (the paper's Figure 7)."""

from __future__ import annotations

from pathlib import Path

from tetris.plans import LayerPlan, ModelPlan, block_label


def plot_plan(plan: ModelPlan, path: str | Path) -> Path:
    """Write the picture; the file's suffix chooses the format (.png, .svg, .pdf). Returns the path.

    A group of bars is a layer, a bar a block at the layer's planned sparsity (its fastest point where that was not
    measured). The line at 1 is the dense layer: a star on it means that the layer stays dense.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    layers = [layer for layer in plan if layer.dense]
    blocks = sorted({c.block for layer in layers for c in layer.candidates if c.block}, key=lambda b: (b[0] * b[1], b))
    figure = Figure(figsize=(max(6.0, 0.8 * len(layers) + 2), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(blocks), 1)
    for index, block in enumerate(blocks):
        places, heights = [], []
        for place, layer in enumerate(layers):
            if (speedup := block_speedup(layer, block)) is not None:
                places.append(place + (index + 0.5) * width - 0.4)
                heights.append(speedup)
                if layer.block == block:
                    axes.plot(places[-1], speedup, marker="*", color="black", markersize=9)
        axes.bar(places, heights, width, label=block_label(block))
    dense = [place for place, layer in enumerate(layers) if layer.block is None]
    axes.plot(dense, [1.0] * len(dense), linestyle="none", marker="*", color="black", markersize=9)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=35, ha="right")
    axes.set_ylabel("speedup over dense")
    axes.set_title(f"{plan.device}, {plan.dtype}: the star is the plan's choice")
    axes.legend(title="block (out x in)", fontsize="small")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def block_speedup(layer: LayerPlan, block: tuple[int, int]) -> float | None:
    """Dense time / the block's time at the layer's sparsity, or at its fastest point; None if it was not measured."""
    points = [c for c in layer.candidates if c.block == block]
    planned = [c for c in points if c.sparsity == layer.sparsity]
    if layer.dense is None or not points:
        return None
    return layer.dense.time_us / min(c.time_us for c in planned or points)
