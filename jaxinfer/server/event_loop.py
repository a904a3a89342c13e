"""The event loop of a server that is a process of its own."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from importlib.util import find_spec
from typing import Any

SWITCH_S = 0.001


def run(main: Coroutine[Any, Any, None]) -> None:
    """As asyncio.run, on uvloop where that is installed: messages cost less on it.

    The engine's thread gets the interpreter after SWITCH_S at most: by Python's own 5 ms each of
    its steps would be that late while the loop has much to write.
    """
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=_factory()) as runner:
        runner.run(main)


def _factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop
