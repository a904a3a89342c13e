"""Every order of events in a small universe: states are compared by fingerprint, visited once."""

from typing import NamedTuple

from jaxinfer.host.scenario import STEP, Event, Scenario
from jaxinfer.host.simulator import Simulation


class Universe(NamedTuple):
    """A scenario without events, and how often each fault may happen on one path."""

    scenario: Scenario
    num_cancels: int = 0
    num_failures: int = 0
    num_nans: int = 0
    num_ticks: int = 0  # of the clock, each to a second later


class Found(NamedTuple):
    """What an exploration has seen; no invariant was broken."""

    num_states: int
    num_transitions: int
    is_complete: bool  # False where it stopped at its bound
    longest_drain: int  # steps that the slowest state needs until all has ended
    most_preemptions: int  # of one request on a path without failures


class _Left(NamedTuple):
    """The faults that may still happen."""

    cancels: int
    failures: int
    nans: int
    ticks: int


def explore(universe: Universe, *, max_transitions: int) -> Found:
    """Visits all states, depth first; raises AssertionError with the path to a broken one."""
    world = Simulation(universe.scenario, is_logged=False)
    left = _Left(*universe[1:])
    after_step: dict[int, int] = {}  # state -> the one that a plain step leads to
    root = hash((world.fingerprint(), left))
    empty = {root}
    stack = [(root, world.snapshot(), left, iter(_choices(world, left)))]
    seen, path, num_transitions, most, here = {root}, [], 0, 0, root
    while stack and num_transitions < max_transitions:
        state, snapshot, left, choices = stack[-1]
        event = next(choices, None)
        if event is None:
            stack.pop()
            if path:
                path.pop()
            continue
        if here != state:
            world.restore(snapshot)
        _apply(world, event, path)
        num_transitions += 1
        after = _spent(left, event)
        here = reached = hash((world.fingerprint(), after))
        if event == STEP:
            after_step[state] = reached
        if reached in seen:
            continue
        seen.add(reached)
        if world.is_empty:
            empty.add(reached)
        if not world.num_failures:
            most = max(most, *world.preempted.values(), 0)
        path.append(event)
        stack.append((reached, world.snapshot(), after, iter(_choices(world, after))))
    return Found(len(seen), num_transitions, not stack, _longest(after_step, empty), most)


def _choices(world: Simulation, left: _Left) -> list[Event]:
    """Everything that may happen next; a plain step is first, so that no path is left hanging."""
    requests = range(len(world.scenario.requests))
    events = [STEP] if not world.is_empty else []
    events += [Event("submit", index) for index in requests if index not in world.indices]
    if left.cancels:
        events += [Event("cancel", index) for index in world.live]
    if left.failures and not world.is_empty:
        events += [Event("fail", phase=phase) for phase in ("", "read", "part")]
    if left.nans:
        holders = [index for index, held in world.live.items() if held.slot is not None]
        events += [Event("nan", index) for index in holders]
    if left.ticks:
        events.append(Event("time", at=world.now_s + 1))
    return events


def _spent(left: _Left, event: Event) -> _Left:
    return _Left(
        left.cancels - (event.kind == "cancel"),
        left.failures - (event.kind == "fail"),
        left.nans - (event.kind == "nan"),
        left.ticks - (event.kind == "time"),
    )


def _apply(world: Simulation, event: Event, path: list[Event]) -> None:
    try:
        world.apply(event)
    except Exception as error:
        raise AssertionError(f"{error!r} after {[*path, event]}") from error


def _longest(after_step: dict[int, int], empty: set[int]) -> int:
    """The longest way to an empty state by plain steps alone; a way that has no end is an error."""
    distance = dict.fromkeys(empty, 0)
    for start in after_step:
        way = []
        state = start
        while state not in distance and state in after_step:
            way.append(state)
            assert len(way) <= len(after_step), "steps alone go round in a circle: a livelock"
            state = after_step[state]
        base = distance.get(state, 0)  # not there: where a bounded exploration stopped
        for place, passed in enumerate(reversed(way), 1):
            distance[passed] = base + place
    return max(distance.values())
