"""Small universes in every order of events: no invariant breaks and nothing ever gets stuck."""

import pytest

from jaxinfer.host.world import MAX_PREEMPTIONS
from tests.sim import universes, work


def test_every_order_of_three_requests(workers):
    found = explore(workers, universes.small(), max_transitions=60_000)
    assert all(one.is_complete for one in found)
    assert sum(one.num_transitions for one in found) > 42_000
    assert max(one.most_preemptions for one in found) > 1


@pytest.mark.full
def test_every_order_of_four_requests(workers):
    found = explore(workers, universes.large(), max_transitions=400_000)
    assert all(one.is_complete for one in found)
    assert sum(one.num_transitions for one in found) > 1_000_000


def explore(workers, names, *, max_transitions):
    bounds = [max_transitions] * len(names)
    found = list(workers.map(work.explore_universe, names, bounds))
    for one in found:
        assert one.is_complete or one.num_transitions == max_transitions
        assert one.most_preemptions <= MAX_PREEMPTIONS
    return found
