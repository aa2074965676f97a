"""Timer, compilation ahead and stored choices where the GPU is a stand-in: what they do around the kernels."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import sys
import weakref

import pytest
import torch
from torch import nn

import tetris
from tests.support.fake_gpu import H200
from tetris import reference
from tetris.autotune import compile_job, device, timer, tune_problems, tuner
from tetris.autotune.compile_ahead import Compiled
from tetris.autotune.compile_job import Job, distinct_kernels, even_layout, run_once
from tetris.autotune.compile_server import CompileServer
from tetris.autotune.problems import LayerInput
from tetris.autotune.space import config_space
from tetris.autotune.steps import Steps
from tetris.autotune.store import TuningStore
from tetris.autotune.team import Team, local_gpu
from tetris.autotune.timer import graphed, time_us
from tetris.autotune.tuner import apply_tuned, sparse_layers
from tetris.dispatch import Launch
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, LinearConfig, LinearProblem
from tetris.tuned_choices import Entry

LINEAR = LinearProblem(8, 64, 48, (16, 16), "float32", 6)
CONV = Conv2dProblem(2, 32, 32, 6, 6, (3, 3), (1, 1), (1, 1), (1, 1), (16, 16), "float32", 3)


class Clock:
    """CUDA events, streams and graphs on a clock that moves one millisecond with every call of :meth:`run`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.sleeps, self.replays = 0.0, 0, 0
        owner = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = owner.now

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Stream:
            def wait_stream(self, other: object) -> None: ...

        class Graph:
            def replay(self) -> None:
                owner.replays += 1
                owner.run()

        def sleep(cycles: int) -> None:
            owner.sleeps += 1

        zeros = torch.zeros
        for name, value in {
            "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "_sleep": sleep, "synchronize": lambda: None,
            "current_stream": Stream, "stream": lambda stream: contextlib.nullcontext(),
            "graph": lambda graph, pool: contextlib.nullcontext(), "device": lambda device: contextlib.nullcontext(),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(timer, "L2_FLUSH_BYTES", 64)
        monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))

    def run(self) -> None:
        self.now += 1


def test_gpu_times_are_those_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    twice = lambda: (clock.run(), clock.run())  # noqa: E731
    times = time_us({"a": clock.run, "b": twice}, device="cuda", warmup=1, repeats=5, cold_l2=True)
    assert (times["a"].median_us, times["b"].median_us) == (1000, 2000) and times["a"].repeats == 5
    assert clock.sleeps == 10 and clock.now == 3 + 5 * 3


def test_graphs_are_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    times = time_us({"a": clock.run}, device="cuda", warmup=2, repeats=4, cuda_graph=True, queue_ahead=False)
    assert clock.replays == 4 and clock.sleeps == 0 and clock.now == 2 + 2 + 4 and times["a"].p90_us == 1000


