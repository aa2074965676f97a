"""Whole networks: the dense model, eager, graphed and compiled, against the pruned and converted one, in one run.

Speedups are over the *fastest* dense variant of the same batch. The planner chooses every layer's block first; its
measurements are the per-layer rows beside cuDNN's and cuBLAS's. Dense models keep dense random weights.
"""

from __future__ import annotations

import argparse
import copy
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import tetris
from tetris.autotune.ceilings import Ceilings, measure_ceilings
from tetris.autotune.compile_ahead import Job, distinct_kernels, start_workers
from tetris.autotune.device import device_info, device_name, versions
from tetris.autotune.measure import cudnn_search
from tetris.autotune.planner import plan
from tetris.autotune.problems import LayerInput, capture_inputs, pools, problem_at
from tetris.autotune.timer import Timing, graphed, time_us
from tetris.autotune.tuner import apply_tuned, sparse_layers, tune_model
from tetris.bench.networks import FULL, NETWORKS, QUICK, NetworkCase, trained_like
from tetris.bench.report import pivot, table
from tetris.bench.rows import FAILED, OK, WRONG, Row, write_csv
from tetris.plans import ModelPlan, block_label
from tetris.pruning import Block, fit_block
from tetris.specs import match, prunable_layers, resolve_sparsity
from tetris.tolerances import relative_error, tolerance

LIBRARY = {"conv2d": "cudnn", "linear": "cublas"}
CHECKED = 4
"""Samples whose outputs are compared with the masked model's in float32."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--model", nargs="+", choices=sorted(NETWORKS), help="default: the networks of the targets")
    parser.add_argument("--batch", nargs="+", type=int, help="default: the network's")
    parser.add_argument("--blocks", help="candidates of the planner, OUTxIN,...; default: the network's")
    parser.add_argument("--method", default="sort", help="reordering; see tetris.reorder")
    parser.add_argument("--tune", type=int, default=0, help="configurations to measure a layer before timing")
    parser.add_argument("--compile", choices=("none", "default", "max-autotune-no-cudagraphs"), default="default")
    parser.add_argument("--compile-converted", action="store_true", help="time the converted model compiled, too")
    parser.add_argument("--compile-seconds", type=float, default=60, help="for kernels to be compiled ahead")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--save-plan", action="store_true", help="write the plans beside the CSV")
    parser.add_argument("--plans", type=Path, help="folder of saved plans to use instead of measuring the layers again")


def parse_blocks(text: str) -> tuple[Block, ...]:
    """ "64x32,64" -> ((64, 32), 64)."""
    parts = [tuple(int(size) for size in part.split("x")) for part in text.split(",")]
    return tuple(part[0] if len(part) == 1 else (part[0], part[1]) for part in parts)


def run(args: argparse.Namespace) -> list[Row]:
    """Every network at every batch: a row a provider, then a row a layer and candidate. The CSV grows as they come.

    On a GPU kernels are compiled in processes of their own while the dense models are compiled here.
    """
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    ceilings = measure_ceilings(args.device, dtype)
    sessions = []
    for name in args.model or (QUICK if args.quick or args.device == "cpu" else FULL):
        case = NETWORKS[name]
        dense = Dense.of(case, args.device, dtype, args.compile if args.device == "cuda" else "none")
        sessions += [Session(case, dense, batch, dtype, ceilings, args) for batch in args.batch or case.batches]
    if args.device == "cuda":
        jobs = distinct_kernels((job for session in sessions for job in session.jobs()), device_info(args.device))
        print(f"compiling {len(jobs)} kernels ahead", flush=True)
        workers = start_workers(jobs, args.device)
        for session in sessions:
            if session.case is sessions[0].case:
                session.compile_dense()
        print(*workers.wait(args.compile_seconds), sep="\n", flush=True)
    rows: list[Row] = []
    for session in sessions:
        try:
            rows += session.rows()
        except (RuntimeError, TypeError, ValueError, AssertionError) as problem:  # the other networks still count
            traceback.print_exc()
            reason = f"{FAILED}: {type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
            rows.append(Row("network", session.name, "tetris", status=reason))
        write_csv(args.out / "network.csv", rows)
    return rows


def show(rows: list[Row]) -> str:
    """The layers' speedups per block, then all networks together."""
    layers = [row for row in rows if row.extra.get("layer")]
    whole = [row for row in rows if not row.extra.get("layer")]
    return f"{pivot(layers)}\n\n{table(whole, extra=['batch', 'floor'])}"


