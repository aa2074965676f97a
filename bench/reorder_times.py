"""How long the searches take for VGG16's layers at the paper's rates, in 32x32 blocks: layer by layer and together."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch

from tetris.autotune.device import device_name, versions
from tetris.bench.reorder_cases import vgg16_weights
from tetris.bench.rows import FAILED, Row
from tetris.errors import TetrisError
from tetris.importance import channel_importance
from tetris.joint_reordering import JointProblem, reorder_jointly
from tetris.layout import grid_shape
from tetris.pruning import units_to_keep
from tetris.reordering import reorder
from tetris.search.system import BlockProblem, System, total_of
from tetris.search.transport import certify, solve

EDGE = 32
METHODS: tuple[tuple[str, str, int], ...] = (
    ("none", "none", 1),
    ("sort", "sort", 1),
    ("paper", "paper", 1),
    ("batched", "batched", 1),
    ("exact", "exact", 1),
    ("annealed 60", "annealed", 60),
    ("annealed 500", "annealed", 500),
)
"""(provider, method, steps)."""

Layers = list[tuple[str, torch.Tensor, float]]
"""(name, weight, sparsity)."""


def measure_vgg16(sigma: float, device: str) -> Iterator[list[Row]]:
    """Method by method: a row a layer, their sum, and all of them in one search."""
    kind = "gaussian" if sigma == 0 else f"lognormal {sigma:g}"
    layers = [(name, weight.to(device), sparsity) for name, weight, sparsity in vgg16_weights(sigma)]
    wanted = [m for m in METHODS if m[0] != "none"]
    if device == "cpu":  # annealing all of VGG16 is the GPU's business
        wanted = [m for m in wanted if m[1] in ("sort", "paper", "batched")]
    else:
        name, weight, sparsity = next(layer for layer in layers if layer[0] == "fc6")
        yield [measure_exact_step(f"VGG16 {name} M-step {kind}", weight, sparsity, kind)]
    for provider, method, steps in wanted:
        rows, seconds, swaps = [], 0.0, 0
        for name, weight, sparsity in layers:
            case = f"VGG16 {name} {kind}"
            try:
                first = reorder(weight, EDGE, sparsity, method, steps=min(steps, 2)) if weight.is_cuda else None
                before = _reset_peak(device)
                r = reorder(weight, EDGE, sparsity, method, steps=steps)
            except (RuntimeError, TetrisError) as error:
                rows.append(Row("reorder", case, provider, status=f"{FAILED}: {error}", device=device_name(device)))
                seconds = math.nan
                continue
            seconds, swaps = seconds + r.seconds, swaps + r.n_swaps
            # |W| and the answer's mask are not the search's
            megabytes = (_peak_since(device, before) - 5 * weight.numel()) / 1e6
            extra = {"matrix": kind, "retained": r.retained, "swaps": r.n_swaps, "megabytes": megabytes}
            if first is not None:  # it loaded or compiled the kernels
                extra["first_call_ms"] = first.seconds * 1e3
            rows.append(_vgg_row(case, provider, r.seconds, device, extra))
        rows.append(_vgg_row(f"VGG16 all {kind}", provider, seconds, device, {"matrix": kind, "swaps": swaps}))
        if device != "cpu":
            rows.append(measure_together(layers, provider, method, steps, device, kind))
        yield rows


def measure_together(layers: Layers, provider: str, method: str, steps: int, device: str, kind: str) -> Row:
    """All layers in one call, each with permutations of its own; the time from weights to permutations and layouts."""
    case = f"VGG16 together {kind}"

    def search(steps: int) -> tuple[float, float, int]:
        """(seconds, kept / total importance of all layers, swaps)."""
        began = time.perf_counter()
        problems = [
            JointProblem(channel_importance(weight.abs()), (EDGE, EDGE), sparsity, ((name, 0), (name, 1)))
            for name, weight, sparsity in layers
        ]
        r = reorder_jointly(problems, method, steps=steps)
        seconds = time.perf_counter() - began
        totals = [total_of(problem.importance) for problem in problems]
        return seconds, sum(part * total for part, total in zip(r.retained, totals)) / sum(totals), r.n_swaps

    try:
        search(min(steps, 2))  # loads or compiles
        before = _reset_peak(device)
        seconds, retained, swaps = search(steps)
    except (RuntimeError, TetrisError) as error:
        return Row("reorder", case, provider, status=f"{FAILED}: {error}", device=device_name(device))
    scores = 4 * sum(weight.shape[0] * weight.shape[1] for _, weight, _ in layers)
    megabytes = (_peak_since(device, before) - scores) / 1e6
    extra = {"matrix": kind, "retained": retained, "swaps": swaps, "megabytes": megabytes}
    return _vgg_row(case, provider, seconds, device, extra)


def measure_exact_step(case: str, weight: torch.Tensor, sparsity: float, kind: str) -> Row:
    """One exact M-step along the inputs, from a random assignment, for the mask of the given order."""
    rows, columns = grid_shape((weight.shape[0], weight.shape[1]), (EDGE, EDGE))
    system = System([BlockProblem(weight.abs(), (EDGE, EDGE), units_to_keep(rows * columns, sparsity))])
    masks, _ = system.expectation()
    values = system.values(1, masks)
    seconds = math.inf
    for _ in range(3):
        partition = system.partitions[1]
        partition.order.copy_(torch.randperm(len(partition.order), generator=torch.Generator().manual_seed(0)))
        torch.cuda.synchronize()
        began = time.perf_counter()
        moves, _ = solve(values, partition)
        seconds = min(seconds, time.perf_counter() - began)
    certificate = certify(values, partition)
    extra = {"matrix": kind, "swaps": moves, "gap": certificate.gap, "optimal": int(certificate.is_optimal)}
    return _vgg_row(case, "exact M-step", seconds, "cuda", extra)


def _vgg_row(case: str, provider: str, seconds: float, device: str, extra: dict) -> Row:
    common = {"block_out": EDGE, "block_in": EDGE}
    return Row(
        "reorder",
        case,
        provider,
        median_us=seconds * 1e6,
        device=device_name(device),
        versions=versions(),
        extra={**common, **extra},
    )


def _reset_peak(device: str) -> int:
    """Bytes that lie on the GPU now."""
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_since(device: str, before: int) -> float:
    """Bytes at the peak beyond what was there; NaN on a CPU."""
    return math.nan if device == "cpu" else float(torch.cuda.max_memory_allocated() - before)
