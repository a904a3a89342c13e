"""Files that others must not touch, and what they say now: read again when they change."""

import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from jaxinfer.errors import ConfigError

CHECK_S = 1.0
OTHERS = stat.S_IRWXO
GROUP_WRITES = stat.S_IWGRP

T = TypeVar("T")
Stamp = tuple[tuple[int, ...], ...]

log = logging.getLogger("jaxinfer.server")


class Watched(Generic[T]):
    """What some files come to, as of the last time that they were whole.

    `read()` raises ConfigError where they are not: at the start that is the caller's error, later
    the old value stays and the log says why. The files are looked at once in `every_s`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], T],
        *,
        every_s: float = CHECK_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._every_s = every_s
        self._clock = clock
        self._stamp = _stamp(self._paths)
        self._value = read()
        self._looked_s = clock()

    def now(self) -> T:
        """The newest whole value."""
        now_s = self._clock()
        if now_s - self._looked_s < self._every_s:
            return self._value
        self._looked_s = now_s
        found = _stamp(self._paths)
        if found != self._stamp:
            self._stamp = found  # seen, so that a broken file is logged once and not once a call
            try:
                self._value = self._read()
            except ConfigError as error:
                log.error("a changed file is not used, the one before it stays: %s", error)
            else:
                log.warning("read again: %s", ", ".join(map(str, self._paths)))
        return self._value


def check_private(path: Path, setting: str) -> None:
    """Raises ConfigError unless only its owner writes a file, and no one outside its group reads.

    The owner is this user or root.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"{setting} = {str(path)!r} can't be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{setting} = {str(path)!r} is no file")
    if found.st_mode & (OTHERS | GROUP_WRITES):
        raise ConfigError(
            f"{setting} = {str(path)!r} has mode {stat.S_IMODE(found.st_mode):o}, so others can "
            f"touch it; run: chmod 600 {path}"
        )
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{setting} = {str(path)!r} belongs to user {found.st_uid}; run: "
            f"chown {os.geteuid()} {path}"
        )


def _stamp(paths: Sequence[Path]) -> Stamp:
    """What changes when a file does, its mode included; a file that is gone counts as one more."""
    found: list[tuple[int, ...]] = []
    for path in paths:
        try:
            one = path.stat()
            found.append((one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns))
        except OSError as error:
            found.append((error.errno or 0,))
    return tuple(found)
