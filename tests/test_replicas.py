"""Engines beside each other: where requests go, and what others see of one in trouble."""

import time
from collections.abc import Callable

import pytest

from jaxinfer import sharding
from jaxinfer.config import MeshConfig
from jaxinfer.errors import ConfigError, Draining, DuplicateRequest, QueueFull
from jaxinfer.host.request import FinishReason, Output
from jaxinfer.replicas import Replicas, numbered
from jaxinfer.server.served import EngineLike
from jaxinfer.server.watch import Watch
from tests import tiny
from tests.server.fake_engine import FakeEngine

SLACK = 2


class World:
    """Replicas of fake engines, and what they have delivered."""

    def __init__(self, count: int, **engine) -> None:
        self.engines: list[FakeEngine] = []
        self.outputs: list[Output] = []
        self.ends: list[Exception | None] = []

        def make(deliver: Callable[[list[Output]], None]) -> FakeEngine:
            self.engines.append(FakeEngine(deliver, **engine))
            return self.engines[-1]

        self.replicas = Replicas([make] * count, self.outputs.extend, page_size=4, slack=SLACK)
        self.replicas.start(self.ends.append)

    def hold(self, at: int) -> None:
        self.engines[at].gate.clear()

    def submit(self, name: str, prompt: tuple[int, ...] = (3,), **sampling) -> int:
        """Returns where it went."""
        self.replicas.submit(tiny.make_request(name, prompt, **sampling))
        (at,) = (
            at
            for at, engine in enumerate(self.engines)
            if name in [request.request_id for request in engine.submitted]
        )
        return at

    def until(self, condition: Callable[[], object]) -> None:
        end_s = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end_s
            time.sleep(0.002)

    def ended(self) -> dict[str, FinishReason]:
        return {one.request_id: one.finish_reason for one in self.outputs if one.finish_reason}


@pytest.fixture
def world():
    made = World(3, step_s=0.0)
    for at in range(3):
        made.hold(at)
    yield made
    for engine in made.engines:
        engine.gate.set()
    made.replicas.stop(10.0)


def test_requests_go_where_the_fewest_are_and_all_are_answered(world):
    assert isinstance(world.replicas, EngineLike)
    places = [world.submit(f"r{number}") for number in range(7)]
    assert [places.count(at) for at in range(3)] == [3, 2, 2]
    assert world.replicas.stats().num_running == 7
    for engine in world.engines:
        engine.gate.set()
    world.until(lambda: len(world.ended()) == 7)
    assert set(world.ended().values()) == {FinishReason.LENGTH}


def test_a_beginning_that_a_replica_has_seen_goes_there_again_unless_that_one_is_busy(world):
    shared = tuple(range(10, 18))
    home = world.submit("first", shared)
    assert [world.submit(f"other{n}", (n + 1,)) for n in range(2)] == [1, 2]
    assert world.submit("second", (*shared, 1)) == home
    assert world.submit("third", (*shared, 2)) == home
    assert world.submit("fourth", (*shared, 3)) != home  # it has SLACK more than others by now
    assert world.submit("short", shared[:2]) != home


def test_a_full_replica_is_passed_over_and_only_when_all_are_full_a_request_is_refused():
    world = World(2, step_s=0.0, max_live=2)
    for at in range(2):
        world.hold(at)
    for number in range(4):
        world.replicas.check_room()
        world.submit(f"r{number}")
    with pytest.raises(QueueFull):
        world.replicas.check_room()
    with pytest.raises(QueueFull):
        world.replicas.submit(tiny.make_request("one more", (1,)))
    world.engines[1].gate.set()
    world.until(lambda: len(world.ended()) == 2)
    assert world.submit("after all") == 1
    world.engines[0].gate.set()
    assert world.replicas.stop(10.0)


def test_an_id_is_taken_on_all_of_them_and_free_once_its_request_has_ended(world):
    world.submit("same")
    with pytest.raises(DuplicateRequest):
        world.replicas.submit(tiny.make_request("same", (1,)))
    world.replicas.cancel("same")
    world.replicas.cancel("nobody")
    for engine in world.engines:
        engine.gate.set()
    world.until(lambda: world.ended() == {"same": FinishReason.CANCELLED})
    world.submit("same")


