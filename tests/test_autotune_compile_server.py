"""The server that forks workers: environments, ends, and what happens when it or its owner dies."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tetris.autotune.compile_ahead import Worker
from tetris.autotune.compile_job import READY, Job
from tetris.autotune.compile_server import ENDED, KERNELS, STARTED, CompileServer
from tetris.kernels.configs import LinearProblem

JOB = Job(LinearProblem(4, 64, 48, (16, 32), "float32", 4))
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def server() -> Iterator[CompileServer]:
    with CompileServer("cpu") as server:
        yield server


def runs(process: int) -> bool:
    """Whether it is there and not just waiting to be buried."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def comes_true(what: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not (true := what()) and time.monotonic() < end:
        time.sleep(0.02)
    return true


def test_workers_start_in_a_fraction_of_a_second_once_the_server_is_there(server: CompileServer) -> None:
    assert Worker(server, "cpu").compile(JOB).reason == ""
    parts = Worker(server, "cpu").compile(JOB).parts
    assert parts and parts["ready"] - parts["started"] < 0.5, "importing torch alone takes longer"


SERVING = """
import json, os, socket, sys
from tetris.autotune import compile_job, compile_server

compile_job.work = lambda device: print(device, dict(os.environ), sys.stdin.readline().strip()) or 3
control, server = socket.socketpair()
mine, worker = socket.socketpair()
socket.send_fds(control, [b"."], [worker.fileno()])
worker.close()
mine.sendall(json.dumps(["cpu", {"SAID": "now"}]).encode() + b"\\na job\\n")
if os.fork() == 0:
    mine.close()
    control.close()
    compile_server.serve(server)
    os._exit(0)
server.close()
print([line.strip() for line in mine.makefile() if line.strip() and compile_server.STARTED not in line])
control.close()
"""


def test_a_worker_has_its_owner_s_environment_and_its_end_is_told() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", SERVING], capture_output=True, text=True, env=environment)
    assert ast.literal_eval(run.stdout) == ["cpu {'SAID': 'now'} a job", f"{ENDED}3"], run.stderr


def test_workers_asked_for_at_once_are_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    with CompileServer("cpu", workers=2) as server:
        first = server.worker("cpu")
        assert len(server._idle) == 1 and any(line.startswith(STARTED) for line in first.makefile())
        other = server.worker("meta")
        assert len(server._idle) == 1, "a worker of another device is another one"
        last = server.worker("cpu")
        assert not server._idle and len({first.fileno(), other.fileno(), last.fileno()}) == 3


def test_a_closed_server_gives_workers_that_have_ended() -> None:
    server = CompileServer("cpu")
    worker = Worker(server, "cpu")
    server.close()
    server.close()
    assert "the worker ended with nothing" in worker.compile(JOB).reason
    assert "the worker ended with nothing" in worker.compile(JOB).reason, "and nothing is started for it"
    assert server.process.poll() is not None


def test_a_server_that_dies_is_replaced() -> None:
    with CompileServer("cpu") as server:
        worker = Worker(server, "cpu")
        assert worker.compile(JOB).reason == ""
        server.process.kill()
        server.process.wait()
        assert comes_true(lambda: Worker(server, "cpu").compile(JOB).reason == "")


def test_a_server_that_cannot_import_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch today')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("tetris.autotune.compile_server.Path", lambda name: tmp_path / "a" / "b")
    with CompileServer("cpu") as server:
        assert "no torch today" in Worker(server, "cpu").compile(JOB).reason


def test_all_end_with_their_owner(tmp_path: Path) -> None:
    code = (
        "import json, sys, time\n"
        "from tests.test_autotune_compile_server import JOB\n"
        "from tetris.autotune.compile_ahead import Worker\n"
        "from tetris.autotune.compile_server import CompileServer\n"
        "server = CompileServer('cpu'); worker = Worker(server, 'cpu'); worker.compile(JOB)\n"
        "print(json.dumps([server.process.pid, worker.process]), flush=True); time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert owner.stdout is not None
    processes = json.loads(owner.stdout.readline())
    assert all(map(runs, processes))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert comes_true(lambda: not any(map(runs, processes)))


def test_the_server_of_a_gpu_imports_every_kernel_and_compiles_one_without_touching_the_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = (
        "import sys, torch, threading\n"
        "from tetris.autotune.compile_server import prepare\n"
        "prepare('cuda')\n"
        "print(torch.cuda.is_initialized(), len([m for m in sys.modules if m.startswith('tetris.kernels.')]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    initialized, modules = run.stdout.split()
    assert initialized == "False" and int(modules) >= len(list(KERNELS.rglob("*.py")))
    assert list(tmp_path.rglob("_copy_one.cubin"))


def test_what_the_server_says_of_a_worker_comes_on_its_socket(server: CompileServer) -> None:
    lines = {server.worker("cpu").makefile().readline() for _ in range(3)}
    assert lines <= {"\n", f"{READY}\n"}, "either may speak first, and each has a line of its own"
