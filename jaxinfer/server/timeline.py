"""What happened in every step, kept in bounded memory: where did the time of a request go.

The engine's thread tells each step once. Steps of one make-up become one stretch, so that a batch
that only decodes costs a comparison a step; a request's own story is put together when it is asked
for, on the thread that asks: see server.account.
"""

import bisect
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from jaxinfer.config import EngineConfig
from jaxinfer.host.live import Live
from jaxinfer.host.plan import Plan
from jaxinfer.host.prefills import prefills
from jaxinfer.host.sequence import Sequence
from jaxinfer.server.account import Happening, Part, Story, Stretch, tell
from jaxinfer.v1 import admin_pb2 as pb

MAX_ENDED = 1000
MAX_BYTES = 16 * 2**20
_STRETCH_BYTES, _PART_BYTES, _ORDER_BYTES = 500, 100, 8  # measured with sys.getsizeof, rounded up


@dataclass(slots=True)
class StepCounts:
    """Sums over all steps that have returned."""

    num_steps: int = 0
    num_prefill_steps: int = 0
    num_useful_tokens: int = 0
    num_computed_tokens: int = 0
    """With the padding of chunks and rows."""
    prefill_s: float = 0.0
    """Of steps with a chunk in them, whoever else was in them."""
    decode_s: float = 0.0
    gap_s: float = 0.0
    """In which there was work and no step under way: the device waited for the host."""


def total(counts: Iterable[StepCounts]) -> StepCounts:
    """Of engines beside each other."""
    found = StepCounts()
    for one in counts:
        for field in fields(StepCounts):
            setattr(found, field.name, getattr(found, field.name) + getattr(one, field.name))
    return found


class _Planned(NamedTuple):
    """A step under way."""

    plan: Plan
    began_s: float


class Timeline:
    """A host.observer.Observer that answers `explain`, from any thread."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_ended: int = MAX_ENDED,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """`config` and `clock` are the engine's."""
        self.counts = StepCounts()
        self._config = config
        self._clock = clock
        self._max_ended = max_ended
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._stretches: deque[Stretch] = deque()
        self._num_bytes = 0
        self._forgotten_s = float("-inf")  # what ended before is no longer known
        self._live: dict[str, Live] = {}
        self._ended: OrderedDict[str, Story] = OrderedDict()
        self._names: dict[int, str] = {}  # order of arrival -> request_id
        self._under_way: deque[_Planned] = deque()
        self._last: tuple[Sequence, ...] | None = None  # the decodes of an open, plain stretch
        self._returned_s = float("-inf")

    def submitted(self, live: Live) -> None:
        """A request arrived."""
        with self._lock:
            request_id = live.request.request_id
            self._live[request_id] = live
            self._names[live.sequence.order] = request_id
            self._drop(self._ended.pop(request_id, None))

    def dispatched(self, plan: Plan, began_s: float) -> None:
        """A step went to the device."""
        self._under_way.append(_Planned(plan, began_s))

    def returned(self, now_s: float) -> None:
        """The oldest step under way is done."""
        plan, began_s = self._under_way.popleft()
        start_s = max(began_s, self._returned_s)
        seconds, gap_s = now_s - start_s, self._gap_s(began_s)
        self._count(plan, seconds, gap_s)
        is_plain = not (plan.chunks or plan.admit or plan.preempt)
        with self._lock:
            last = self._stretches[-1] if self._stretches else None
            if (
                is_plain
                and last is not None
                and plan.decodes == self._last
                and plan.held_up == last.held_up
            ):
                last.num_steps += 1
                last.end_s = now_s
                last.busy_s += seconds
                last.longest_s = max(last.longest_s, seconds)
            else:
                self._keep(_stretch(self.counts.num_steps - 1, plan, began_s, start_s, now_s))
            self._last = plan.decodes if is_plain else None
        self._returned_s = now_s

    def ended(self, live: Live) -> None:
        """A request has ended."""
        with self._lock:
            request_id = live.request.request_id
            if self._live.pop(request_id, None) is None:
                return
            self._ended[request_id] = _story(live)
            self._last = None  # a step that was dispatched with it is none of its own
            if len(self._ended) > self._max_ended:
                self._drop(self._ended.popitem(last=False)[1])

    def failed(self, now_s: float) -> None:
        """The device failed: what was under way is lost, and everyone starts over."""
        self._under_way.clear()
        self._last = None
        start_s = min(now_s, max(self._returned_s, self._forgotten_s, 0.0))
        with self._lock:
            number = self.counts.num_steps
            self._keep(Stretch(number, start_s, start_s, now_s, 0.0, 0.0, has_failed=True))
        self._returned_s = now_s

    def explain(self, request_id: str) -> tuple[Happening, ...]:
        """What happened to a request, in order; the seconds add up to its time.

        Empty where it is unknown: never seen, or so long ago that it is forgotten.
        """
        with self._lock:
            live = self._live.get(request_id)
            story = self._ended.get(request_id) if live is None else _story(live)
            if story is None:
                return ()
            stretches = list(self._stretches)
            if stretches:
                stretches[-1] = replace(stretches[-1])  # the only one that still changes
            forgotten_s = self._forgotten_s
        end_s = self._clock() if story.finished_s is None else story.finished_s
        known = _between(stretches, story.arrived_s, end_s)
        orders = {order for one in known for order in one.named}
        names = {order: self._names.get(order, "another") for order in orders}
        return tell(story, known, end_s=end_s, forgotten_s=forgotten_s, names=names)

    @property
    def num_bytes(self) -> int:
        """About so much memory the stretches take."""
        return self._num_bytes

    def _keep(self, stretch: Stretch) -> None:
        self._stretches.append(stretch)
        self._num_bytes += _size(stretch)
        while self._num_bytes > self._max_bytes and len(self._stretches) > 1:
            oldest = self._stretches.popleft()
            self._num_bytes -= _size(oldest)
            self._forgotten_s = oldest.end_s

    def _drop(self, story: Story | None) -> None:
        if story is not None:
            self._names.pop(story.order, None)

    def _gap_s(self, began_s: float) -> float:
        """How long nothing was under way before this step, though there was work.

        A request that arrives while the engine sleeps begins the work.
        """
        since_s = self._returned_s
        if began_s <= since_s:
            return 0.0
        with self._lock:
            oldest = next(iter(self._live.values()), None)
        arrived_s = began_s if oldest is None else oldest.timings.arrived_s
        return max(0.0, began_s - max(since_s, arrived_s))

    def _count(self, plan: Plan, seconds: float, gap_s: float) -> None:
        counts, num_decodes = self.counts, len(plan.decodes)
        counts.num_steps += 1
        counts.gap_s += gap_s
        counts.num_useful_tokens += num_decodes
        if num_decodes:
            rows = self._config.row_counts
            counts.num_computed_tokens += rows[bisect.bisect_left(rows, num_decodes)]
        if not plan.chunks:
            counts.decode_s += seconds
            return
        counts.num_prefill_steps += 1
        counts.prefill_s += seconds
        counts.num_useful_tokens += sum(chunk.length for chunk in plan.chunks)
        counts.num_computed_tokens += sum(
            prefill.num_tokens for prefill in prefills(plan.chunks, self._config)
        )


