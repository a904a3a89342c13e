"""The engine's thread: nobody hangs, whatever the engine does."""

import threading
import time

import pytest

from jaxinfer.errors import Draining, InvalidRequest, QueueFull
from jaxinfer.host.request import EngineStats, FinishReason, Limits, Output
from jaxinfer.runner import EngineThread
from tests import tiny


class FakeEngine:
    """Gives each live request one token a step, for three steps."""

    limits = Limits(vocab_size=256, max_seq_len=64)
    max_waiting = 4

    def __init__(self, *, fails_at=None):
        self.live = {}
        self.ended = []
        self.steps = 0
        self.fails_at = fails_at
        self.gate = threading.Event()
        self.gate.set()

    has_work = property(lambda self: bool(self.live or self.ended))
    num_waiting = property(lambda self: len(self.live))

    def submit(self, request):
        self.live[request.request_id] = 0

    def cancel(self, name):
        if self.live.pop(name, None) is not None:
            self.ended.append(Output(name, (), (), "", FinishReason.CANCELLED))

    def step(self, *, tell):
        self.gate.wait(10)
        self.steps += 1
        if self.steps == self.fails_at:
            raise RuntimeError("planted")
        outputs, self.ended = self.ended, []
        for name in list(self.live):
            self.live[name] += 1
            ended = FinishReason.LENGTH if self.live[name] == 3 else None
            outputs.append(Output(name, (7,), (0.0,), "x", ended))
            if ended:
                del self.live[name]
        return outputs

    def stats(self):
        return EngineStats(*[0] * 13, 0.0, 0.0, 0.0)


@pytest.fixture
def started():
    threads = []

    def start(engine):
        outputs = []
        thread = EngineThread(engine, outputs.append)
        thread.start()
        threads.append(thread)
        return thread, outputs

    yield start
    for thread in threads:
        thread.stop()
        assert not thread.alive


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited 5 s in vain")


def ends(batches):
    return {
        one.request_id: one.finish_reason for batch in batches for one in batch if one.finish_reason
    }


def test_delivers_once_a_step_and_sleeps_without_work(started):
    engine = FakeEngine()
    thread, batches = started(engine)
    thread.submit(tiny.make_request("a", [1]))
    wait_for(lambda: "a" in ends(batches))
    assert [len(batch) for batch in batches] == [1, 1, 1]
    steps = engine.steps
    time.sleep(0.05)
    assert engine.steps == steps


def test_refuses_bad_duplicate_and_too_many_requests(started):
    engine = FakeEngine()
    engine.gate.clear()
    thread, batches = started(engine)
    with pytest.raises(InvalidRequest):
        thread.submit(tiny.make_request("empty", []))
    thread.submit(tiny.make_request("a", [1]))
    with pytest.raises(InvalidRequest, match="in use"):
        thread.submit(tiny.make_request("a", [1]))
    with pytest.raises(QueueFull, match="max_waiting"):
        for number in range(9):
            thread.submit(tiny.make_request(f"q{number}", [1]))
    engine.gate.set()
    wait_for(lambda: len(ends(batches)) == 4)


def test_drain_finishes_what_runs_and_takes_nothing_new(started):
    thread, batches = started(FakeEngine())
    thread.submit(tiny.make_request("a", [1]))
    assert thread.drain(5.0)
    assert ends(batches) == {"a": FinishReason.LENGTH}
    with pytest.raises(Draining):
        thread.submit(tiny.make_request("b", [1]))


def test_drain_gives_up_after_its_time(started):
    engine = FakeEngine()
    engine.gate.clear()
    thread, batches = started(engine)
    thread.submit(tiny.make_request("a", [1]))
    assert not thread.drain(0.05)
    engine.gate.set()
    wait_for(lambda: "a" in ends(batches))


def test_stop_cancels_what_is_left(started):
    engine = FakeEngine()
    engine.gate.clear()
    thread, batches = started(engine)
    thread.submit(tiny.make_request("a", [1]))
    threading.Timer(0.05, engine.gate.set).start()
    thread.stop()
    assert ends(batches) in ({"a": FinishReason.CANCELLED}, {"a": FinishReason.LENGTH})


def test_an_engine_that_dies_ends_every_request(started):
    thread, batches = started(FakeEngine(fails_at=2))
    thread.submit(tiny.make_request("a", [1]))
    wait_for(lambda: not thread.alive)
    assert ends(batches) == {"a": FinishReason.ERROR}
    assert "planted" not in batches[-1][0].error
    with pytest.raises(Draining):
        thread.submit(tiny.make_request("b", [1]))


def test_what_is_asked_runs_between_steps_on_the_engines_thread(started):
    engine = FakeEngine()
    thread, batches = started(engine)
    seen = thread.ask(lambda asked: (asked, asked.steps, threading.current_thread().name))
    assert seen.result(5) == (engine, 0, "engine")
    wait_for(lambda: engine.steps == 1)  # a step follows, also without work
    with pytest.raises(ZeroDivisionError):
        thread.ask(lambda asked: 1 / 0).result(5)
    thread.submit(tiny.make_request("a", [1]))
    wait_for(lambda: ends(batches) == {"a": FinishReason.LENGTH})


def test_what_is_asked_too_late_is_refused_and_never_hangs(started):
    engine = FakeEngine()
    engine.gate.clear()
    thread, _ = started(engine)
    thread.submit(tiny.make_request("a", [1]))
    wait_for(lambda: thread.pulse == (0, True) and not thread._inbox)
    late = thread.ask(lambda asked: 1)
    given_up = thread.ask(lambda asked: 2)
    assert given_up.cancel()
    threading.Timer(0.05, engine.gate.set).start()
    thread.stop()
    assert isinstance(late.exception(5), Draining) or late.result() == 1
    with pytest.raises(Draining):
        thread.ask(lambda asked: 3)


def test_the_pulse_counts_steps_and_knows_of_work(started):
    engine = FakeEngine()
    thread, batches = started(engine)
    assert thread.pulse == (0, False)
    thread.submit(tiny.make_request("a", [1]))
    wait_for(lambda: thread.pulse == (3, False))
    engine.gate.clear()
    thread.submit(tiny.make_request("b", [1]))
    assert thread.pulse == (3, True)
    engine.gate.set()
    wait_for(lambda: thread.pulse == (6, False))


def test_its_end_is_told_before_any_client_hears_of_it():
    told = []
    thread = EngineThread(FakeEngine(fails_at=2), told.append)
    thread.start(told.append)
    thread.submit(tiny.make_request("a", [1]))
    wait_for(lambda: not thread.alive)
    assert isinstance(told[1], RuntimeError) and str(told[1]) == "planted"
    assert ends([told[0], told[2]]) == {"a": FinishReason.ERROR}


def test_it_accepts_again_after_a_refusal(started):
    thread, batches = started(FakeEngine())
    thread.refuse()
    with pytest.raises(Draining):
        thread.submit(tiny.make_request("a", [1]))
    thread.accept()
    thread.submit(tiny.make_request("a", [1]))
    wait_for(lambda: ends(batches) == {"a": FinishReason.LENGTH})


def test_a_stop_that_takes_too_long_says_so(started):
    engine = FakeEngine()
    engine.gate.clear()
    thread, _ = started(engine)
    thread.submit(tiny.make_request("a", [1]))
    wait_for(lambda: not thread._inbox)
    assert not thread.stop(0.05)
    engine.gate.set()
    assert thread.stop(5.0)
