"""The real scheduler, pages and prefix cache under a fake model, virtual time and chosen faults.

A scenario is data; what comes of it is a function of it alone. The invariants of host/invariants.py
are checked after every event.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items

from jaxinfer.host import invariants
from jaxinfer.host.fake_device import Row, packed_rows, plain_rows
from jaxinfer.host.loop import Loop, Sampled
from jaxinfer.host.plan import Plan
from jaxinfer.host.request import FinishReason
from jaxinfer.host.scenario import STEP, Event, Phase, Scenario
from jaxinfer.host.sequence import Sequence
from jaxinfer.host.world import Part, UnderWay, World


class DeviceFailed(Exception):
    """The fake device's step failed: its pages are lost."""


def run(scenario: Scenario, *, drain: bool = True) -> "Simulation":
    """Runs a scenario; raises AssertionError where an invariant is broken.

    With `drain` plain steps follow until every request has ended.
    """
    simulation = Simulation(scenario)
    for event in scenario.events:
        simulation.apply(event)
    if drain:
        simulation.drain()
    return simulation


class Simulation(World):
    """A world in which events happen, in the order in which an engine lets them."""

    def __init__(self, scenario: Scenario, *, is_logged: bool = True) -> None:
        super().__init__(scenario, is_logged=is_logged)
        self._event = STEP
        self._before: invariants.Before | None = None
        self.loop = Loop(
            self.scheduler,
            overlap=scenario.config.overlap,
            dispatch=self._dispatch,
            read=self._read,
            take=self._take,
            planned=self._planned,
        )

    def apply(self, event: Event) -> None:
        """Lets one event happen and checks the state after it."""
        self._event = event
        self.num_events += 1
        if event.kind == "submit":
            self._submit(event.request)
        elif event.kind == "cancel" and not event.phase:
            self.end(event.request, FinishReason.CANCELLED)
        elif event.kind == "time":
            self.now_s = max(self.now_s, event.at)
        elif event.kind == "flush":
            self.scheduler.prefix.flush()
            self.num_forgotten += 1
        else:
            self._step()
        invariants.check_state(self)

    def drain(self) -> int:
        """Steps until all requests have ended; returns how many steps that took."""
        bound = self.bound()
        for count in range(bound + 1):
            if self.is_empty:
                invariants.check_drained(self)
                return count
            self.apply(STEP)
        raise AssertionError(f"{len(self.live)} requests are still live after {bound} steps")

    def end(self, index: int, reason: FinishReason) -> None:
        """Ends a live request from outside, as Engine.cancel does."""
        sequence = self.live.get(index)
        if sequence is not None:
            self.scheduler.finish(sequence, reason)
            self._close(sequence)

    def _submit(self, index: int) -> None:
        if index in self.live:
            return
        sequence = self.scheduler.add(self.scenario.requests[index])
        assert sequence.order == len(self.sequences)
        self.sequences.append(sequence)
        self.indices.append(index)
        self.live[index] = sequence
        self.emitted[sequence.order] = 0

    def _step(self) -> None:
        """Engine.step: what is overdue ends, then one turn of the loop, which may fail."""
        for sequence in self.scheduler.overdue(self.now_s, self.pace):
            invariants.check_hopeless(self, sequence)
            self.end(self.indices[sequence.order], FinishReason.DEADLINE)
        invariants.check_deadlines(self)
        self._before, self.last_plan = invariants.Before(self), None
        try:
            self.loop.step(drain=self._event.kind == "drain")
        except DeviceFailed:
            self.num_failures += 1
            self.num_forgotten += 1
            self.note("failed")
            self.device.empty(range(self.config.num_pages))
            self.returned = list(self.device.cells)
            self.loop.restart()
        self._let_time_pass()
        self._before = None

    def _let_time_pass(self) -> None:
        """A step takes as long as the scenario's pace says."""
        if self.last_plan is not None and not self.last_plan.is_empty:
            num_tokens = sum(chunk.length for chunk in self.last_plan.chunks)
            self.now_s += max(self.pace.step_s, num_tokens * self.pace.prefill_token_s)

    def _planned(self, plan: Plan) -> None:
        assert self._before is not None
        invariants.check_plan(self, plan, self._before)
        self.last_plan = plan
        for sequence in plan.preempt:
            self.preempted[sequence.order] = self.preempted.get(sequence.order, 0) + 1
        for admission in plan.admit:
            for page in admission.shared:
                self.idle_since.pop(page, None)
        self.note(
            tuple(one.order for one in plan.preempt),
            tuple((one.order, slot, shared) for one, slot, shared in plan.admit),
            tuple((chunk.sequence.order, chunk.start, chunk.size) for chunk in plan.chunks),
            tuple(one.order for one in plan.decodes),
        )

    def _dispatch(self, plan: Plan) -> UnderWay:
        assert self._before is not None
        invariants.check_begun(self, plan, self._before)
        self.hand_out(invariants.taken_pages(plan, self._before))
        rows = (
            packed_rows(self.table, plan, self.config)
            if self.table is not None
            else plain_rows(plan, eos=self.eos)
        )
        parts: list[Part] = []
        tokens: list[int] = []
        written: list[tuple[int, int]] = []
        broken = self.live.get(self._event.request) if self._event.kind == "nan" else None
        for sequence, row in rows:
            self._check_row(sequence, row)
            if sequence is broken:
                self.struck[sequence.order] = None
                self.num_forgotten += 1
            token = self.device.run(row, is_broken=sequence is broken)
            if row.is_sampled:
                tokens.append(token)
            written += self._book_writes(sequence, row)
            if row.is_sampled and row.tokens is not None:  # a last chunk is a part
                parts.append(Part(tuple(tokens), tuple(written)))
                tokens, written = [], []
        if self._event.kind == "fail" and not self._event.phase:
            raise DeviceFailed
        self._interrupt("dispatched")
        if tokens or written or not parts:
            parts.append(Part(tuple(tokens), tuple(written)))
        return UnderWay(tuple(parts), self.num_events)

    def _book_writes(self, sequence: Sequence, row: Row) -> list[tuple[int, int]]:
        size, cells = self.device.page_size, self.device.cells
        places = self.device.places(row)
        for position, place in enumerate(places, row.start):
            self.writers[place // size] = sequence.order
            self.depths[place // size] = position // size
        return [(place, cells[place]) for place in places]

    def _check_row(self, sequence: Sequence, row: Row) -> None:
        assert row.slot == sequence.slot, f"the row says slot {row.slot}, it has {sequence.slot}"
        held = len(sequence.pages)
        assert list(row.pages[:held]) == sequence.pages, f"{row.pages} is not {sequence.pages}"

    def _read(self, plan: Plan, under_way: UnderWay) -> Iterator[Items[int]]:
        if self._event.kind == "fail" and self._event.phase == "read":
            raise DeviceFailed
        for sequence in plan.sampled:
            self.tables[sequence.order] = tuple(sequence.pages)
        for part in under_way.parts:
            is_last = part is under_way.parts[-1]
            if self._event.kind == "fail" and self._event.phase == "part" and is_last:
                raise DeviceFailed
            for place, cell in self.landed(under_way._replace(parts=(part,))):
                self.returned[place] = cell
            self._interrupt("read")
            self.note(part.tokens)
            yield part.tokens

    def _take(self, sampled: Sampled) -> None:
        """Engine._read and _take: a token goes to its client, and some end their request."""
        sequence = sampled.sequence
        index = self.indices[sequence.order]
        if self.struck:
            invariants.check_known(self)
        if sampled.counts:
            invariants.check_token(self, sampled)
            self.emitted[sequence.order] += 1
            if str(sampled.token) in sequence.request.sampling.stop:
                if sequence.finish_reason is None:
                    self.scheduler.finish(sequence, FinishReason.STOP_STRING)
                elif sequence.finish_reason in (FinishReason.LENGTH, FinishReason.CONTEXT):
                    sequence.finish_reason = FinishReason.STOP_STRING
            if sequence.finish_reason is not None:
                self._close(sequence)
        elif self.live.get(index) is sequence and sampled.token < 0:
            self._close(sequence)
        self._interrupt("taken")

    def _close(self, sequence: Sequence) -> None:
        """A request's client learns that it has ended."""
        order, reason = sequence.order, sequence.finish_reason
        assert reason is not None
        invariants.check_end(self, sequence)
        self.ended[order] = reason
        del self.live[self.indices[order]]
        self.note(order, reason.value)

    def _interrupt(self, phase: Phase) -> None:
        event = self._event
        if event.kind == "cancel" and event.phase == phase:
            self.end(event.request, FinishReason.CANCELLED)
