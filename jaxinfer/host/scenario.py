"""What happens in a simulation, as data: settings, requests and events; kept and shrunk as JSON."""

import dataclasses
import json
from collections.abc import Callable
from typing import Literal, NamedTuple

from jaxinfer.config import EngineConfig
from jaxinfer.host.plain import engine_from_plain, request_from_plain, tuples
from jaxinfer.host.request import Request

Kind = Literal["submit", "cancel", "time", "step", "drain", "fail", "nan", "flush"]
Phase = Literal["", "dispatched", "read", "taken", "part"]
PHASES: tuple[Phase, ...] = ("", "dispatched", "read", "taken")


class Event(NamedTuple):
    """One thing that happens; one that doesn't apply changes nothing.

    submit   request number `request` arrives
    cancel   that one is cancelled; with a phase in the midst of a step that begins now
    time     the clock goes on to `at`
    step     one engine step
    drain    one that leaves nothing under way
    fail     one whose device call raises, on dispatch or, with phase "read", on reading, or, with
             phase "part", on reading the last of what returns part by part
    nan      one in which the rows of that request are not finite
    flush    the prefix cache is emptied
    """

    kind: Kind
    request: int = 0
    phase: Phase = ""
    at: float = 0.0


STEP = Event("step")


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that a simulation depends on."""

    config: EngineConfig
    requests: tuple[Request, ...]
    events: tuple[Event, ...] = ()
    eos: tuple[int, ...] = ()
    key: int = 0
    """Of the fake model: another key, another text."""
    pace: tuple[float, float] = (0.0, 0.0)
    """Seconds that each prefilled token and each step take at least, as the scheduler is told."""
    is_packed: bool = False
    """Rows go through the packed batches, as the real programs get them."""

    def to_json(self) -> str:
        """As text that `from_json` reads back."""
        plain = dataclasses.asdict(self)
        plain["events"] = [list(event) for event in self.events]
        return json.dumps(plain, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> "Scenario":
        """The scenario in a text."""
        plain = json.loads(text)
        return Scenario(
            config=engine_from_plain(plain.pop("config")),
            requests=tuple(map(request_from_plain, plain.pop("requests"))),
            events=tuple(Event(*event) for event in plain.pop("events")),
            **tuples(plain),
        )


def shrink(scenario: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """A smaller scenario that still fails: events leave in ever smaller bites until all matter."""
    assert fails(scenario), "a scenario that does not fail can't be shrunk"
    bite = max(1, len(scenario.events) // 2)
    while True:
        start, has_shrunk = 0, False
        while start < len(scenario.events):
            events = scenario.events[:start] + scenario.events[start + bite :]
            smaller = dataclasses.replace(scenario, events=events)
            if fails(smaller):
                scenario, has_shrunk = smaller, True
            else:
                start += bite
        if bite == 1 and not has_shrunk:
            return _without_idle_requests(scenario, fails)
        bite = max(1, bite // 2)


def _without_idle_requests(scenario: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """Leaves out the requests that never arrive."""
    kept = sorted({event.request for event in scenario.events if event.kind == "submit"})
    place = {index: at for at, index in enumerate(kept)}
    smaller = dataclasses.replace(
        scenario,
        requests=tuple(scenario.requests[index] for index in kept),
        events=tuple(
            event._replace(request=place.get(event.request, 0))
            for event in scenario.events
            if event.request in place or event.kind not in ("cancel", "nan")
        ),
    )
    return smaller if fails(smaller) else scenario
