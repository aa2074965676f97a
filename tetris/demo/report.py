"""One self-contained HTML file of the results: summary, embedded pictures, the whole table. No scripts, no links."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tetris.demo.experiment import PRUNED_LAYERS, Result, Settings
from tetris.demo.pictures import METHOD_NAMES

COLUMNS = (
    "block",
    "sparsity",
    "method",
    "pruned",
    "retained",
    "before",
    "tuned",
    "vs dense",
    "speedup",
    "ideal",
)

SHORT_NAMES = {"element": "element", "none": "blocks", "sort": "sorted", "paper": "TETRIS", "annealed": "annealed"}

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; background: white; border-radius: 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th { vertical-align: bottom; } td:nth-child(3), th:nth-child(3) { text-align: left; }
tr.tetris { font-weight: 600; } tr.first td { border-top: 2px solid #888a; }
.scroll { overflow-x: auto; } .note { color: #777; font-size: .9rem; }
"""


@dataclass(frozen=True)
class Summary:
    """What the report says beside the grid's results."""

    data: str
    device: str
    versions: str
    dense_accuracy: float
    n_test: int
    seconds: float
    settings: Settings


def cells(result: Result, dense_accuracy: float) -> list[str]:
    """The texts of one table line, in the order of COLUMNS; a speedup that does not exist is a dash."""
    variant = result.variant
    return [
        f"{variant.block}x{variant.block}",
        f"{variant.sparsity:.0%}",
        SHORT_NAMES.get(variant.method, variant.method),
        f"{result.pruned:.1%}",
        f"{result.retained:.1%}",
        f"{result.accuracy_before:.1%}",
        f"{result.accuracy_after:.1%}",
        f"{100 * (result.accuracy_after - dense_accuracy):+.1f}",
        "-" if math.isnan(result.speedup) else f"{result.speedup:.2f}x",
        f"{result.ideal:.2f}x",
    ]


def ordered(results: Sequence[Result]) -> list[Result]:
    """By sparsity, then block, element-wise first: neighbours are what one compares."""
    methods = list(METHOD_NAMES)
    return sorted(results, key=lambda r: (r.variant.sparsity, r.variant.block, methods.index(r.variant.method)))


def notes(summary: Summary) -> list[str]:
    """What a reader has to know to read the numbers right."""
    step = 100 / summary.n_test
    how = "one thread, fp32" if summary.device.startswith("cpu") else "fp16, CUDA graphs"
    return [
        f"Sparsity is that of {' and '.join(PRUNED_LAYERS)} (98.7 % of the weights); conv1 and fc2 stay dense and "
        "count in 'ideal', which is all multiply-adds / those left.",
        f"Accuracy (before and after fine-tuning) is on {summary.n_test} held-out images: one image is {step:.2f} "
        "points; smaller differences mean nothing.",
        "Methods: element-wise; blocks in the given order; blocks of channels sorted by L1 norm; TETRIS, blocks "
        "after the paper's Algorithm 1; other names are this project's searches (see tetris.reorder).",
        "Pruned: the share of weights, beside the share of blocks that was asked for: edge blocks are smaller, and a "
        "block larger than a layer's channels shrinks to half of them.",
        "Retained: the share of the sum of |weight| of the pruned layers that pruning kept.",
        f"Speedup is the dense network's time / the converted network's, medians of interleaved runs on this machine "
        f"({how}), batch {summary.settings.timed_batch}; below 1 means slower.",
        "Element-wise masks have no speedup: the zeros are scattered and the network runs as the dense one.",
        f"Fine-tuning: {summary.settings.fine_tuning.epochs} epochs with the mask in place; the dense network trained "
        f"for {summary.settings.training.epochs}. Seed {summary.settings.seed}.",
    ]


def headline(results: Sequence[Result], summary: Summary) -> str:
    """The most that the grid gives at no loss beyond one point, in one sentence; says so where nothing does."""
    good = [r for r in results if r.accuracy_after >= summary.dense_accuracy - 0.01 and not math.isnan(r.speedup)]
    if not good:
        return f"Dense accuracy {summary.dense_accuracy:.2%}; no converted variant stays within one point of it."
    best = max(good, key=lambda r: r.speedup)
    name = f"{METHOD_NAMES[best.variant.method]}, {best.variant.block}x{best.variant.block}"
    return (
        f"Dense accuracy {summary.dense_accuracy:.2%}. Fastest within one point of it: "
        f"{name}, {best.variant.sparsity:.0%} pruned: "
        f"{best.accuracy_after:.2%} at {best.speedup:.2f}x the dense network's speed (ideal {best.ideal:.2f}x)."
    )


def render(results: Sequence[Result], summary: Summary, pictures: Sequence[tuple[str, bytes]]) -> str:
    """The HTML page. ``pictures`` are (caption, PNG bytes)."""
    figures = "\n".join(
        f'<h2>{html.escape(caption)}</h2>\n<img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for caption, png in pictures
    )
    note_items = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes(summary))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tetris: LeNet on {html.escape(summary.data)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>LeNet, reordered and pruned in blocks</h1>
<p>{html.escape(headline(results, summary))}</p>
<p class="note">{html.escape(summary.data)}. {html.escape(summary.device)}; {html.escape(summary.versions)};
{summary.seconds:.0f} s.</p>
{figures}
<h2>All results</h2>
<div class="scroll">
{_table(results, summary.dense_accuracy)}
</div>
<ul class="note">
{note_items}
</ul>
</body>
</html>
"""


def _table(results: Sequence[Result], dense_accuracy: float) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    lines = [f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>"]
    previous = None
    for result in ordered(results):
        classes = ["tetris"] if result.variant.method not in ("element", "none", "sort") else []
        if result.variant.sparsity != previous:
            classes.append("first")
            previous = result.variant.sparsity
        body = "".join(f"<td>{html.escape(text)}</td>" for text in cells(result, dense_accuracy))
        lines.append(f'<tr class="{" ".join(classes)}">{body}</tr>')
    lines.append("</tbody>\n</table>")
    return "\n".join(lines)
