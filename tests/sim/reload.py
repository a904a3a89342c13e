"""A simulation whose scheduler is saved, loaded elsewhere, and finds its pages computed again."""

import json

from jaxinfer.host import state
from jaxinfer.host.fake_device import EMPTY, Row
from jaxinfer.host.scenario import Event, Scenario
from jaxinfer.host.simulator import Simulation


def run(scenario: Scenario, *, at: set[int], is_loaded: bool) -> Simulation:
    """Runs a scenario; before the events `at` the state is saved, and loaded if `is_loaded`."""
    simulation = Simulation(scenario)
    for number, event in enumerate(scenario.events):
        if number in at:
            simulation.apply(Event("drain"))
            saved = json.dumps(state.save(simulation.scheduler))
            simulation.num_forgotten += 1
            if is_loaded:
                load(simulation, saved)
        simulation.apply(event)
    simulation.drain()
    return simulation


def load(simulation: Simulation, saved: str) -> None:
    """Puts a loaded scheduler into the place of the old one, and empties the device's pages."""
    eos = simulation.scenario.eos
    scheduler = state.load(json.loads(saved), simulation.config, eos_token_ids=eos)
    assert json.dumps(state.save(scheduler)) == saved
    simulation.scheduler = simulation.loop.scheduler = scheduler
    for sequence in (*scheduler.running, *scheduler.waiting):
        simulation.sequences[sequence.order] = sequence
        simulation.live[simulation.indices[sequence.order]] = sequence
    _fill(simulation)


def _fill(simulation: Simulation) -> None:
    """Prefills what a new device would have to, and checks that it holds what the old one did."""
    scheduler, device = simulation.scheduler, simulation.device
    before, last = list(device.cells), list(device.last)
    device.empty(range(simulation.config.num_pages))
    device.last = [0] * len(last)
    for tokens, pages in scheduler.prefix.chains():
        device.run(_row(tuple(tokens), tuple(pages)))
    for sequence in scheduler.running:
        device.run(_row(tuple(sequence.tokens[: sequence.num_stored]), tuple(sequence.pages)))
        if not sequence.is_prefilling:
            device.last[sequence.slot] = sequence.tokens[-1]
            assert last[sequence.slot] == sequence.tokens[-1]
    size = device.page_size
    for page in scheduler.prefix.pages:
        places = slice(page * size, (page + 1) * size)
        assert device.cells[places] == before[places] and EMPTY not in device.cells[places]
    simulation.returned = list(device.cells)


def _row(tokens: tuple[int, ...], pages: tuple[int, ...]) -> Row:
    return Row(0, 0, tokens, pages, is_sampled=False, seed=0, banned=frozenset())
