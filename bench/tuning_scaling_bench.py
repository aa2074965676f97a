"""Tuning on several GPUs: seconds of one full search of some suites, with 1, 2, ... processes under torchrun.

Every run starts with an empty store and an empty cache of compiled kernels. A process gets the same number of
processors however many processes there are; compiling and measuring are timed apart. What the processes say is read
line by line, so that a run that is cut off leaves what it had finished.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
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
GRACE_SECONDS = 15.0
KERNELS = "TETRIS_BENCH_KERNELS"
"""Where the search's kernels go; what making the layers compiles is no part of it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--suite", nargs="+", choices=sorted(SUITES), default=["vgg16"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="GPUs to use, one run each")
    parser.add_argument("--budget", type=int, help="configurations to measure a layer; default: a full search")
    parser.add_argument("--run-seconds", type=float, default=300, help="a run that takes longer is ended")


def run(args: argparse.Namespace) -> list[Row]:
    """A row a run; the CSV grows as they come."""
    rows: list[Row] = []
    most, suites = max(args.processes), "+".join(args.suite)
    if torch.cuda.device_count() < most:
        rows.append(Row("tuning scaling", suites, f"{most} processes", status=f"{SKIPPED}: not so many GPUs"))
        write_csv(args.out / "tuning_scaling.csv", rows)
        return rows
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for processes in args.processes:
            row = summary(suites, processes, run_processes(processes, args, most, Path(folder)))
            rows.append(replace(row, speedup=(rows or [row])[0].median_us / row.median_us))
            write_csv(args.out / "tuning_scaling.csv", rows)
            print(show(rows[-1:]), flush=True)
    return rows


def show(rows: list[Row]) -> str:
    """Seconds and their parts."""
    parts = ["seconds", "compile_wall_seconds", "measure_wall_seconds", "compile_seconds", "problems", "processors"]
    return table(rows, extra=parts)


def run_processes(processes: int, args: argparse.Namespace, most: int, folder: Path) -> list[dict[str, Any]]:
    """What every process of one run said of itself: a dictionary for each that got as far as compiling."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "tetris.bench.tuning_scaling_bench", str(args.budget or 0), str(most), *args.suite]
    environment = os.environ | {
        "TETRIS_CACHE_DIR": str(folder / f"store {processes}"),
        KERNELS: str(folder / f"kernels {processes}"),
    }
    found: dict[int, dict[str, Any]] = {}
    for line in lines_of(command, environment, args.run_seconds):
        if line.startswith(RESULT):
            said = json.loads(line.removeprefix(RESULT))
            found.setdefault(said["rank"], {}).update(said)
        print(line, end="", flush=True)
    return [found[rank] for rank in sorted(found)]


def lines_of(command: list[str], environment: dict[str, str], seconds: float) -> Iterator[str]:
    """The lines that a command and its children print, as they come; all of them are ended after ``seconds``.

    It is asked to end, and killed :data:`GRACE_SECONDS` later: the processes of torchrun have sessions of their own and
    only torchrun can end them.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    alarms = [
        threading.Timer(seconds, os.killpg, (process.pid, signal.SIGTERM)),
        threading.Timer(seconds + GRACE_SECONDS, os.killpg, (process.pid, signal.SIGKILL)),
    ]
    for alarm in alarms:
        alarm.start()
    try:
        yield from process.stdout
        process.wait()
    finally:
        for alarm in alarms:
            alarm.cancel()
        if process.poll() is None:
            process.terminate()
            process.wait()


def summary(suites: str, processes: int, found: list[dict[str, Any]]) -> Row:
    """The slowest process's seconds; what compiling took on all processors together."""
    name = f"{processes} process{'es' if processes > 1 else ''}"
    extra: dict[str, Any] = {"processes": processes}
    for key in ("seconds", "compile_wall_seconds", "measure_wall_seconds"):
        extra |= {key: max(one[key] for one in found if key in one)} if any(key in one for one in found) else {}
    extra |= {key: sum(one.get(key, 0) for one in found) for key in ("compile_seconds", "workers", "processors")}
    ended = [one for one in found if "seconds" in one]
    if len(ended) < processes:
        status = f"{FAILED}: {len(ended)} of {processes} processes ended well"
        return Row("tuning scaling", suites, name, status=status, extra=extra)
    extra["problems"] = "+".join(str(one["problems"]) for one in found)
    where = device_name("cuda"), versions()
    return Row("tuning scaling", suites, name, 1e6 * extra["seconds"], device=where[0], versions=where[1], extra=extra)


def own_processors(share_of: int, index: int) -> int:
    """Keep this process and its workers to one of ``share_of`` equal shares of the processors; returns how many."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // share_of
    os.sched_setaffinity(0, cores[index * share : (index + 1) * share])
    return share


def main() -> None:
    """One process of a run: budget (0 = a full search), largest number of processes, suites."""
    budget, most, suites = int(sys.argv[1]) or None, int(sys.argv[2]), sys.argv[3:]
    gpu = torch.device(local_gpu())
    torch.cuda.set_device(gpu)
    processors = own_processors(most, gpu.index)
    cases = [case for suite in suites for case in SUITES[suite]]
    wanted = [case.wanted(str(gpu), torch.float16, budget=budget) for case in cases]
    outcomes: list[Outcome] = []
    torch.cuda.synchronize()
    os.environ["TRITON_CACHE_DIR"] = os.environ[KERNELS]
    team = Team.of_torchrun()
    team.announce(f"ready {team.rank}", "")
    team.wait_for(f"ready {rank}" for rank in range(team.world))
    started = time.monotonic()

    def say(**facts: float) -> None:
        print(RESULT + json.dumps({"rank": team.rank} | facts), flush=True)

    search = Search(wanted, device_info(gpu), team)
    search.compile()
    compiled_at = time.monotonic()
    say(compile_wall_seconds=compiled_at - started, workers=default_workers(), processors=processors)
    search.measure(TuningStore(), outcomes.append)
    ended = time.monotonic()
    say(
        seconds=ended - started,
        measure_wall_seconds=ended - compiled_at,
        compile_seconds=sum(outcome.compile_seconds for outcome in outcomes),
        problems=len(outcomes),
    )


if __name__ == "__main__":
    main()
