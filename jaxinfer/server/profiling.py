"""Traces of the device and the host, begun and ended by an operator, one at a time."""

import asyncio
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from jaxinfer.errors import OutOfTurn

log = logging.getLogger("jaxinfer.server")


def begin(folder: Path) -> None:
    """Begins jax.profiler's trace, without the interpreter's calls: those would slow every step."""
    import jax  # no test without an engine needs it

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(folder, profiler_options=options)


def end() -> None:
    """Ends it and writes it down."""
    import jax

    jax.profiler.stop_trace()


class Profiler:
    """One trace at most, in a folder of its own below the system's temporary one.

    A trace ends by itself after its time: what nobody stops must not fill the disk.
    """

    def __init__(
        self, *, begin: Callable[[Path], None] = begin, end: Callable[[], None] = end
    ) -> None:
        self._begin = begin
        self._end = end
        self._lock = asyncio.Lock()
        self._folder: Path | None = None
        self._last: Path | None = None  # one that ended by itself, and that no one has asked for
        self._timer: asyncio.Task[None] | None = None

    async def start(self, max_s: float) -> Path:
        """Begins a trace; raises OutOfTurn where one runs."""
        async with self._lock:
            if self._folder is not None:
                raise OutOfTurn(f"a trace runs already, into {self._folder}; stop it first")
            folder = Path(tempfile.mkdtemp(prefix="jaxinfer-profile-"))
            try:
                await asyncio.to_thread(self._begin, folder)
            except RuntimeError as error:
                folder.rmdir()
                raise OutOfTurn(f"no trace was begun: {error}") from error
            self._folder, self._last = folder, None
            self._timer = asyncio.create_task(self._stop_after(max_s))
            return folder

    async def stop(self) -> Path:
        """Ends the trace; one that ended by itself is told once. OutOfTurn where there is none."""
        async with self._lock:
            if self._folder is not None:
                if self._timer is not None:
                    self._timer.cancel()
                await self._finish()
            found, self._last = self._last, None
            if found is None:
                raise OutOfTurn("no trace runs; start one first")
            return found

    async def close(self) -> None:
        """Ends what runs."""
        async with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._folder is not None:
                await self._finish()

    async def _stop_after(self, max_s: float) -> None:
        await asyncio.sleep(max_s)
        async with self._lock:
            log.warning("the trace in %s ends after its %g s", self._folder, max_s)
            self._timer = None  # from here on it must not be cancelled in the middle
            await self._finish()

    async def _finish(self) -> None:
        self._last, self._folder = self._folder, None
        await asyncio.to_thread(self._end)
