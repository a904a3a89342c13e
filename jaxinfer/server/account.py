"""The story of one request, told from the steps between its arrival and its end.

Its pieces lie end to end, so that their seconds add up to its time:

    | queued | prefill | decode x 40 | beside x 2 | decode x 7 | finished |
    arrived  began                                             returned   end

A piece ends when a step returns. One step is under way while the one before it still runs; the
device does them one after the other, and so a step's time begins when the one before has returned.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxinfer.host.plan import HeldUp
from jaxinfer.host.request import UNFINISHED, FinishReason

WHY: dict[HeldUp, str] = {
    "": "until the next step",
    "slot": "no slot was free for the first in line",
    "pages": "the first in line had to wait for pages",
    "prefill": "the step had as much prefill work as it may (engine.max_prefill_tokens)",
    "prefix": "the tokens that it shares were still being stored",
    "step": "a step from before it gave way was still under way",
}
MAX_NAMED = 3  # neighbours that a text names


class Part(NamedTuple):
    """A chunk of a prompt."""

    order: int
    length: int
    size: int


class Story(NamedTuple):
    """What is known of a request without its steps."""

    request_id: str
    order: int
    arrived_s: float
    scheduled_s: float | None
    finished_s: float | None
    reason: FinishReason | None
    num_prompt: int
    num_outputs: int


@dataclass(slots=True)
class Stretch:
    """One step, or several in a row that only decode, for the same requests."""

    number: int
    """Of its first step."""
    began_s: float
    """When the first step was dispatched."""
    start_s: float
    """When the device could begin with it: the step before it has returned."""
    end_s: float
    """When the last one returned."""
    busy_s: float
    """Of the device; the rest is time that the host took between steps."""
    longest_s: float
    num_steps: int = 1
    held_up: HeldUp = ""
    decodes: tuple[int, ...] = ()
    chunks: tuple[Part, ...] = ()
    admitted: tuple[tuple[int, int, int], ...] = ()
    """Order of arrival, slot, cached tokens."""
    gave_way: tuple[tuple[int, int], ...] = ()
    """Who lost its slot, for whom."""
    has_failed: bool = False

    @property
    def named(self) -> Iterator[int]:
        """The requests that a text may name."""
        yield from (part.order for part in self.chunks)
        yield from (gainer for _, gainer in self.gave_way)


class Happening(NamedTuple):
    """One piece of a request's time."""

    at_s: float
    """Since the request arrived."""
    seconds: float
    kind: str
    """queued, admitted, prefill, decode, beside (others' prefill), paused, preempted, failed,
    forgotten, running or finished."""
    text: str
    step: int


@dataclass
class _Run:
    """Pieces of one kind in a row."""

    kind: str
    why: str
    at_s: float
    step: int
    seconds: float = 0.0
    num_steps: int = 0
    longest_s: float = 0.0
    host_s: float = 0.0
    num_others: int = 0  # tokens of others' prompts, with padding
    others: dict[str, None] = field(default_factory=dict)


def tell(
    story: Story,
    stretches: Items[Stretch],
    *,
    end_s: float,
    forgotten_s: float,
    names: dict[int, str],
) -> tuple[Happening, ...]:
    """The story until `end_s`; stretches that ended before `forgotten_s` are no longer known."""
    given = [s.began_s for s in stretches for one in s.admitted if one[0] == story.order]
    teller = _Teller(story, names, given)
    if forgotten_s > story.arrived_s:
        teller.forget(min(forgotten_s, end_s))
    for stretch in stretches:
        if story.finished_s is None or stretch.end_s <= end_s or _ends_within(stretch, story):
            teller.hear(stretch, end_s)
    teller.close(end_s)
    return tuple(teller.told)


def _ends_within(stretch: Stretch, story: Story) -> bool:
    """Whether its first token was its last: it need not wait for the decodes of that step."""
    is_own = any(part.order == story.order for part in stretch.chunks)
    return is_own and story.reason not in UNFINISHED


