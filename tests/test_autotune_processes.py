"""Tuning in several processes, and in one that is killed: real processes, with the CPU in the GPU's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tune_on_cpu import WIDTHS
from tetris.autotune.team import Team

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = len(WIDTHS) - 1


def start(folder: Path, *arguments: str, seconds: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, *arguments, "-m", "tests.support.tune_on_cpu", str(folder), str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def results(text: str) -> list[dict]:
    return [json.loads(line.split("result ")[1]) for line in text.splitlines() if "result " in line]


@pytest.mark.slow
def test_two_processes_share_the_problems_and_end_with_the_same_choices(tmp_path: Path) -> None:
    run = start(tmp_path, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", seconds=0.3)
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0
    first, second = sorted(results(text), key=lambda result: result["rank"])
    assert first["searched"] and second["searched"], "both worked"
    assert sorted(first["searched"] + second["searched"]) == sorted(map(str, range(PROBLEMS))), "each problem once"
    assert first["entries"] == second["entries"] == first["stored"] == PROBLEMS
    assert first["configs"] == second["configs"] and all(first["configs"].values())
    assert first["shown"] == [PROBLEMS], "the first process shows the progress of all"


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    killed = start(tmp_path, seconds=0.5)
    assert killed.stdout is not None
    done = {killed.stdout.readline().split()[-1] for _ in range(2)}
    killed.send_signal(signal.SIGKILL)
    killed.wait(30)
    text, _ = start(tmp_path).communicate(timeout=200)
    (result,) = results(text)
    again = set(result["searched"])
    assert result["entries"] == result["stored"] == PROBLEMS
    assert result["reused"] == PROBLEMS - len(again) >= 1 and len(done - again) >= 1


def test_the_board_divides_work_and_carries_texts() -> None:
    one = Team.alone()
    two = Team(1, 2, one.board)
    assert [one.claim("job"), two.claim("job"), two.claim("job"), one.claim("problem")] == [0, 1, 2, 0]
    assert two.heard("x") is None
    one.announce("x", "")
    two.announce("y", "text")
    assert one.wait_for(["y", "x"]) == ["text", ""] and one.heard("x") == ""
    assert one.agree("list", "mine") == two.agree("list", "theirs") == "mine"
