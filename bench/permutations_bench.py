"""What sharing permutations among layers costs in importance, and what not sharing them costs in time.

Every network is pruned three times at the same rates: in the original order, with one permutation a channel group
("shared": free at run time) and with one a weight and side ("separate": data is moved at run time). On a GPU the
converted networks run too, and permutation's share of their kernels' time is measured.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tetris
from tetris.autotune.compile_ahead import start_workers
from tetris.autotune.compile_job import distinct_kernels
from tetris.autotune.device import device_info, device_name, versions
from tetris.autotune.measure import Epilogue
from tetris.autotune.planner import fused_epilogues
from tetris.autotune.problems import capture_inputs, problem_at
from tetris.autotune.timer import graphed, time_us
from tetris.bench.cases import VGG16_KEPT, scaled_weight
from tetris.bench.kernel_profile import profile_kernels
from tetris.bench.rows import Row, write_csv
from tetris.bench.trained import trained_networks
from tetris.groups_picture import groups_picture
from tetris.models import MLP, VGG16, LanguageModel, TransformerBlock, resnet18, resnet50
from tetris.specs import prunable_layers, resolve_blocks, resolve_sparsity

SHARED, SEPARATE, ORIGINAL = "shared", "separate", "original"
VGG16_BLOCKS = {"features.*": (64, 32), "classifier.*": (64, 64)}
VGG16_RATES = [round(1 - kept, 2) for kept in VGG16_KEPT.values()]


@dataclass(frozen=True)
class Case:
    """One network: how to make it, its input, and which layers lose how much in which blocks."""

    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    sparsity: Any
    block: Any = (64, 32)
    trained: bool = False
    vocabulary: int = 0

    def inputs(self, device: str, dtype: torch.dtype) -> torch.Tensor:
        """Standard normal inputs, images channels_last; of a language model random tokens."""
        if self.vocabulary:
            return torch.randint(self.vocabulary, self.input_shape, device=device)
        x = torch.randn(self.input_shape).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


CASES: dict[str, Case] = {
    "LeNet, trained": Case(nn.Identity, (16, 1, 28, 28), {"conv2": 0.73, "fc1": 0.73}, (25, 10), trained=True),
    "VGG-like, trained": Case(nn.Identity, (16, 1, 8, 8), 0.73, (32, 32), trained=True),
    "MLP 1024-4096": Case(partial(MLP, 1024, 4096, 1024, 4096, 1024), (256, 1024), 0.75),
    "transformer block 768": Case(partial(TransformerBlock, 768, 12), (2, 128, 768), 0.75),
    "language model 768, 2 blocks": Case(
        partial(LanguageModel, 8192, 768, 12, 2, 128), (2, 128), {"blocks.*": 0.75}, vocabulary=8192
    ),
    "ResNet-18": Case(resnet18, (32, 3, 224, 224), {"layer*": 0.73}),
    "ResNet-50, 3x3": Case(resnet50, (32, 3, 224, 224), {"layer*.*.conv2": 0.75}),
    "ResNet-50": Case(resnet50, (32, 3, 224, 224), {"layer*": 0.75}),
    "VGG16": Case(VGG16, (32, 3, 224, 224), VGG16_RATES, VGG16_BLOCKS),
    "VGG16-BN": Case(partial(VGG16, batch_norm=True), (32, 3, 224, 224), VGG16_RATES, VGG16_BLOCKS),
}
QUICK = ("VGG-like, trained",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--model", nargs="+", choices=list(CASES), help="default: all")
    parser.add_argument("--method", default="paper", help="reordering; see tetris.reorder")
    parser.add_argument("--compile-seconds", type=float, default=60, help="on a GPU, for kernels compiled side by side")
    parser.add_argument("--compile-only", action="store_true", help="fill the compiler's cache and measure nothing")


def run(args: argparse.Namespace) -> list[Row]:
    """A row a network and kind of permutation; the CSV grows as they come."""
    names = args.model or (QUICK if args.quick else tuple(CASES))
    draw_groups(args.out / "groups.png")
    trained = trained_networks(quick=args.quick) if any(CASES[name].trained for name in names) else {}
    rows: list[Row] = []
    for name in names:
        model = trained["lenet" if "LeNet" in name else "vgg"] if CASES[name].trained else None
        rows += measure(name, CASES[name], model, args)
        write_csv(args.out / "permutations.csv", rows)
    return rows


def draw_groups(path: Path) -> None:
    """The channel groups of ResNet-18."""
    graph = tetris.channel_groups(resnet18(width=8), torch.zeros(1, 3, 64, 64))
    path.parent.mkdir(parents=True, exist_ok=True)
    groups_picture(graph, "ResNet-18: a line is an order of channels that layers share").savefig(path, dpi=100)


@torch.no_grad()
def measure(name: str, case: Case, trained: nn.Module | None, args: argparse.Namespace) -> list[Row]:
    """One network in three orders."""
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    model = heavy_tailed(case.make()) if trained is None else trained
    model = model.to(args.device, dtype).eval()
    x = case.inputs(args.device, dtype)
    rows, kept = [], {}
    if args.device == "cuda" and args.compile_seconds:
        print(*compile_ahead(case, model, x, args.compile_seconds), sep="\n", flush=True)
        if args.compile_only:
            return []
    for kind in (ORIGINAL, SHARED, SEPARATE):
        options = {"method": "none"} if kind == ORIGINAL else {"method": args.method, "permutations": kind}
        start = time.perf_counter()
        pruned = tetris.prune(model, case.sparsity, case.block, example_inputs=x, **options)  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
        found = [reordering.retained for reordering in tetris.reorderings(pruned).values()]
        kept[kind] = sum(found) / len(found)
        extra = {"retained": kept[kind], "layers": len(found), "search_seconds": seconds}
        extra |= run_time(pruned, x) if args.device == "cuda" else {}
        rows.append(Row("permutations", name, kind, device=device_name(args.device), versions=versions(), extra=extra))
        print(f"{name} {kind}: {extra}", flush=True)
        del pruned
    for row in rows:
        row.extra["gain_kept"] = share_of_gain(row.extra["retained"], kept)
    return rows


def compile_ahead(case: Case, model: nn.Module, x: torch.Tensor, seconds: float) -> list[str]:
    """Compile the converted network's kernels in processes side by side; what did not compile."""
    layers = prunable_layers(model)
    rates, blocks = resolve_sparsity(case.sparsity, layers), resolve_blocks(case.block, layers)
    inputs, epilogues = capture_inputs(model, x, layers), fused_epilogues(model, x, list(rates))
    jobs = [
        epilogues.get(name, Epilogue()).job(problem_at(layers[name], inputs[name], blocks[name], rate))
        for name, rate in rates.items()
    ]
    return start_workers(distinct_kernels(jobs, device_info(x.device)), str(x.device.type)).wait(seconds)


