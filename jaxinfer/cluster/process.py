"""What a process of a group is told on stdin, what it says on stdout, and how it ends."""

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from jaxinfer import config as settings

DONE, FAILED, WRONG = 0, 1, 2
"""How it ends: told to stop; something broke, so that a new start may help; it would not."""
log = logging.getLogger("jaxinfer.cluster")


@dataclass(frozen=True)
class Spec:
    """What one process is to do."""

    rank: int
    size: int
    host: str
    """Of rank 0, which listens there."""
    port: int
    key: str
    settings: str
    """As TOML; those of rank 0 count."""
    place: int = 0
    """Among the processes of this machine."""
    num_here: int = 1
    is_fresh: bool = False
    """Stored programs are not used: earlier starts failed."""
    is_debug: bool = False

    def line(self) -> str:
        """As it goes through the pipe."""
        return json.dumps(asdict(self)) + "\n"


class Process:
    """This process: its events, and its end, which is always at once."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.config = settings.load_over(spec.settings, name="the group's settings", environ={})
        self._ending = threading.Lock()
        self._events = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # libraries print, and stdout is for events

    def say(self, event: str, **facts: Any) -> None:
        """Tells whoever started this."""
        with contextlib.suppress(BrokenPipeError):  # nobody is there to be told
            self._events.write(json.dumps({"event": event, **facts}) + "\n")

    def end(self, code: int, why: str = "") -> NoReturn:
        """Ends without a word to jax, whose own end waits for processes that may be gone."""
        with self._ending:  # which is never left: the first reason counts
            if why:
                log.error("rank %d ends: %s", self.spec.rank, why)
                self.say("ended", why=why)
            os._exit(code)

    def until_told(self, stop: Callable[[], None] = lambda: None) -> NoReturn:
        """Reads stdin to its end; `stop` is called at the word for it."""
        for line in sys.stdin:
            if line.strip() == "stop":
                stop()
                self.end(DONE)
        self.end(FAILED, "whoever started this process is gone")

    def lost(self, why: str) -> None:
        """The group can't go on."""
        self.end(FAILED, why)
