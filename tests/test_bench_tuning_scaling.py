"""The scaling bench around its GPU processes: what it starts and what it makes of their answers."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import pytest
import torch

from tetris.bench import tuning_scaling_bench
from tetris.bench.rows import Row, read_csv


def answers(rank: int, seconds: float, measured: float, problems: int) -> list[str]:
    """What a process prints: after compiling and at the end."""
    first = {"rank": rank, "compile_wall_seconds": seconds - measured, "workers": 15, "processors": 16}
    last = {"rank": rank, "seconds": seconds, "measure_wall_seconds": measured, "compile_seconds": 30}
    return ["result " + json.dumps(said) + "\n" for said in (first, last | {"problems": problems})]


def options(out: Path, processes: list[int]) -> Namespace:
    suite = [["vgg16"], ["vgg16", "resnet50"]]
    return Namespace(suite=suite, processes=processes, budget=None, run_seconds=60, out=out, log=True)


def test_without_the_gpus_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    rows = tuning_scaling_bench.run(options(tmp_path, [1, 2]))
    assert all(row.status.startswith("skipped") for row in rows)
    assert [row.case for row in read_csv(tmp_path / "tuning_scaling.csv")] == ["vgg16", "vgg16+resnet50"]


def test_searches_are_named_by_their_suites() -> None:
    assert tuning_scaling_bench.suites_of("vgg16+resnet50") == ["vgg16", "resnet50"]
    with pytest.raises(ArgumentTypeError, match="got vgg61"):
        tuning_scaling_bench.suites_of("vgg16+vgg61")


def test_runs_are_compared_with_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process takes 40 s; two take 21 and 20; the last run loses three processes, one of them after compiling.

    The longer search, of two suites, takes one process 100 s, two 50, and is then lost.
    """
    one, two = answers(0, 40, 30, 15), [*answers(1, 20, 16, 7), *answers(0, 21, 15, 8)]
    texts = iter([one, two, [*answers(0, 9, 8, 9), answers(1, 9, 8, 9)[0]], answers(0, 100, 50, 30)])
    texts = itertools.chain(texts, [[*answers(0, 50, 25, 15), *answers(1, 50, 25, 15)], []])
    caches: list[str] = []
    suites: list[list[str]] = []

    def lines_of(command, environment, seconds):
        caches.extend(environment[name] for name in ("TETRIS_CACHE_DIR", "TRITON_CACHE_DIR", tuning_scaling_bench.LOG))
        budget, most, *names = command[command.index("tetris.bench.tuning_scaling_bench") + 1 :]
        assert (budget, most, seconds) == ("0", "4", 60)
        suites.append(names)
        return iter(["noise\n", *next(texts)])

    monkeypatch.setattr(tuning_scaling_bench, "lines_of", lines_of)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(tuning_scaling_bench, "device_name", lambda device: "gpu")
    rows = tuning_scaling_bench.run(options(tmp_path, [1, 2, 4]))
    assert [row.extra.get("seconds") for row in rows] == [40, 21, 9, 100, 50, None]
    assert suites == [["vgg16"]] * 3 + [["vgg16", "resnet50"]] * 3 and rows[3].case == "vgg16+resnet50"
    assert rows[3].speedup == 1 and rows[4].speedup == 2 and rows[5].status.startswith("failed: 0 of 4")
    assert rows[0].speedup == 1 and rows[1].speedup == pytest.approx(40 / 21) and math.isnan(rows[2].speedup)
    assert rows[1].extra["problems"] == "8+7" and rows[1].extra["compile_seconds"] == 60
    assert rows[1].extra["measure_wall_seconds"] == 16 and rows[1].extra["processors"] == 32
    assert rows[2].status == "failed: 1 of 4 processes ended well" and rows[2].extra["compile_wall_seconds"] == 1
    assert len(set(caches)) == 18, "every run has an empty store, compiles for itself and has its own log"
    assert len(read_csv(tmp_path / "tuning_scaling.csv")) == 6


def test_the_order_of_the_runs_does_not_matter() -> None:
    """What is worth most runs first, because time may run out."""
    rows = [
        Row("", case, "", us, extra={"processes": n}) for case, n, us in (("b", 2, 6.0), ("a", 2, 5.0), ("a", 1, 9.0))
    ]
    found = tuning_scaling_bench.with_speedups(rows)
    assert [row.speedup for row in found[1:]] == [9 / 5, 1.0] and math.isnan(found[0].speedup)


def runs(process: int) -> bool:
    """Whether it is there and not just waiting to be buried."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_lines_come_before_a_run_is_cut_off_and_nothing_of_it_is_left() -> None:
    sleeper = "import time, os; print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    started = time.monotonic()
    lines = list(tuning_scaling_bench.lines_of([sys.executable, "-c", parent], dict(os.environ), 3.0))
    assert time.monotonic() - started < 30 and len(lines) == 1
    while runs(int(lines[0])) and time.monotonic() - started < 30:
        time.sleep(0.05)
    assert not runs(int(lines[0])), "the child of the command was ended, too"


def test_a_process_keeps_to_its_share_of_the_processors() -> None:
    code = (
        "import os; from tetris.bench.tuning_scaling_bench import own_processors\n"
        "before = len(os.sched_getaffinity(0)); print(own_processors(before, 0), len(os.sched_getaffinity(0)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["1", "1"]