@dataclass(frozen=True)
class Dense:
    """A network in the forms that are needed of it.

    Attributes:
        model: as it is.
        folded: with batch norms folded into convolutions, as a user would run it.
        compiled: ``folded`` compiled, or None.
        epilogues: activation and whether a max-pool follows, of every layer that pruning replaces.
    """

    model: nn.Module
    folded: nn.Module
    compiled: Callable[..., object] | None
    epilogues: dict[str, tuple[str, bool]]

    @staticmethod
    @torch.no_grad()
    def of(case: NetworkCase, device: str, dtype: torch.dtype, mode: str) -> Dense:
        """``mode``: torch.compile's, or "none"."""
        model = trained_like(case, device, dtype)
        folded = with_folded_norms(model)
        compiled = None if mode == "none" else torch.compile(folded, mode=mode, dynamic=False)
        pruned = tetris.prune(model, case.sparsity, block=32, method="none")
        layers = sparse_layers(tetris.convert(pruned, example_inputs=case.inputs(1, device, dtype)))
        return Dense(
            model, folded, compiled, {name: (layer.activation, pools(layer)) for name, layer in layers.items()}
        )


@dataclass
class Session:
    """One network at one batch."""

    case: NetworkCase
    dense: Dense
    batch: int
    dtype: torch.dtype
    ceilings: Ceilings
    args: argparse.Namespace

    def __post_init__(self) -> None:
        self.device: str = self.args.device
        self.x = self.case.inputs(self.batch, self.device, self.dtype)
        self.name = f"{self.case.name} b{self.batch}"
        self.where = device_name(self.device), versions()
        self.model = self.dense.model

    @torch.no_grad()
    def compile_dense(self) -> None:
        """Let torch.compile meet this batch."""
        if self.dense.compiled is not None:
            self.dense.compiled(self.x)

    @torch.no_grad()
    def jobs(self) -> list[Job]:
        """The kernels that planning and the converted network will want, as far as shapes tell."""
        layers = prunable_layers(self.model)
        rates = resolve_sparsity(self.case.sparsity, layers)
        found = []
        blocks = match(self.blocks(), list(layers), "blocks")
        for name, x in capture_inputs(self.model, self.x, layers).items():
            for block in blocks.get(name, ()) if name in rates else ():
                fitted = fit_block(block, (layers[name].weight.shape[0], layers[name].weight.shape[1]))
                problem = problem_at(layers[name], x, fitted, rates[name])
                found += [
                    Job(problem, bias=layers[name].bias is not None),
                    Job(problem, "", *self.dense.epilogues[name]),
                ]
        return found

    def blocks(self) -> dict[str, tuple[Block, ...]]:
        """The planner's candidates by layer."""
        return self.case.blocks if self.args.blocks is None else {"*": parse_blocks(self.args.blocks)}

    @torch.no_grad()
    def rows(self) -> list[Row]:
        """Plan, prune, convert, check, time."""
        chosen = self.plan()
        print(f"\n{self.name}\n{chosen}", flush=True)
        layers = self.layer_rows(chosen)
        if not chosen.blocks:
            return [*layers, Row("network", self.name, "tetris", status="skipped: the plan keeps every layer dense")]
        pruned = tetris.prune(self.model, plan=chosen, method=self.args.method, example_inputs=self.x)
        fast = tetris.convert(pruned, example_inputs=self.x, plan=chosen)
        print(fast.conversion, flush=True)
        if self.device == "cuda":
            if self.args.tune:
                print(tune_model(fast, self.x, budget=self.args.tune), flush=True)
            else:
                apply_tuned(fast, self.x)
        error = self.error_of(pruned, fast)
        whole = self.network_rows(fast, chosen, error)
        print(table(whole), flush=True)
        return [*layers, *whole]

    def plan(self) -> ModelPlan:
        """The saved plan of this network and batch, or a new one."""
        file = f"{self.case.name}_b{self.batch}.json"
        if self.args.plans is not None:
            return ModelPlan.load(self.args.plans / file)
        args = self.args
        made = plan(self.model, self.x, self.case.sparsity, self.blocks(), args.method, repeats=args.repeats)
        if self.args.save_plan:
            made.save(self.args.out / "plans" / file)
        return made

    def error_of(self, pruned: nn.Module, fast: nn.Module) -> float:
        """Relative error of the converted model against the masked one computed in float32."""
        exact = tetris.bake_masks(copy.deepcopy(pruned).eval()).float()
        before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        try:
            return relative_error(fast(self.x)[:CHECKED], exact(self.x[:CHECKED].float()))
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before

    def providers(self, fast: nn.Module) -> dict[str, Callable[[], object]]:
        """The ways a user would run the dense and the converted model."""
        found: dict[str, Callable[[], object]] = {}
        for label, model in (("dense", self.dense.folded), ("tetris", fast)):
            found[f"{label} eager"] = partial(model, self.x)
            if self.device == "cuda":
                found[f"{label} graph"] = found[f"{label} eager"]
        if self.dense.compiled is not None:
            found["dense compile+graph"] = partial(self.dense.compiled, self.x)
            if self.args.compile_converted:
                compiled = torch.compile(fast, mode=self.args.compile, dynamic=False)
                found["tetris compile+graph"] = partial(compiled, self.x)
        return found

    def network_rows(self, fast: nn.Module, chosen: ModelPlan, error: float) -> list[Row]:
        """All variants, interleaved."""
        runs: dict[str, Callable[[], object]] = {}
        failures: dict[str, str] = {}
        with cudnn_search():
            for provider, call in self.providers(fast).items():
                try:
                    call()
                    runs[provider] = graphed(call) if provider.endswith("graph") else call
                except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as problem:
                    failures[provider] = f"{FAILED}: {str(problem).splitlines()[0]}"
            times = time_us(runs, device=self.device, repeats=self.args.repeats, queue_ahead=False, budget_s=10.0)
        dense_us = min(time.median_us for provider, time in times.items() if provider.startswith("dense"))
        limit = tolerance(self.dtype) * math.sqrt(len(chosen))
        rows = [Row("network", self.name, provider, status=status) for provider, status in failures.items()]
        for provider, time in times.items():
            sparse = provider.startswith("tetris")
            flop, size_bytes, least_us = self.roofline(chosen if sparse else None)
            row = Row("network", self.name, provider, flop=flop, bytes=size_bytes)
            if sparse and not error <= limit:
                rows.append(replace(row, error=error, status=WRONG))
                continue
            row = _timed(row, time, dense_us / time.median_us)
            rows.append(replace(row, roofline_fraction=least_us / time.median_us, error=error if sparse else math.nan))
        floor = self.case.floors.get(self.batch, "")
        device, software = self.where
        extra = {"batch": self.batch, "floor": floor}
        return [replace(row, extra=extra, device=device, versions=software) for row in rows]

    def layer_rows(self, chosen: ModelPlan) -> list[Row]:
        """What the planner measured, beside the library's dense layer."""
        rows = []
        rates = resolve_sparsity(self.case.sparsity, prunable_layers(self.model))
        for layer in chosen:
            for candidate in layer.candidates:
                if candidate.block is not None and candidate.sparsity != rates[layer.name]:
                    continue
                library = LIBRARY[layer.kind] if self.device == "cuda" else "dense"
                provider = library if candidate.block is None else block_label(candidate.block)
                time = Timing(candidate.time_us, candidate.p10_us, candidate.p90_us, self.args.repeats)
                assert layer.dense is not None
                extra = {
                    "layer": layer.name,
                    "batch": self.batch,
                    "kept": candidate.kept_fraction,
                    "retained": candidate.retained,
                    "chosen": candidate.block == layer.block,
                    "config": candidate.config,
                }
                row = Row("network", f"{self.name} {layer.name}", provider, extra=extra)
                row = replace(row, device=self.where[0], versions=self.where[1])
                rows.append(_timed(row, time, layer.dense.time_us / candidate.time_us))
        return rows

    def roofline(self, chosen: ModelPlan | None) -> tuple[float, float, float]:
        """(FLOP, bytes, least microseconds) of all convolutions and linear layers, each at its own limit."""
        layers = prunable_layers(self.model)
        total_flop = total_bytes = total_us = 0.0
        for name, x in capture_inputs(self.model, self.x, layers).items():
            kept = chosen[name].kept_fraction if chosen is not None else 1.0
            flop, size_bytes = dense_work(layers[name], x, kept)
            total_flop, total_bytes = total_flop + flop, total_bytes + size_bytes
            total_us += self.ceilings.least_us(flop, size_bytes)
        return total_flop, total_bytes, total_us


