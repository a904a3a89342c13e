"""The driver against a real server of a fake engine, and against targets that misbehave."""

import asyncio
import time

import pytest

from jaxinfer.bench.load.calls import Call, Recipe, calls_of
from jaxinfer.bench.load.drive import drive
from jaxinfer.bench.load.events import EMPTY, figures
from jaxinfer.bench.load.grpc import GrpcTarget
from jaxinfer.bench.load.lengths import Lengths
from jaxinfer.bench.load.measure import Rates, measure
from jaxinfer.bench.load.target import Ask, CallFailed, End, Part
from jaxinfer.errors import ClientError, Unreachable
from jaxinfer.host.workload import SLO
from tests.server.serving import running

RECIPE = Recipe(Lengths(4, 20), Lengths(3, 9), num_requests=20, rate_per_s=400.0)


def against(body, ask=None, **dials):
    """Runs `body(target, engine)` against a fake engine behind gRPC."""

    async def main():
        async with (
            running(**dials) as server,
            GrpcTarget(server.target, ask or Ask()) as target,
        ):
            return await body(target, server.engine)

    return asyncio.run(main())


class Scripted:
    """A target without a server: it takes as long as it is told, and answers what it is told."""

    def __init__(self, *events, blocks_s=0.0):
        self.events, self.blocks_s = events, blocks_s
        self.calls, self.num_open, self.most_open = [], 0, 0

    async def stream(self, call):
        self.calls.append(call)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        time.sleep(self.blocks_s)  # a client that is too busy to send in time
        try:
            for event in self.events:
                await asyncio.sleep(0)
                if isinstance(event, CallFailed):
                    raise event
                yield event
        finally:
            self.num_open -= 1


def test_an_open_loop_counts_every_token_of_every_request():
    calls = calls_of(RECIPE, vocab_size=256)
    run = against(lambda target, engine: drive(target, calls), step_s=0.002)
    assert [one.number for one in run.records] == list(range(20))
    for call, one in zip(calls, run.records, strict=True):
        assert one.is_ok and one.planned_s == call.at_s <= one.sent_s < one.chunks_s[0]
        assert one.num_output_tokens == call.num_output_tokens >= len(one.chunks_s)
        assert one.num_prompt_tokens == len(call.prompt)
        assert one.num_cached_tokens == len(call.prompt) // 2  # as the fake engine says
        assert one.queue_s == 0 and one.prefill_s > 0
    assert run.lag_s.count > 0


def test_the_server_gets_what_the_workload_says():
    calls = calls_of(RECIPE, vocab_size=256)

    async def body(target, engine):
        await drive(target, calls)
        return engine.submitted

    submitted = sorted(against(body), key=lambda one: one.sampling.seed)
    assert [one.prompt for one in submitted] == [one.prompt for one in calls]
    assert [one.sampling.max_tokens for one in submitted] == [o.num_output_tokens for o in calls]
    assert all(one.sampling.ignore_eos and one.sampling.temperature == 0 for one in submitted)


def test_refused_requests_are_counted_by_their_status_and_are_not_good():
    calls = [Call(number, 0.0, (5, 6, 7), 1) for number in range(12)]

    async def body(target, engine):
        return await drive(target, calls), len(engine.submitted)

    run, num_taken = against(body, step_s=0.3, max_live=5)
    found = figures(run.records, SLO(ttft_s=60.0))
    assert 5 <= num_taken < 12
    assert found.failures == {"RESOURCE_EXHAUSTED": 12 - num_taken} and found.num_ok == num_taken
    assert found.attainment == num_taken / 12
    assert any("requests are waiting" in one.message for one in run.records)


