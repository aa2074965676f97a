"""Tuning on several GPUs: seconds of one full search of a suite, with 1, 2, ... processes under torchrun.

Every run starts with an empty store and an empty cache of compiled kernels. A process gets the same number of
processors however many processes there are; compiling and measuring are timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tetris.autotune.compile_ahead import default_workers
from tetris.autotune.device import device_info, device_name, versions
from tetris.autotune.store import TuningStore
from tetris.autotune.team import Team, local_gpu
from tetris.autotune.tune_problems import Outcome, Search
from tetris.bench.report import table
from tetris.bench.rows import FAILED, SKIPPED, Row, write_csv
from tetris.bench.tuning_cases import SUITES

RESULT = "result "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--suite", choices=sorted(SUITES), default="vgg16")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="GPUs to use, one run each")
    parser.add_argument("--budget", type=int, help="configurations to measure a layer; default: a full search")


def run(args: argparse.Namespace) -> list[Row]:
    """A row a run; the CSV grows as they come."""
    rows: list[Row] = []
    most = max(args.processes)
    if torch.cuda.device_count() < most:
        rows.append(Row("tuning scaling", args.suite, f"{most} processes", status=f"{SKIPPED}: not so many GPUs"))
        write_csv(args.out / "tuning_scaling.csv", rows)
        return rows
    with tempfile.TemporaryDirectory() as folder:
        for processes in args.processes:
            row = summary(args.suite, processes, run_processes(processes, args, most, Path(folder)))
            rows.append(replace(row, speedup=(rows or [row])[0].median_us / row.median_us))
            write_csv(args.out / "tuning_scaling.csv", rows)
            print(show(rows[-1:]), flush=True)
    return rows


def show(rows: list[Row]) -> str:
    """Seconds and their parts."""
    parts = ["seconds", "compile_wall_seconds", "measure_wall_seconds", "compile_seconds", "problems"]
    return table(rows, extra=parts)


def run_processes(processes: int, args: argparse.Namespace, most: int, folder: Path) -> list[dict[str, Any]]:
    """What every process of one run printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "tetris.bench.tuning_scaling_bench", args.suite, str(args.budget or 0), str(most)]
    environment = os.environ | {
        "TETRIS_CACHE_DIR": str(folder / f"store {processes}"),
        "TRITON_CACHE_DIR": str(folder / f"kernels {processes}"),
    }
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False).stdout
    return [json.loads(line.removeprefix(RESULT)) for line in text.splitlines() if line.startswith(RESULT)]


def summary(suite: str, processes: int, found: list[dict[str, Any]]) -> Row:
    """The slowest process's seconds; what compiling took on all processors together."""
    name = f"{processes} process{'es' if processes > 1 else ''}"
    if len(found) < processes:
        return Row("tuning scaling", suite, name, status=f"{FAILED}: {len(found)} of {processes} processes ended well")
    extra: dict[str, Any] = {"processes": processes}
    extra |= {
        key: max(one[key] for one in found) for key in ("seconds", "compile_wall_seconds", "measure_wall_seconds")
    }
    extra |= {key: sum(one[key] for one in found) for key in ("compile_seconds", "workers")}
    extra["problems"] = "+".join(str(one["problems"]) for one in found)
    where = device_name("cuda"), versions()
    return Row("tuning scaling", suite, name, 1e6 * extra["seconds"], device=where[0], versions=where[1], extra=extra)


def main() -> None:
    """One process of a run: suite, budget (0 = a full search), largest number of processes."""
    suite, budget, most = sys.argv[1], int(sys.argv[2]) or None, int(sys.argv[3])
    gpu = torch.device(local_gpu())
    torch.cuda.set_device(gpu)
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // most
    os.sched_setaffinity(0, cores[gpu.index * share : (gpu.index + 1) * share])
    wanted = [case.wanted(str(gpu), torch.float16, budget=budget) for case in SUITES[suite]]
    outcomes: list[Outcome] = []
    torch.cuda.synchronize()
    team = Team.of_torchrun()
    team.announce(f"ready {team.rank}", "")
    team.wait_for(f"ready {rank}" for rank in range(team.world))
    started = time.monotonic()
    search = Search(wanted, device_info(gpu), team)
    search.compile()
    compiled_at = time.monotonic()
    search.measure(TuningStore(), outcomes.append)
    ended = time.monotonic()
    result: dict[str, Any] = {"seconds": ended - started, "compile_wall_seconds": compiled_at - started}
    result |= {"measure_wall_seconds": ended - compiled_at, "workers": default_workers()}
    result["compile_seconds"] = sum(outcome.compile_seconds for outcome in outcomes)
    print(RESULT + json.dumps(result | {"problems": len(outcomes)}), flush=True)


if __name__ == "__main__":
    main()
