"""Step times are fitted, and workloads predicted from them."""

import dataclasses
import random

import pytest

from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.host.cost_model import (
    CostModel,
    StepRecord,
    StepTimes,
    Work,
    fit,
    from_json,
    simulate,
    to_json,
)
from jaxinfer.host.loop import Loop
from jaxinfer.host.request import JAXINFER_DEFAULTS, Request, SamplingParams
from jaxinfer.host.scheduler import Scheduler
from jaxinfer.host.workload import (
    SLO,
    Arrival,
    Timeline,
    Workload,
    WorkloadSpec,
    draw,
    replay,
    summarise,
)

CONFIG = EngineConfig(
    num_slots=4,
    max_seq_len=256,
    prefill_chunks=(16, 64),
    max_prefill_tokens=64,
    prefill_per_decode=0,
    attention_block=16,
    cache=CacheConfig(page_size=16),
)
COST = CostModel(step_s=0.010, chunks=((16, 0.012), (64, 0.036)), context_token_s=1e-6, row_s=0.001)
LONE = Workload((Arrival(0.0, 60, 5),))


def random_works(count, *, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        sizes = tuple(rng.choice([16, 64]) for _ in range(rng.randint(0, 3)))
        context = sum(sizes) * rng.choice([16, 64, 128])
        yield Work(sizes, context, rng.randint(0, 4000), 8)


def test_a_fit_finds_the_costs_that_made_the_records():
    cost = fit(StepRecord(work, COST.seconds(work)) for work in random_works(300))
    assert cost.relative_error < 1e-6
    for work in random_works(50, seed=1):
        assert cost.seconds(work) == pytest.approx(COST.seconds(work), rel=1e-3)


def test_a_fit_of_noisy_records_has_no_negative_term_and_is_near():
    rng = random.Random(2)
    works = list(random_works(2000))
    cost = fit(StepRecord(work, COST.seconds(work) * rng.uniform(0.8, 1.25)) for work in works)
    assert (
        min(
            dataclasses.astuple(cost)[0],
            *(time for _, time in cost.chunks),
            *dataclasses.astuple(cost)[2:],
        )
        >= 0
    )
    assert 0.05 < cost.relative_error < 0.3
    for work in works[:50]:
        assert cost.seconds(work) == pytest.approx(COST.seconds(work), rel=0.08)


def test_a_fit_of_one_kind_of_step_is_its_mean_and_of_none_is_refused():
    cost = fit([StepRecord(Work((), 0, 128, 8), 0.5)] * 3)
    assert cost.step_s == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="no step was recorded"):
        fit([])


def test_a_lone_request_takes_its_prefill_and_its_decodes():
    seen = simulate(LONE, CONFIG, COST)
    first = 0.036
    assert seen.ttft_s.mean == pytest.approx(first), "it does not wait for the decode behind it"
    assert seen.num_requests == 1 and seen.num_refused == 0
    decodes = [0.011 + context * 1e-6 for context in (64, 64, 64, 64)]
    assert seen.e2e_s.mean == pytest.approx(first + sum(decodes))
    assert seen.tpot_s.mean == pytest.approx(sum(decodes) / 4)
    assert seen.output_tokens_per_s == pytest.approx(5 / seen.duration_s)


def test_host_and_edge_are_part_of_what_clients_see():
    slow = CostModel(step_s=0.01, host_s=0.1, edge_s=0.5)
    seen = simulate(LONE, CONFIG, slow)
    assert seen.ttft_s.mean == pytest.approx(0.5 + 0.1 + 0.1 + 0.01, abs=0.1)
    assert seen.tpot_s.mean > 0.07


def test_shared_prefixes_and_more_slots_help():
    shared = draw(WorkloadSpec(12, 4, None, (200, 210), (9, 9), num_shared_tokens=192))
    alone = Workload(tuple(Arrival(0.0, one.num_prompt_tokens, 9) for one in shared.arrivals), 4)
    with_hits, without = (simulate(one, CONFIG, COST) for one in (shared, alone))
    assert with_hits.hit_rate > 0.5 and without.hit_rate == 0
    assert with_hits.ttft_s.mean < without.ttft_s.mean
    serial = draw(WorkloadSpec(12, 1, None, (9, 9), (20, 20)))
    many = Workload(serial.arrivals, 4)
    one, four = (simulate(load, CONFIG, COST).output_tokens_per_s for load in (serial, many))
    assert 2 < four / one < 4


def test_goodput_falls_with_the_rate_and_refusals_count():
    slo = SLO(ttft_s=0.3, tpot_s=0.05)
    spec = WorkloadSpec(60, None, 1.0, (20, 120), (10, 40))
    calm = simulate(draw(spec), CONFIG, COST, slo=slo)
    assert calm.goodput_per_s == pytest.approx(calm.requests_per_s)
    crowd = simulate(draw(dataclasses.replace(spec, rate_per_s=50.0)), CONFIG, COST, slo=slo)
    assert crowd.goodput_per_s < 0.5 * crowd.requests_per_s
    assert crowd.ttft_s.p50 <= crowd.ttft_s.p90 <= crowd.ttft_s.p99
    assert simulate(Workload((Arrival(0.0, 999, 2),)), CONFIG, COST).num_refused == 1


