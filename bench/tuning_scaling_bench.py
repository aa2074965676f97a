"""Tuning on several GPUs: seconds of full searches, of one suite or several, with 1, 2, ... processes under torchrun.

Every run starts with an empty store and an empty cache of compiled kernels. A process gets the same number of
processors however many processes there are; compiling and measuring are timed apart. As in ``tetris tune``
workers start while the layers are made; a search's seconds begin when these are there, the command's when it is
entered. What the processes say is read line by line, so that a run that is cut off leaves what it had finished.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
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
from tetris.autotune.compile_server import CompileServer
from tetris.autotune.device import device_info, device_name, versions
from tetris.autotune.steps import Steps
from tetris.autotune.store import TuningStore
from tetris.autotune.team import Team, local_gpu
from tetris.autotune.tune_problems import Outcome, Search
from tetris.bench.report import table
from tetris.bench.rows import FAILED, SKIPPED, Row, write_csv
from tetris.bench.tuning_cases import SUITES
from tetris.bench.tuning_rows import job_rows

RESULT = "result "
GRACE_SECONDS = 15.0
LOG = "TETRIS_BENCH_LOG"
"""Where the first process writes what every worker of the team did when."""
WALL = ("seconds", "compile_wall_seconds", "measure_wall_seconds")
PARTS = ("space", "ready", "start", "wait", "close", "input", "prepare", "race", "final")
"""What a process's search goes into, in seconds: the configuration spaces; until its last worker was ready (negative
where that was before); until this process was, and from then until all was compiled; until the workers had left; and
the measurement's own steps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument(
        "--suite",
        nargs="+",
        type=suites_of,
        default=[["vgg16"]],
        help="searches, each of one suite or of A+B+C",
    )
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="GPUs to use, one run each")
    parser.add_argument("--budget", type=int, help="configurations to measure a layer; default: a full search")
    parser.add_argument("--run-seconds", type=float, default=300, help="a run that takes longer is ended")
    parser.add_argument("--log", action="store_true", help="write what every worker did when, a CSV a run")


def suites_of(text: str) -> list[str]:
    """ "vgg16+resnet50" -> their names."""
    names = text.split("+")
    if unknown := set(names) - set(SUITES):
        raise argparse.ArgumentTypeError(f"wanted some of {', '.join(sorted(SUITES))}; got {', '.join(unknown)}")
    return names


def run(args: argparse.Namespace) -> list[Row]:
    """A row a run; the CSV grows as they come."""
    rows: list[Row] = []
    most = max(args.processes)
    for suites in args.suite:
        name = "+".join(suites)
        if torch.cuda.device_count() < most:
            rows.append(Row("tuning scaling", name, f"{most} processes", status=f"{SKIPPED}: not so many GPUs"))
            write_csv(args.out / "tuning_scaling.csv", rows)
            continue
        for processes in args.processes:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                entered = time.monotonic()
                found = run_processes(processes, suites, args, most, Path(folder))
                row = summary(name, processes, found, time.monotonic() - entered)
            rows = with_speedups([*rows, row])
            write_csv(args.out / "tuning_scaling.csv", rows)
            print(show(rows[-1:]), flush=True)
    return rows


def with_speedups(rows: list[Row]) -> list[Row]:
    """Every search against that with one process, as soon as that has ended."""
    alone = {row.case: row.median_us for row in rows if row.extra.get("processes") == 1}
    return [replace(row, speedup=alone.get(row.case, math.nan) / row.median_us) for row in rows]


def show(rows: list[Row]) -> str:
    """Seconds and their parts."""
    return table(rows, extra=[*WALL, "command_seconds", "compile_seconds", "problems", "processors"])


