"""What happened in every step, as records: enough to run an incident again and to compare.

A record is one step: what came in before it, what the scheduler decided, what was sent to the
device, what came back, and who ended. Arrivals, cancels, clock and failures are the inputs of a
replay; all the rest is compared.

    {"step": 7, "now": 12.5, "events": [["submit", 3, {...}]], "plan": {...}, "batch": 2774923,
     "got": [[6, [5, 81], 1938]], "ended": [[2, "length", 48]]}
"""

import zlib
from collections import deque
from collections.abc import Sequence as Items
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxinfer.host.loop import Phase
from jaxinfer.host.pace import Pace
from jaxinfer.host.plain import Record, request_to_plain
from jaxinfer.host.plan import Plan
from jaxinfer.host.sequence import Sequence

FORMAT = 2


@runtime_checkable
class Sink(Protocol):
    """Where records go."""

    @property
    def path(self) -> Path | None: ...
    @property
    def is_full(self) -> bool: ...
    def append(self, record: Record, /) -> None: ...
    def rotate(self, state: Record, /) -> None: ...


class Memory:
    """Keeps records in a list, as plain as a file would give them back."""

    is_full = False
    path = None

    def __init__(self) -> None:
        self.records: list[Record] = []

    def append(self, record: Record) -> None:
        """Takes one record."""
        self.records.append(record)

    def rotate(self, state: Record) -> None:
        """Never asked for."""


class Recorder:
    """Puts the record of each step together; an engine or a simulation tells it what it does."""

    def __init__(self, sink: Sink, *, veil: "Veil | None" = None) -> None:
        self._sink = sink
        self._veil = veil
        self._num_steps = 0
        self._events: list[Any] = []
        self._record: Record = {}
        self._under_way: deque[int] = deque()
        self._num_read = 0  # tokens of the oldest of them
        self._decodes: list[int] = []
        self._num_pages: dict[int, int] = {}  # order -> pages that records have told
        self._pace = Pace()
        self._wants_state = False

    @property
    def path(self) -> Path | None:
        """The file that records go to now."""
        return self._sink.path

    def ask_for_state(self) -> None:
        """A new segment should begin with the next step, full or not."""
        self._wants_state = True

    def resume(self, step: int, sequences: list[Sequence]) -> None:
        """Goes on behind a saved state."""
        self._num_steps = step
        self._num_pages = {sequence.order: len(sequence.pages) for sequence in sequences}

    @property
    def wants_state(self) -> bool:
        """Whether the next step should leave nothing under way, and `save` follow it."""
        return self._wants_state or self._sink.is_full

    def submitted(self, sequence: Sequence) -> None:
        """A request arrived, or came back from a snapshot with some of its answer."""
        request, order = request_to_plain(sequence.request), sequence.order
        tokens = list(sequence.tokens)
        if self._veil is not None:
            tokens = self._veil.cover(order, tokens)
            request = self._veil.without_text(request)
        num_prompt = len(sequence.request.prompt)
        event = ["submit", order, request | {"prompt": tokens[:num_prompt]}]
        self._events.append([*event, tokens[num_prompt:]] if tokens[num_prompt:] else event)

    def cancelled(self, order: int) -> None:
        """A client left."""
        self._events.append(["cancel", order])

    def flushed(self) -> None:
        """The prefix cache was emptied."""
        self._events.append(["flush"])

    def begun(self, now_s: float, pace: Pace) -> None:
        """A step begins; what came in since the last one belongs to it."""
        self._record = {"step": self._num_steps, "now": now_s}
        if pace != self._pace:
            self._record["pace"] = list(pace)
            self._pace = pace
        if self._events:
            self._record["events"], self._events = self._events, []

    def planned(self, plan: Plan) -> None:
        """The scheduler has decided."""
        decodes = [one.order for one in plan.decodes]
        parts = {
            "preempt": [one.order for one in plan.preempt],
            "admit": [[one.order, slot, list(shared)] for one, slot, shared in plan.admit],
            "chunks": [
                [one.sequence.order, one.start, one.length, one.size] for one in plan.chunks
            ],
        }
        self._record["plan"] = {name: part for name, part in parts.items() if part}
        if decodes != self._decodes:
            self._record["plan"]["decodes"] = self._decodes = decodes
        for sequence, _, shared in plan.admit:
            self._num_pages[sequence.order] = len(shared)

    def booked(self, plan: Plan) -> None:
        """The plan has its pages, and goes to the device."""
        self._under_way.append(self._num_steps)
        for stored in plan.stored:
            order, pages = stored.sequence.order, stored.sequence.pages
            new = pages[self._num_pages[order] :]
            if new:
                self._record.setdefault("pages", []).append([order, new])
                self._num_pages[order] = len(pages)

    def packed(self, batch: np.ndarray) -> None:
        """A batch goes to the device."""
        self._record["batch"] = zlib.crc32(batch.tobytes(), self._record.get("batch", 0))

    def returned(self, plan: Plan, tokens: Items[int], logprobs: np.ndarray | None = None) -> None:
        """A step has returned, or the next part of it."""
        first, self._num_read = self._num_read, self._num_read + len(tokens)
        orders = [one.order for one in plan.sampled[first : self._num_read]]
        seen = list(tokens) if self._veil is None else self._veil.follow(orders, tokens)
        got: list[Any] = [self._under_way[0], seen]
        if self._num_read == len(plan.sampled):
            self._under_way.popleft()
            self._num_read = 0
        if logprobs is not None:
            got.append(zlib.crc32(logprobs.tobytes()))
        self._record.setdefault("got", []).append(got)

    def ended(self, sequence: Sequence) -> None:
        """A request has ended; a cancel between two steps was an event already."""
        assert sequence.finish_reason is not None
        self._num_pages.pop(sequence.order, None)
        if self._record:
            end = [sequence.order, sequence.finish_reason.value, len(sequence.tokens)]
            self._record.setdefault("ended", []).append(end)
        if self._veil is not None:
            self._veil.forget(sequence.order)

    def failed(self, phase: Phase) -> None:
        """The device failed; what was under way is lost."""
        self._record["failed"] = phase
        if phase == "dispatch":
            self._record.pop("batch", None)  # how far it got does not matter
        self._under_way.clear()
        self._num_read = 0

    def close(self, *, drained: bool) -> None:
        """The step is over."""
        if drained:
            self._record["drain"] = True
        record, self._record = self._record, {}
        self._sink.append(record)
        self._num_steps += 1

    def save(self, state: Record) -> None:
        """A new segment begins, with the state that a replay of it starts from."""
        self._decodes = []
        self._pace = Pace()
        self._wants_state = False
        veiled = state if self._veil is None else self._veil.cover_state(state)
        self._sink.rotate({"step": self._num_steps} | veiled)


