"""Slows new connections down while calls come in that never say anything.

gRPC hands a call over when its headers have come, and each costs the event loop about 0.2 ms in
arrival order. A client that sends headers without messages, and comes back on a new connection
whenever it is thrown out, fills that line far faster than it can be emptied. What bounds it is
the kernel: a filter on the listening socket drops most requests to connect while that goes on.
Clients that are connected notice nothing, and others try again by themselves, after a second.
"""

import asyncio
import ctypes
import logging
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import grpc

from jaxinfer.server.status import SAID

CLOSE_AT = 64.0  # silent calls of late; bursts of 1,000 good calls come to 11
OPEN_AT = 16.0
FADE_S = 0.5
HOLD_S = 3.0
KEPT_OF = 16  # requests to connect of which one is let through
LOOK_S = 0.1

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27  # <asm-generic/socket.h>; Python has no names for them
TCP_FLAGS, SYN, SYN_ACK = 13, 0x02, 0x12
RANDOM = 0xFFFFF000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM of <linux/filter.h>
ALL, NONE = 0xFFFFFFFF, 0
LOAD_BYTE, LOAD_WORD, AND, JUMP_EQUAL, RETURN = 0x30, 0x20, 0x54, 0x15, 0x06
DROP_MOST = (
    (LOAD_BYTE, 0, 0, TCP_FLAGS),
    (AND, 0, 0, SYN_ACK),
    (JUMP_EQUAL, 0, 3, SYN),
    (LOAD_WORD, 0, 0, RANDOM),
    (AND, 0, 0, KEPT_OF - 1),
    (JUMP_EQUAL, 0, 1, 0),
    (RETURN, 0, 0, ALL),
    (RETURN, 0, 0, NONE),
)
"""Code, jump if true, jump if false, value: a program of classic BPF, run on each packet's header.

An accepted socket inherits it, where it lets everything through: nothing there is a bare SYN.
"""

log = logging.getLogger("jaxinfer.server")


class Turnstile(grpc.aio.ServerInterceptor):
    """Counts calls whose message has not come; on the loop's thread only."""

    def __init__(
        self,
        slow: Callable[[bool], object],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`slow(True)` slows new connections down, `slow(False)` ends that."""
        self._slow = slow
        self._clock = clock
        self._level = 0.0
        self._level_s = clock()
        self._hold_until_s = -math.inf
        self.is_slowing = False

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Lets all calls through as they are."""
        self._add(1.0)
        SAID.set(self._said)
        if self._level >= CLOSE_AT:
            self._hold_until_s = self._level_s + HOLD_S
            if not self.is_slowing:
                self._turn(is_slowing=True)
                asyncio.get_running_loop().call_later(LOOK_S, self._look)
        return await continuation(handler_call_details)

    def close(self) -> None:
        """Lets everybody in again."""
        if self.is_slowing:
            self._turn(is_slowing=False)

    def _said(self) -> None:
        self._add(-1.0)

    def _add(self, count: float) -> None:
        now_s = self._clock()
        faded = self._level * math.exp((self._level_s - now_s) / FADE_S)
        self._level, self._level_s = max(0.0, faded + count), now_s

    def _look(self) -> None:
        if not self.is_slowing:
            return
        self._add(0.0)
        if self._level <= OPEN_AT and self._level_s >= self._hold_until_s:
            self._turn(is_slowing=False)
        else:
            asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _turn(self, *, is_slowing: bool) -> None:
        self.is_slowing = is_slowing
        self._slow(is_slowing)
        if is_slowing:
            log.warning(
                "calls come in that say nothing: of new connections one in %d gets in at once, "
                "until that has stopped for %g s",
                KEPT_OF,
                HOLD_S,
            )
        else:
            log.warning("silent calls have stopped; new connections get in as before")


def slow_connections(port: int, *, is_slow: bool) -> int:
    """Has the kernel drop most requests to connect to a port of this process, or none of them.

    Returns how many listening sockets were told; none where the system is no Linux. gRPC keeps its
    sockets to itself, so they are looked for, and not kept: a copy would hold the port.
    """
    num_told = 0
    for listener in _listening(port):
        with listener, suppress(OSError):  # the kernel may take no filter, or have none to give up
            if is_slow:
                _attach(listener, DROP_MOST)
            else:
                listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
            num_told += 1
    return num_told


def _listening(port: int) -> Iterator[socket.socket]:
    """Copies of the sockets that listen there; the caller closes them."""
    for name in os.listdir("/proc/self/fd") if sys.platform == "linux" else ():
        with suppress(OSError), ExitStack() as kept:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            one = kept.enter_context(socket.socket(fileno=os.dup(int(name))))
            is_tcp = one.family in (socket.AF_INET, socket.AF_INET6)
            if (
                is_tcp
                and one.type == socket.SOCK_STREAM
                and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                and one.getsockname()[1] == port
            ):
                kept.pop_all()
                yield one


def _attach(listener: socket.socket, program: Sequence[tuple[int, int, int, int]]) -> None:
    code = b"".join(struct.pack("HBBI", *one) for one in program)
    kept = ctypes.create_string_buffer(code)  # the kernel copies it within the call
    where = struct.pack("HP", len(program), ctypes.addressof(kept))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, where)
