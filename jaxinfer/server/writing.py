"""Streams onto the wire; a client that takes nothing for too long is left.

One clock looks at all streams, so that a message costs no timer of its own.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from jaxinfer.errors import SlowReader
from jaxinfer.server.status import Reported

LOOKS = 8  # within the time that a reader may take: it has up to an eighth more
NEVER = math.inf


class _Stream:
    """One stream, on the task that writes it."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task
        self.began_s = NEVER
        """When the write under way began."""
        self.is_late = False


class Writers:
    """All streams of a server; on the event loop's thread only."""

    def __init__(self, limit_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`limit_s` of 0 waits for ever."""
        self._limit_s = limit_s
        self._clock = clock
        self._open: set[_Stream] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._open)

    async def write(self, events: AsyncGenerator[Any, None], call: Any) -> None:
        """The events of a stream onto the wire.

        What a client has not read is in its own window and in ours, and both are bounded. Its
        status waits behind that; its request does not.
        """
        task = asyncio.current_task()
        assert task is not None
        stream = _Stream(task)
        self._open.add(stream)
        self._look_later()
        try:
            await self._write_all(events, call, stream)
        except asyncio.CancelledError:
            if not stream.is_late or task.uncancel():
                raise
            stream.began_s = NEVER
            await events.aclose()
            async with Reported(call):
                raise SlowReader(
                    f"nothing was read for {self._limit_s:g} s (server.reader_limit_s); resume "
                    "with the same request_id to go on"
                ) from None
        finally:
            self._open.discard(stream)

    async def _write_all(
        self, events: AsyncGenerator[Any, None], call: Any, stream: _Stream
    ) -> None:
        is_begun, clock = False, self._clock
        async for event in events:
            stream.began_s = clock()
            if not is_begun:  # or no status could follow while the first message waits
                await call.send_initial_metadata(())
                is_begun = True
            await call.write(event)
            stream.began_s = NEVER

    def _look_later(self) -> None:
        if self._limit_s and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._limit_s / LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._open:
            return
        late_s = self._clock() - self._limit_s
        for stream in self._open:
            if stream.began_s <= late_s and not stream.is_late:
                stream.is_late = True
                stream.task.cancel()
        self._look_later()
