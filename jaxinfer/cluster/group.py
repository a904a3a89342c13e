"""The processes of a group among themselves: the leader listens, the others and the front join.

Detection of a lost process is here and not in jax.distributed: a collective whose peer is gone
hangs, and nothing that runs in it can notice.
"""

import contextlib
import json
import logging
import queue
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from jaxinfer.cluster import wire
from jaxinfer.cluster.log import Ledger
from jaxinfer.cluster.wire import Greeting, Link, Message
from jaxinfer.errors import ConfigError, GroupError, GroupRefused, PeerLost

RETRY_S = 0.1  # between two attempts to reach a leader that is not there yet
MAX_GREETINGS = 64  # of connections that have proven nothing yet, at once
PATIENCE_S = 60.0  # with a silent process, while its group loads and compiles
NAME_S = 60.0  # until the name of this host must be known
log = logging.getLogger("jaxinfer.cluster")

Lost = Callable[[str], None]
"""Hears once that the group can't go on, and why; on any thread."""


class Agreement:
    """Values that all processes have told under one label, in the order of their ranks."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._told: defaultdict[str, dict[int, Any]] = defaultdict(dict)
        self._found: dict[str, list[Any]] = {}
        self._news = threading.Condition()

    def tell(self, rank: int, label: str, value: Any) -> list[Any] | None:
        """Takes one; returns all of them where it was the last."""
        with self._news:
            told = self._told[label]
            told[rank] = value
            if len(told) < self._size:
                return None
            found = [told[one] for one in range(self._size)]
            del self._told[label]
        return found

    def settle(self, label: str, values: list[Any]) -> None:
        """All values are known here."""
        with self._news:
            self._found[label] = values
            self._news.notify_all()

    def wait(self, label: str) -> tuple[Any, ...]:
        """Waits for them. A process that is lost ends the group, and with it this wait."""
        with self._news:
            self._news.wait_for(lambda: label in self._found)
            return tuple(self._found.pop(label))


class Leader:
    """Rank 0's end: takes the others in, streams the log to them, compares what comes back.

    `about` must be the same in all; `lost` hears what ends the group; `heard` hears the front.
    """

    def __init__(
        self,
        listener: socket.socket,
        key: bytes,
        *,
        size: int,
        silence_s: float,
        about: dict[str, str],
        lost: Lost,
        heard: Callable[[Message], None],
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._listener, self._key, self._size = listener, key, size
        self._silence_s, self._patience_s, self._about = silence_s, patience_s, about
        self._is_settled = False
        self._lost, self._heard = lost, heard
        self._agreement = Agreement(size)
        self._ledger = Ledger(size)
        self._peers: dict[int, Link] = {}
        self._front: Link | None = None
        self._news = threading.Condition()
        self._greetings = threading.BoundedSemaphore(MAX_GREETINGS)
        threading.Thread(target=self._listen, name="group listens", daemon=True).start()

    @property
    def num_compared(self) -> int:
        """Steps whose checksums were equal in all ranks."""
        return self._ledger.num_compared

    def wait_for_peers(self, timeout_s: float) -> None:
        """Returns once all ranks are here; GroupError where some are not in time."""
        with self._news:
            if self._news.wait_for(lambda: len(self._peers) == self._size - 1, timeout_s):
                return
            missing = [str(one) for one in range(1, self._size) if one not in self._peers]
        raise GroupError(
            f"rank {', '.join(missing)} did not come within cluster.start_limit_s = {timeout_s:g}"
        )

    def send(self, message: Message) -> None:
        """To all other ranks."""
        for peer in self._peers.values():
            try:
                peer.send(message)
            except PeerLost as error:
                self._lost(str(error))

    def tell_front(self, message: Message) -> None:
        """To the server, where it is connected."""
        if self._front is not None:
            with contextlib.suppress(PeerLost):  # the thread that receives from it says so
                self._front.send(message)

    def agree(self, label: str, value: Any) -> tuple[Any, ...]:
        """What each rank says under a label; all of them must ask."""
        self._settle(0, label, value)
        return self._agreement.wait(label)

    def digest(self, step: int, digest: str, *, rank: int = 0) -> None:
        """What came of a step in one rank."""
        with self._news:
            wrong = self._ledger.add(rank, step, digest)
        if wrong:
            self._lost(wrong)

    def settle(self) -> None:
        """The group is ready: a process that is silent now is lost."""
        with self._news:
            self._is_settled = True
            links = [*self._peers.values(), *filter(None, [self._front])]
        for link in links:
            link.settle()

    def close(self) -> None:
        """Ends all connections and takes no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who listens
        self._listener.close()
        with self._news:
            links = [*self._peers.values(), *filter(None, [self._front])]
        for link in links:
            link.close()

    def _settle(self, rank: int, label: str, value: Any) -> None:
        found = self._agreement.tell(rank, label, value)
        if found is not None:
            self.send(["agreed", label, found])
            self._agreement.settle(label, found)

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # it was closed
            if self._greetings.acquire(blocking=False):
                threading.Thread(target=self._take, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def _take(self, connection: socket.socket) -> None:
        try:
            greeted = self._greet(connection)
        finally:
            self._greetings.release()
        if greeted is not None:
            self._receive(*greeted)

    def _greet(self, connection: socket.socket) -> tuple[Link, Greeting] | None:
        """Takes the other end in; None where it has no place here."""
        try:
            greeting, proof = wire.challenge(connection, self._key)
            if why := self._why_not(greeting):
                wire.refuse(connection, why)
                log.warning("%s %d was refused: %s", greeting.role, greeting.rank, why)
                return None
            name = "the server" if greeting.role == "front" else f"rank {greeting.rank}"
            link = wire.welcome(
                connection,
                proof,
                name=name,
                silence_s=self._silence_s,
                more=[],
                patience_s=0.0 if self._is_settled else self._patience_s,
            )
        except (OSError, ValueError, TypeError, GroupRefused) as error:
            log.warning("a connection was refused: %s", error)
            connection.close()
            return None
        with self._news:
            if greeting.role == "front":
                self._front = link
            else:
                self._peers[greeting.rank] = link
            self._news.notify_all()
        return link, greeting

    def _why_not(self, greeting: Greeting) -> str:
        if greeting.role == "front":
            return ""
        if greeting.role != "rank" or not 0 < greeting.rank < self._size:
            return f"{greeting.role} {greeting.rank} is no part of a group of {self._size}"
        for name, own in self._about.items():
            if greeting.about.get(name) != own:
                return f"its {name} is {greeting.about.get(name)}, rank 0 has {own}"
        with self._news:
            return "that rank is here already" if greeting.rank in self._peers else ""

    def _receive(self, link: Link, greeting: Greeting) -> None:
        try:
            while True:
                match link.receive():
                    case ["agree", str(label), value]:
                        self._settle(greeting.rank, label, value)
                    case ["digest", int(step), str(digest)]:
                        self.digest(step, digest, rank=greeting.rank)
                    case ["failed", str(why)]:
                        self._lost(f"{link.name}: {why}")
                    case message if greeting.role == "front":
                        self._heard(message)
                    case message:
                        raise PeerLost(f"{link.name} sent {message[0]!r}, which is unknown here")
        except PeerLost as error:
            self._lost(str(error))


class Follower:
    """Any other rank's end: joins, and hears the log in order."""

    def __init__(
        self,
        address: tuple[str, int],
        key: bytes,
        *,
        rank: int,
        about: dict[str, str],
        lost: Lost,
        timeout_s: float,
        patience_s: float = PATIENCE_S,
    ) -> None:
        greeting = Greeting("rank", rank, about)
        self._link, _ = join(
            address, key, greeting, name="rank 0", timeout_s=timeout_s, patience_s=patience_s
        )
        self._lost = lost
        self._agreement = Agreement(1)
        self._log: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._receive, name="group listens", daemon=True).start()

    def next(self) -> Message:
        """The leader's next message."""
        return self._log.get()

    def agree(self, label: str, value: Any) -> tuple[Any, ...]:
        """What each rank says under a label; all of them must ask."""
        self._say(["agree", label, value])
        return self._agreement.wait(label)

    def digest(self, step: int, digest: str) -> None:
        """What came of a step here."""
        self._say(["digest", step, digest])

    def failed(self, why: str) -> None:
        """This rank can't go on; the others hear of it."""
        self._say(["failed", why])

    def settle(self) -> None:
        """The group is ready: a leader that is silent now is lost."""
        self._link.settle()

    def close(self) -> None:
        """Ends the connection."""
        self._link.close()

    def _say(self, message: Message) -> None:
        try:
            self._link.send(message)
        except PeerLost as error:
            self._lost(str(error))

    def _receive(self) -> None:
        try:
            while True:
                match self._link.receive():
                    case ["agreed", str(label), list(values)]:
                        self._agreement.settle(label, values)
                    case message:
                        self._log.put(message)
        except PeerLost as error:
            self._lost(str(error))


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections; ConfigError where the address can't be had.

    A pod's own name may be known a while after the pod has begun.
    """
    end_s = time.monotonic() + NAME_S
    while True:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            break
        except socket.gaierror as error:
            if time.monotonic() > end_s:
                raise ConfigError(f"rank 0 is to be on {host!r}, no known name: {error}") from None
            time.sleep(RETRY_S)
    try:
        return socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        raise ConfigError(
            f"rank 0 can't listen on {host!r}, cluster.port = {port}: {error.strerror or error}"
        ) from None


def join(
    address: tuple[str, int],
    key: bytes,
    greeting: Greeting,
    *,
    name: str,
    timeout_s: float,
    patience_s: float = PATIENCE_S,
) -> tuple[Link, Message]:
    """Connects to a leader, which may not listen yet.

    Raises PeerLost where none is there in time, GroupRefused where it refuses.
    """
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            connection = socket.create_connection(address, timeout=wire.GREETING_S)
            try:
                return wire.greet(connection, key, greeting, name=name, patience_s=patience_s)
            except GroupError:
                connection.close()
                raise
        except (OSError, PeerLost) as error:
            if time.monotonic() > end_s:
                where = json.dumps(list(address))
                raise PeerLost(f"{name} can't be reached at {where}: {error}") from None
            time.sleep(RETRY_S)
