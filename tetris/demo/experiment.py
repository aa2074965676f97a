"""The grid of the demo: one trained LeNet; for every sparsity and block size, pruned in four ways, fine-tuned,
converted, verified and timed. A finished variant is one Result; an interrupted grid goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

import tetris
from tetris.autotune.timer import time_us
from tetris.demo.datasets import Dataset
from tetris.demo.training import OnStep, Schedule, accuracy, one_cpu_thread, seeded, train
from tetris.errors import FileFormatError, TetrisError
from tetris.files import write_text
from tetris.models import LeNet
from tetris.search.methods import METHODS

PRUNED_LAYERS = ("conv2", "fc1")
"""98.7 % of LeNet's weights. conv1 (one input channel) and fc2 (ten classes), the ends, stay dense."""


TRAINING = Schedule(epochs=8, learning_rate=0.02, batch_size=16, weight_decay=5e-3)
"""98 % on the held-out digits; the weight decay lets unused channels fade, as long training does on larger data."""
FINE_TUNING = Schedule(epochs=2, learning_rate=0.01, batch_size=32)


@dataclass(frozen=True)
class Variant:
    """One way to prune: "element", or in blocks of ``block`` x ``block`` reordered by "none", "sort", "paper", ..."""

    method: str
    block: int
    sparsity: float

    @property
    def key(self) -> str:
        """A short name that is also a file's."""
        return f"{self.method}-{self.block}-{self.sparsity:g}"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the results."""

    blocks: tuple[int, ...] = (8, 16, 32)
    sparsities: tuple[float, ...] = (0.73, 0.9, 0.95, 0.98)
    methods: tuple[str, ...] = ("none", "sort", "paper")
    seed: int = 0
    training: Schedule = TRAINING
    fine_tuning: Schedule = FINE_TUNING
    timed_batch: int = 64
    timed_repeats: int = 15

    @staticmethod
    def for_dataset(
        dataset: str, seed: int = 0, quick: bool = False, methods: tuple[str, ...] = ("none", "sort", "paper")
    ) -> Settings:
        """The settings that suit a data set: MNIST is 45 times larger than the digits and needs fewer passes."""
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            raise TetrisError(f"demo: wanted methods of {', '.join(METHODS)}; got {', '.join(unknown)}")
        settings = Settings(methods=methods, seed=seed)
        if dataset == "mnist":
            training = Schedule(epochs=5, learning_rate=0.05, batch_size=64)
            settings = replace(settings, training=training, fine_tuning=replace(training, epochs=1, learning_rate=0.02))
        return replace(settings, blocks=(16,), sparsities=(0.73, 0.9)) if quick else settings

    def variants(self) -> list[Variant]:
        """The grid; element-wise pruning once per sparsity."""
        return [
            variant
            for sparsity in self.sparsities
            for variant in (
                Variant("element", 1, sparsity),
                *(Variant(method, block, sparsity) for block in self.blocks for method in self.methods),
            )
        ]


@dataclass(frozen=True)
class Result:
    """What became of a variant. Accuracies are fractions of the held-out images; times are microseconds a batch.

    Attributes:
        retained: kept / total importance (sum of |W|) of the pruned layers, right after pruning.
        pruned: weights pruned / all weights of those layers; differs from the sparsity that was asked for, because
            whole blocks are pruned and blocks at the edge of a layer are smaller.
        kept_work: multiply-adds left / all, over the whole network.
        dense_us, fast_us: medians of the dense and the converted network; NaN for element-wise masks, which leave
            nothing that a dense machine could skip.
        error: of the converted network's outputs, as ``tetris.verify`` reports it.
    """

    variant: Variant
    retained: float
    pruned: float
    kept_work: float
    accuracy_before: float
    accuracy_after: float
    dense_us: float = math.nan
    fast_us: float = math.nan
    error: float = math.nan

    @property
    def speedup(self) -> float:
        """Dense / converted time, measured on this machine."""
        return self.dense_us / self.fast_us

    @property
    def ideal(self) -> float:
        """The speedup if time were proportional to the work that is left, the dense layers included."""
        return 1 / self.kept_work


def trained_lenet(data: Dataset, settings: Settings, checkpoint: Path, on_step: OnStep | None = None) -> nn.Module:
    """The dense network, on the data's device; from ``checkpoint`` where that is complete.

    It is kept channels_last: a training step then takes a sixth less on a CPU, and the dense network that the speedups
    compare with is the faster one.
    """
    model = seeded(LeNet, settings.seed).to(data.train_images.device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with one_cpu_thread():
        return train(model, data, settings.training, settings.seed, checkpoint, on_step)


def run_variant(
    dense: nn.Module,
    data: Dataset,
    variant: Variant,
    settings: Settings,
    checkpoint: Path,
    on_step: OnStep | None = None,
) -> Result:
    """Prune, fine-tune, convert, verify, time (on a GPU in fp16). ``dense`` is not changed, the checkpoint removed."""
    example = data.test_images[: settings.timed_batch]
    by_element = variant.method == "element"
    pruned = tetris.prune(
        dense,
        sparsity={name: variant.sparsity for name in PRUNED_LAYERS},
        block=variant.block,
        method="none" if by_element else variant.method,
        structure="element" if by_element else "block",
        example_inputs=example,
        seed=settings.seed,
    )
    before_pruning = effective_weights(dense)
    kept = kept_fractions(pruned)
    retained = retained_importance(dense, pruned)
    pruned_fraction = 1 - weighted_mean(kept, {name: before_pruning[name].numel() for name in PRUNED_LAYERS})
    before = accuracy(pruned, data.test_images, data.test_labels)
    train(pruned, data, settings.fine_tuning, settings.seed, checkpoint, on_step)
    after = accuracy(pruned, data.test_images, data.test_labels)
    kept_work = weighted_mean(kept, multiply_adds(dense, example[:1]))
    checkpoint.unlink(missing_ok=True)
    if by_element:
        return Result(variant, retained, pruned_fraction, kept_work, before, after)
    fast = tetris.convert(pruned, example_inputs=example)
    report = tetris.verify(pruned, fast, example_inputs=example)
    if not report.passed:
        raise TetrisError(f"demo: the converted network of {variant.key} is wrong; nothing is timed\n{report}")
    if example.device.type == "cuda":
        dense, example = copy.deepcopy(dense).half(), example.half()
        fast = tetris.convert(copy.deepcopy(pruned).half(), example_inputs=example)
    dense_us, fast_us = time_pair(dense, fast, example, settings.timed_repeats)
    error = max(check.error for check in report.outputs)
    return Result(variant, retained, pruned_fraction, kept_work, before, after, dense_us, fast_us, error)


def run_grid(
    dense: nn.Module, data: Dataset, settings: Settings, folder: Path, on_step: OnStep | None = None
) -> Iterator[Result]:
    """Every variant's result, in the grid's order; each is kept in ``folder`` as soon as it is there."""
    store = ResultStore(folder / "results.json", fingerprint(data, settings))
    for variant in settings.variants():
        if variant.key not in store.results:
            with one_cpu_thread():
                result = run_variant(dense, data, variant, settings, folder / f"{variant.key}.pt", on_step)
            store.add(result)
        yield store.results[variant.key]


def fingerprint(data: Dataset, settings: Settings) -> str:
    """What must agree for results and checkpoints to be carried from one run to the next."""
    return f"{settings} {data.describe()} {data.train_images.device}"


class ResultStore:
    """Finished results in a JSON file; they count only for the settings, data and device that they were made with."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.results: dict[str, Result] = {}
        if path.exists():
            self._read()

    def add(self, result: Result) -> None:
        """Keep a result; the file is replaced atomically."""
        self.results[result.variant.key] = result
        content = {"fingerprint": self.fingerprint, "results": [asdict(r) for r in self.results.values()]}
        write_text(self.path, json.dumps(content, indent=1))

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["fingerprint"] != self.fingerprint:
                return
            found = [Result(**{**entry, "variant": Variant(**entry["variant"])}) for entry in content["results"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"demo: {self.path} is corrupt ({error}); delete it to start over") from error
        self.results = {result.variant.key: result for result in found}


def time_pair(dense: nn.Module, fast: nn.Module, example: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Median microseconds of the dense and the converted network on one batch, interleaved; on a GPU as CUDA graphs,
    so that launches from Python do not hide the kernels."""
    with torch.inference_mode():
        timings = time_us(
            {"dense": lambda: dense(example), "fast": lambda: fast(example)},
            device=example.device,
            repeats=repeats,
            cuda_graph=example.device.type == "cuda",
        )
    return timings["dense"].median_us, timings["fast"].median_us


def effective_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Layer name -> the weight that its forward uses (masked where a mask is in place), detached."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    return {name: layer.weight.detach() for name, layer in layers.items()}


def kept_fractions(pruned: nn.Module) -> dict[str, float]:
    """Layer name -> fraction of its weights that are not zero."""
    return {name: float((weight != 0).double().mean()) for name, weight in effective_weights(pruned).items()}


def weighted_mean(values: Mapping[str, float], weights: Mapping[str, int]) -> float:
    """Mean of ``values`` over the names of ``weights``, weighted by them."""
    return sum(values[name] * weights[name] for name in weights) / sum(weights.values())


def retained_importance(dense: nn.Module, pruned: nn.Module, names: Sequence[str] = PRUNED_LAYERS) -> float:
    """sum |masked W| / sum |W| over the pruned layers: one minus the paper's objective (eq. 5), normalised."""
    before, after = effective_weights(dense), effective_weights(pruned)
    total = sum(float(before[name].abs().sum()) for name in names)
    return sum(float(after[name].abs().sum()) for name in names) / total


def multiply_adds(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Layer name -> multiply-adds of the dense layer for ``example`` [1, ...]."""
    counts: dict[str, int] = {}

    def count(name: str):
        def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            positions = output[0].numel() // output.shape[1]
            counts[name] = module.weight.numel() * positions  # type: ignore[operator, union-attr]

        return hook

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count(name)) for name, layer in layers]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return counts
