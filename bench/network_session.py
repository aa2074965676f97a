"""One network at one batch: plan it, prune it, convert it, check it, time it beside the dense one."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

import tetris
from tetris.autotune.ceilings import Ceilings
from tetris.autotune.compile_job import Job
from tetris.autotune.device import device_name, versions
from tetris.autotune.measure import Epilogue, cudnn_search
from tetris.autotune.never_slower import never_slower
from tetris.autotune.planner import fused_epilogues, plan
from tetris.autotune.problems import capture_inputs, problem_at
from tetris.autotune.timer import Timing, graphed, time_us
from tetris.autotune.tuner import apply_tuned, tune_model
from tetris.autotune.unpruned import FULL_BLOCKS, may_gain
from tetris.autotune.whole_network import dense_baseline
from tetris.bench.kernel_profile import KernelProfile, profile_kernels
from tetris.bench.network_work import dense_work
from tetris.bench.networks import NetworkCase, trained_like
from tetris.bench.rows import FAILED, OK, WRONG, Row
from tetris.plans import EndToEnd, ModelPlan, block_label
from tetris.pruning import Block, fit_block
from tetris.specs import match, prunable_layers, resolve_sparsity, worth_pruning
from tetris.tolerances import relative_error, tolerance

LIBRARY = {"conv2d": "cudnn", "linear": "cublas"}
CHECKED = 4
"""Samples whose outputs are compared with the masked model's in float32."""
COMPILED = "compile+graph"

Note = Callable[[str], None]


@dataclass(frozen=True)
class Dense:
    """A network in the forms that are needed of it.

    Attributes:
        model: as it is.
        folded: with batch norms folded into convolutions, as a user would run it.
        compiled: ``folded`` compiled, or None.
        epilogues: what conversion fuses behind every layer that may run on a block kernel.
    """

    model: nn.Module
    folded: nn.Module
    compiled: Callable[..., object] | None
    epilogues: dict[str, Epilogue]

    @staticmethod
    @torch.no_grad()
    def of(case: NetworkCase, device: str, dtype: torch.dtype, mode: str) -> Dense:
        """``mode``: torch.compile's, or "none"."""
        model, x = trained_like(case, device, dtype), case.inputs(1, device, dtype)
        folded = dense_baseline(model, x)
        compiled = None if mode == "none" else torch.compile(folded, mode=mode, dynamic=False)
        layers = prunable_layers(model)
        rates = resolve_sparsity(case.sparsity, layers)
        planned = [n for n, layer in layers.items() if n in rates or worth_pruning(layer.weight.shape)]
        return Dense(model, folded, compiled, fused_epilogues(model, x, planned))


