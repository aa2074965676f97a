"""Compiling ahead: jobs survive their trip to a worker, and a worker runs what it is given."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tetris.autotune.compile_ahead import LATE, CompilePool, Worker, start_workers
from tetris.autotune.compile_job import PARTS, Job, _layer_and_input, distinct_kernels, even_layout, run_once
from tetris.autotune.compile_server import CompileServer
from tetris.autotune.problems import LayerInput
from tetris.autotune.team import Team
from tetris.autotune.tune_problems import Wanted
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, DeviceInfo, LinearProblem

CONV = Conv2dProblem(2, 32, 64, 8, 8, (3, 3), (1, 1), (1, 1), (1, 1), (32, 16), "float32", 3)
LINEAR = LinearProblem(4, 64, 48, (16, 32), "float32", 4)


@pytest.fixture
def server() -> Iterator[CompileServer]:
    server = CompileServer("cpu")
    yield server
    server.close()


def test_jobs_survive_json() -> None:
    for job in (Job(CONV, activation="relu", max_pool=True), Job(LINEAR, config='{"tile":1}', bias=False)):
        assert Job.from_json(job.to_json()) == job


def test_a_job_builds_its_layer_and_runs() -> None:
    assert run_once(Job(CONV, activation="relu", max_pool=True), "cpu").shape == (2, 64, 4, 4)
    assert run_once(Job(LINEAR), "cpu").shape == (4, 48)


def test_problems_that_share_a_kernel_are_compiled_once() -> None:
    larger = replace(LINEAR, out_features=96, n_blocks=8)
    jobs = [Job(LINEAR), Job(larger), Job(larger, bias=False), Job(CONV), Job(CONV, max_pool=True), Job(CONV)]
    device = DeviceInfo("NVIDIA H200", (9, 0), 132, "3.6.0")
    assert distinct_kernels(jobs, device) == [jobs[0], jobs[2], jobs[3], jobs[4]]


def test_a_job_may_have_a_layout_of_its_own() -> None:
    job = Job(LINEAR, indptr=(0, 2, 3, 4), indices=(0, 1, 0, 1))
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    assert run_once(job, "cpu").shape == (4, 48)


def test_a_job_s_weights_are_ones_but_for_its_blocks_of_zeros() -> None:
    """Some kernels leave out block rows that add nothing: a worker must compile what the layer runs."""
    layer, x = _layer_and_input(Job(LINEAR, zeros=(1, 3)), "cpu")
    assert (layer.blocks == 0).flatten(1).all(1).tolist() == [False, True, False, True] and not x.any()
    assert (_layer_and_input(Job(CONV), "cpu")[0].blocks == 1).all()
    conv, x = _layer_and_input(Job(CONV, zeros=(1,)), "cpu")
    (job,) = Wanted("conv", conv, LayerInput((2, 32, 8, 8), torch.float32, x.device, True)).jobs([Conv2dConfig()])
    assert job.zeros == (1,) and Job.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_layouts_are_even() -> None:
    layout = even_layout((96, 64), (32, 16), 7, "cpu")
    assert layout.n_blocks == 7 and sorted(layout.indptr.diff().tolist()) == [2, 2, 3]


def test_workers_run_all_jobs_and_name_the_ones_that_fail() -> None:
    assert start_workers([Job(CONV), Job(LINEAR), Job(LINEAR)], "cpu", workers=2).wait(120) == []
    bad = Job(LinearProblem(4, 64, 48, (16, 32), "no_such_dtype", 4))
    failures = start_workers([bad], "cpu", workers=1).wait(120)
    assert len(failures) == 1 and "no_such_dtype" in failures[0]


def test_a_pool_tells_every_job_s_outcome_and_time() -> None:
    bad = Job(LinearProblem(4, 64, 48, (16, 32), "no_such_dtype", 4))
    pool = CompilePool([[Job(CONV), bad], [Job(LINEAR)]], "cpu", workers=2)
    seen: list[int] = []
    steps = iter(range(3))
    fine, failed, other = pool.results(seen.append, meanwhile=steps)
    assert next(steps, None) is None, "what was to be done meanwhile is done"
    assert fine.reason == "" and fine.seconds > 0 and "no_such_dtype" in failed.reason
    assert pool.team.tally("job") == 3
    for done in (fine, failed, other):
        assert done.parts is not None and done.parts["worker"] in (0, 1) and done.parts["rank"] == 0
        assert set(PARTS) - set(done.parts) <= {"compiler", "launch"}, "the one that failed launched nothing"
        assert done.parts["started"] < done.parts["ready"] <= done.parts["began"] <= time.monotonic()
    assert other.reason == "" and seen == sorted(seen) and set(seen) <= {0, 1, 2, 3}
    pool.close()


def test_a_job_that_hangs_is_ended_and_the_next_one_runs(server: CompileServer) -> None:
    worker = Worker(server, "cpu")
    hung = worker.compile(Job(CONV), seconds=0.01)
    assert "ended after 0.01 s" in hung.reason
    assert worker.compile(Job(CONV)).reason == ""
    os.kill(worker.process, signal.SIGKILL)
    assert "ended with -9" in worker.compile(Job(LINEAR)).reason
    assert worker.compile(Job(LINEAR)).reason == "", "a dead worker is replaced"


def test_a_worker_that_cannot_start_says_why(server: CompileServer) -> None:
    reason = Worker(server, "no such device").compile(Job(CONV)).reason
    assert "no such device" in reason or "Expected" in reason


def test_jobs_that_take_too_long_are_left() -> None:
    (failure,) = start_workers([Job(CONV)], "cpu", workers=1).wait(0.01)
    assert "not compiled within 0.01 s" in failure


def test_jobs_that_are_late_are_told_apart() -> None:
    pool = CompilePool([[Job(CONV)], [Job(LINEAR)]], "cpu", workers=1)
    assert pool.results(seconds=0.01) == [LATE, LATE]
    pool.close()
    assert pool.server.process.poll() is not None and not any(thread.is_alive() for thread in pool._threads)


def test_two_pools_of_a_team_share_the_batches_and_do_each_once() -> None:
    team = Team.alone()
    batches = [[Job(CONV), Job(LINEAR)], [Job(LINEAR, bias=False)], [Job(CONV, bias=False)]]
    pools = [CompilePool(batches, "cpu", Team(rank, 2, team.board), workers=1) for rank in (0, 1)]
    done = pools[1].results()
    assert [outcome.reason for outcome in done] == [""] * 4 and team.tally("job") == 4
    assert done[0].parts and done[1].parts and done[0].parts["rank"] == done[1].parts["rank"], "one worker's"
    for pool in pools:
        pool.close()


def test_what_a_lost_process_had_claimed_another_one_compiles() -> None:
    board = Team.alone().board
    lost, left = Team(0, 2, board), Team(1, 2, board, lost_seconds=0.2)
    assert lost.claim("batch") == 0, "and that was the last that was seen of it"
    pool = CompilePool([[Job(CONV), Job(LINEAR)], [Job(LINEAR, bias=False)]], "cpu", left, workers=1)
    done = pool.results(seconds=60)
    assert [outcome.reason for outcome in done] == [""] * 3 and left.tally("job") == 3
    assert {outcome.parts["rank"] for outcome in done if outcome.parts} == {1}
    pool.close()
