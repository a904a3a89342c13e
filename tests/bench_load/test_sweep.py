"""The sweep against servers whose edge is known."""

import asyncio

import pytest

from jaxinfer.bench.load.drive import Run
from jaxinfer.bench.load.events import Record, figures, spread
from jaxinfer.bench.load.sweep import sweep
from jaxinfer.host.workload import SLO


def swept(edge, *, low=1.0, high=64.0, share=0.99):
    """A server that answers within the bound up to `edge` requests a second."""
    asked = []

    async def measure(rate, number):
        assert number == len(asked)
        asked.append(rate)
        first_s = 0.1 if rate <= edge else 2.0
        records = (Record(0, 0.0, 0.0, [first_s], first_s, num_output_tokens=1),)
        return Run("now", records, spread([])), figures(records, SLO(ttft_s=1.0))

    return asyncio.run(sweep(measure, low=low, high=high, share=share)), asked


@pytest.mark.parametrize("edge", [1.0, 1.05, 3.3, 8.0, 40.0])
def test_it_finds_the_edge_to_a_tenth_and_tries_few_rates(edge):
    found, asked = swept(edge)
    assert found.best.rate_per_s <= edge < found.best.rate_per_s * 1.1
    assert len(asked) == len(set(asked)) <= 12
    assert max(asked) <= 4 * edge  # no rate far beyond what the server can do
    rates = [trial.rate_per_s for trial in found.trials]
    assert rates == sorted(rates) and not found.is_open


def test_a_server_that_is_too_slow_for_the_lowest_rate_has_no_best():
    found, asked = swept(0.5)
    assert found.best is None and asked == [1.0]


def test_a_server_that_keeps_up_to_the_end_says_that_the_end_was_not_found():
    found, asked = swept(1000.0, high=10.0)
    assert found.is_open and found.best.rate_per_s == 10.0 and asked == [1.0, 2.0, 4.0, 8.0, 10.0]