def share_of_gain(retained: float, kept: dict[str, float]) -> float:
    """Of what separate permutations gain over the original order; NaN where they gain nothing."""
    gain = kept[SEPARATE] - kept[ORIGINAL]
    return (retained - kept[ORIGINAL]) / gain if gain > 0 else math.nan


def heavy_tailed(model: nn.Module) -> nn.Module:
    """Weights whose rows and columns differ as in trained networks, each layer for itself: sharing at its hardest."""
    for index, layer in enumerate(prunable_layers(model).values()):
        weight = scaled_weight(tuple(layer.weight.shape), 0.5, index)
        layer.weight.data = weight / math.sqrt(weight[0].numel())
    return model


def run_time(pruned: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """The converted network from a CUDA graph: its time, and permutation's share of its kernels' time."""
    fast = tetris.convert(pruned, x)
    fast(x)
    replay = graphed(lambda: fast(x))
    time = time_us({"fast": replay}, device=x.device, repeats=10)["fast"]
    share = profile_kernels(replay, str(x.device)).share("permutation")
    return {"network_us": time.median_us, "permutation_share": share}


def show(rows: list[Row]) -> str:
    """A line a network and order."""
    from tabulate import tabulate

    columns = ("retained", "gain_kept", "network_us", "permutation_share", "search_seconds")
    lines = [
        [row.case, row.provider, *(f"{row.extra[c]:.3f}" if c in row.extra else "" for c in columns)] for row in rows
    ]
    return tabulate(lines, headers=("network", "permutations", *columns), disable_numparse=True)