def test_a_prediction_is_the_same_every_time():
    load = draw(WorkloadSpec(40, None, 9.0, (5, 99), (1, 30)))
    assert simulate(load, CONFIG, COST) == simulate(load, CONFIG, COST)


def test_figures_follow_their_definitions():
    timelines = [Timeline(0.0, [1.0, 1.5, 3.0]), Timeline(1.0, [2.0])]
    seen = summarise(timelines, slo=SLO(e2e_s=2.0), num_refused=1)
    assert seen.ttft_s.mean == 1.0
    assert seen.tpot_s.mean == 1.0
    assert seen.itl_s.mean == 1.0
    assert seen.e2e_s.p50 == 2.0
    assert (seen.duration_s, seen.num_requests, seen.num_refused) == (3.0, 2, 1)
    assert seen.goodput_per_s == pytest.approx(1 / 3)


def test_a_recorder_counts_from_dispatch_or_from_the_step_before():
    scheduler, recorder, now = Scheduler(CONFIG), StepTimes(CONFIG), iter((1.0, 2.0, 5.0, 6.5))

    def dispatch(plan):
        recorder.dispatched(plan, next(now))

    def read(plan, handle):
        recorder.returned(next(now))
        return [[0] * len(plan.sampled)]

    loop = Loop(scheduler, overlap=True, dispatch=dispatch, read=read, take=lambda sampled: None)
    sampling = SamplingParams(max_tokens=3).or_else(JAXINFER_DEFAULTS)
    scheduler.add(Request("a", tuple(range(40)), sampling))
    for _ in range(3):
        loop.step()
    first, second = recorder.records
    assert first == (Work((64,), 64 * 48, 48, 1), 4.0)
    assert second == (Work((), 0, 48, 1), 1.5)


def test_a_cost_model_survives_its_file_and_others_are_refused():
    assert from_json(to_json(COST)) == COST
    for text in ("", "[]", "{}", to_json(COST).replace("row_s", "rows"), '{"step_s": "x"}'):
        with pytest.raises(ConfigError, match="cost model"):
            from_json(text)
    assert from_json(to_json(CostModel(0.0, row_s=1.0))).row_s == 1.0
    for bad in (CostModel(0.0, host_s=1.0), dataclasses.replace(COST, row_s=-1.0)):
        with pytest.raises(ConfigError, match="finite and at least 0"):
            from_json(to_json(bad))


def test_a_workload_is_drawn_within_its_bounds_and_the_same_every_time():
    spec = WorkloadSpec(50, None, 5.0, (30, 60), (2, 9), num_shared_tokens=16, seed=3)
    load = draw(spec)
    assert load == draw(spec) != draw(dataclasses.replace(spec, seed=4))
    assert load.concurrency is None and len(load.arrivals) == 50
    assert all(30 <= one.num_prompt_tokens <= 60 for one in load.arrivals)
    assert all(2 <= one.num_output_tokens <= 9 for one in load.arrivals)
    times = [one.at_s for one in load.arrivals]
    assert times == sorted(times) and 5 < times[-1] < 20
    given = replay([(5, 1), (40, 2)], dataclasses.replace(spec, rate_per_s=None, concurrency=2))
    assert given.concurrency == 2
    assert [one.num_shared_tokens for one in given.arrivals] == [5, 16]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate_per_s": 1.0}, "a rate or a concurrency, and not both"),
        ({"concurrency": None}, "a rate or a concurrency"),
        ({"concurrency": None, "rate_per_s": float("nan")}, "the rate is nan"),
        ({"concurrency": 0}, "concurrency of the workload is 0"),
        ({"num_requests": 0}, "num_requests of the workload is 0"),
        ({"num_prompt_tokens": (9, 8)}, "num_prompt_tokens of the workload is 9-8"),
        ({"num_shared_tokens": 20}, "20 shared tokens leave none"),
    ],
)
def test_a_workload_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(WorkloadSpec(4, 2), **changes)


def test_a_chunk_of_another_size_lies_between_or_in_proportion():
    assert [COST.chunk_s(size) for size in (8, 16, 40, 64, 128)] == pytest.approx(
        [0.012, 0.012, 0.024, 0.036, 0.072]
    )
    assert CostModel(1.0).chunk_s(8) == 0.0


def test_a_few_steps_that_were_held_up_hardly_count():
    works = list(random_works(300))
    times = [COST.seconds(work) * (20 if at % 25 == 0 else 1) for at, work in enumerate(works)]
    cost = fit(map(StepRecord, works, times))
    for work in works[:50]:
        assert cost.seconds(work) == pytest.approx(COST.seconds(work), rel=0.05)
