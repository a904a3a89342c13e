"""Random scenarios: no invariant breaks, the same one runs the same way, rare things happen."""

import collections
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.host.scenario import Event, Scenario, shrink
from jaxinfer.host.simulator import run
from tests.sim import work
from tests.sim.swarm import random_scenario

REGRESSIONS = Path(__file__).parent / "regressions"


def test_random_scenarios_break_no_invariant_and_reach_every_rare_path(workers):
    found = workers.map(work.run_seeds, work.split(10_000))
    seen = sum(map(collections.Counter, found), collections.Counter())
    assert len(seen) == 14, sorted(seen)
    assert min(seen.values()) >= 100, seen


@pytest.mark.full
def test_a_hundred_thousand_random_scenarios_break_no_invariant(workers):
    list(workers.map(work.run_seeds, work.split(100_000)))


def test_a_thousand_scenarios_run_the_same_way_again(workers):
    assert sum(workers.map(work.run_twice, work.split(1000))) == 1000


def test_a_scenario_runs_the_same_way_in_every_process(workers):
    for seed in range(20):
        simulation = run(random_scenario(seed))
        assert simulation.log_hash == workers.submit(work.log_hash, seed).result()


def test_nothing_depends_on_the_hash_seed_of_a_process():
    script = "from tests.sim import work; print(work.trace())"
    said = set()
    for seed in ("0", "1", "4294967295"):
        process = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        said.add(process.stdout)
    assert len(said) == 1, said


@pytest.mark.parametrize("path", sorted(REGRESSIONS.glob("*.json")), ids=lambda path: path.stem)
def test_what_once_failed_does_not_fail_again(path):
    run(Scenario.from_json(path.read_text()))


def test_a_failing_scenario_shrinks_to_what_matters():
    def ends_in_error(candidate: Scenario) -> bool:
        return "error" in run(candidate).ended.values()

    scenario = next(
        scenario
        for scenario in map(random_scenario, range(1000))
        if len(scenario.events) > 25 and ends_in_error(scenario)
    )
    small = shrink(scenario, ends_in_error)
    assert [event.kind for event in small.events] == ["submit", "nan"]
    assert len(small.requests) == 1


def test_an_event_that_does_not_apply_changes_nothing():
    scenario = random_scenario(3)
    idle = dataclasses.replace(
        scenario,
        events=(Event("cancel", 0), Event("nan", 0), Event("fail", phase="read"), Event("step")),
    )
    simulation = run(idle)
    assert not simulation.sequences and not simulation.num_failures