def run_processes(
    processes: int, suites: list[str], args: argparse.Namespace, most: int, folder: Path
) -> list[dict[str, Any]]:
    """What every process of one run said of itself: a dictionary for each that got as far as compiling."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "tetris.bench.tuning_scaling_bench", str(args.budget or 0), str(most), *suites]
    environment = os.environ | {"TETRIS_CACHE_DIR": str(folder / "store"), "TRITON_CACHE_DIR": str(folder / "kernels")}
    if args.log:
        environment[LOG] = str(args.out / f"tuning_scaling_jobs_{'_'.join(suites)}_{processes}.csv")
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


def summary(name: str, processes: int, found: list[dict[str, Any]], command_seconds: float) -> Row:
    """The slowest process's seconds, and those of every step; what compiling took on all processors together."""
    provider = f"{processes} process{'es' if processes > 1 else ''}"
    extra: dict[str, Any] = {"processes": processes}
    for key in (*WALL, *(f"{part}_seconds" for part in PARTS)):
        extra |= {key: max(one[key] for one in found if key in one)} if any(key in one for one in found) else {}
    extra |= {key: sum(one.get(key, 0) for one in found) for key in ("compile_seconds", "workers", "processors")}
    extra["command_seconds"] = command_seconds
    ended = [one for one in found if "seconds" in one]
    if len(ended) < processes:
        status = f"{FAILED}: {len(ended)} of {processes} processes ended well"
        return Row("tuning scaling", name, provider, status=status, extra=extra)
    extra["problems"] = "+".join(str(one["problems"]) for one in found)
    where = device_name("cuda"), versions()
    return Row(
        "tuning scaling", name, provider, 1e6 * extra["seconds"], device=where[0], versions=where[1], extra=extra
    )


def own_processors(share_of: int, index: int) -> int:
    """Keep this process and its workers to one of ``share_of`` equal shares of the processors; returns how many.

    Processors that are threads of one core go to one share: otherwise one process would have whole cores, two halves.
    """
    threads = sorted(os.sched_getaffinity(0), key=lambda thread: (first_sibling(thread), thread))
    share = len(threads) // share_of
    os.sched_setaffinity(0, threads[index * share : (index + 1) * share])
    return share


def first_sibling(thread: int) -> int:
    """The first thread of a thread's core; where the system does not tell, every thread is a core."""
    path = Path(f"/sys/devices/system/cpu/cpu{thread}/topology/thread_siblings_list")
    return int(re.split("[,-]", path.read_text())[0]) if path.exists() else thread


def main() -> None:
    """One process of a run: budget (0 = a full search), largest number of processes, suites."""
    budget, most, suites = int(sys.argv[1]) or None, int(sys.argv[2]), sys.argv[3:]
    gpu = torch.device(local_gpu())
    processors = own_processors(most, gpu.index)
    server = CompileServer(str(gpu), default_workers())
    torch.cuda.set_device(gpu)
    cases = [case for suite in suites for case in SUITES[suite]]
    wanted = [case.wanted(str(gpu), torch.float16, budget=budget) for case in cases]
    outcomes: list[Outcome] = []
    torch.cuda.synchronize()
    team = Team.of_torchrun()
    team.announce(f"ready {team.rank}", "")
    team.wait_for(f"ready {rank}" for rank in range(team.world))
    started = time.monotonic()

    def say(**facts: float) -> None:
        print(RESULT + json.dumps({"rank": team.rank} | facts), flush=True)

    def say_steps(steps: Steps) -> None:
        say(**{f"{name}_seconds": seconds for name, seconds in steps.seconds.items() if name in PARTS})

    search = Search(wanted, device_info(gpu), team)
    search.steps.add("space", time.monotonic() - started)
    results = search.compile(server=server)
    compiled_at = time.monotonic()
    mine = [(done.seconds, done.parts) for done in results if done.parts and done.parts["rank"] == team.rank]
    search.steps.add("ready", max((parts["ready"] for _, parts in mine), default=started) - started)
    say_steps(search.steps)
    say(compile_wall_seconds=compiled_at - started, workers=default_workers(), processors=processors)
    search.measure(TuningStore(), outcomes.append)
    ended = time.monotonic()
    if LOG in os.environ and team.rank == 0:
        write_csv(Path(os.environ[LOG]), job_rows(search, started))
    parts = Steps()
    for outcome in outcomes:
        for name, seconds in outcome.steps.seconds.items():
            parts.add(name, seconds)
    say_steps(parts)
    say(
        seconds=ended - started,
        measure_wall_seconds=ended - compiled_at,
        compile_seconds=sum(taken for taken, _ in mine),
        problems=len(outcomes),
    )


if __name__ == "__main__":
    main()