@dataclass
class Session:
    """One network at one batch; :meth:`measure` fills ``rows`` as it goes."""

    case: NetworkCase
    dense: Dense
    batch: int
    dtype: torch.dtype
    ceilings: Ceilings
    args: argparse.Namespace
    note: Note = print
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device: str = self.args.device
        self.x = self.case.inputs(self.batch, self.device, self.dtype)
        self.name = f"{self.case.name} b{self.batch}"
        self.where = {"device": device_name(self.device), "versions": versions()}
        self.model = self.dense.model

    # -- before -------------------------------------------------------------------------------------------------------
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
            epilogue = self.dense.epilogues.get(name)
            full = FULL_BLOCKS if may_gain(x.device, epilogue) else ()
            for block in blocks.get(name, ()) if name in rates else full:
                fitted = fit_block(block, (layers[name].weight.shape[0], layers[name].weight.shape[1]))
                problem = problem_at(layers[name], x, fitted, rates.get(name, 0.0))
                found.append((epilogue or Epilogue()).job(problem))
        return found

    def blocks(self) -> dict[str, tuple[Block, ...]]:
        """The planner's candidates by layer."""
        return self.case.blocks if self.args.blocks is None else {"*": parse_blocks(self.args.blocks)}

    # -- measuring ----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def measure(self) -> None:
        """Plan layer by layer, then run the network, and give up layers while it is slower as a whole."""
        chosen = self.plan()
        self.rows = layers = self.layer_rows(chosen)
        measured = {}
        self.note(f"{self.name}: planned")
        print(chosen, flush=True)

        def end_to_end(plan: ModelPlan) -> EndToEnd:
            whole = self.network_rows(*self.convert(plan), plan)
            self.rows = measured[plan.layers] = [*layers, *whole]
            self.note(f"{self.name}: timed")
            return self.fastest(whole)

        final = never_slower(chosen, end_to_end)
        self.rows = list(measured.get(final.layers, self.rows))
        if not final.blocks:
            why = str(final.end_to_end.note if final.end_to_end else "the plan keeps every layer dense")
            self.rows.append(self.row("tetris as planned", status=f"skipped: {why}", extra=self.columns()))
        if self.args.save_plan:
            final.save(self.args.out / "plans" / f"{self.case.name}_b{self.batch}.json")

    def plan(self) -> ModelPlan:
        """The saved plan of this network and batch, or a new one."""
        args = self.args
        if args.plans is not None:
            return ModelPlan.load(args.plans / f"{self.case.name}_b{self.batch}.json")
        return plan(
            self.model, self.x, self.case.sparsity, self.blocks(), args.method, repeats=args.repeats, whole=None,
            seconds_per_layer=args.seconds_per_layer, epilogues=self.dense.epilogues,
        )  # fmt: skip

    def convert(self, chosen: ModelPlan) -> tuple[nn.Module, float]:
        """The network pruned and converted by a plan, its kernels tuned as far as asked, and its relative error."""
        pruned = tetris.prune(self.model, plan=chosen, method=self.args.method, example_inputs=self.x)
        fast = tetris.convert(pruned, example_inputs=self.x, plan=chosen)
        print(fast.conversion, flush=True)
        if self.device == "cuda":
            if self.args.tune:
                print(tune_model(fast, self.x, budget=self.args.tune), flush=True)
            else:
                apply_tuned(fast, self.x)
        error = self.error_of(pruned, fast)
        self.note(f"{self.name}: converted, relative error {error:.1e}")
        return fast, error

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
            compiled = torch.compile(fast, mode=self.args.compile, dynamic=False)
            found |= {
                f"dense {COMPILED}": partial(self.dense.compiled, self.x),
                f"tetris {COMPILED}": partial(compiled, self.x),
            }
        return found

    def network_rows(self, fast: nn.Module, error: float, chosen: ModelPlan) -> list[Row]:
        """All variants, interleaved. A converted network whose result is wrong gets no time."""
        runs: dict[str, Callable[[], object]] = {}
        rows = []
        with cudnn_search():
            for provider, call in self.providers(fast).items():
                try:
                    call()
                    runs[provider] = graphed(call) if provider.endswith("graph") else call
                except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as problem:
                    rows.append(self.row(provider, status=f"{FAILED}: {str(problem).splitlines()[0]}"))
                self.note(f"{self.name}: {provider} ready")
            times = time_us(runs, device=self.device, repeats=self.args.repeats, queue_ahead=False, budget_s=10.0)
        dense_us = min(time.median_us for provider, time in times.items() if provider.startswith("dense"))
        limit = tolerance(self.dtype) * math.sqrt(len(chosen))
        for provider, time in times.items():
            sparse = provider.startswith("tetris")
            flop, size_bytes, least_us = self.roofline(chosen if sparse else None)
            row = self.row(provider, flop=flop, bytes=size_bytes, error=error if sparse else math.nan)
            if sparse and not error <= limit:
                rows.append(replace(row, status=WRONG))
                continue
            rows.append(
                replace(_timed(row, time, dense_us / time.median_us), roofline_fraction=least_us / time.median_us)
            )
        shares = self.permutation_shares(runs) if self.args.profile else {}
        columns = self.columns() | {"dense_us": dense_us}
        return [replace(row, extra=columns | shares.get(row.provider, {})) for row in rows]

    def permutation_shares(self, runs: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
        """Where the time goes: the kernels of every graphed variant are printed, permutation's share is a column."""
        shares = {}
        for provider in (p for p in runs if p.endswith("graph") or self.device != "cuda"):
            found: KernelProfile = profile_kernels(runs[provider], self.device)
            print(f"{self.name} {provider}\n{found}", flush=True)
            shares[provider] = {"permutation_share": found.share("permutation")}
        return shares

    def fastest(self, rows: list[Row]) -> EndToEnd:
        """The fastest dense and the fastest converted variant; RuntimeError where none is right."""
        sides = ("dense", "tetris")
        right = {side: [r.median_us for r in rows if r.status == OK and r.provider.startswith(side)] for side in sides}
        if not all(right.values()):
            raise RuntimeError(f"no right variant of {', '.join(side for side in sides if not right[side])}")
        best = {side: min(times) for side, times in right.items()}
        return EndToEnd("eager" if self.dense.compiled is None else "compile", best["dense"], best["tetris"])

    # -- rows ---------------------------------------------------------------------------------------------------------
    def columns(self) -> dict[str, object]:
        """Further columns of a row about the whole network."""
        return {"batch": self.batch, "floor": self.case.floors.get(self.batch, "")}

    def row(self, provider: str, layer: str = "", **values: object) -> Row:
        """A row of this network, or of one layer of it."""
        return replace(Row("network", f"{self.name} {layer}".rstrip(), provider, **self.where), **values)  # type: ignore[arg-type]

    def layer_rows(self, chosen: ModelPlan) -> list[Row]:
        """What the planner measured, beside the library's dense layer."""
        rows = []
        rates = resolve_sparsity(self.case.sparsity, prunable_layers(self.model))
        for layer in chosen:
            for candidate in layer.candidates:
                if candidate.block is not None and candidate.sparsity != rates.get(layer.name, 0.0):
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
                row = self.row(provider, layer.name, extra=extra)
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


def parse_blocks(text: str) -> tuple[Block, ...]:
    """ "64x32,64" -> ((64, 32), 64)."""
    parts = [tuple(int(size) for size in part.split("x")) for part in text.split(",")]
    return tuple(part[0] if len(part) == 1 else (part[0], part[1]) for part in parts)


def _timed(row: Row, time: Timing, speedup: float) -> Row:
    return replace(row, median_us=time.median_us, p10_us=time.p10_us, p90_us=time.p90_us, speedup=speedup, status=OK)
