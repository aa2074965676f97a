"""Compile kernels in many processes at once, so that a planner, a tuner or a bench finds them in the compiler's cache.

A Gluon kernel takes a processor some seconds to compile; a network needs dozens. A kernel that crashes or hangs takes
its worker with it and nobody else.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tetris.autotune.compile_job import ANSWER, Job
from tetris.autotune.team import TICK_SECONDS, Team, processes_here

MOST_WORKERS = 15
"""Each holds a GPU context and the operands of one layer."""
JOB_SECONDS = 60.0
"""A job that takes longer hangs."""
CLOSE_SECONDS = 10.0
"""A killed process is gone by then, or never."""


class Compiled(NamedTuple):
    """The outcome of a job: "" or why it failed, how long it took, and ``compile_job.PARTS`` of it.

    To the parts the pool adds which of its "worker"s it was and when that was "started".
    """

    reason: str
    seconds: float
    parts: dict[str, float] | None = None


LATE = Compiled("not compiled in time", 0.0)


class Worker:
    """A process that takes one job after the other; one that died is replaced when the next job comes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        """Start the process; it imports while nobody waits."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tetris.autotune.compile_job", self.device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip

    def compile(self, job: Job, seconds: float = JOB_SECONDS) -> Compiled:
        """Have the job compiled and run once."""
        if self.process.poll() is not None:
            self.start()
        started, process = time.monotonic(), self.process
        assert process.stdin is not None and process.stdout is not None
        alarm = threading.Timer(seconds, process.kill)
        alarm.start()
        said: deque[str] = deque(maxlen=3)
        try:
            process.stdin.write(json.dumps(job.to_json()) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith(ANSWER):
                    reason, taken, parts = json.loads(line.removeprefix(ANSWER))
                    return Compiled(reason, taken, {"started": self.started, **parts})
                said.append(line.strip())
        except BrokenPipeError:
            pass  # it died while idle: said below
        finally:
            alarm.cancel()
        code, taken = process.wait(), time.monotonic() - started
        if taken >= seconds:
            return Compiled(f"ended after {seconds:g} s", taken)
        return Compiled(f"the worker ended with {code}: {' | '.join(said)[-300:]}", taken)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


class CompilePool:
    """Workers that compile a team's jobs in their order; every process of the team has its own and claims from all.

    Args:
        jobs: the same list in every process of the team.
        device: where the layers run.
        team: who shares the work; None = nobody.
        workers: processes; None = all processors this process may use but one, at most 15.
    """

    def __init__(self, jobs: Sequence[Job], device: str, team: Team | None = None, workers: int | None = None) -> None:
        self.jobs, self.device, self.team = list(jobs), device, team or Team.alone()
        self._closed = False
        count = min(default_workers() if workers is None else workers, len(self.jobs))
        self._workers = [Worker(self.device) for _ in range(count)]
        works = enumerate(self._workers)
        self._threads = [threading.Thread(target=self._work, args=[*work], daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def _work(self, number: int, worker: Worker) -> None:
        while not self._closed and (index := self.team.claim("job")) < len(self.jobs):
            done = worker.compile(self.jobs[index])
            if not self._closed:
                done = done._replace(parts={"worker": number, **(done.parts or {})})
                self.team.announce(f"job {index}", json.dumps(done))
                self.team.tally("job", 1)
        worker.close()

    def results(
        self, on_progress: Callable[[int], None] = lambda done: None, seconds: float = math.inf
    ) -> list[Compiled]:
        """The outcomes of all jobs, in their order; waits for them, telling how many are done now and then.

        After ``seconds`` what is missing counts as :data:`LATE`.
        """
        names = [f"job {index}" for index in range(len(self.jobs))]
        end = time.monotonic() + seconds
        while not self.team.board.check(names) and time.monotonic() < end:
            on_progress(self.team.tally("job"))
            time.sleep(TICK_SECONDS)
        texts = [self.team.heard(name) for name in names]
        return [LATE if text is None else Compiled(*json.loads(text)) for text in texts]

    def wait(self, seconds: float | None = None) -> list[str]:
        """Wait for all jobs, at most ``seconds``, and close; what failed, in words."""
        end = math.inf if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if seconds is None else max(end - time.monotonic(), 0.0))
        late = any(thread.is_alive() for thread in self._threads)
        self.close()
        failures = []
        for index, job in enumerate(self.jobs):
            text = self.team.heard(f"job {index}")
            if text is not None and (reason := Compiled(*json.loads(text)).reason):
                failures.append(f"{job.problem} {job.config}: {reason}")
        return failures + ([f"some jobs were not compiled within {seconds:g} s"] if late else [])

    def close(self) -> None:
        """Take no further job, end those under way, and wait until the processes have left the GPU."""
        self._closed = True
        for worker in self._workers:
            worker.process.kill()
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)


def default_workers() -> int:
    """The processors that this process may use, divided among the machine's processes, but for one to measure with."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    if usable == os.cpu_count():
        usable //= processes_here()
    return max(1, min(MOST_WORKERS, usable - 1))


def start_workers(jobs: Sequence[Job], device: str = "cuda", workers: int | None = None) -> CompilePool:
    """Start compiling ``jobs``, duplicates once, and return at once; ``wait`` for the result before timing."""
    return CompilePool(list(dict.fromkeys(jobs)), device, workers=workers)
