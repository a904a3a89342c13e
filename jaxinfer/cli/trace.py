"""`jaxinfer trace`: a journal as a timeline that ui.perfetto.dev and chrome://tracing open."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from jaxinfer.errors import ConfigError
from jaxinfer.host import segments
from jaxinfer.host.plain import Record
from jaxinfer.host.segments import Segment

STEPS, WAITING = 0, 1  # tracks beside those of the slots
FIRST_SLOT = 10
US = 1e6


def trace(
    journal: Path,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    segment: int | None = None,
) -> None:
    """Writes a journal's steps as a timeline: a track a slot, one of steps, pages and waiting.

    A step is drawn from its beginning to that of the next one; where none followed at once, as
    long as the median one.

    Parameters
    ----------
    journal
        A journal's folder, or one of its segments.
    output
        The file to write; open it on ui.perfetto.dev or chrome://tracing.
    segment
        Which segment of the folder; all of them where none is named.
    """
    found = _read(journal.expanduser(), segment)
    events = list(draw(found))
    try:
        with output.expanduser().open("w", encoding="utf-8") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)
    except OSError as error:
        raise ConfigError(f"-o {output} can't be written: {error.strerror}") from None
    num_steps = sum(len(one.records) for one in found)
    num_spans = sum(event["ph"] == "X" for event in events)
    print(f"{output}: {num_steps} steps, {num_spans} spans; open it on ui.perfetto.dev")


def _read(journal: Path, number: int | None) -> list[Segment]:
    if journal.is_file() or number is not None:
        return [segments.read(segments.find(journal, number=number))]
    segments.find(journal)  # says what is wrong where there is none
    found = [segments.read(path) for path in segments.segments(journal)]
    newest = [found.pop()]
    while found and _leads_to(found[-1], newest[0]):
        newest.insert(0, found.pop())
    return newest


def _leads_to(before: Segment, after: Segment) -> bool:
    """Whether one segment goes on with the engine of another, and is not of another start."""
    state = after.header["state"]
    return bool(state and before.records) and state["step"] == before.records[-1]["step"] + 1


def draw(found: list[Segment]) -> Iterator[dict[str, Any]]:
    """The events of a trace, in the order of the steps; the segments follow each other."""
    header, records = found[0].header, [record for one in found for record in one.records]
    firsts = {one.records[0]["step"] for one in found if one.records}
    num_slots = header["engine"]["num_slots"]
    yield _called("process_name", STEPS, f"jaxinfer {header['model']}")
    for track, name in (
        (STEPS, "steps"),
        (WAITING, "arrivals"),
        *((FIRST_SLOT + slot, f"slot {slot:03}") for slot in range(num_slots)),
    ):
        yield _called("thread_name", track, name)
        yield _called("thread_sort_index", track, track, key="sort_index")
    board = _Board(header["state"])
    for record, end_s in zip(records, _ends(records, header["state"]), strict=True):
        if record["step"] in firsts:
            board.decodes = []  # each segment says them anew
        yield from board.step(record, end_s)
    yield from board.close()


@dataclass
class _Seat:
    """A request that holds a slot."""

    slot: int
    since_s: float
    kind: str
    num_steps: int = 0
    num_tokens: int = 0


@dataclass
class _Board:
    """Who is where, between two steps."""

    state: Record
    last_s: float = 0.0
    names: dict[int, str] = field(default_factory=dict)
    seats: dict[int, _Seat] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    pages: dict[int, list[int]] = field(default_factory=dict)
    decodes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for one in self.state.get("sequences", ()):
            order = one["order"]
            self.names[order] = one["request"]["request_id"]
            if one["slot"] is None:
                self.waiting.add(order)
            else:
                self.seats[order] = _Seat(one["slot"], -1.0, "decode")
                self.pages[order] = list(one["pages"])

    def step(self, record: Record, end_s: float) -> Iterator[dict[str, Any]]:
        """One record."""
        now_s = record["now"]
        for seat in self.seats.values():
            seat.since_s = now_s if seat.since_s < 0 else seat.since_s
        for event in record.get("events", ()):
            yield from self._event(event, now_s)
        plan = record.get("plan", {})
        for order in plan.get("preempt", ()):
            yield from self._leave(order, now_s, "gave way")
            self.waiting.add(order)
        for order, slot, shared in plan.get("admit", ()):
            self.waiting.discard(order)
            self.seats[order] = _Seat(slot, now_s, "prefill")
            self.pages[order] = list(shared)
        chunks = plan.get("chunks", [])
        self.decodes = plan.get("decodes", self.decodes)
        yield from self._move(chunks, now_s)
        for order, new in record.get("pages", ()):
            self.pages.setdefault(order, []).extend(new)
        if chunks or self.decodes:
            yield self._step_span(record, chunks, now_s, end_s)
        yield self._counter("waiting", now_s, {"requests": len(self.waiting)})
        held = {page for pages in self.pages.values() for page in pages}
        yield self._counter("pages", now_s, {"in use": len(held)})
        for order, reason, _ in record.get("ended", ()):
            yield from self._leave(order, end_s, reason)
            self.waiting.discard(order)
        if "failed" in record:
            yield _instant("the device failed", STEPS, now_s)
            for order in list(self.seats):
                yield from self._leave(order, end_s, "device failed")
                self.waiting.add(order)
        self.last_s = max(self.last_s, end_s)

    def close(self) -> Iterator[dict[str, Any]]:
        """The journal ends here, and requests may not have."""
        for order in list(self.seats):
            yield from self._leave(order, self.last_s, "not ended")

    def _event(self, event: list[Any], now_s: float) -> Iterator[dict[str, Any]]:
        match event:
            case ["submit", order, request, *_]:
                self.names[order] = request["request_id"]
                self.waiting.add(order)
                yield _instant(f"{self.names[order]} arrives", WAITING, now_s)
            case ["cancel", order]:
                yield from self._leave(order, now_s, "cancelled")
                self.waiting.discard(order)
            case _:
                yield _instant(str(event[0]), WAITING, now_s)

    def _move(self, chunks: list[list[int]], now_s: float) -> Iterator[dict[str, Any]]:
        """Closes the prefill of those that only decode from here on, and counts steps."""
        lengths: dict[int, int] = {}
        for order, _, length, _ in chunks:
            lengths[order] = lengths.get(order, 0) + length
        for order, seat in self.seats.items():
            if order in self.decodes and order not in lengths and seat.kind == "prefill":
                yield self._span(order, seat, now_s, "")
                self.seats[order] = seat = _Seat(seat.slot, now_s, "decode")
            seat.num_steps += order in lengths or order in self.decodes
            seat.num_tokens += lengths.get(order, 0) + (order in self.decodes)

    def _leave(self, order: int, now_s: float, reason: str) -> Iterator[dict[str, Any]]:
        seat = self.seats.pop(order, None)
        self.pages.pop(order, None)
        if seat is not None:
            yield self._span(order, seat, now_s, reason)

    def _span(self, order: int, seat: _Seat, end_s: float, reason: str) -> dict[str, Any]:
        details = {
            "request": self.names.get(order, ""),
            "steps": seat.num_steps,
            "tokens": seat.num_tokens,
        } | ({"ended": reason} if reason else {})
        name = f"{seat.kind} {self.names.get(order, order)}"
        return _complete(name, FIRST_SLOT + seat.slot, seat.since_s, end_s, details)

    def _step_span(
        self, record: Record, chunks: list[list[int]], now_s: float, end_s: float
    ) -> dict[str, Any]:
        parts = [f"{len(self.decodes)} decode"] if self.decodes else []
        parts += [f"prefill {length}/{size}" for _, _, length, size in chunks]
        details = {
            "step": record["step"],
            "decodes": [self.names.get(order, order) for order in self.decodes],
            "chunks": [
                {"request": self.names.get(order, order), "from": start, "length": n, "size": size}
                for order, start, n, size in chunks
            ],
        }
        return _complete(" + ".join(parts), STEPS, now_s, end_s, details)

    def _counter(self, name: str, now_s: float, values: dict[str, int]) -> dict[str, Any]:
        return {"ph": "C", "pid": 1, "name": name, "ts": round(now_s * US, 1), "args": values}


def _ends(records: list[Record], state: Record) -> list[float]:
    """When each step was over: when the next one began, if it did at once."""
    live = len(state.get("sequences", ()))
    spans: list[float | None] = []
    for record, after in zip(records, [*records[1:], None], strict=True):
        kinds = [event[0] for event in record.get("events", ())]
        live += kinds.count("submit") - kinds.count("cancel") - len(record.get("ended", ()))
        is_followed = after is not None and live > 0
        spans.append(after["now"] - record["now"] if is_followed and after is not None else None)
    known = [span for span in spans if span is not None]
    usual_s = statistics.median(known) if known else 0.001
    ends: list[float] = []
    for number, (record, span) in enumerate(zip(records, spans, strict=True)):
        end_s = record["now"] + (usual_s if span is None else span)
        if number + 1 < len(records):
            end_s = min(end_s, records[number + 1]["now"])
        ends.append(end_s)
    return ends


def _complete(
    name: str, track: int, start_s: float, end_s: float, details: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": 1,
        "tid": track,
        "name": name,
        "ts": round(start_s * US, 1),
        "dur": round(max(0.0, end_s - start_s) * US, 1),
        "args": details,
    }


def _instant(name: str, track: int, now_s: float) -> dict[str, Any]:
    return {"ph": "i", "pid": 1, "tid": track, "s": "t", "name": name, "ts": round(now_s * US, 1)}


def _called(kind: str, track: int, value: str | int, *, key: str = "name") -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": track, "name": kind, "args": {key: value}}
