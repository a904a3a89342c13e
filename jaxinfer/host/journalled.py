"""A simulation that keeps a journal, as an engine does: what it did can be run on a real model."""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import asdict
from pathlib import Path

from jaxinfer.host.journal import Memory, Recorder
from jaxinfer.host.plan import Plan
from jaxinfer.host.scenario import Event, Scenario
from jaxinfer.host.segments import Segment
from jaxinfer.host.sequence import Sequence
from jaxinfer.host.simulator import Simulation
from jaxinfer.host.world import UnderWay


def record(scenario: Scenario) -> Segment:
    """Runs a scenario to its end and returns its journal."""
    simulation = Journalled(scenario)
    for event in scenario.events:
        simulation.apply(event)
    simulation.drain()
    header = {
        "model": "fake",
        "engine": asdict(scenario.config),
        "eos_token_ids": list(scenario.eos),
        "prompts": "keep",
        "state": {},
    }
    return Segment(Path("simulation"), header, simulation.memory.records, is_torn=False)


class Journalled(Simulation):
    """Events are those of an engine: a cancel comes between two steps."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.memory = Memory()
        self._recorder = Recorder(self.memory)

    def apply(self, event: Event) -> None:
        """Lets one event happen, and tells it to the journal."""
        assert not (event.kind == "cancel" and event.phase), "an engine has no such event"
        sequence = self.live.get(event.request)
        if event.kind == "cancel" and sequence is not None:
            self._recorder.cancelled(sequence.order)
        if event.kind == "flush":
            self._recorder.flushed()
        super().apply(event)

    def _submit(self, index: int) -> None:
        num_before = len(self.sequences)
        super()._submit(index)
        if len(self.sequences) > num_before:
            self._recorder.submitted(self.sequences[-1])

    def _step(self) -> None:
        num_failures = self.num_failures
        self._recorder.begun(self.now_s, self.pace)
        super()._step()
        if self.num_failures > num_failures:
            self._recorder.failed(self.loop.phase)
        self._recorder.close(drained=False)

    def _planned(self, plan: Plan) -> None:
        super()._planned(plan)
        self._recorder.planned(plan)

    def _dispatch(self, plan: Plan) -> UnderWay:
        self._recorder.booked(plan)
        return super()._dispatch(plan)

    def _read(self, plan: Plan, under_way: UnderWay) -> Iterator[Items[int]]:
        for tokens in super()._read(plan, under_way):
            self._recorder.returned(plan, tokens)
            yield tokens

    def _close(self, sequence: Sequence) -> None:
        super()._close(sequence)
        self._recorder.ended(sequence)