def test_one_that_hangs_is_seen_though_the_others_go_on(world):
    now_s = [0.0]
    watch = Watch(5.0, clock=lambda: now_s[0])
    for engine in world.engines[1:]:
        engine.gate.set()
    hung = world.submit("hung", max_tokens=10**6)
    assert hung == 0
    for look in range(100):
        name = f"quick{look}"
        world.submit(name)
        world.until(lambda name=name: name in world.ended())
        now_s[0] += 0.1
        watch.look(world.replicas.pulse)
    assert watch.is_stalled
    world.engines[0].gate.set()
    world.until(lambda: world.engines[0].pulse.num_steps > 3)
    watch.look(world.replicas.pulse)
    assert not watch.is_stalled


def test_the_end_of_one_is_the_end_of_all_and_told_once(world):
    for engine in world.engines:
        engine.gate.set()
    world.engines[1].crash(RuntimeError("broken"))
    world.until(lambda: world.ends)
    assert not world.replicas.alive and str(world.ends[0]) == "broken"
    with pytest.raises(Draining):
        world.replicas.ask(lambda engine: engine.flush_prefix_cache())
    assert world.replicas.stop(10.0) and len(world.ends) == 1
    with pytest.raises(Draining):
        world.replicas.ask(lambda engine: engine.flush_prefix_cache())


def test_draining_and_questions_reach_all_of_them(world):
    for engine in world.engines:
        engine.gate.set()
    assert world.replicas.ask(lambda engine: engine.flush_prefix_cache()).result(10) == 9
    assert [engine.num_flushed for engine in world.engines] == [1, 1, 1]
    assert world.replicas.ask(lambda engine: engine.rotate_journal()).result(10) is None
    world.replicas.refuse()
    with pytest.raises(Draining):
        world.replicas.submit(tiny.make_request("late", (1,)))
    world.replicas.accept()
    world.submit("again")


def test_the_rule_batch_cuts_a_mesh_into_those_of_its_replicas():
    rules = (("heads", "X"), ("kv_heads", "X"))
    both = MeshConfig((2, 4), ("Y", "X"), (("batch", "Y"), *rules))
    assert sharding.replicas(both) == (
        MeshConfig((4,), ("X",), rules, 0),
        MeshConfig((4,), ("X",), rules, 4),
    )
    inner = MeshConfig((4, 2), ("X", "Y"), (*rules, ("batch", "Y")), 1)
    assert [mesh.first_device for mesh in sharding.replicas(inner)] == [1, 5]
    alone = MeshConfig((3,), ("Y",), (("batch", "Y"),))
    assert sharding.replicas(alone) == tuple(
        MeshConfig((1,), ("X",), (), first) for first in range(3)
    )
    tensor = MeshConfig((4,), ("X",), rules)
    assert sharding.replicas(tensor) == (tensor,)
    assert sharding.is_plain(MeshConfig()) and not sharding.is_plain(sharding.replicas(alone)[1])


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (MeshConfig((2,), ("Y",), (("batch", "Z"),)), "'batch' along 'Z'"),
        (MeshConfig((2,), ("Y",), (("batch", "Y"), ("ffw", "Y"))), "for itself"),
        (MeshConfig((2, 2), ("Y",), (("batch", "Y"),)), "differ in length"),
    ],
)
def test_a_rule_that_can_not_be_cut_is_refused(mesh, words):
    with pytest.raises(ConfigError, match=words):
        sharding.replicas(mesh)


def test_what_one_engine_can_not_be_says_so():
    mesh = MeshConfig((2,), ("Y",), (("batch", "Y"),))
    with pytest.raises(ConfigError, match="`serve` takes replicas"):
        sharding.fit(tiny.MODEL, mesh)
    with pytest.raises(ConfigError, match="devices from number 7 on; 1 are here"):
        sharding.make_mesh(MeshConfig((2,), ("X",), (("ffw", "X"),), 7))


def test_each_keeps_what_it_keeps_under_its_own_number():
    assert [numbered("kept/journal", at, 2) for at in range(2)] == [
        "kept/journal-0",
        "kept/journal-1",
    ]
    assert numbered("kept/journal", 0, 1) == "kept/journal" and numbered("", 1, 2) == ""
