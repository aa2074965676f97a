"""A process that has imported everything and forks workers, so that a worker starts in a fraction of a second.

Importing torch and Triton takes seconds, more where many processes do it at once. The server imports once, never
touches a GPU, and every worker (:mod:`tetris.autotune.compile_job`) is its child: started in the environment of whoever
asks, bound by a socket that stands for its standard input and output. The server reports on the same socket that the
worker began and how it ended. When the socket to the server closes, because its owner is done or dead, all end.

``python -m tetris.autotune.compile_server DEVICE`` is the server; its standard input is the socket.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

STARTED, ENDED = "compile_server started:", "compile_server ended:"
"""How the server's lines on a worker's socket begin; the process id, or the exit code, follows."""
KERNELS = Path(__file__).parents[1] / "kernels"
REAP_SECONDS = 0.02
CLOSE_SECONDS = 10.0
"""A killed process is gone by then, or never."""


class CompileServer:
    """The owner's side: starts the server, which imports while nobody waits, and asks it for workers.

    Args:
        device: where workers run: kernels are imported, and the compiler started, unless it is the CPU.
        workers: how many to start at once, on that device and in today's environment, for those who will ask.
    """

    def __init__(self, device: str = "cuda", workers: int = 0) -> None:
        self.device = device
        self._lock, self._closed = threading.Lock(), False
        self._start()
        self._idle = [self._forked(device) for _ in range(workers)]

    def _start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])
        self._control, theirs = socket.socketpair()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        command = [sys.executable, "-m", "tetris.autotune.compile_server", self.device.partition(":")[0]]
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=self._output, stderr=subprocess.STDOUT, env=environment
            )

    def worker(self, device: str) -> socket.socket:
        """The socket of a new worker for a device; it may still be starting. A server that died is replaced.

        Where there is no server, because it was closed or dies just now, the socket is that of a worker that ended.
        """
        with self._lock:
            if self._idle and device == self.device:
                return self._idle.pop()
        return self._forked(device)

    def _forked(self, device: str) -> socket.socket:
        mine, theirs = socket.socketpair()
        with suppress(OSError):
            with theirs, self._lock:
                if not self._closed and self.process.poll() is not None:
                    self._control.close()
                    self._start()
                socket.send_fds(self._control, [b"."], [theirs.fileno()])
            mine.sendall(json.dumps([device, dict(os.environ) | {"OMP_NUM_THREADS": "1"}]).encode() + b"\n")
        return mine

    def said(self) -> str:
        """The end of what the server printed: why it could not start."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), 1000, max(size - 1000, 0)).decode(errors="replace").strip()

    def __enter__(self) -> CompileServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server and all its workers, and wait until they have left the GPU."""
        with self._lock:
            self._closed = True
            self._control.close()
        self.process.terminate()  # it heeds this while it imports, the socket afterwards
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main() -> None:
    """The server. Once it has workers, only its owner ends it, by closing the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare(sys.argv[1])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(socket.socket(fileno=os.dup(0)))


def prepare(device: str) -> None:
    """Import what workers need, and pay for the first compilation; leaves one thread, as forking wants it."""
    import torch

    importlib.import_module("tetris.autotune.compile_job")
    torch.set_num_threads(1)
    if device != "cpu":
        prepare_to_launch()
    gc.collect()
    gc.freeze()  # the collector of a child would copy the memory that it shares
    sys.stdout.flush()


def prepare_to_launch() -> None:
    """What a process's first launches pay for once, but for the driver: imports and the compiler's start."""
    for path in sorted(KERNELS.rglob("*.py")):
        importlib.import_module(".".join(("tetris.kernels", *path.relative_to(KERNELS).with_suffix("").parts)))
    importlib.import_module("tetris.kernels.compiler_start").start_compiler()


def serve(control: socket.socket) -> None:
    """Fork a worker for every socket that comes, tell how each ends, and end all with the control socket."""
    workers: dict[int, int] = {}
    try:
        while True:
            if select.select([control], [], [], REAP_SECONDS if workers else None)[0]:
                message, sockets, *_ = socket.recv_fds(control, 1, 1)
                if not message:
                    return
                process = os.fork()
                if process == 0:
                    control.close()
                    become_worker(sockets[0], list(workers.values()))
                workers[process] = sockets[0]
                tell(sockets[0], f"{STARTED}{process}")
            while workers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                tell(workers[ended[0]], f"{ENDED}{os.waitstatus_to_exitcode(ended[1])}")
                os.close(workers.pop(ended[0]))
    finally:
        for process in workers:
            os.kill(process, signal.SIGKILL)
        for process in workers:
            os.waitpid(process, 0)


def tell(worker: int, line: str) -> None:
    """Write a line to a worker's owner, who may be gone."""
    with suppress(OSError):
        os.write(worker, f"\n{line}\n".encode())


def become_worker(own: int, others: list[int]) -> NoReturn:
    """In the child: take the socket for standard input and output and the owner's environment, work, and end."""
    code = 1
    try:
        for other in others:
            os.close(other)
        for standard in (0, 1, 2):
            os.dup2(own, standard)
        os.close(own)
        device, environment = json.loads(sys.stdin.readline())
        os.environ.clear()
        os.environ.update(environment)
        from tetris.autotune.compile_job import work

        code = work(device)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
