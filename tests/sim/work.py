"""What the tests of the simulator give to worker processes."""

import collections
import dataclasses
import random
import tempfile
from pathlib import Path

import pytest

from jaxinfer.host.draft import Draft
from jaxinfer.host.scenario import STEP, Event, Scenario, shrink
from jaxinfer.host.simulator import Simulation, run
from tests.sim import deadlines, preemption, reload, universes
from tests.sim.explorer import Found, explore
from tests.sim.mutants import MUTANTS
from tests.sim.points import bases, check, points
from tests.sim.swarm import random_scenario


def split(count: int, *, pieces: int = 40) -> list[range]:
    """The numbers up to `count`, in pieces for several workers."""
    return [range(piece, count, pieces) for piece in range(pieces)]


def run_seeds(seeds: range) -> dict[str, int]:
    """Runs the scenarios of these seeds; one that fails is shrunk and shown as text to keep."""
    seen: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        scenario = random_scenario(seed)
        try:
            simulation = run(scenario)
        except Exception as error:
            kept = shrink(scenario, fails).to_json()
            raise AssertionError(f"seed {seed}: {error!r}; keep in regressions/:\n{kept}") from None
        seen.update(probes(simulation))
    return dict(seen)


def run_twice(seeds: range) -> int:
    """Runs scenarios again, from their text: how many went the same way."""
    same = 0
    for seed in seeds:
        scenario = random_scenario(seed)
        again = Scenario.from_json(scenario.to_json())
        same += again == scenario and run(scenario).log_hash == run(again).log_hash
    return same


def log_hash(seed: int) -> str:
    """The log of one seed, in another process."""
    return run(random_scenario(seed)).log_hash


def fails(scenario: Scenario) -> bool:
    """Whether an invariant breaks."""
    try:
        run(scenario)
    except Exception:
        return True
    return False


def probes(simulation: Simulation) -> dict[str, int]:
    """How often the rare paths were taken."""
    prefix = simulation.scheduler.prefix.stats()
    ends = collections.Counter(reason.value for reason in simulation.ended.values())
    return {
        "preempted": sum(simulation.preempted.values()),
        "hits": prefix.num_hit_tokens,
        "evicted": prefix.num_evicted_pages,
        "failures": simulation.num_failures,
        "packed": simulation.scenario.is_packed,
        "end of a broken row": len(simulation.struck),
        **ends,
    }


def hunt(name: str, max_scenarios: int) -> int | None:
    """The first seed that finds a planted bug."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
        mutant.plant(monkeypatch, Path(folder))
        return next((s for s in range(max_scenarios) if fails(random_scenario(s))), None)


def explore_universe(name: str, max_transitions: int) -> Found:
    """Explores one of the universes."""
    return explore((universes.small() | universes.large())[name], max_transitions=max_transitions)


def run_points(base: int, first: int, step: int) -> dict[str, int]:
    """Runs every `step`th point of a base; how often it ended something, and how."""
    scenario = bases()[base]
    seen: collections.Counter[str] = collections.Counter()
    for place, point in enumerate(points(scenario)):
        if place % step == first:
            seen[check(point)] += 1
    return dict(seen)


def run_reloads(seeds: range) -> tuple[int, int]:
    """Saves and loads at random points: how many went the same way, and how often it was loaded.

    Without NaN: what a broken chunk has left in a page is not computed again.
    """
    same = loads = 0
    for seed in seeds:
        scenario, rng = random_scenario(seed), random.Random(seed)
        events = tuple(event for event in scenario.events if event.kind != "nan")
        at = set(rng.sample(range(len(events)), k=min(2, len(events))))
        scenario = dataclasses.replace(scenario, is_packed=False, events=events)
        kept, loaded = (reload.run(scenario, at=at, is_loaded=one) for one in (False, True))
        same += kept.log_hash == loaded.log_hash
        loads += len(at)
    return same, loads


def run_deadlines(seeds: range) -> dict[str, int]:
    """What came of random deadlines."""
    return dict(sum(map(deadlines.run, seeds), collections.Counter()))


def run_overload(by_work: bool, prefix: bool, at_once: bool) -> preemption.Lost:
    """What 300 overloads lose, by the work lost or with the last in line as the victim."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not by_work:
            monkeypatch.setattr(Draft, "_victim", preemption.last_in_line)
        found = [preemption.run(seed, prefix=prefix, at_once=at_once) for seed in range(300)]
    return preemption.Lost(
        num_tokens=sum(one.num_tokens for one in found),
        num_preemptions=sum(one.num_preemptions for one in found),
        most_of_one=max(one.most_of_one for one in found),
    )


def trace() -> tuple[object, ...]:
    """Logs of random scenarios and fingerprints of a small universe: the same in every process."""
    logs = [log_hash(seed) for seed in range(60)]
    found = explore_universe("two growing, broken", 1000)
    world = Simulation(universes.small()["long"].scenario)
    prints: list[int] = []
    for event in (Event("submit", 0), STEP, Event("submit", 1), STEP, STEP, STEP):
        world.apply(event)
        prints.append(world.fingerprint())
    return (*logs, found, *prints)