def explainer(*timelines: Timeline) -> Callable[[str], list[pb.Happening] | None]:
    """What AdminService asks: the story as messages; None where a request is unknown.

    Engines beside each other have a timeline each: the first one that knows the request tells.
    """

    def explain(request_id: str) -> list[pb.Happening] | None:
        for timeline in timelines:
            story = timeline.explain(request_id)
            if story:
                return [pb.Happening(**one._asdict()) for one in story]
        return None

    return explain


def _between(stretches: list[Stretch], start_s: float, end_s: float) -> list[Stretch]:
    found: list[Stretch] = []
    for one in reversed(stretches):
        if one.end_s <= start_s:
            break
        if one.start_s <= end_s:
            found.append(one)
    return found[::-1]


def _stretch(number: int, plan: Plan, began_s: float, start_s: float, now_s: float) -> Stretch:
    seconds, held_up = now_s - start_s, plan.held_up
    return Stretch(
        number=number,
        began_s=began_s,
        start_s=start_s,
        end_s=now_s,
        busy_s=seconds,
        longest_s=seconds,
        held_up=held_up,
        decodes=tuple([one.order for one in plan.decodes]),
        chunks=tuple(Part(one.sequence.order, one.length, one.size) for one in plan.chunks),
        admitted=tuple((one.order, slot, one.num_cached) for one, slot, _ in plan.admit),
        gave_way=tuple(
            (one.order, gainer.order)
            for one, gainer in zip(plan.preempt, plan.gainers, strict=True)
        ),
    )


def _story(live: Live) -> Story:
    sequence, timings = live.sequence, live.timings
    return Story(
        request_id=live.request.request_id,
        order=sequence.order,
        arrived_s=timings.arrived_s,
        scheduled_s=timings.scheduled_s,
        finished_s=timings.finished_s,
        reason=sequence.finish_reason,
        num_prompt=len(live.request.prompt),
        num_outputs=len(live.tokens),
    )


def _size(stretch: Stretch) -> int:
    parts = len(stretch.chunks) + len(stretch.admitted) + len(stretch.gave_way)
    return _STRETCH_BYTES + _PART_BYTES * parts + _ORDER_BYTES * len(stretch.decodes)
