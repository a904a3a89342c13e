"""The engine as a server sees it, while its processes come and go."""

import threading

import pytest

from jaxinfer.cluster import messages
from jaxinfer.cluster.remote import RemoteEngine
from jaxinfer.errors import (
    Draining,
    DuplicateRequest,
    EngineFailed,
    InvalidRequest,
    PeerLost,
    QueueFull,
)
from jaxinfer.host.request import EngineStats, FinishReason, Limits, Output
from jaxinfer.server.served import EngineLike
from jaxinfer.server.timeline import StepCounts
from tests.tiny import make_request

STATS = EngineStats(2, *[0] * 12, 0.0, 0.0, 0.0)
WAIT_S = 30.0


class Front:
    """A remote engine, what it has sent, and what its server was told."""

    def __init__(self, **changes):
        self.sent, self.outputs, self.serving = [], [], []
        self.is_there = True
        given = {"num_slots": 2, "max_waiting": 2, "counts": StepCounts(), "stats": STATS} | changes
        self.engine = RemoteEngine(self.outputs.extend, self.send, limits=Limits(256, 64), **given)
        self.engine.serving = self.serving.append

    def send(self, message):
        if not self.is_there:
            raise PeerLost("gone")
        self.sent.append(message)

    def submit(self, *names):
        for name in names:
            self.engine.submit(make_request(name, [1, 2, 3]))

    def lose(self):
        self.is_there = False
        self.engine.hear(["over", "rank 1 is gone"])

    def back(self):
        self.is_there = True
        self.engine.hear(["ready", {"stats": messages.stats_to_plain(STATS)}])


def output(name, reason=None):
    return Output(name, (5,), (-0.5,), "x", reason)


def give(front, *outputs):
    front.engine.hear(["outputs", [messages.output_to_plain(one) for one in outputs]])


def test_it_is_what_a_server_needs():
    assert isinstance(Front().engine, EngineLike)


def test_requests_go_out_and_outputs_come_back():
    front = Front()
    front.submit("a")
    assert front.sent[0][0] == "submit" and front.sent[0][1]["request_id"] == "a"
    give(front, output("a"), output("stranger"))
    assert [one.request_id for one in front.outputs] == ["a"]
    assert front.engine.pulse.has_work
    give(front, output("a", FinishReason.LENGTH))
    assert not front.engine.pulse.has_work
    front.submit("a")  # its id is free again
    front.engine.cancel("a")
    assert front.sent[-1] == ["cancel", "a"]


def test_what_no_engine_would_take_is_refused_here():
    front = Front()
    with pytest.raises(InvalidRequest):
        front.engine.submit(make_request("long", [1] * 64))
    front.submit("a")
    with pytest.raises(DuplicateRequest):
        front.submit("a")
    front.submit("b", "c", "d")
    with pytest.raises(QueueFull, match="engine.max_waiting"):
        front.submit("e")
    front.engine.refuse()
    with pytest.raises(Draining):
        front.engine.check_room()
    assert len(front.sent) == 4


def test_a_lost_group_ends_what_is_live_and_refuses_until_it_is_back():
    front = Front()
    front.submit("a", "b")
    front.lose()
    assert front.serving == [False] and not front.engine.is_up and front.engine.alive
    ends = [(one.request_id, one.finish_reason) for one in front.outputs]
    assert ends == [("a", FinishReason.CANCELLED), ("b", FinishReason.CANCELLED)]
    assert "start again" in front.outputs[0].error
    with pytest.raises(Draining, match="start again") as refused:
        front.submit("c")
    assert refused.value.retry_after_s > 1
    front.engine.cancel("a")  # nobody is there to hear it, and nothing comes of it
    front.back()
    assert front.serving == [False, True]
    front.submit("a")
    assert front.sent[-1][1]["request_id"] == "a"
    give(front, output("b"))  # an answer of the start before is nobody's
    assert len(front.outputs) == 2


def test_a_request_that_meets_a_group_on_its_way_out_is_refused_and_forgotten():
    front = Front()
    front.is_there = False
    with pytest.raises(Draining):
        front.submit("a")
    assert not front.engine.pulse.has_work


def test_a_request_that_the_leader_refuses_ends_as_one_to_ask_again():
    front = Front()
    front.submit("a")
    front.engine.hear(["refused", "a", "256 requests are waiting"])
    (end,) = front.outputs
    assert end.finish_reason is FinishReason.CANCELLED and end.error == "256 requests are waiting"


def test_counts_are_the_leaders():
    counts = StepCounts()
    front = Front(counts=counts)
    stats = messages.stats_to_plain(STATS)
    front.engine.hear(["pulse", 7, [9, *stats[1:]], {"num_steps": 7, "gap_s": 0.5}])
    assert front.engine.pulse.num_steps == 7 and front.engine.stats().num_slots == 9
    assert (counts.num_steps, counts.gap_s) == (7, 0.5)


def answered(front, function, *answers):
    """What an asker gets where the leader gives these answers."""
    future = front.engine.ask(function)
    for found, why in answers:
        while not (asks := [one for one in front.sent if one[0] == "ask"]):
            threading.Event().wait(0.001)
        front.sent.remove(asks[0])
        front.engine.hear(["answer", asks[0][1], found, why])
    return future.result(WAIT_S)


def test_operators_and_scores_ask_by_name():
    front = Front()
    assert answered(front, lambda engine: engine.flush_prefix_cache(), (3, "")) == 3
    assert answered(front, lambda engine: engine.rotate_journal(), (None, "")) is None
    assert answered(front, lambda engine: engine.scorer, (0, "")) is None
    part = answered(
        front,
        lambda engine: engine.scorer.part([1, 2, 3], 0),
        (16, ""),
        ([[-0.5, -1.5], [True, False]], ""),
    )
    assert part.logprobs.tolist() == [-0.5, -1.5] and part.is_likeliest.tolist() == [True, False]
    with pytest.raises(EngineFailed, match="the device failed"):
        answered(front, lambda engine: engine.flush_prefix_cache(), (None, "the device failed"))


def test_who_asks_a_group_that_goes_away_is_told():
    front = Front()
    future = front.engine.ask(lambda engine: engine.flush_prefix_cache())
    while not front.sent:
        threading.Event().wait(0.001)
    front.lose()
    with pytest.raises(Draining):
        future.result(WAIT_S)
    with pytest.raises(Draining):
        front.engine.ask(lambda engine: engine.flush_prefix_cache())
    assert front.engine.explain("a") == []


def test_a_group_that_is_given_up_is_the_end_of_the_engine():
    front, ended = Front(), []
    front.engine.start(ended.append)
    front.submit("a")
    front.engine.end(EngineFailed("5 starts in a row failed"))
    assert str(ended[0]) == "5 starts in a row failed"
    assert front.outputs[-1].finish_reason is FinishReason.CANCELLED
    assert front.engine.stop(1.0)


def test_only_a_group_that_a_server_still_wants_is_said_to_be_lost(caplog):
    front = Front()
    front.lose()
    assert "the group is lost: rank 1 is gone" in caplog.text
    front.back()
    caplog.clear()
    front.engine.stop()
    front.lose()
    assert not caplog.records and front.serving == [False, True, False]
