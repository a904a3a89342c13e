"""Connections between the processes of a group: framed JSON, proven with a key, never silent.

A frame is four bytes of length and a JSON list, its first entry the kind of message. Nothing else
is ever read from a connection, so that no message can carry code.

Both ends prove that they have the group's key before anything else is said: each answers the other
one's random challenge with an HMAC. What follows is neither encrypted nor sealed.
"""

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxinfer.errors import GroupRefused, PeerLost

PROTOCOL = 1
MAX_BYTES = 256 * 2**20  # of a frame; a step with 256 prompts of 128k tokens fits
MAX_GREETING_BYTES = 16 * 1024  # of a frame from somebody who has proven nothing
GREETING_S = 10.0
BEATS = 4  # within the time after which silence means that a peer is lost
BEAT = ["beat"]

Message = list[Any]


class Greeting(NamedTuple):
    """Who has connected."""

    role: str
    """"rank" or "front"."""
    rank: int
    about: Mapping[str, str]
    """What must be the same in all processes, by name."""


class Link:
    """One end of a connection; any thread may send, one receives.

    Raises PeerLost where the other end is gone, says nothing for `silence_s`, or nonsense. Until
    `settle` it may be silent for `patience_s`, if that is longer: loading and compiling can keep a
    process from beating.
    """

    def __init__(
        self, connection: socket.socket, name: str, *, silence_s: float, patience_s: float = 0.0
    ) -> None:
        self.name = name
        self._connection = connection
        self._beat_s = silence_s / BEATS
        self._final_s = silence_s
        self._silence_s = max(silence_s, patience_s)
        self._sending = threading.Lock()
        self._closed = threading.Event()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(self._silence_s)
        threading.Thread(target=self._keep_beating, name=f"beat {name}", daemon=True).start()

    def send(self, message: Message) -> None:
        """Hands a message to the operating system."""
        frame = pack(message)
        try:
            with self._sending:
                self._connection.sendall(frame)
        except TimeoutError:
            raise PeerLost(f"{self.name} has taken nothing for {self._silence_s:g} s") from None
        except OSError as error:
            raise PeerLost(f"{self.name} is gone: {error.strerror or error}") from None

    def receive(self) -> Message:
        """Waits for a message."""
        while True:
            try:
                message = read(self._connection, MAX_BYTES)
            except TimeoutError:
                raise PeerLost(f"{self.name} was silent for {self._silence_s:g} s") from None
            except (OSError, ValueError) as error:
                raise PeerLost(f"{self.name} is gone: {error}") from None
            if message != BEAT:
                return message

    def settle(self) -> None:
        """The start is over: from the next message on silence is what it is said to be."""
        self._silence_s = self._final_s
        self._connection.settimeout(self._final_s)

    def close(self) -> None:
        """Ends the connection; whoever receives on either end hears of it at once."""
        self._closed.set()
        with contextlib.suppress(OSError):  # the other end was faster
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _keep_beating(self) -> None:
        while not self._closed.wait(self._beat_s):
            try:
                self.send(BEAT)
            except PeerLost:
                return  # whoever receives or sends next says so


def pack(message: Message) -> bytes:
    """A message as it goes over the wire."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return len(body).to_bytes(4, "big") + body


def read(connection: socket.socket, max_bytes: int) -> Message:
    """The next frame; ValueError where it is none, OSError where the connection ends."""
    length = int.from_bytes(_read_exactly(connection, 4), "big")
    if length > max_bytes:
        raise ValueError(f"it sent a frame of {length} bytes; at most {max_bytes} are read")
    try:
        message = json.loads(_read_exactly(connection, length))
    except RecursionError:
        raise ValueError("it sent a frame that is too deep") from None
    if not (isinstance(message, list) and message and isinstance(message[0], str)):
        raise ValueError("it sent a frame that is no message")
    return message


def greet(
    connection: socket.socket,
    key: bytes,
    greeting: Greeting,
    *,
    name: str,
    patience_s: float = 0.0,
) -> tuple[Link, Message]:
    """The connecting end: proves itself, and checks the other end; returns what that one said.

    Raises GroupRefused where the other end refuses, PeerLost where it goes away.
    """
    nonce = secrets.token_hex(32)
    connection.settimeout(GREETING_S)
    try:
        kind, protocol, challenge = read(connection, MAX_GREETING_BYTES)
        if kind != "challenge" or protocol != PROTOCOL or not isinstance(challenge, str):
            raise GroupRefused(f"{name} speaks another protocol than this version of jaxinfer")
        proof = _proof(key, "joins", challenge, nonce, greeting)
        connection.sendall(pack(["greeting", *greeting, nonce, proof]))
        kind, *rest = read(connection, MAX_GREETING_BYTES)
        if kind == "refused":
            raise GroupRefused(f"{name} refuses this process: {rest[0]}")
        said, silence_s, *more = rest
        if kind != "welcome" or not _is_same(
            said, _proof(key, "takes", challenge, nonce, greeting)
        ):
            raise GroupRefused(f"{name} has another key than this process")
        link = Link(connection, name, silence_s=float(silence_s), patience_s=patience_s)
        return link, more
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise PeerLost(f"{name} ended the greeting: {error}") from None


def challenge(connection: socket.socket, key: bytes) -> tuple[Greeting, str]:
    """The listening end: who connects, and the proof that `welcome` sends back.

    Raises GroupRefused for somebody without the key; OSError and ValueError for nonsense.
    """
    nonce = secrets.token_hex(32)
    connection.settimeout(GREETING_S)
    connection.sendall(pack(["challenge", PROTOCOL, nonce]))
    kind, role, rank, about, theirs, said = read(connection, MAX_GREETING_BYTES)
    if kind != "greeting" or not isinstance(about, dict):
        raise ValueError("it sent no greeting")
    greeting = Greeting(str(role), int(rank), about)
    if not _is_same(said, _proof(key, "joins", nonce, str(theirs), greeting)):
        refuse(connection, "it has another key")
        raise GroupRefused(f"a process that called itself {role} {rank} has another key")
    return greeting, _proof(key, "takes", nonce, str(theirs), greeting)


def refuse(connection: socket.socket, why: str) -> None:
    """Says why, and ends the connection."""
    with connection, contextlib.suppress(OSError):  # it may not have waited for the reason
        connection.sendall(pack(["refused", why]))


def welcome(
    connection: socket.socket,
    proof: str,
    *,
    name: str,
    silence_s: float,
    more: Message,
    patience_s: float = 0.0,
) -> Link:
    """Takes the other end in."""
    connection.sendall(pack(["welcome", proof, silence_s, *more]))
    return Link(connection, name, silence_s=silence_s, patience_s=patience_s)


def _proof(key: bytes, act: str, challenge: str, nonce: str, greeting: Greeting) -> str:
    words = json.dumps([act, challenge, nonce, *greeting], sort_keys=True)
    return hmac.new(key, words.encode(), hashlib.sha256).hexdigest()


def _is_same(said: object, proof: str) -> bool:
    return isinstance(said, str) and hmac.compare_digest(said.encode(), proof.encode())


def _read_exactly(connection: socket.socket, count: int) -> bytes:
    parts, left = [], count
    while left:
        part = connection.recv(min(left, 2**20))
        if not part:
            raise ConnectionError("the connection ended")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
