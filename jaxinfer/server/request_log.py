"""One JSON line for each request that ended; without prompts and answers.

The event loop only puts into a bounded queue, and a thread writes. Where the disk is slow or full,
lines are lost and counted, and nothing else happens.
"""

import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Set
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxinfer import errors
from jaxinfer.errors import ConfigError
from jaxinfer.host.request import FinishReason, Output
from jaxinfer.server.status import row

MAX_QUEUED = 4096
COMPLAIN_S = 60.0  # between two complaints about the same disk
ERRORS: dict[FinishReason, type[errors.JaxinferError]] = {
    FinishReason.DEADLINE: errors.DeadlinePassed,
    FinishReason.CANCELLED: errors.Draining,
    FinishReason.ERROR: errors.EngineFailed,
}
log = logging.getLogger("jaxinfer.server")


@runtime_checkable
class Target(Protocol):
    """A text file."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class _Ended(NamedTuple):
    """What a line is made of, on the thread that writes."""

    output: Output
    is_cancelled: bool
    at: datetime


class RequestLog:
    """A hub's observer that writes what ended."""

    def __init__(
        self,
        open_file: Callable[[], Target],
        *,
        has_tenants: bool = False,
        max_queued: int = MAX_QUEUED,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """With tenants, what stands before the first / of a request's id is one's name."""
        self._open_file = open_file
        self._has_tenants = has_tenants
        self._now = now
        self._queue: queue.Queue[_Ended | None] = queue.Queue(max_queued)
        self._num_overflown = 0  # each of the two is counted by one thread
        self._num_unwritten = 0
        self._complained_s = float("-inf")
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Lines that were lost."""
        return self._num_overflown + self._num_unwritten

    def delivered(self, outputs: list[Output], cancelled: Set[str]) -> None:
        """The outputs of one step went out; on the event loop's thread."""
        for output in outputs:
            if output.finish_reason is not None:
                ended = _Ended(output, output.request_id in cancelled, self._now())
                try:
                    self._queue.put_nowait(ended)
                except queue.Full:
                    self._num_overflown += 1

    def close(self, timeout_s: float = 5.0) -> None:
        """Returns once all lines are written, or after the timeout."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _line(self, ended: _Ended) -> dict[str, Any]:
        output = ended.output
        assert output.finish_reason is not None
        tenant, slash, name = output.request_id.partition("/")
        has_tenant = self._has_tenants and bool(slash)
        timings = output.timings
        first_s, end_s = timings.first_token_s, timings.finished_s
        num_later = output.num_output_tokens - 1
        tpot_s = None
        if first_s is not None and end_s is not None and num_later > 0:
            tpot_s = round((end_s - first_s) / num_later, 6)
        return {
            "time": ended.at.isoformat(timespec="milliseconds"),
            "request_id": name if has_tenant else output.request_id,
            "tenant": tenant if has_tenant else None,
            "finish_reason": output.finish_reason.value,
            "status": _status(output.finish_reason, is_cancelled=ended.is_cancelled),
            "num_prompt_tokens": output.num_prompt_tokens,
            "num_output_tokens": output.num_output_tokens,
            "num_cached_tokens": output.num_cached_tokens,
            "num_preemptions": output.num_preemptions,
            "queue_s": _since(timings.arrived_s, timings.scheduled_s),
            "ttft_s": _since(timings.arrived_s, first_s),
            "tpot_s": tpot_s,
            "e2e_s": _since(timings.arrived_s, end_s),
        }

    def _run(self) -> None:
        file: Target | None = None
        while True:
            lines = self._take()
            wanted = [json.dumps(self._line(one)) + "\n" for one in lines if one is not None]
            try:
                if wanted:
                    file = self._open_file() if file is None else file
                    file.write("".join(wanted))
                    file.flush()
            except OSError as error:
                self._num_unwritten += len(wanted)
                file = self._give_up(file, error)
            if None in lines:
                self._give_up(file, None)
                return

    def _take(self) -> list[_Ended | None]:
        """Waits for a line, and takes all that are there."""
        lines = [self._queue.get()]
        with suppress(queue.Empty):
            while lines[-1] is not None:
                lines.append(self._queue.get_nowait())
        return lines

    def _give_up(self, file: Target | None, error: OSError | None) -> None:
        """Closes the file, which the next line opens again."""
        try:
            if file is not None and file is not sys.stderr:
                file.close()
        except OSError as late:
            error = error or late
        now_s = time.monotonic()
        if error is not None and now_s - self._complained_s >= COMPLAIN_S:
            self._complained_s = now_s
            log.error("the request log loses lines (%d so far): %s", self.num_dropped, error)


def open_log(where: str, *, has_tenants: bool = False) -> RequestLog | None:
    """The log that `server.request_log` asks for; ConfigError where it can't be written."""
    if not where:
        return None
    if where == "-":
        return RequestLog(lambda: sys.stderr, has_tenants=has_tenants)
    path = Path(where).expanduser()

    def append() -> Target:
        return path.open("a", encoding="utf-8")

    try:
        append().close()
    except OSError as error:
        raise ConfigError(
            f"server.request_log is {where!r}, which can't be written: {error.strerror}"
        ) from None
    return RequestLog(append, has_tenants=has_tenants)


def _status(reason: FinishReason, *, is_cancelled: bool) -> str:
    """What the caller saw, or would have."""
    if reason not in ERRORS:
        return "OK"
    if reason is FinishReason.CANCELLED and is_cancelled:
        return "CANCELLED"
    return row(ERRORS[reason])[0].name


def _since(start_s: float, end_s: float | None) -> float | None:
    return None if end_s is None else round(end_s - start_s, 6)
