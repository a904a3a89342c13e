"""Random deadlines in virtual time: what was spent on requests that could not make it."""

import collections
import dataclasses
import random

from jaxinfer.host import invariants
from jaxinfer.host.plan import Plan
from jaxinfer.host.request import FinishReason
from jaxinfer.host.scenario import STEP, Event
from jaxinfer.host.simulator import Simulation
from tests.sim.swarm import random_scenario

PACE = (0.01, 0.05)


class Watched(Simulation):
    """Counts what plans do for requests with a deadline."""

    def __init__(self, scenario) -> None:
        super().__init__(scenario)
        self.counts: collections.Counter[str] = collections.Counter()
        self.planned: set[int] = set()  # orders that took part in any plan
        self.unmeetable: set[int] = set()  # orders that could not make it when they arrived

    def apply(self, event: Event) -> None:
        """As ever; an arrival is judged by the contents of the device's pages."""
        num_before = len(self.sequences)
        super().apply(event)
        for sequence in self.sequences[num_before:]:
            deadline_s = sequence.request.deadline_s
            if deadline_s is not None:
                self.counts["deadlines"] += 1
                if self.now_s + invariants.least_wait_s(self, sequence) > deadline_s:
                    self.unmeetable.add(sequence.order)

    def _planned(self, plan: Plan) -> None:
        taking_part = [*(chunk.sequence for chunk in plan.chunks), *plan.decodes]
        for sequence in taking_part:
            deadline_s = sequence.request.deadline_s
            self.counts["late"] += deadline_s is not None and deadline_s <= self.now_s
            self.planned.add(sequence.order)
        for sequence in self.scheduler.waiting:
            deadline_s = sequence.request.deadline_s
            self.counts["late in line"] += deadline_s is not None and deadline_s <= self.now_s
        super()._planned(plan)


def run(seed: int) -> collections.Counter[str]:
    """One scenario in which every request has a deadline of its own."""
    scenario, rng = random_scenario(seed), random.Random(seed)
    requests = tuple(
        dataclasses.replace(request, deadline_s=rng.uniform(0.0, 1.5))
        for request in scenario.requests
    )
    steps = [STEP] * 8
    events = [*(Event("submit", index) for index in range(len(requests))), *steps]
    rng.shuffle(events)
    world = Watched(
        dataclasses.replace(scenario, requests=requests, events=tuple(events), pace=PACE)
    )
    for event in events:
        world.apply(event)
    world.drain()
    counts = world.counts
    counts["unmeetable"] = len(world.unmeetable)
    counts["unmeetable, planned"] = len(world.unmeetable & world.planned)
    counts["ended early"] = len(world.hopeless)
    counts["ended late"] = list(world.ended.values()).count(FinishReason.DEADLINE)
    return counts
