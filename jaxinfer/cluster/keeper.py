"""Starts the processes of a group on this machine, and starts them again when one of them ends.

A process that is lost leaves the others in a collective that never returns, so all of them are
ended, at once and for good; on other machines their own keepers do the same.
"""

import contextlib
import json
import logging
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jaxinfer.cluster.process import DONE, WRONG, Spec

COMMAND = (sys.executable, "-m", "jaxinfer.cluster.rank")
MAX_PAUSE_S = 30.0  # between two starts that fail; doubled from START_PAUSE_S
START_PAUSE_S = 0.5
FRESH_AFTER = 2  # starts that failed: the stored programs may be why
STOP_S = 5.0  # for processes that were told to stop
log = logging.getLogger("jaxinfer.cluster")


class Happened(NamedTuple):
    """What a process said, or that it has ended."""

    start: int
    """Of which start of the group."""
    rank: int
    event: str
    facts: dict[str, Any]


class Ended(NamedTuple):
    """Why a keeper gave up, or that it was told to."""

    code: int
    why: str


Run = Callable[[Sequence[str]], "subprocess.Popen[str]"]


def popen(command: Sequence[str]) -> "subprocess.Popen[str]":
    """A process whose stdin and stdout are ours; Ctrl-C does not reach it."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


class Keeper:
    """Keeps one group's processes of this machine running.

    `specs` are theirs, by rank; where rank 0 is here, the others hear what they are once it says
    its port, and import meanwhile. `told` hears each event on the keeper's thread.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        *,
        start_limit_s: float,
        max_failed_starts: int,
        told: Callable[[Happened], None] = lambda happened: None,
        command: Sequence[str] = COMMAND,
        run: Run = popen,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._specs = specs
        self._start_limit_s = start_limit_s
        self._max_failed_starts = max_failed_starts
        self._told = told
        self._command, self._run, self._clock = command, run, clock
        self._events: queue.Queue[Happened | None] = queue.Queue()
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._start = self._num_failed = 0
        self._is_stopping = threading.Event()

    @property
    def pids(self) -> dict[int, int]:
        """Of the processes that run, by rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def keep(self) -> Ended:
        """Starts the group again and again, until it is told to stop or has to give up."""
        while True:
            ended = self._run_once()
            if ended is not None:
                return ended
            limit = self._max_failed_starts
            if limit and self._num_failed >= limit:
                return Ended(1, f"{limit} starts in a row failed (cluster.max_failed_starts)")
            if self._num_failed:
                pause_s = min(MAX_PAUSE_S, START_PAUSE_S * 2 ** (self._num_failed - 1))
                self._is_stopping.wait(pause_s)

    def stop(self) -> None:
        """Ends the group, from any thread; `keep` returns."""
        self._is_stopping.set()
        self._events.put(None)

    def _run_once(self) -> Ended | None:
        """One start of the group, to its end."""
        if self._is_stopping.is_set():
            return Ended(DONE, "")
        self._start += 1
        first, *others = self._specs
        limit_s, ready, why = self._clock() + self._start_limit_s, set[int](), ""
        try:
            for spec in self._specs:
                self._spawn(spec.rank)
            for spec in self._specs if first.rank else (first,):
                self._tell(spec)
            while True:
                is_ready = len(ready) == len(self._specs)
                happened = self._next(None if is_ready else limit_s - self._clock())
                if happened is None:
                    if self._is_stopping.is_set():
                        self._say_stop()
                        return Ended(DONE, "")
                    log.error(
                        "the group was not ready in %g s; it starts again", self._start_limit_s
                    )
                    self._num_failed += 1
                    return None
                self._told(happened)
                match happened.event:
                    case "listening":
                        for spec in others:
                            self._tell(replace(spec, port=int(happened.facts["port"])))
                    case "ready":
                        ready.add(happened.rank)
                        if len(ready) == len(self._specs):
                            self._num_failed = 0
                    case "ended":
                        why = why or happened.facts["why"]
                    case "exit":
                        return self._after(happened, why, is_ready)
                    case _:
                        log.debug("rank %d: %s", happened.rank, happened.facts)
        finally:
            self._kill()

    def _after(self, happened: Happened, why: str, is_ready: bool) -> Ended | None:
        """What the end of a process means: None is another start."""
        code, rank = happened.facts["code"], happened.rank
        if code == DONE:
            return Ended(DONE, "")
        if code == WRONG and not is_ready:
            return Ended(WRONG, f"rank {rank} can't start: {why}")
        log.error("rank %d has ended with %d; all of its group start again", rank, code)
        if not is_ready:
            self._num_failed += 1
        return None

    def _next(self, timeout_s: float | None) -> Happened | None:
        """The next event of this start; None where it is time to look around."""
        end_s = None if timeout_s is None else self._clock() + timeout_s
        while True:
            left_s = None if end_s is None else max(0.0, end_s - self._clock())
            try:
                happened = self._events.get(timeout=left_s)
            except queue.Empty:
                return None
            if happened is None or happened.start == self._start:
                return happened

    def _spawn(self, rank: int) -> None:
        process = self._processes[rank] = self._run(self._command)
        threading.Thread(target=self._read, args=(self._start, rank, process), daemon=True).start()

    def _tell(self, spec: Spec) -> None:
        """What a process is; one that has ended already is told of by its reader."""
        line = replace(spec, is_fresh=self._num_failed >= FRESH_AFTER).line()
        _write(self._processes[spec.rank], line)

    def _read(self, start: int, rank: int, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                facts = json.loads(line)
                self._events.put(Happened(start, rank, facts.pop("event"), facts))
        self._events.put(Happened(start, rank, "exit", {"code": process.wait()}))

    def _say_stop(self) -> None:
        """Lets the group end by itself: rank 0 tells the others, on other machines too."""
        for process in self._processes.values():
            _write(process, "stop\n")
        for process in self._processes.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                log.warning("process %d did not stop in %g s", process.pid, STOP_S)

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        self._processes.clear()


def _write(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended
        process.stdin.write(line)
        process.stdin.flush()