def with_folded_norms(model: nn.Module) -> nn.Module:
    """The model with batch norms folded into convolutions, as the converted one has them: a fair baseline."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    from torch.fx.experimental.optimization import fuse

    folded = fuse(model)
    for parameter in folded.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return folded


def dense_work(layer: nn.Conv2d | nn.Linear, x: LayerInput, kept: float = 1.0) -> tuple[float, float]:
    """(FLOP, least bytes) of a layer of which ``kept`` of the weights remain."""
    item = x.dtype.itemsize
    weights = layer.weight.numel() * kept
    if isinstance(layer, nn.Linear):
        positions_in = positions_out = math.prod(x.shape[:-1])
    else:
        with torch.device("meta"):
            out = torch.nn.functional.conv2d(
                torch.empty(x.shape), torch.empty(layer.weight.shape), None, layer.stride, layer.padding, layer.dilation
            )
        positions_in, positions_out = x.shape[0] * x.shape[2] * x.shape[3], out.shape[0] * out.shape[2] * out.shape[3]
    c_out, c_in = layer.weight.shape[:2]
    return 2.0 * positions_out * weights, item * (positions_in * c_in + positions_out * c_out + weights)


def _timed(row: Row, time: Timing, speedup: float) -> Row:
    return replace(row, median_us=time.median_us, p10_us=time.p10_us, p90_us=time.p90_us, speedup=speedup, status=OK)
