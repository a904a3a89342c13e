"""Planted bugs: the simulator finds each of them, or it could not be trusted with real ones."""

from tests.sim import work
from tests.sim.mutants import MUTANTS

MAX_SCENARIOS = 5000


def test_every_planted_bug_is_found(workers):
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 30
    seeds = workers.map(work.hunt, names, [MAX_SCENARIOS] * len(names))
    missed = [name for name, seed in zip(names, seeds, strict=True) if seed is None]
    assert not missed, f"not found in {MAX_SCENARIOS} scenarios: {missed}"