class _Teller:
    """Walks the stretches with a cursor: up to there the time is accounted for."""

    def __init__(self, story: Story, names: dict[int, str], given: list[float]) -> None:
        """`given` says when it was given slots."""
        self.told: list[Happening] = []
        self._given = given
        self._story = story
        self._names = names
        self._cursor_s = story.arrived_s
        self._has_slot = False
        self._is_again = False  # it had a slot before
        self._run: _Run | None = None
        self._step = 0

    def forget(self, until_s: float) -> None:
        """Time of which nothing is known."""
        scheduled_s = self._story.scheduled_s
        self._has_slot = self._is_again = scheduled_s is not None and scheduled_s <= until_s
        self._spend(until_s, "forgotten", "too long ago: the record of these steps made room")

    def hear(self, stretch: Stretch, end_s: float) -> None:
        """One stretch more."""
        self._step, order = stretch.number, self._story.order
        if stretch.has_failed:
            text = "the device failed; its tokens are kept, and stored again"
            lost = ("failed", text) if self._has_slot else self._between()
            self._spend(min(stretch.end_s, end_s), *lost)
            self._has_slot = False
            return
        for loser, gainer in stretch.gave_way:
            if loser == order:
                self._spend(min(stretch.began_s, end_s), *self._between())
                self._point("preempted", f"gave its pages to {self._name(gainer)}")
                self._has_slot = False
        for admitted, slot, num_cached in stretch.admitted:
            if admitted == order:
                self._admit(stretch, slot, num_cached, end_s)
        if self._cursor_s < stretch.start_s and not self._has_slot:
            self._spend(min(stretch.start_s, end_s), *self._between())
        if stretch.end_s > self._cursor_s:
            self._live_through(stretch, end_s)

    def close(self, end_s: float) -> None:
        """What is left until the end."""
        story = self._story
        if story.finished_s is None:
            if self._has_slot:
                self._spend(end_s, "running", "in the step under way")
            else:
                self._spend(end_s, "queued", WHY[""])
            self._flush()
            return
        assert story.reason is not None
        text = f"{story.reason.value}, {story.num_outputs} tokens"
        if story.reason in UNFINISHED:
            where = ("running", "in the step under way") if self._has_slot else self._between()
            self._spend(end_s, *where)
            self._point("finished", text)
        else:
            self._flush()
            self._spend(end_s, "finished", text)
            self._flush()

    def _admit(self, stretch: Stretch, slot: int, num_cached: int, end_s: float) -> None:
        self._spend(min(stretch.began_s, end_s), *self._between())
        again = ", again" if self._is_again else f", {num_cached} of its prompt's tokens cached"
        text = f"slot {slot}{again}"
        self._point("admitted", text)
        self._has_slot = self._is_again = True
        self._given.pop(0)

    def _live_through(self, stretch: Stretch, end_s: float) -> None:
        order, until_s = self._story.order, min(stretch.end_s, end_s)
        mine = [part for part in stretch.chunks if part.order == order]
        others = [part for part in stretch.chunks if part.order != order]
        if mine:
            self._has_slot = True
            num_tokens = sum(part.length for part in mine)
            sizes = " + ".join(str(part.size) for part in mine)
            beside = f", beside {self._named(others)}" if others else ""
            self._flush()
            self._spend(until_s, "prefill", f"{num_tokens} tokens, padded to {sizes}{beside}")
            self._flush()
        elif order in stretch.decodes:
            self._has_slot, at_s = True, self._cursor_s
            run = self._spend(until_s, "beside" if others else "decode", "")
            run.num_steps += stretch.num_steps
            run.longest_s = max(run.longest_s, stretch.longest_s)
            run.host_s += max(0.0, until_s - at_s - stretch.busy_s)
            run.num_others += sum(part.size for part in others)
            run.others |= dict.fromkeys(self._name(part.order) for part in others)
        elif self._has_slot:
            beside = f" beside {self._named(others)}" if others else ""
            self._spend(until_s, "paused", f"holds its slot and was in no step{beside}")
        else:
            if self._given and self._given[0] < until_s:
                self._spend(self._given[0], "queued", self._queued(stretch))
                self._spend(until_s, "queued", "its own step waited for the one under way")
            self._spend(until_s, "queued", self._queued(stretch))

    def _queued(self, stretch: Stretch) -> str:
        is_first_step = stretch.began_s <= self._story.arrived_s and stretch.num_steps == 1
        return "the step under way was to end first" if is_first_step else WHY[stretch.held_up]

    def _between(self) -> tuple[str, str]:
        """What time before a step is spent with."""
        if self._has_slot:
            return "paused", "the step before it was to end first, or the host was busy"
        return "queued", WHY[""]

    def _spend(self, until_s: float, kind: str, why: str) -> _Run:
        """Moves the cursor; a piece like the one before makes that one longer."""
        run = self._run
        if run is None or (run.kind, run.why) != (kind, why):
            self._flush()
            run = self._run = _Run(kind, why, self._cursor_s - self._story.arrived_s, self._step)
        run.seconds += max(0.0, until_s - self._cursor_s)
        self._cursor_s = max(self._cursor_s, until_s)
        return run

    def _point(self, kind: str, text: str) -> None:
        """Something that takes no time."""
        self._flush()
        at_s = self._cursor_s - self._story.arrived_s
        self.told.append(Happening(at_s, 0.0, kind, text, self._step))

    def _flush(self) -> None:
        run, self._run = self._run, None
        if run is None or (not run.seconds and not run.num_steps and run.kind != "finished"):
            return
        self.told.append(Happening(run.at_s, run.seconds, run.kind, _text(run), run.step))

    def _named(self, parts: list[Part]) -> str:
        names = dict.fromkeys(self._name(part.order) for part in parts)
        return f"{sum(part.size for part in parts)} tokens of {_listed(names)}"

    def _name(self, order: int) -> str:
        return self._names[order]


def _text(run: _Run) -> str:
    if run.kind not in ("decode", "beside"):
        return run.why
    mean_s = run.seconds / run.num_steps
    text = f"{run.num_steps} steps, mean {1e3 * mean_s:.2f} ms, longest {1e3 * run.longest_s:.2f}"
    if run.kind == "beside":
        text += f", with {run.num_others} prefill tokens of {_listed(run.others)}"
    if run.host_s > 0.01 * run.seconds:
        text += f"; {1e3 * run.host_s:.2f} ms of them between steps"
    return text


def _listed(names: dict[str, None]) -> str:
    shown = list(names)[:MAX_NAMED]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
