"""Operands, candidates and timing of block-sparse convolutions: what the conv benches share."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F

from tetris.autotune.ceilings import Ceilings
from tetris.autotune.device import device_info, device_name, versions
from tetris.autotune.timer import time_us
from tetris.bench.cases import LAYOUTS, random_layout
from tetris.bench.conv_cases import Case
from tetris.bench.rows import Row
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem
from tetris.kernels.conv2d_paths import choose_conv2d_config, config_for_layout
from tetris.kernels.hopper.conv2d import block_sparse_conv2d, conv2d_schedule, launch_arguments
from tetris.kernels.hopper.heuristics import complete_tile
from tetris.kernels.hopper.pieces import FEW_TILES
from tetris.kernels.hopper.pointwise_conv2d import block_sparse_conv2d as pointwise_conv2d
from tetris.kernels.hopper.pointwise_conv2d import pointwise_schedule
from tetris.kernels.hopper.tile_choice import memory_decides, ranked_configs
from tetris.layout import BlockLayout
from tetris.packing import pack
from tetris.tolerances import relative_error, tolerance

BASELINE = "cudnn"
CHECKED_IMAGES = 4
"""Images at each end of the batch that are compared with float64."""

SHORT_BATCH = 8
"""Up to here a case runs with a cold L2, as its weights come from memory in practice."""


@lru_cache(maxsize=256)
def case_layout(case: Case, seed: int = 0) -> BlockLayout:
    """The case's layout on the CPU, empty block rows included: the Hopper kernel stores their epilogue only.

    Of a layer of one block row or column ``reorder`` would halve the block: its layout is random.
    """
    layer = case.layer
    shape = (layer.c_out, layer.c_in)
    single = layer.c_out <= case.block[0] or layer.c_in <= case.block[1]
    maker = random_layout if single else LAYOUTS[case.layout]
    return maker(shape, case.block, layer.kept, seed=seed)


def case_problem(case: Case, n_blocks: int) -> Conv2dProblem:
    """The case as the kernels' configs know it; three input channels count as eight, see :class:`Operands`."""
    layer = case.layer
    k, s, p = layer.kernel_size, layer.stride, layer.padding
    return Conv2dProblem(
        layer.batch, max(layer.c_in, 8), layer.c_out, layer.height, layer.width, (k, k), (s, s), (p, p), (1, 1),
        case.block, case.dtype, n_blocks,
    )  # fmt: skip


