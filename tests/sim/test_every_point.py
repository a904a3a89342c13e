"""At whatever point a request ends, there is one end for each, and no page is lost."""

import collections

import pytest

from tests.sim import work
from tests.sim.points import bases


def test_a_sample_of_all_points(workers):
    seen = run(workers, every=11)
    assert seen.total() >= 1000
    assert {"cancelled", "deadline", "error"} < set(seen)


@pytest.mark.full
def test_every_point(workers):
    assert run(workers, every=1).total() >= 10_000


def run(workers, *, every):
    count = len(bases())
    found = workers.map(work.run_points, range(count), [0] * count, [every] * count)
    return sum(map(collections.Counter, found), collections.Counter())