def test_a_graph_keeps_alive_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200 a replay read the freed schedule of a layer that only the captured function had held."""
    clock = Clock(monkeypatch)

    class Layer:
        def __call__(self) -> None:
            clock.run()

    layer = Layer()
    alive = weakref.ref(layer)
    replay = graphed(layer)
    del layer
    gc.collect()
    assert alive() is not None
    replay()
    assert clock.replays == 1
    del replay
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("device_name", ["cpu", "cuda"])
def test_a_budget_ends_after_three_rounds(device_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert time_us({"a": clock.run}, device=device_name, repeats=50, budget_s=0.0)["a"].repeats == 3


def test_even_layouts_leave_no_block_row_empty() -> None:
    layout = even_layout((64, 48), (16, 16), 6, "cpu")
    counts = layout.indptr.diff()
    assert int(counts.sum()) == 6 and int(counts.min()) == 1 and int(counts.max()) == 2
    assert even_layout((32, 32), (16, 16), 99, "cpu").kept_fraction == 1


@pytest.mark.parametrize(
    "job", [Job(LINEAR, activation="relu"), Job(CONV, bias=False, max_pool=True)], ids=["linear", "conv"]
)
def test_a_job_runs_the_layer_it_describes_and_travels_as_text(job: Job) -> None:
    y = run_once(job, "cpu")
    assert y.shape == ((8, 48) if job.problem is LINEAR else (2, 32, 3, 3))
    assert torch.equal(y, torch.zeros_like(y))  # zeros in, no bias: the weights do not show
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_jobs_that_want_one_kernel_are_compiled_once() -> None:
    other_tokens = Job(LinearProblem(8, 128, 48, (16, 16), "float32", 9), LinearConfig().to_key())
    jobs = [Job(LINEAR, LinearConfig().to_key()), other_tokens, Job(LINEAR, LinearConfig(num_warps=8).to_key())]
    jobs += [Job(CONV, Conv2dConfig().to_key()), Job(CONV, Conv2dConfig().to_key(), bias=False)]
    assert distinct_kernels(jobs, H200) == [jobs[0], *jobs[2:]]


def test_a_worker_answers_every_job_and_ends_after_an_error_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, done = [Job(LINEAR), Job(CONV), Job(LINEAR, bias=False), Job(CONV, bias=False)], []

    def run(job: Job, device: str, steps: Steps) -> None:
        if job == jobs[1]:
            raise KeyError("out of shared memory\nand more")
        if job == jobs[2]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        done.append((job, device))

    monkeypatch.setattr(compile_job, "run_once", run)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(json.dumps(job.to_json()) for job in jobs)))
    assert compile_job.work("cpu") == 1
    assert done == [(jobs[0], "cpu")]
    first, *lines = capsys.readouterr().out.splitlines()
    answers = [json.loads(line.removeprefix(compile_job.ANSWER)) for line in lines]
    assert first == compile_job.READY
    assert [reason for reason, *_ in answers[:1]] == [""] and "KeyError" in answers[1][0] and len(answers) == 3


def converted() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(8, 64)
    return tetris.convert(tetris.prune(model, 0.5, block=16, method="none"), example_inputs=x), x


def test_stored_choices_are_set_on_the_layers_of_a_gpu(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = converted()
    layers = sparse_layers(model)
    on_gpu = LayerInput((8, 64), torch.float32, torch.device("cuda"), False)
    monkeypatch.setattr(tuner, "capture_inputs", lambda *arguments: dict.fromkeys(layers, on_gpu))
    monkeypatch.setattr(tuner, "device_info", lambda device: H200)
    store = TuningStore(tmp_path, tables=tmp_path / "none")
    assert apply_tuned(model, x, store) == {} and layers["0"].config == ""
    problem = tuner.problem_of(layers["0"], on_gpu)
    config = config_space(problem, H200)[1]
    store.put([Entry(H200.name, H200.capability, H200.triton_version, problem, config, 5.0, 9.0, 3)])
    layers["0"]._launches[("old",)] = Launch("{}")
    assert apply_tuned(model, x, store) == {"0": 0.0, "2": 0.0}
    assert layers["0"].config == config.to_key() and layers["0"]._launches == {}  # on a CPU a call makes none


def test_torchrun_tells_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    team = Team.of_torchrun()
    assert (team.rank, team.world) == (0, 1) and local_gpu() == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_gpu() == "cuda:1"


class InstantPool:
    """A pool whose jobs are all compiled but for one, which failed."""

    def __init__(
        self, batches: list[list[Job]], device: str, team: Team, workers: int | None, server: CompileServer
    ) -> None:
        self.jobs, self.closed, InstantPool.made = [job for batch in batches for job in batch], False, self
        assert server.process.poll() is None

    def results(self, on_progress, seconds: float, meanwhile) -> list[Compiled]:
        on_progress(4)
        return [Compiled("too large" if index == 1 else "", 2.0) for index in range(len(self.jobs))]

    def close(self) -> None:
        self.closed = True


def test_kernels_are_compiled_before_they_are_measured(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = converted()
    monkeypatch.setattr(tuner, "require_gpu", lambda devices: None)
    monkeypatch.setattr(tuner, "device_info", lambda device: H200)
    monkeypatch.setattr(tune_problems, "CompilePool", InstantPool)
    store = TuningStore(tmp_path, tables=tmp_path / "none")
    tuning = tuner.tune_model(model, x, store=store, budget=4, workers=3)
    pool = InstantPool.made
    assert pool.closed and len(pool.jobs) == len(set(pool.jobs)) == 4
    assert {job.problem.tokens for job in pool.jobs} == {8}
    assert tuning.failures == {pool.jobs[1].config: "too large"} and tuning.compile_seconds == 8
    assert tuning.entries[0].tried == 3 and tuning.entries[0].config.to_key() != pool.jobs[1].config


def test_a_gpu_is_named_in_full_and_in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(device, "gpu_info", lambda device: H200)
    assert device.device_name("cuda") == "NVIDIA H200" and device.short_name("cuda") == "h200"
    assert device.device_info("cuda") is H200
    assert device.package_version("no-such-package") == "none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)  # a CUDA build asks the GPU that is not there
    assert "cudnn 91900" in device.versions()


def test_gelu_and_relu6_have_twins() -> None:
    x = torch.tensor([-1.0, 0.5, 9.0])
    assert torch.equal(reference.activate(x, "relu6"), torch.tensor([0.0, 0.5, 6.0]))
    assert reference.activate(x, "gelu")[1] == pytest.approx(0.5 * 0.5 * (1 + math.erf(0.5 / math.sqrt(2))))
