"""Figures of event lists made by hand, with answers known beforehand."""

import numpy as np
import pytest

from jaxinfer.bench.load.events import (
    EMPTY,
    Record,
    figures,
    is_good,
    missed,
    peak_in_flight,
    spread,
)
from jaxinfer.host.workload import SLO


def record(number, planned_s, sent_s, chunks_s, *, num_output=None, status="OK", ended_s=None):
    return Record(
        number,
        planned_s,
        sent_s,
        list(chunks_s),
        ended_s if ended_s is not None else (chunks_s or [sent_s])[-1],
        status,
        num_prompt_tokens=10,
        num_output_tokens=len(chunks_s) if num_output is None else num_output,
        num_cached_tokens=4,
        queue_s=0.25 if status == "OK" else None,
    )


# Planned at 0, 1 and 2; the client sends the second one half a second late; the third is refused.
RECORDS = [
    record(0, 0.0, 0.0, [0.5, 0.6, 0.8]),
    record(1, 1.0, 1.5, [2.0, 3.0], num_output=5),
    record(2, 2.0, 2.0, [], status="RESOURCE_EXHAUSTED", ended_s=2.01),
]


def test_times_count_from_the_planned_arrival_not_from_the_sending():
    late = RECORDS[1]
    assert (late.ttft_s, late.e2e_s, late.lateness_s) == (1.0, 2.0, 0.5)


def test_tpot_is_by_tokens_and_itl_by_parts():
    assert RECORDS[0].tpot_s == pytest.approx(0.15)
    assert RECORDS[1].tpot_s == 0.25  # five tokens in two parts: four gaps in a second
    assert record(0, 0.0, 0.0, [0.5]).tpot_s is None
    found = figures(RECORDS, SLO())
    assert found.itl_s.count == 3 and found.itl_s.max == 1.0
    assert found.itl_s.mean == pytest.approx(1.3 / 3)


def test_the_figures_of_a_list_made_by_hand():
    found = figures(RECORDS, SLO(ttft_s=0.75))
    assert (found.num_requests, found.num_ok) == (3, 2)
    assert found.failures == {"RESOURCE_EXHAUSTED": 1}
    assert found.duration_s == 3.0
    assert found.offered_per_s == 1.0
    assert found.requests_per_s == pytest.approx(2 / 3)
    assert found.output_tokens_per_s == pytest.approx(8 / 3)
    assert found.total_tokens_per_s == pytest.approx(28 / 3)
    assert found.goodput_per_s == pytest.approx(1 / 3)
    assert found.attainment == pytest.approx(1 / 3)  # of three: the refused one is in it
    assert found.missed == {"ttft": 1}
    assert (found.ttft_s.count, found.ttft_s.p50) == (2, 0.75)
    assert found.queue_s.count == 2 and found.prefill_s.count == 0
    assert found.lateness_s.count == 3 and found.lateness_s.max == 0.5
    assert (found.num_prompt_tokens, found.num_cached_tokens) == (20, 8)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (SLO(ttft_s=1.0), True),  # at the bound is within it
        (SLO(ttft_s=0.999), False),
        (SLO(tpot_s=0.25), True),
        (SLO(tpot_s=0.24), False),
        (SLO(e2e_s=2.0, ttft_s=1.0, tpot_s=0.25), True),
        (SLO(e2e_s=1.99, ttft_s=1.0), False),
        (SLO(), True),
    ],
)
def test_a_request_is_good_if_it_keeps_every_bound(slo, good):
    assert is_good(RECORDS[1], slo) is good


def test_a_failed_request_is_never_good_and_one_token_keeps_any_tpot():
    assert not is_good(RECORDS[2], SLO())
    one = record(0, 0.0, 0.0, [0.5])
    assert is_good(one, SLO(tpot_s=1e-9)) and missed([one], SLO(tpot_s=1e-9)) == {"tpot": 0}


def test_percentiles_are_those_of_numpy():
    values = np.random.default_rng(0).exponential(size=997).tolist()
    found = spread(values)
    expected = np.percentile(values, (50, 90, 99), method="linear")
    assert (found.p50, found.p90, found.p99) == tuple(expected)
    assert found.mean == pytest.approx(sum(values) / len(values)) and found.max == max(values)
    assert spread([1.0, 2.0, None]).p90 == pytest.approx(1.9)
    assert spread([]).count == 0


def test_requests_under_way_are_counted_from_when_they_had_to_go():
    assert peak_in_flight(RECORDS) == 2
    assert peak_in_flight([record(n, float(n), float(n), [n + 1.0]) for n in range(5)]) == 1


def test_a_run_of_failures_has_figures_too():
    found = figures([record(0, 0.0, 0.0, [], status=EMPTY, ended_s=0.5)], SLO(ttft_s=1.0))
    assert (found.num_ok, found.attainment, found.goodput_per_s) == (0, 0.0, 0.0)
    assert found.failures == {EMPTY: 1} and found.ttft_s.count == 0
    assert figures([], SLO()).num_requests == 0