class Veil:
    """Stand-ins for token ids: equal prefixes have equal ones, and nothing else can be told.

    The stand-in of a token is a keyed hash of all tokens up to it, so prefix hits stay what they
    were. With a key that is thrown away nobody can try out prompts.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._states: dict[int, bytes] = {}  # order -> of its tokens so far

    def cover(self, order: int, tokens: Items[int]) -> list[int]:
        """The stand-ins of all tokens of a new sequence."""
        self._states[order], covered = self._cover(b"", tokens)
        return covered

    def follow(self, orders: Items[int], tokens: Items[int]) -> list[int]:
        """The stand-ins of one step's tokens; those of sequences that have ended are 0."""
        found: list[int] = []
        for order, token in zip(orders, tokens, strict=True):
            if token >= 0 and order in self._states:
                self._states[order], (token,) = self._cover(self._states[order], [token])
            found.append(min(token, 0) if order not in self._states else token)
        return found

    def forget(self, order: int) -> None:
        """Its sequence has ended."""
        self._states.pop(order, None)

    def without_text(self, request: Record) -> Record:
        """A request without what its author wrote into it."""
        sampling = {
            name: value
            for name, value in request["sampling"].items()
            if name not in ("stop", "stop_token_ids")
        }
        return request | {"sampling": sampling, "salt": self._name(request["salt"])}

    def cover_state(self, state: Record) -> Record:
        """A state of host.state with stand-ins."""
        ends: dict[int, bytes] = {-1: b""}  # page -> what its tokens lead to
        known: list[Any] = []
        for page, parent, salt, tokens in state["known"]:
            ends[page], covered = self._cover(ends[parent], tokens)
            known.append([page, parent, self._name(salt), covered])
        sequences = [
            one
            | {
                "request": self.without_text(one["request"]),
                "tokens": self.cover(one["order"], one["tokens"]),
            }
            for one in state["sequences"]
        ]
        return state | {"known": known, "sequences": sequences}

    def _cover(self, before: bytes, tokens: Items[int]) -> tuple[bytes, list[int]]:
        covered: list[int] = []
        for token in tokens:
            text = before + token.to_bytes(4, "little")
            before = blake2b(text, key=self._key, digest_size=16).digest()
            covered.append(int.from_bytes(before[:4], "little") >> 1)
        return before, covered

    def _name(self, salt: str) -> str:
        return blake2b(salt.encode(), key=self._key, digest_size=8).hexdigest()
