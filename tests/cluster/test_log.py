"""The log of steps: what one engine takes in makes another one do the same, bit for bit."""

import json
from dataclasses import replace

import pytest

from jaxinfer.cluster import messages
from jaxinfer.cluster.follower import Replica
from jaxinfer.cluster.log import Led, Ledger, digest_of
from jaxinfer.engine import Engine
from jaxinfer.errors import EngineFailed
from jaxinfer.host.journal import Memory, Recorder
from jaxinfer.host.request import FinishReason, Limits, Output, SamplingParams, Timings
from jaxinfer.replay import Conditions
from jaxinfer.text.assets import TextAssets
from tests import tiny

REQUESTS = tiny.random_requests(10, seed=3, max_prompt=80, max_tokens=24)


def follower_of(ledger, problems):
    conditions = Conditions()
    config = tiny.engine_config()
    engine = Engine(
        tiny.params(),
        tiny.MODEL,
        tiny.TokenText(),
        config,
        clock=conditions.clock,
        store=tiny.store(),
    )
    return Replica(engine, conditions, told(ledger, 1, problems))


def told(ledger, rank, problems):
    return lambda step, digest: problems.extend(filter(None, [ledger.add(rank, step, digest)]))


def run_both(leader, *, spoil=lambda message: message, journal=None):
    """Everything that a group does, in one process: returns problems, outputs and the ledger."""
    ledger, problems, outputs = Ledger(2), [], []
    replica = follower_of(ledger, problems)

    def send(message):
        kind, inputs = wire_copy(spoil(message))
        assert kind == "step"
        replica.step(inputs)

    leader.journal = Led(told(ledger, 0, problems), send, journal=journal)
    for number, request in enumerate(REQUESTS):
        leader.submit(request)
        outputs += leader.step()
        if number == 4:
            leader.cancel(REQUESTS[2].request_id)
        if number == 6:
            leader.flush_prefix_cache()
            leader.submit(replace(REQUESTS[0], request_id="late", deadline_s=0.0))
    while leader.has_work:
        outputs += leader.step()
    return problems, outputs, ledger


def wire_copy(message):
    return json.loads(json.dumps(message))


def test_a_follower_does_what_the_leader_does_and_checksums_say_so():
    leader, memory = tiny.make_engine(), Memory()
    problems, outputs, ledger = run_both(leader, journal=Recorder(memory))
    assert problems == []
    assert ledger.num_compared == len(memory.records) >= leader.stats().num_steps > 20
    ends = {one.request_id: one.finish_reason for one in outputs if one.finish_reason}
    assert ends[REQUESTS[2].request_id] is FinishReason.CANCELLED
    assert ends["late"] is FinishReason.DEADLINE
    assert len(ends) == len(REQUESTS) + 1
    assert [one["step"] for one in memory.records] == list(range(len(memory.records)))


def test_a_follower_that_took_something_else_is_found_at_once():
    def spoil(message):
        inputs = wire_copy(message[1])
        for event in inputs.get("events", ()):
            if event[0] == "submit" and event[2]["request_id"] == REQUESTS[3].request_id:
                event[2]["prompt"][0] ^= 1
        return ["step", inputs]

    problems, _, _ = run_both(tiny.make_engine(), spoil=spoil)
    assert "came out otherwise in rank 1 than in rank 0" in problems[0]


def test_the_checksum_leaves_out_what_came_in_and_nothing_else():
    record = {"step": 3, "now": 1.0, "pace": [1], "events": [], "plan": {}, "got": [[2, [5], 9]]}
    assert digest_of(record) == digest_of(record | {"now": 2.0, "events": [["flush"]]})
    for changed in ({"step": 4}, {"plan": {"admit": []}}, {"got": [[2, [5], 8]]}, {"batch": 1}):
        assert digest_of(record) != digest_of(record | changed)


def test_the_ledger_names_the_ranks_that_differ():
    ledger = Ledger(4)
    for rank, digest in ((0, "a"), (2, "b"), (1, "a")):
        assert ledger.add(rank, 7, digest) == ""
    assert ledger.add(3, 7, "b").startswith("step 7 came out otherwise in rank 2, 3 than in rank 0")
    assert ledger.num_compared == 1


def test_a_failed_step_has_no_way_back_in_a_group():
    recorder = Led(lambda step, digest: None, lambda message: None)
    with pytest.raises(EngineFailed, match="its group starts again"):
        recorder.failed("read")


def test_what_an_engine_tells_its_server_survives_the_wire():
    output = Output(
        "r1",
        (5, 81),
        (-0.1234567, -2.5e-8),
        "é🙂",
        FinishReason.STOP_TOKEN,
        stop=81,
        error="",
        num_prompt_tokens=3,
        num_output_tokens=2,
        timings=Timings(1.5, 2.5, None, 3.5),
    )
    for one in (output, replace(output, finish_reason=None, stop="end", token_ids=())):
        assert messages.output_from_plain(wire_copy(messages.output_to_plain(one))) == one
    stats = tiny.make_engine().stats()
    assert messages.stats_from_plain(wire_copy(messages.stats_to_plain(stats))) == stats
    told = (
        tiny.MODEL,
        Limits(256, 64, (0,)),
        SamplingParams(temperature=0.5, stop=("a", "b")),
        TextAssets(tokenizer_json="{}", chat_template="x"),
    )
    assert messages.model_from_plain(wire_copy(messages.model_to_plain(*told))) == told
