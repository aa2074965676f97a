"""The demo from start to end: data, dense network, grid, files. What ``tetris demo`` calls."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import tetris
from tetris.autotune.device import device_name, versions
from tetris.bench.rows import Row, write_csv
from tetris.demo import pictures, report
from tetris.demo.datasets import Dataset, load_dataset
from tetris.demo.experiment import Result, Settings, fingerprint, run_grid, trained_lenet
from tetris.demo.training import OnStep, accuracy
from tetris.files import atomic_file, write_text
from tetris.groups_picture import groups_picture

RESUME_FOLDER = ".resume"
"""Inside the output folder: checkpoints and finished variants of runs that have not ended, a folder for every choice of
settings, data and device; removed at the end of a run."""


@dataclass(frozen=True)
class Outcome:
    """What the demo found and where it wrote it."""

    results: list[Result]
    summary: report.Summary
    report_path: Path


def run_demo(
    out: Path,
    settings: Settings,
    dataset: str = "digits",
    data_directory: Path | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> Outcome:
    """Run everything and write ``out``/report.html, demo.csv, layer.png and accuracy.png.

    Args:
        device: "cpu", "cuda" or None: the GPU where there is one.
        console: where progress and the table go; None stays silent.
    """
    start = time.perf_counter()
    console = console or Console(quiet=True)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = load_dataset(dataset, data_directory).to(place)
    resume = out / RESUME_FOLDER / hashlib.sha256(fingerprint(data, settings).encode()).hexdigest()[:12]
    if resume.exists():
        console.print(f"going on with the interrupted run in {resume}")
    resume.mkdir(parents=True, exist_ok=True)
    with Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        dense = trained_lenet(data, settings, resume / "dense.pt", _bar(progress, "train the dense network"))
        dense_accuracy = accuracy(dense, data.test_images, data.test_labels)
        results = _grid(progress, dense, data, settings, resume)
    summary = report.Summary(
        data=data.describe(),
        device=device_name(place),
        versions=versions(),
        dense_accuracy=dense_accuracy,
        n_test=len(data.test_labels),
        seconds=time.perf_counter() - start,
        settings=settings,
    )
    report_path = _write(out, dense, data, results, summary)
    shutil.rmtree(out / RESUME_FOLDER)
    console.print(result_table(results, summary))
    for note in report.notes(summary):
        console.print(f"[dim]- {note}[/dim]", highlight=False)
    console.print(f"\n{report.headline(results, summary)}", highlight=False)
    console.print(f"{report_path} ({time.perf_counter() - start:.0f} s)", highlight=False, soft_wrap=True)
    return Outcome(results, summary, report_path)


def result_table(results: Sequence[Result], summary: report.Summary) -> Table:
    """The grid as a table for the terminal; TETRIS's lines are bold."""
    title = f"LeNet on {summary.data}; dense accuracy {summary.dense_accuracy:.2%}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for name in report.COLUMNS:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    previous = None
    for result in report.ordered(results):
        if previous not in (None, result.variant.sparsity):
            table.add_section()
        previous = result.variant.sparsity
        baseline = result.variant.method in ("element", "none", "sort")
        table.add_row(*report.cells(result, summary.dense_accuracy), style="" if baseline else "bold")
    return table


def rows(results: Sequence[Result], summary: report.Summary) -> list[Row]:
    """The results as CSV rows, one a variant."""
    return [
        Row(
            bench="demo",
            case=f"LeNet {r.variant.block}x{r.variant.block} {r.variant.sparsity:.0%}",
            provider=r.variant.method,
            median_us=r.fast_us,
            speedup=r.speedup,
            error=r.error,
            device=summary.device,
            versions=summary.versions,
            extra={
                "data": summary.data,
                "block": r.variant.block,
                "sparsity": r.variant.sparsity,
                "pruned": r.pruned,
                "retained": r.retained,
                "dense_accuracy": summary.dense_accuracy,
                "accuracy_before": r.accuracy_before,
                "accuracy_after": r.accuracy_after,
                "dense_us": r.dense_us,
                "ideal": r.ideal,
                "batch": summary.settings.timed_batch,
                "seed": summary.settings.seed,
            },
        )
        for r in report.ordered(results)
    ]


def _grid(progress: Progress, dense: nn.Module, data: Dataset, settings: Settings, folder: Path) -> list[Result]:
    """All results, with one bar for the grid and one for the fine-tuning under way."""
    variants = settings.variants()
    whole = progress.add_task("prune, fine-tune, convert, measure", total=len(variants))
    inner = progress.add_task("", total=None)
    results: list[Result] = []

    def on_step(done: int, total: int) -> None:
        variant = variants[len(results)]
        name = f"  {variant.method} {variant.block}x{variant.block} at {variant.sparsity:.0%}"
        progress.update(inner, description=name, completed=done, total=total)

    for result in run_grid(dense, data, settings, folder, on_step):
        results.append(result)
        progress.update(whole, completed=len(results))
    progress.remove_task(inner)
    return results


def _bar(progress: Progress, description: str) -> OnStep:
    task: TaskID = progress.add_task(description, total=None)

    def on_step(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

    return on_step


def _write(out: Path, dense: nn.Module, data: Dataset, results: Sequence[Result], summary: report.Summary) -> Path:
    """All files of the demo, each of them atomically; the report last. Returns its path."""
    settings = summary.settings
    block, method = max(settings.blocks), settings.methods[-1]
    drawn = []
    for name in ("fc1", "conv2"):
        weight = dense.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        layer = tetris.reorder(weight.detach().cpu(), block=block, sparsity=0.73, method=method, seed=settings.seed)
        drawn.append((name, pictures.to_png(pictures.layer_picture(weight, layer, name))))
    curves = pictures.to_png(pictures.accuracy_picture(results, summary.dense_accuracy, summary.data))
    _write_bytes(out / "layer.png", drawn[0][1])
    _write_bytes(out / "accuracy.png", curves)
    write_csv(out / "demo.csv", rows(results, summary))
    captions = [(f"{name}: original, reordered, pruned", png) for name, png in drawn]
    groups = tetris.channel_groups(dense, data.test_images[:1])
    captions.append(("Channels that share one order", pictures.to_png(groups_picture(groups))))
    path = out / "report.html"
    write_text(path, report.render(results, summary, [("Accuracy against sparsity", curves), *captions]))
    return path


def _write_bytes(path: Path, content: bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