@dataclass(frozen=True)
class Operands:
    """One case's tensors. ``dense``: random weight of the baseline; ``pruned``: what of it the layout keeps.

    Three input channels are padded to eight for our kernel (``x_padded``), which TMA's 16-byte strides demand.
    """

    case: Case
    layout: BlockLayout
    x: torch.Tensor
    x_padded: torch.Tensor
    dense: torch.Tensor
    pruned: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None

    @staticmethod
    def of(case: Case, device: str, seed: int = 0) -> Operands:
        """Random operands in channels_last memory."""
        layer, dtype = case.layer, getattr(torch, case.dtype)
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        layout = case_layout(case, seed)
        layout = BlockLayout(layout.shape, layout.block, layout.indptr.to(device), layout.indices.to(device))
        k = layer.kernel_size
        dense = (normal(layer.c_out, layer.c_in, k, k) / (layer.c_in * k * k) ** 0.5).to(dtype)
        mask = layout.to_mask().repeat_interleave(case.block[0], 0).repeat_interleave(case.block[1], 1)
        pruned = dense * mask[: layer.c_out, : layer.c_in, None, None]
        x = normal(layer.batch, layer.c_in, layer.height, layer.width).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        padded = F.pad(x, (0, 0, 0, 0, 0, 8 - layer.c_in)) if layer.c_in < 8 else x
        return Operands(
            case, layout, x, padded.contiguous(memory_format=torch.channels_last),
            dense.contiguous(memory_format=torch.channels_last), pruned, pack(pruned, layout),
            normal(layer.c_out).to(dtype) if case.fused else None,
        )  # fmt: skip

    def cudnn(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The dense layer, with its epilogue as separate operations."""
        layer = self.case.layer
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.conv2d(x, weight, bias, layer.stride, layer.padding)
        y = y.relu_() if self.case.fused else y
        return F.max_pool2d(y, 2) if self.case.pool else y

    def bound(
        self, config: Conv2dConfig, output_permutation: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Our layer with that config as a function of its (padded) input, its schedule made beforehand."""
        problem = case_problem(self.case, self.layout.n_blocks)
        geometry = {name: getattr(problem, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        options = {"c_out": problem.c_out, "activation": "relu" if self.case.fused else "none", **geometry}
        options |= {"config": config, "allow_tf32": self.case.dtype == "float32"}
        lists = (self.layout.indptr, self.layout.indices)
        device = self.x.device
        sm_count = device_info(device).sm_count
        if config.kernel == "hopper_linear":
            plan = pointwise_schedule(problem, config, *lists, sm_count).tensors
            options |= {"schedule": plan, "output_permutation": output_permutation}
            return lambda x: pointwise_conv2d(x, self.values, *lists, self.bias, **options)
        schedule = conv2d_schedule(*lists, problem, config, sm_count, device, self.values)
        options |= {"schedule": schedule, "max_pool": self.case.pool, "output_permutation": output_permutation}
        return lambda x: block_sparse_conv2d(x, self.values, *lists, self.bias, **options)

    def tetris(
        self, config: Conv2dConfig, output_permutation: torch.Tensor | None = None
    ) -> Callable[[], torch.Tensor]:
        """Our layer with that config on its input."""
        run = self.bound(config, output_permutation)
        return lambda: run(self.x_padded)


def candidates(case: Case, most: int) -> list[Conv2dConfig]:
    """The likeliest configs of a case, the one that layers run first; 1x1 convolutions: of both kernels.

    At short batches three times as many, of different tiles: there the model ranks them badly.
    """
    layout, info = case_layout(case), device_info("cuda")
    problem = case_problem(case, layout.n_blocks)
    options = {"max_pool": case.pool, "allow_tf32": case.dtype == "float32"}
    chosen = choose_conv2d_config(problem, info, **options)
    chosen = config_for_layout(chosen, problem, info, layout.indptr, layout.indices)
    other = [replace(chosen, tile_w=128 + 256 - chosen.tile_w)] if chosen.kernel == "hopper_linear" else []
    found = [*dict.fromkeys([chosen, *other, *ranked_configs(problem, info, **options)])]
    if case.layer.batch <= SHORT_BATCH and most > 1:
        shapes = {(config.tile_n, config.tile_h, config.tile_w): config for config in found[::-1]}
        return [config for config in found if config in shapes.values()][: 3 * most]
    return found[:most]


def compile_one(job: tuple[Case, Conv2dConfig]) -> None:
    """Compile one launch in a process of its own; leaves the kernel in the compiler's cache on disk."""
    case, config = job
    torch.set_num_threads(1)
    if config.kernel == "hopper_linear":
        Operands.of(case, "cuda").tetris(config)()
        return
    from tetris.kernels.hopper.conv2d_device import conv2d_kernel

    layout, dtype = case_layout(case), getattr(torch, case.dtype)
    problem = case_problem(case, layout.n_blocks)
    tile = complete_tile(problem, config, max_pool=case.pool)
    schedule = conv2d_schedule(layout.indptr, layout.indices, problem, config, 132, "cpu")
    height, width = (size // (2 if case.pool else 1) for size in problem.output_size)

    def image(channels: int, height: int, width: int) -> torch.Tensor:
        shape = (problem.batch, channels, height, width)
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    values = torch.empty(problem.n_blocks, problem.taps, *problem.block, dtype=dtype)
    bias = torch.empty(problem.c_out, dtype=dtype) if case.fused else None
    x, y = image(problem.c_in, problem.height, problem.width), image(problem.c_out, height, width)
    arguments, constants = launch_arguments(
        x, values, layout.indices, bias, None, y, tile, schedule,
        activation="relu" if case.fused else "none", max_pool=case.pool,
        permutation=torch.arange(problem.c_out) if config.output_group else None, sectors=config.fetch == "sectors",
    )  # fmt: skip
    conv2d_kernel.warmup(*arguments, grid=(1,), **constants)


def add_compile_argument(parser: argparse.ArgumentParser) -> None:
    """Whether a bench compiles its kernels ahead."""
    parser.add_argument(
        "--compile", choices=("first", "only", "never"), default="first",
        help="compile all kernels in parallel before measuring, or do nothing else, or trust the compiler's cache",
    )  # fmt: skip


def kernel_key(case: Case, config: Conv2dConfig) -> tuple[object, ...]:
    """What the compiler sees of a launch of the convolution kernel: not the sizes; of the layout, whether there are
    rows without blocks or cut into pieces; whether programs take their tiles."""
    if config.kernel != "hopper":
        return case, config
    problem, layout = case_problem(case, 1), case_layout(case)
    tile = complete_tile(problem, config, max_pool=case.pool)
    empty = bool((layout.indptr.diff() == 0).any())
    cuts = False
    if math.prod(tile.tiles(problem.batch, *problem.output_size)) * problem.block_rows <= FEW_TILES * 132:
        cuts = len(conv2d_schedule(layout.indptr, layout.indices, problem, config, 132, "cpu").counters) > 0
    takes = memory_decides(case_problem(case, layout.n_blocks), tile, 132)
    return tile, case.dtype, case.fused, case.pool, config.fetch, config.output_group > 0, empty, cuts, takes


def compile_all(cases: Sequence[Case], most: int, more: Sequence[tuple[Case, Conv2dConfig]] = ()) -> None:
    """Compile the candidates of all cases in parallel, and ``more`` launches, each kernel once."""
    jobs = [*((case, config) for case in cases for config in candidates(case, most)), *more]
    kinds = {kernel_key(case, config): (case, config) for case, config in jobs}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(16, max(1, (os.cpu_count() or 2) - 1)), mp_context=context) as pool:
        list(pool.map(compile_one, kinds.values()))


def measure(case: Case, ceilings: Ceilings, most: int = 4, repeats: int = 15) -> list[Row]:
    """The rows of one case: cuDNN on dense weights, ours with the analytic config, ours with the best of ``most``."""
    operands = Operands.of(case, "cuda")
    dtype = operands.x.dtype
    configs = candidates(case, most)
    allowed = tolerance(dtype, dtype is torch.float32)
    images = operands.x
    if len(images) > 2 * CHECKED_IMAGES:
        images = torch.cat([images[:CHECKED_IMAGES], images[-CHECKED_IMAGES:]])
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):
        expected = operands.cudnn(images.double(), operands.pruned.double())
    runs: dict[str, Callable[[], torch.Tensor]] = {BASELINE: lambda: operands.cudnn(operands.x, operands.dense)}
    errors: dict[str, float] = {}
    for index, config in enumerate(configs):
        run = operands.tetris(config)
        y = run()
        ends = y if len(y) == len(expected) else torch.cat([y[:CHECKED_IMAGES], y[-CHECKED_IMAGES:]])
        errors[str(index)] = relative_error(ends, expected)
        if errors[str(index)] <= allowed:
            runs[str(index)] = run
    times = time_us(runs, device="cuda", repeats=repeats, cuda_graph=True, cold_l2=case.layer.batch <= SHORT_BATCH)
    kept = operands.layout.kept_fraction
    flop, size = case.layer.flop(kept), least_bytes(case, operands.layout)
    least = ceilings.least_us(flop, size)
    dense_us = times[BASELINE].median_us
    extra = {
        "batch": case.layer.batch, "block": f"{case.block[0]}x{case.block[1]}", "kept": kept, "layout": case.layout,
        "dtype": case.dtype, "floor": case.floor, "target": case.target,
        "ideal": min(1 / kept, dense_us / (size / ceilings.bytes_per_s * 1e6)),
    }  # fmt: skip
    row = Row(
        "conv", case.name, BASELINE, flop=flop, bytes=size, device=device_name("cuda"), versions=versions(), extra=extra
    )
    timed = [name for name in times if name != BASELINE]
    best = min(timed, key=lambda name: times[name].median_us, default="")
    chosen = [(BASELINE, BASELINE), ("tetris", "0"), ("tetris tuned", best)]
    rows = []
    for provider, name in chosen:
        if name not in times:
            rows.append(replace(row, provider=provider, error=errors.get(name, math.nan), status="wrong"))
            continue
        t = times[name]
        note = "" if provider == BASELINE else configs[int(name)].to_key()
        rows.append(
            replace(
                row, provider=provider, median_us=t.median_us, p10_us=t.p10_us, p90_us=t.p90_us,
                roofline_fraction=least / t.median_us, speedup=dense_us / t.median_us,
                error=errors.get(name, math.nan), extra=extra | {"note": note},
            )
        )  # fmt: skip
    return rows


def least_bytes(case: Case, layout: BlockLayout) -> float:
    """The least traffic: input channels that any block row keeps, kept weights and output, each once."""
    layer, item = case.layer, getattr(torch, case.dtype).itemsize
    used = min(layer.c_in, int(layout.to_mask().any(0).sum()) * case.block[1])
    height, width = (size // (2 if case.pool else 1) for size in layer.out_size)
    taken = layer.height * layer.width if layer.kernel_size > 1 else math.prod(layer.out_size)
    activations = layer.batch * (taken * used + height * width * layer.c_out)
    return float(item) * (activations + layer.c_in * layer.c_out * layer.kernel_size**2 * layout.kept_fraction)
