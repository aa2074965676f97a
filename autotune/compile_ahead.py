"""Compile kernels in many processes at once, so that a planner, a tuner or a bench finds them in the compiler's cache.

A Gluon kernel takes a processor some seconds to compile; a network needs dozens. A kernel that crashes or hangs takes
its worker with it and nobody else.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from socket import SHUT_RDWR
from typing import NamedTuple

from tetris.autotune.compile_job import ANSWER, READY, Job
from tetris.autotune.compile_server import CLOSE_SECONDS, ENDED, STARTED, CompileServer
from tetris.autotune.team import TICK_SECONDS, Team, processes_here

MOST_WORKERS = 15
"""Each holds a GPU context and the operands of one layer."""
JOB_SECONDS = 60.0
"""A job that takes longer hangs."""


class Compiled(NamedTuple):
    """The outcome of a job: "" or why it failed, how long it took, and ``compile_job.PARTS`` of it.

    To the parts the pool adds which "worker" of which process ("rank") it was and when that was "started".
    """

    reason: str
    seconds: float
    parts: dict[str, float] | None = None


LATE = Compiled("not compiled in time", 0.0)
DONE = object()


class Worker:
    """A process that takes one job after the other; one that died is replaced when the next job comes."""

    def __init__(self, server: CompileServer, device: str) -> None:
        self.server, self.device = server, device
        self.start()

    def start(self) -> None:
        """Have the process started; nobody waits for it."""
        self.started, self.process, self.ended = time.monotonic(), 0, ""
        self.said: deque[str] = deque(maxlen=3)
        self.socket = self.server.worker(self.device)
        self.lines = self.socket.makefile("rw", errors="replace")

    def wait_until_ready(self, seconds: float = JOB_SECONDS) -> None:
        """Wait until it takes jobs; what cannot start says why when it gets one."""
        with self._alarm(seconds):
            self._listen(READY)

    def compile(self, job: Job, seconds: float = JOB_SECONDS) -> Compiled:
        """Have the job compiled and run once."""
        if self.ended:
            self.start()
        started = time.monotonic()
        with self._alarm(seconds):
            with suppress(OSError):  # it died while idle, or its server did
                self.lines.write(json.dumps(job.to_json()) + "\n")
                self.lines.flush()
            if (answer := self._listen(ANSWER)) is not None:
                reason, taken, parts = json.loads(answer)
                return Compiled(reason, taken, {"started": self.started, **parts})
        taken = time.monotonic() - started
        if taken >= seconds:
            return Compiled(f"ended after {seconds:g} s", taken)
        what = " | ".join(self.said) or self.server.said()
        return Compiled(f"the worker ended with {self.ended}: {what[-300:]}", taken)

    def _listen(self, wanted: str) -> str | None:
        """The rest of the next line that begins so; None if the process ended before."""
        code = "nothing"
        with suppress(OSError):
            for line in map(str.strip, self.lines):
                if line.startswith(wanted):
                    return line.removeprefix(wanted)
                if line.startswith(STARTED):
                    self.process = int(line.removeprefix(STARTED))
                elif line.startswith(ENDED):
                    code = line.removeprefix(ENDED)
                    break
                elif line and line != READY:
                    self.said.append(line)
        self.ended = code
        self.socket.close()
        return None

    @contextmanager
    def _alarm(self, seconds: float) -> Iterator[None]:
        """End the process if what happens within takes longer."""
        alarm = threading.Timer(seconds, self.kill)
        alarm.start()
        try:
            yield
        finally:
            alarm.cancel()

    def kill(self) -> None:
        """End a process that hangs, or that has not even started."""
        if self.process:
            with suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)
        else:
            self.close()

    def close(self) -> None:
        """Let the process end: it waits for a job that will not come."""
        with suppress(OSError):
            self.socket.shutdown(SHUT_RDWR)


class CompilePool:
    """Workers that compile a team's jobs; every process of the team has its own and claims from all.

    Args:
        batches: jobs that one worker is to do after each other, because they want the same kernel; those that take
            long first. The same in every process of the team.
        device: where the layers run.
        team: who shares the work; None = nobody.
        workers: processes; None = all processors this process may use but one, at most 15.
        server: what starts them; None = one for this pool. Closing the pool closes it.
    """

    def __init__(
        self,
        batches: Sequence[Sequence[Job]],
        device: str,
        team: Team | None = None,
        workers: int | None = None,
        server: CompileServer | None = None,
    ) -> None:
        self.batches, self.device, self.team = list(batches), device, team or Team.alone()
        self.jobs = [job for batch in self.batches for job in batch]
        self.firsts = [0, *accumulate(map(len, self.batches))]
        self.server = server or CompileServer(device.partition(":")[0])
        self._closed = False
        self._threads: list[threading.Thread] = []
        for number in range(min(default_workers() if workers is None else workers, len(self.batches))):
            self._begin(self._work, number)

    def _begin(self, work: Callable[[int], None], number: int) -> None:
        thread = threading.Thread(target=work, args=[number], daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self, number: int) -> None:
        """A worker's thread: batches until none is left; then the process ends, and leaves the GPU to others."""
        worker = Worker(self.server, self.device)
        worker.wait_until_ready()  # meanwhile others may be: they take the longest
        while not self._closed and (index := self.team.claim("batch")) < len(self.batches):
            self._compile(index, worker, number)
        worker.close()

    def _inherited(self, index: int) -> None:
        """The thread of a batch that a lost process left."""
        worker = Worker(self.server, self.device)
        self._compile(index, worker, -1)
        worker.close()

    def _compile(self, index: int, worker: Worker, number: int) -> None:
        for place, job in enumerate(self.batches[index], self.firsts[index]):
            if self._closed:
                return
            done = worker.compile(job)
            if not self._closed:
                done = done._replace(parts={"rank": self.team.rank, "worker": number, **(done.parts or {})})
                self.team.announce(f"job {place}", json.dumps(done))
                self.team.tally("job", 1)

    def results(
        self,
        on_progress: Callable[[int], None] = lambda done: None,
        seconds: float = math.inf,
        meanwhile: Iterator[object] | None = None,
    ) -> list[Compiled]:
        """The outcomes of all jobs, in their order; waits for them, telling how many are done now and then.

        After ``seconds`` what is missing counts as :data:`LATE`. ``meanwhile`` is advanced until then.
        """
        names = [f"job {index}" for index in range(len(self.jobs))]
        lasts = [names[first - 1] for first in self.firsts[1:]]
        end, meanwhile = time.monotonic() + seconds, meanwhile or iter(())
        while not self.team.board.check(names) and time.monotonic() < end and self._at_work():
            on_progress(self.team.tally("job"))
            self.team.sign()
            for index in self.team.inherit("batch", self.team.missing(lasts)):
                self._begin(self._inherited, index)
            work_until = time.monotonic() + TICK_SECONDS
            while time.monotonic() < work_until and next(meanwhile, DONE) is not DONE:
                pass
            time.sleep(max(work_until - time.monotonic(), 0.0))
        texts = [self.team.heard(name) for name in names]
        return [LATE if text is None else Compiled(*json.loads(text)) for text in texts]

    def _at_work(self) -> bool:
        """Whether anybody may still announce something: here, where no worker could be started, nobody will."""
        return self.team.world > 1 or any(thread.is_alive() for thread in self._threads)

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
        self.server.close()
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
    return CompilePool([[job] for job in dict.fromkeys(jobs)], device, workers=workers)
