"""Whole networks: the dense model, eager, graphed and compiled, against the pruned and converted one, in one run.

Speedups are over the *fastest* dense variant of the same batch. The planner chooses every layer's block first; its
measurements are the per-layer rows beside cuDNN's and cuBLAS's. Dense models keep dense random weights.
``--model vgg16 --batch 32`` runs one step of many and keeps the others' rows in the CSV.
"""

from __future__ import annotations

import argparse
import time
import traceback
from pathlib import Path

import torch

from tetris.autotune.ceilings import measure_ceilings
from tetris.autotune.compile_ahead import start_workers
from tetris.autotune.compile_job import distinct_kernels
from tetris.autotune.device import device_info
from tetris.bench import compile_dense
from tetris.bench.network_session import Dense, Note, Session
from tetris.bench.networks import FULL, NETWORKS, QUICK
from tetris.bench.report import pivot, table
from tetris.bench.rows import FAILED, Row, read_csv, write_csv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--model", nargs="+", choices=sorted(NETWORKS), help="default: the networks of the targets")
    parser.add_argument("--batch", nargs="+", type=int, help="default: the network's")
    parser.add_argument("--blocks", help="candidates of the planner, OUTxIN,...; default: the network's")
    parser.add_argument("--method", default="sort", help="reordering; see tetris.reorder")
    parser.add_argument("--tune", type=int, default=0, help="configurations to measure a layer before timing")
    parser.add_argument("--compile", choices=("none", "default", "max-autotune-no-cudagraphs"), default="default")
    parser.add_argument("--compile-seconds", type=float, default=90, help="for what is compiled ahead; 0 = nothing is")
    parser.add_argument("--compile-only", action="store_true", help="fill the compilers' caches and measure nothing")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds-per-layer", type=float, default=0.5, help="planning; fewer repeats after that")
    parser.add_argument("--profile", action="store_true", help="list the kernels of every variant by time")
    parser.add_argument("--save-plan", action="store_true", help="write the plans beside the CSV")
    parser.add_argument("--plans", type=Path, help="folder of saved plans to use instead of measuring the layers again")


def run(args: argparse.Namespace) -> list[Row]:
    """Every network at every batch: a row a layer and candidate, then a row a provider. The CSV grows as they come.

    On a GPU everything that shapes foretell is compiled ahead, in processes of its own.
    """
    note = stopwatch()
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    ceilings = measure_ceilings(args.device, dtype)
    sessions = []
    for name in args.model or (QUICK if args.quick or args.device == "cpu" else FULL):
        case = NETWORKS[name]
        dense = Dense.of(case, args.device, dtype, args.compile if args.device == "cuda" else "none")
        sessions += [Session(case, dense, batch, dtype, ceilings, args, note) for batch in args.batch or case.batches]
        note(f"{name}: built")
    file = args.out / "network.csv"
    rows = others(file, {session.name for session in sessions})
    if args.device == "cuda":
        compile_ahead(sessions, args, note)
    for session in () if args.compile_only else sessions:
        try:
            session.measure()
        except (RuntimeError, TypeError, ValueError, AssertionError) as problem:  # the other networks still count
            traceback.print_exc()
            reason = f"{FAILED}: {type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
            session.rows.append(session.row("tetris", status=reason))
        rows += session.rows
        write_csv(file, rows)
        print(table([row for row in session.rows if not row.extra.get("layer")], extra=["batch", "floor"]), flush=True)
    return rows


def stopwatch() -> Note:
    """Prints what it is told behind the seconds since it was made."""
    start = time.monotonic()
    return lambda text: print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)


def others(file: Path, names: set[str]) -> list[Row]:
    """The rows of an earlier run that are about none of these networks and batches."""
    if not file.is_file():
        return []
    return [row for row in read_csv(file) if " ".join(row.case.split()[:2]) not in names]


def compile_ahead(sessions: list[Session], args: argparse.Namespace, note: Note) -> None:
    """Kernels and dense models, side by side; then let this process meet what lies in the caches."""
    if args.compile_seconds:
        end = time.monotonic() + args.compile_seconds
        dense = [
            compile_dense.start(session.case.name, session.batch, args.device, session.dtype, args.compile)
            for session in sessions
            if args.compile != "none" and len(sessions) > 1
        ]
        jobs = distinct_kernels((job for session in sessions for job in session.jobs()), device_info(args.device))
        note(f"compiling {len(jobs)} kernels and {len(dense)} dense networks")
        failures = start_workers(jobs, args.device).wait(args.compile_seconds)
        failures += [compile_dense.wait(process, end - time.monotonic()) for process in dense]
        print(*filter(None, failures), sep="\n", flush=True)
    for session in sessions:
        session.compile_dense()
        note(f"{session.name}: dense compiled")


def show(rows: list[Row]) -> str:
    """The layers' speedups per block, then all networks together."""
    layers = [row for row in rows if row.extra.get("layer")]
    whole = [row for row in rows if not row.extra.get("layer")]
    return f"{pivot(layers)}\n\n{table(whole, extra=['batch', 'floor'])}"