def test_a_step_that_fails_and_a_deadline_have_statuses_of_their_own():
    calls = [Call(0, 0.0, (5,), 4)]

    async def failing(target, engine):
        engine.fail_with = "the device is gone"
        return await drive(target, calls)

    (one,) = against(failing).records
    assert (one.status, one.chunks_s) == ("INTERNAL", [])
    late = against(lambda t, e: drive(t, calls), ask=Ask(timeout_s=0.05), step_s=0.2)
    assert late.records[0].status == "DEADLINE_EXCEEDED"


def test_a_closed_loop_keeps_so_many_requests_under_way():
    target = Scripted(Part(), Part(), End(3, 2))
    calls = [Call(number, 0.0, "text", 2) for number in range(10)]
    run = asyncio.run(drive(target, calls, concurrency=3))
    assert target.most_open == 3 and [call.number for call in target.calls] == list(range(10))
    assert figures(run.records, SLO()).num_ok == 10


def test_a_client_that_holds_requests_back_says_so_and_counts_it():
    calls = [Call(number, 0.0, "text", 1) for number in range(5)]
    run = asyncio.run(drive(Scripted(Part(), End(1, 1), blocks_s=0.02), calls))
    late = [one.lateness_s for one in run.records]
    assert late == sorted(late) and late[-1] >= 4 * 0.02
    assert all(one.ttft_s >= one.lateness_s + 0.02 for one in run.records)


def test_requests_wait_for_their_time_and_for_nobody_else():
    target = Scripted(Part(), End(1, 1))
    calls = [Call(0, 0.0, "a", 1), Call(1, 0.05, "b", 1), Call(2, 0.05, "c", 1)]
    run = asyncio.run(drive(target, calls))
    assert all(one.sent_s >= one.planned_s for one in run.records)
    assert [one.planned_s for one in run.records] == [0.0, 0.05, 0.05]


def test_an_answer_without_tokens_is_a_failure_and_what_came_before_one_is_kept():
    calls = [Call(0, 0.0, "text", 3)]
    (empty,) = asyncio.run(drive(Scripted(End(4, 0)), calls)).records
    assert empty.status == EMPTY and not empty.is_ok
    cut = Scripted(Part(2), Part(), CallFailed("CUT", "gone"))
    (one,) = asyncio.run(drive(cut, calls)).records
    assert (one.status, one.message, one.num_output_tokens) == ("CUT", "gone", 3)
    assert len(one.chunks_s) == 2 and one.ended_s >= one.chunks_s[-1]


def test_a_warm_up_goes_first_with_other_prompts_and_does_not_count():
    async def body(target, engine):
        run, _ = await measure(target, RECIPE, vocab_size=256, slo=SLO(), num_warmup=3)
        return run, engine.submitted

    run, submitted = against(body)
    assert len(run.records) == 20 and len(submitted) == 23
    counted = {one.prompt for one in calls_of(RECIPE, vocab_size=256)}
    assert not counted & {one.prompt for one in submitted[:3]}


def test_a_warm_up_that_nobody_answers_ends_the_measurement():
    with pytest.raises(ClientError, match="no request of the warm-up was answered: RESOURCE"):
        against(lambda t, e: measure(t, RECIPE, vocab_size=9, slo=SLO(), num_warmup=2), max_live=0)


def test_a_sweep_sends_other_prompts_at_each_rate_and_keeps_the_best_run():
    async def body(target, engine):
        rates = Rates(low=100.0, high=200.0, share=0.99, seconds=None)
        found = await measure(target, RECIPE, vocab_size=256, slo=SLO(ttft_s=60.0), rates=rates)
        return *found, engine.submitted

    run, swept, submitted = against(body)
    assert [trial.rate_per_s for trial in swept.trials] == [100.0, 200.0]
    assert swept.is_open and run is swept.trials[1].run
    assert len({one.prompt for one in submitted}) == 40


def test_no_server_there_is_said_at_once():
    async def main():
        async with GrpcTarget("127.0.0.1:9", Ask(timeout_s=5.0)) as target:
            await target.model()

    with pytest.raises(Unreachable, match="no server answers"):
        asyncio.run(main())
