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
    stars: list[tuple[float, float]] = []
    groups = [[block for block in blocks if block_speedup(layer, block) is not None] for layer in layers]
    width = 0.8 / max([len(group) for group in groups], default=1)
    for index, block in enumerate(blocks):
        members = [place for place, group in enumerate(groups) if block in group]
        at = [place + width * (groups[place].index(block) - (len(groups[place]) - 1) / 2) for place in members]
        heights = [block_speedup(layers[place], block) or 0.0 for place in members]
        axes.bar(at, heights, 0.9 * width, color=f"C{index}", label=block_label(block))
        chosen = [(x, y) for x, y, place in zip(at, heights, members) if layers[place].block == block]
        stars += chosen
    stars += [(place, 1.0) for place, layer in enumerate(layers) if layer.block is None]
    axes.plot([x for x, _ in stars], [y for _, y in stars], linestyle="none", marker="*", color="black", markersize=9)
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
