"""Tuning in several processes, and in one that is killed: real processes, with the CPU in the GPU's place."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.tune_on_cpu import WIDTHS
from tetris.autotune.team import Team
from tetris.errors import TetrisError

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = len(WIDTHS) - 1


def start(folder: Path, *arguments: str, seconds: float = 0.0, **facts: str) -> subprocess.Popen[str]:
    command = [sys.executable, *arguments, "-m", "tests.support.tune_on_cpu", str(folder), str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | facts
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


@pytest.mark.slow
def test_when_a_process_dies_the_others_do_its_share(tmp_path: Path) -> None:
    """The second process is killed while it searches; whoever started them does not end the first one, as here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    facts = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    left, killed = (start(tmp_path, seconds=1.0, **facts, RANK=str(rank)) for rank in (0, 1))
    assert killed.stdout is not None
    assert all("searched" in killed.stdout.readline() for _ in range(2)), "the first of them was announced"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    text, _ = left.communicate(timeout=200)
    (result,) = results(text)
    assert left.returncode == 0 and result["entries"] == result["stored"] == PROBLEMS
    assert len(result["searched"]) < PROBLEMS, "what the other one had finished stays"


def test_the_board_divides_work_and_carries_texts() -> None:
    one = Team.alone()
    two = Team(1, 2, one.board)
    assert [one.claim("job"), two.claim("job"), two.claim("job"), one.claim("problem")] == [0, 1, 2, 0]
    assert two.heard("x") is None
    one.announce("x", "")
    two.announce("y", "text")
    assert one.wait_for(["y", "x"]) == ["text", ""] and one.heard("x") == ""
    assert one.agree("list", "mine") == two.agree("list", "theirs") == "mine"


def test_what_a_lost_process_had_claimed_another_one_inherits_once() -> None:
    board = Team.alone().board
    lost, one, two = (Team(rank, 3, board, lost_seconds=0.1) for rank in range(3))
    assert [lost.claim("job"), one.claim("job"), two.claim("job")] == [0, 1, 2]
    assert one.inherit("job", range(3)) == two.inherit("job", range(3)) == [], "nobody has been silent for long"
    end = time.monotonic() + 10
    while not (found := one.inherit("job", range(3))) and time.monotonic() < end:
        one.sign()
        two.sign()
        time.sleep(0.01)
    two.is_lost(1)
    assert found == [0] and two.inherit("job", range(3)) == [], "it is the other one's now"
    one.announce("job 0", "")
    assert lost.heard("job 0 is of") == "1"


def test_shared_work_ends_when_all_is_done_and_a_lost_leader_is_an_error() -> None:
    board = Team.alone().board
    one, two = Team(0, 2, board, lost_seconds=0.1), Team(1, 2, board, lost_seconds=0.1)
    names, waited = ["a", "b", "c"], []
    assert one.claim("letter") == 0
    for index in two.share("letter", names, lambda: waited.append(1)):
        two.announce(names[index], str(index))
    assert two.wait_for(names) == ["0", "1", "2"] and waited, "the one that was silent after its claim was waited for"
    with pytest.raises(TetrisError, match="process 0 of 2 was lost"):
        two.agree("nothing", "mine")
